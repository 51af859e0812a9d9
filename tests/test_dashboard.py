"""`overnight ui --optuna`: the dashboard on the home's studies, or one line that says why not."""

from __future__ import annotations

import json
import sys
import urllib.request
from importlib.util import find_spec

import pytest

from overnight import dashboard
from overnight.cli import run
from overnight.config import Domain, Search
from overnight.home import Home
from overnight.search.study import Study


def test_without_the_package(monkeypatch, tmp_path, capsys):
    """Exit 2, and one line that says what to install; nothing is started, nothing written."""
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(dashboard, "find_spec", lambda name: None)
    assert run(["ui", "--optuna"]) == 2
    assert capsys.readouterr().err == (
        "--optuna: needs the package optuna-dashboard: pip install 'overnight[dashboard]', got not installed\n"
    )
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("storage", ["", "sqlite:///{}/studies.db"])
def test_before_the_first_night(monkeypatch, tmp_path, capsys, storage):
    """No study yet: exit 2 and one line, and no empty file that a later night would stumble over."""
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OVERNIGHT_STUDY_STORAGE", storage.format(tmp_path))
    monkeypatch.setattr(dashboard, "find_spec", lambda name: object())
    assert run(["ui", "--optuna"]) == 2
    said = capsys.readouterr().err
    assert "there is no study yet" in said and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("optuna_dashboard") is None, reason="optuna-dashboard is not installed")
def test_the_studies_are_served(tmp_path):
    """The real dashboard lists the home's studies, on this machine alone, and ends with its block."""
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    space = {"learning_rate": Domain(low=1e-4, high=1e-2, log=True)}
    study = Study(home.study_storage, "night-1", "m", Search(trials=2, space=space), 4, "maximize")
    study.tell(study.ask().number, "finished", 0.5)
    with dashboard.dashboard_server(home) as address:
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{address}/api/studies", timeout=20) as answer:
            assert [s["study_name"] for s in json.load(answer)["study_summaries"]] == ["night-1"]
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{address}/api/studies", timeout=5)
    assert not (home.root / "optuna" / "server.json").exists() and "optuna_dashboard" not in sys.modules
