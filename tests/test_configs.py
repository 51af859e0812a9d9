"""Every config that is shipped goes through the real loader."""

from __future__ import annotations

from pathlib import Path

import pytest

from overnight.cli import run
from overnight.config import load_config
from overnight.problems import roles

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.y*ml"))


def test_there_are_configs():
    """An empty list would pass every other test of this file."""
    assert {path.stem for path in CONFIGS} >= {"sentiment", "sentiment-full", "topics"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config(path):
    """It loads, and bears the name of its file, under which a user looks for the model."""
    config = load_config(path, problems=roles())
    assert config.name == path.stem
    assert config.description


def test_names_differ():
    """Two configs of one name would fight for one registered model."""
    names = [load_config(path).name for path in CONFIGS]
    assert len(names) == len(set(names))


def test_starter_config(tmp_path, capsys):
    """`overnight config init` writes a config that loads; a second time it overwrites nothing."""
    out = tmp_path / "my-model.yaml"
    assert run(["config", "init", "--out", str(out)]) == 0
    text = out.read_text()
    assert load_config(out, problems=roles()).name == "my-model"
    assert run(["config", "init"]) == 0
    assert capsys.readouterr().out.endswith(text)
    assert run(["config", "init", "--out", str(out)]) == 2
    assert out.read_text() == text


def test_what_the_starter_leaves_commented_is_right_too(tmp_path):
    """The keys behind a # are there to be uncommented: with them it loads as well."""
    out = tmp_path / "my-model.yaml"
    assert run(["config", "init", "--out", str(out)]) == 0
    lines = [
        line.replace("# ", "", 1) if line.lstrip().startswith("# ") and line.startswith(" ") else line
        for line in out.read_text().splitlines()
    ]
    assert sum("# sample:" in line for line in lines) == 0
    out.write_text("\n".join(lines))
    config = load_config(out, problems=roles())
    assert config.data.sample and config.validation.expect.labels.known and config.validation.expect.language.expected
