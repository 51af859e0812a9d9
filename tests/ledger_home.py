"""A home with four versions and no champion, for the tests of the ledger."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from overnight.home import Home
from overnight.tracking import ledger, registry, runs, store

NAME = "sentiment"
VERSIONS = 4


def fine(folder: Path) -> None:
    """A smoke test that the version passes."""
    assert (folder / "model.safetensors").is_file()


def broken(folder: Path) -> None:
    raise ValueError("scores are not a number")


@pytest.fixture(scope="module")
def four_versions(tmp_path_factory, empty_store) -> Path:
    """The root of a home with four finished versions and no champion."""
    root = tmp_path_factory.mktemp("four") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    run_id = runs.open_night(home, store.experiment(home, NAME), "night-1")
    for number in range(1, VERSIONS + 1):
        folder = tmp_path_factory.mktemp("model")
        (folder / "model.safetensors").write_bytes(bytes([number]) * 100)  # the ledger never looks inside
        facts = {"inputs": ("text",), "example": {"text": ["a"]}, "tags": {}, "metrics": {"macro_f1": 0.5}}
        assert registry.register(home, NAME, folder, run_id=run_id, **facts).number == number
    return root


@pytest.fixture
def home(four_versions, tmp_path) -> Home:
    shutil.copytree(four_versions, tmp_path / "home")
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})


def champion(home: Home) -> int | None:
    found = registry.champion(home, NAME)
    return found.number if found else None


def moves(home: Home) -> list[tuple]:
    return [(e.action, e.from_version, e.to_version) for e in ledger.read(home, NAME)]
