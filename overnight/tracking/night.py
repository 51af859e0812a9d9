"""The night's own run in MLflow: opened when first needed, completed from the night's record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overnight.home import Home
from overnight.tracking.runs import DatasetUsed, close_night, log_night, open_night
from overnight.tracking.store import experiment

REPORT, DOCS = "report", "data_docs"
"""Folders among the artifacts of a night's run."""
STATUS = {"promoted": "FINISHED", "kept": "FINISHED", "waiting": "FINISHED", "refused": "FAILED", "failed": "FAILED"}


def night_run(home: Home, model: str, night: str) -> tuple[str, str]:
    """Experiment id and run id of a night; made on the first call, found on every later one."""
    experiment_id = experiment(home, model)
    return experiment_id, open_night(home, experiment_id, night)


def finish_night(home: Home, record: Mapping[str, Any], note: str, artifacts: Mapping[Path, str]) -> tuple[str, str]:
    """Writes what the night learnt to its run, with `note` as its description, and closes it.

    Returns:
        Experiment id and run id.

    Raises:
        TrackingUnavailable: when MLflow does not answer; the next night's reconcile closes the run then.
    """
    experiment_id, run_id = night_run(home, str(record["model"]), str(record["id"]))
    state = str(record["state"])
    metrics = {f"seconds/{name}": value for name, value in record.get("stages", {}).items()}
    candidate = record.get("candidate") or {}
    evaluation = candidate.get("evaluation") or {}
    for name, metric in evaluation.get("metrics", {}).items():
        metrics |= {f"test/{name}{end}": metric[key] for key, end in _ENDS.items() if metric[key] is not None}
    tags = {
        "overnight.state": state,
        "overnight.why": record.get("why"),
        "overnight.fingerprint": record["fingerprint"],
        "overnight.config_hash": record["config_hash"],
        "overnight.version": candidate.get("version"),
        "overnight.best_trial": candidate.get("trial"),
        "mlflow.note.content": note,
    }
    known = {key: value for key, value in tags.items() if value is not None}
    files = {str(path): folder for path, folder in artifacts.items() if path.exists()}
    log_night(home, run_id, metrics=metrics, tags=known, artifacts=files, datasets=_datasets(record))
    close_night(home, run_id, STATUS.get(state, "KILLED"))
    return experiment_id, run_id


def pages_of(experiment_id: str, run_id: str) -> dict[str, str]:
    """Name → address of a night's run and of what it leaves there, as links that work on MLflow's own pages."""
    run = f"#/experiments/{experiment_id}/runs/{run_id}"
    paths = {"run": "", "report": f"/artifacts/{REPORT}/report.html", "docs": f"/artifacts/{DOCS}/index.html"}
    return {name: f"{run}{path}?workflowType=machine_learning" for name, path in paths.items()}


def retell_night(home: Home, record: Mapping[str, Any], note: str, artifacts: Mapping[Path, str]) -> None:
    """Writes how a night's question was answered to its run, which is closed already.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    _, run_id = night_run(home, str(record["model"]), str(record["id"]))
    tags = {"overnight.state": record["state"], "overnight.why": record["why"], "mlflow.note.content": note}
    files = {str(path): folder for path, folder in artifacts.items() if path.exists()}
    log_night(home, run_id, tags=tags, artifacts=files)
    close_night(home, run_id, STATUS[str(record["state"])])


_ENDS = {"value": "", "low": "/low", "high": "/high"}


def _datasets(record: Mapping[str, Any]) -> list[DatasetUsed]:
    data = record.get("data", {})
    sides = data.get("split", {})
    return [
        DatasetUsed(str(record["model"]), str(record["fingerprint"]), data["source"], side, sides[side])
        for side in ("train", "validation", "test")
        if side in sides
    ]
