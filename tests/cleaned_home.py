"""A home with eight nights behind it, for the tests of cleaning."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from overnight.config import Config, Search
from overnight.home import Home, write_json
from overnight.nights import begin_night, night_records
from overnight.search.studies import old_studies
from overnight.search.study import Study
from overnight.tracking import ledger, registry, runs, store
from overnight.tracking.night import night_run

NAME = "tiny"
CONFIG = Config.model_validate({"name": NAME, "model": {"base": "b"}, "data": {"source": "s"}})
SEARCH = Search.model_validate({"trials": 2, "space": {"learning_rate": {"low": 1e-5, "high": 1e-3}}})


def make_night(home: Home, number: int, *, state: str = "kept", version: bool = True) -> str:
    """What a night leaves behind, without its hours: folder, rows, tokens, study, runs, a version."""
    night = begin_night(home, CONFIG, f"{number:016d}" + "0" * 48, forced=True)
    facts = {"started": 1000.0 * number, "state": state, "flow_runs": [f"00000000-0000-0000-0000-{number:012d}"]}
    night.update(**facts, lineage={"config": "tiny.yaml"})
    rows = home.data / NAME / night.record["fingerprint"][:16]
    tokens = home.data / NAME / "tokens" / f"{number:032d}"
    for folder in (rows, tokens, night.folder / "rows", night.folder / "data_docs"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(os.urandom(20_000))
    (night.folder / "clean.parquet").write_bytes(os.urandom(20_000))
    (night.folder / "report.html").write_text("the report")
    study = Study(home.study_storage, night.id, NAME, SEARCH, 1, "maximize")
    experiment, run_id = night_run(home, NAME, night.id)
    for trial in range(2):
        study.tell(study.ask().number, "finished", 0.5 + trial / 10 + number / 100)
        folder = night.folder / "trials" / f"{trial:04d}"
        job = {"train": str(tokens), "validation": str(tokens)}
        write_json(folder / "params.json", {"number": trial, "night": night.id, "study": night.id, "job": job})
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "log", "step": 1, "time": 1.0, "loss": 2.0}) + "\n")
        write_json(folder / "result.json", {"state": "finished", "value": 0.5})
        assert runs.sync_trial(home, experiment, run_id, folder)
    runs.log_night(home, run_id, tags={"overnight.state": state}, artifacts={night.folder / "report.html": "report"})
    if version:
        model = night.folder / "trials" / "0001" / "best"
        model.mkdir()
        (model / registry.WEIGHTS).write_bytes(os.urandom(100_000))
        facts = {"inputs": ("text",), "example": {"text": ["a"]}, "metrics": {"macro_f1": 0.5}}
        made = registry.register(home, NAME, model, run_id=run_id, tags={runs.NIGHT: night.id}, **facts)
        registry.set_alias(home, NAME, registry.CANDIDATE, made.number)
    runs.close_night(home, run_id, "FINISHED")
    return night.id


@pytest.fixture(scope="module")
def eight_nights(tmp_path_factory, empty_store) -> Path:
    """The root of a home with eight nights and versions 1 to 7: 2 was and 3 is champion; the fifth was refused."""
    root = tmp_path_factory.mktemp("eight") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    for number in range(1, 9):
        make_night(home, number, state="refused" if number == 5 else "kept", version=number != 5)
        if number in (2, 3):
            ledger.promote(home, NAME, number, reason="r", smoke=lambda folder: None)
    return root


@pytest.fixture
def home(eight_nights, tmp_path) -> Home:
    """A copy whose artifacts are its own."""
    root = tmp_path / "home"
    shutil.copytree(eight_nights, root)
    columns = ["experiments.artifact_location", "runs.artifact_uri", "logged_models.artifact_location"]
    columns += ["model_versions.source", "model_versions.storage_location"]
    with closing(sqlite3.connect(root / "mlflow" / "mlflow.db")) as database:
        for table, column in (place.split(".") for place in columns):
            database.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(eight_nights), str(root)))
        database.commit()
    return Home.from_environment({"OVERNIGHT_HOME": str(root)})


def files(home: Home) -> dict[str, int]:
    """Path → size of everything under the home but locks and what SQLite writes while it is asked."""
    return {
        str(path.relative_to(home.root)): path.stat().st_size
        for path in home.root.rglob("*")
        if path.is_file()
        and not path.name.endswith((".lock", "-wal", "-shm", "-journal"))
        and "locks" not in path.parts
    }


def left(home: Home) -> dict:
    """What there is of everything that is cleaned."""
    ids = [record["id"] for record in night_records(home)]
    order = {id: number for number, id in enumerate(sorted(ids), 1)}
    mlflow = store.client(home)
    experiment = mlflow.get_experiment_by_name(NAME).experiment_id
    with closing(sqlite3.connect(home.mlflow / "mlflow.db")) as database:
        counts = {
            table: database.execute(f"select count(*) from {table}").fetchone()[0]
            for table in (
                "runs",
                "params",
                "metrics",
                "tags",
                "latest_metrics",
                "logged_models",
                "logged_model_metrics",
            )
        }
        tags = database.execute("select count(*) from model_version_tags").fetchone()[0]
    artifacts = home.mlflow / "artifacts" / NAME
    return {
        "versions": [version.number for version in registry.versions(home, NAME)],
        "nights": len(order),
        "rows": len(list((home.data / NAME).glob("0*"))),
        "tokens": len(list((home.data / NAME / "tokens").glob("0*"))),
        "trials": len(list(home.nights.glob("*/trials/*"))),
        "reports": len(list(home.nights.glob("*/report.html"))),
        "parquet": len(list(home.nights.glob("*/*.parquet"))),
        "studies": len(old_studies(home.study_storage, {NAME: ()})),
        "active runs": len(mlflow.search_runs([experiment])),
        "weights": len(list(artifacts.glob("models/*/artifacts/artifacts/model/*.safetensors"))),
        "folders of models": len(list(artifacts.glob("models/*"))),
        "folders of runs": len(list(artifacts.glob("*"))) - 1,
        "version tags": tags,
        **counts,
    }


KEPT_TWO = {
    "versions": [2, 3, 6, 7],
    "nights": 4,
    "rows": 2,
    "tokens": 2,
    "trials": 4,
    "reports": 4,
    "parquet": 2,
    "studies": 2,
    "active runs": 2 * 3 + 2,
    "runs": 2 * 3 + 2,
    "weights": 4,
    "folders of models": 4,
    "folders of runs": 4,
    "logged_models": 4,
    "logged_model_metrics": 4,
}
"""Nights 7 and 8 whole, 2 and 3 shrunk to their champions, all else gone."""


def check_kept_two(home: Home, before: dict) -> None:
    with closing(sqlite3.connect(home.mlflow / "mlflow.db")) as database:
        assert not database.execute("pragma freelist_count").fetchone()[0], "free pages went back to the disk"
    after = left(home)
    assert {name: after[name] for name in KEPT_TWO} == KEPT_TWO
    assert (
        after["params"] <= before["params"] / 2
        and after["tags"] < before["tags"]
        and after["metrics"] < before["metrics"]
    )
    deleted = 3  # of each deleted version one tag stays, the night's name
    assert after["version tags"] == before["version tags"] / 7 * 4 + deleted
    assert registry.champion(home, NAME).number == 3
    assert registry.download(home, registry.version_of(home, NAME, 2)).is_dir()
    assert registry.version_of(home, NAME, 2).run_id in {r.info.run_id for r in all_runs(home)}
    assert ledger.rollback(home, NAME, reason="r", smoke=lambda folder: None).to_version == 2


def all_runs(home: Home) -> list:
    from mlflow.entities import ViewType

    experiment = store.client(home).get_experiment_by_name(NAME).experiment_id
    return store.client(home).search_runs([experiment], run_view_type=ViewType.ALL)


class Killed(BaseException):
    pass
