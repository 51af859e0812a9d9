"""Where a version comes from: data, config, code, study, run."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "mlflow", "prefect", "optuna", "great-expectations")


def lineage_of(config_path: str) -> dict[str, Any]:
    """The config's path, the git commit it stands in (None outside of git), and the versions that matter."""
    return {
        "config": config_path,
        "commit": git_commit(Path(config_path)),
        "overnight": version("overnight"),
        **{name: version(name) for name in PACKAGES},
    }


def git_commit(path: Path) -> str | None:
    """The commit that is checked out where `path` stands, with `-dirty` when files that git knows are changed."""
    command = [
        "git",
        "-C",
        str(path.absolute().parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
        "--exclude=*",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def version_tags(record: Mapping[str, Any]) -> dict[str, Any]:
    """Tags of the model version that a night registers."""
    facts = {
        "night": record["id"],
        "study": record["id"],
        "fingerprint": record["fingerprint"],
        "config_hash": record["config_hash"],
        "commit": record["lineage"]["commit"],
        "config": record["lineage"]["config"],
        "trial": record["search"]["best"],
        "base": record["config"]["base"],
        "problem": record["config"]["problem"],
    }
    return {f"overnight.{name}": value for name, value in facts.items() if value is not None}
