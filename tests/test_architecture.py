"""The rooms of the house: who may import whom, what an import costs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "mlflow", "prefect", "optuna", "pandas", "great_expectations", "datasets", "pyarrow")


def imported(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_rules():
    """The contracts of pyproject.toml hold: flows on tasks on overnight; one package an external tool."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    "statement",
    [
        "import overnight.cli",
        "from overnight import problems; problems.roles()",
        "import overnight.config, overnight.home, overnight.nights, overnight.promotion",
        "import overnight.tracking.registry, overnight.tracking.ledger, overnight.tracking.runs",
        "import overnight.search.study, overnight.expectations, overnight.report",
        "import overnight.status, overnight.upkeep, overnight.schedule",
    ],
)
def test_the_command_line_starts_light(statement):
    """`overnight --help` must not wait for seconds of imports that it does not need."""
    assert not imported(statement) & set(HEAVY)


def test_the_check_sees_a_heavy_import():
    """The probe itself works: it would notice."""
    assert "pyarrow" in imported("import pyarrow")


def test_nothing_happens_at_import(tmp_path):
    """Importing makes no file and changes no environment variable."""
    code = (
        "import os, pkgutil, importlib, overnight.cli\n"
        "before = dict(os.environ)\n"
        "for name in 'config home nights healing lineage planning doctor services progress references'.split():\n"
        "    importlib.import_module('overnight.' + name)\n"
        "assert dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, check=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["mlflow", "docker"])
def test_folders_named_like_packages_hold_no_code(folder):
    """A Python file in mlflow/ or docker/ would stand in the way of the installed package of that name."""
    assert (ROOT / folder / "README.md").is_file()
    assert [p.name for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".pyc")] == []


def test_the_real_packages_are_found():
    """Also from the root of the repository, where folders of those names stand."""
    code = "from importlib.util import find_spec\nfor name in ('mlflow', 'docker'): print(find_spec(name).origin)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [Path(line).parts[-3:] for line in done.stdout.split()] == [
        ("site-packages", name, "__init__.py") for name in ("mlflow", "docker")
    ]
