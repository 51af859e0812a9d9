"""Backup and restore of the embedded state: whole, verified, elsewhere than it was, and never over what is in use."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from threading import Thread

import pytest

from overnight.backup import back_up
from overnight.cli import run
from overnight.errors import NightFailed, UserError
from overnight.home import Home, Stores, write_json
from overnight.nights import held, no_night, one_night_at_a_time
from overnight.restore import put_back
from overnight.tracking import ledger, registry, runs, store

NAME = "sentiment"
NIGHT = f"{NAME}-20260102-030405"
NOWHERE = Stores(None, None, None, None)


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory, empty_store, tiny_model) -> Path:
    """The root of a home as a promoted night leaves it."""
    from overnight import problems
    from overnight.settings import Training
    from overnight.training.card import Card, finish_model_folder

    root = tmp_path_factory.mktemp("lived") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    weights = tmp_path_factory.mktemp("model")
    problem, labels = problems.get("sequence-classification"), {"labels": ["bad", "good"]}
    problem.load_model(str(tiny_model), labels, Training()).save_pretrained(weights)
    finish_model_folder(weights, Card(problem.name, labels, 32, "macro_f1"), str(tiny_model))
    run_id = runs.open_night(home, store.experiment(home, NAME), NIGHT)
    facts = {"inputs": ("text",), "example": {"text": ["a"]}, "tags": {}, "metrics": {"macro_f1": 0.5}}
    registry.register(home, NAME, weights, run_id=run_id, **facts)
    runs.close_night(home, run_id, "FINISHED")
    ledger.promote(home, NAME, 1, reason="the first", smoke=lambda folder: None)
    return root


@pytest.fixture
def home(lived_in, tmp_path) -> Home:
    """A copy that is used meanwhile: by Prefect's server, whose last rows lie in the write-ahead log."""
    root = tmp_path / "home"
    shutil.copytree(lived_in, root)
    store.relocate(root / "mlflow" / "mlflow.db", lived_in, root)
    night = root / "nights" / NIGHT
    record = {"id": NIGHT, "model": NAME, "state": "promoted", "started": 1.0}
    write_json(night / "night.json", record | {"data": {"quarantine": f"{night}/quarantine.parquet", "rows": 3}})
    write_json(night / "trials" / "0000" / "params.json", {"rows": [f"{night}/rows/train.parquet", "/elsewhere/x"]})
    write_json(night / "trials" / "0000" / "tracked.json", {"closed": True})
    for cache in ("data/sentiment/rows.parquet", "smoke/result.json", "locks/gone.lock", "mlflow/server.json"):
        (root / cache).parent.mkdir(parents=True, exist_ok=True)
        (root / cache).write_text("{}")
    (root / "optuna").mkdir()
    (root / "optuna" / "studies.journal").write_text('{"op_code": 0}\n{"op_code": 1}\n{"op_co')
    (root / "prefect").mkdir()
    server = sqlite3.connect(root / "prefect" / "prefect.db")
    server.execute("pragma journal_mode=wal")
    server.execute("create table flow_run (name text)")
    server.execute("insert into flow_run values ('tonight')")
    server.commit()
    assert (root / "prefect" / "prefect.db-wal").stat().st_size
    yield Home.from_environment({"OVERNIGHT_HOME": str(root)})
    server.close()


def other(tmp_path: Path) -> Home:
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "another place" / "home")})


def test_a_home_is_restored_elsewhere(home, tmp_path):
    """Backed up while a server runs, restored to another path after the disk was lost: champion, ledger, history."""
    back_up(home, NOWHERE, tmp_path / "backup")
    shutil.rmtree(home.root)
    new = other(tmp_path)
    put_back(new, NOWHERE, tmp_path / "backup")
    champion = registry.champion(new, NAME)
    assert champion is not None and champion.number == 1
    weights = registry.download(new, champion)  # compares them with the checksum of the registration
    assert weights.is_relative_to(new.root)
    assert [entry.reason for entry in ledger.read(new, NAME)] == ["the first"]
    assert not ledger.problems(ledger.read(new, NAME))
    with closing(sqlite3.connect(new.root / "prefect" / "prefect.db")) as database:
        assert database.execute("select name from flow_run").fetchall() == [("tonight",)]
    night = new.nights / NIGHT
    assert json.loads((night / "night.json").read_text())["data"] == {
        "quarantine": f"{night}/quarantine.parquet",
        "rows": 3,
    }
    params = json.loads((night / "trials" / "0000" / "params.json").read_text())
    assert params["rows"] == [f"{night}/rows/train.parquet", "/elsewhere/x"]
    assert str(home.root).encode() not in (new.root / "mlflow" / "mlflow.db").read_bytes()
    run_id = runs.open_night(new, store.experiment(new, NAME), "the-next")  # the store goes on where it now lies
    assert store.client(new).get_run(run_id).info.artifact_uri.startswith(new.root.as_uri())


def test_the_doctor_finds_a_restored_home_healthy(home, tmp_path):
    """Nothing is broken, nothing has to be healed."""
    from overnight.doctor import examine

    back_up(home, NOWHERE, tmp_path / "backup")
    new = other(tmp_path)
    put_back(new, NOWHERE, tmp_path / "backup")
    findings = examine(new)
    assert not [f for f in findings if f.state in ("broken", "healed")]
    healthy = "champion is version 1; its weights are as registered, and it passes the smoke test"
    assert healthy in [f.found for f in findings]


def test_what_a_backup_holds(home, tmp_path):
    """State, but neither caches nor what belongs to living processes; a line being written is cut."""
    manifest = back_up(home, NOWHERE, tmp_path / "backup")
    names = set(manifest["files"])
    assert {"home/mlflow/mlflow.db", f"home/ledger/{NAME}.jsonl", f"home/nights/{NIGHT}/night.json"} <= names
    assert {name.split("/")[1] for name in names} == {"mlflow", "ledger", "nights", "optuna", "prefect"}
    assert not [name for name in names if name.endswith((".lock", "server.json", "-wal", "-shm"))]
    journal = (tmp_path / "backup" / "home" / "optuna" / "studies.journal").read_text()
    assert journal == '{"op_code": 0}\n{"op_code": 1}\n'
    on_disk = {path.relative_to(tmp_path / "backup").as_posix() for path in (tmp_path / "backup").rglob("*")}
    assert {name for name in on_disk if (tmp_path / "backup" / name).is_file()} == names | {"manifest.json"}
    assert os.stat(tmp_path / "backup").st_mode & 0o077 == 0


def test_a_changed_backup_is_refused(home, tmp_path):
    """All that is wrong at once, before anything is touched; one without its manifest was never finished."""
    back_up(home, NOWHERE, tmp_path / "backup")
    (tmp_path / "backup" / "home" / "ledger" / f"{NAME}.jsonl").write_text("{}\n")
    (tmp_path / "backup" / "home" / "nights" / NIGHT / "night.json").unlink()
    new = other(tmp_path)
    with pytest.raises(UserError) as refused:
        put_back(new, NOWHERE, tmp_path / "backup")
    assert [c.rule for c in refused.value.complaints] == ["is not what was backed up", "is missing from the backup"]
    (tmp_path / "backup" / "manifest.json").unlink()
    with pytest.raises(UserError, match="no whole backup"):
        put_back(new, NOWHERE, tmp_path / "backup")
    assert not new.root.exists()


def test_what_is_there_is_replaced_only_by_force(home, tmp_path):
    """Without --force the state stays; with it, nothing of the old state remains."""
    back_up(home, NOWHERE, tmp_path / "backup")
    (home.nights / "later").mkdir()
    with pytest.raises(UserError, match="--force"):
        put_back(home, NOWHERE, tmp_path / "backup")
    assert (home.nights / "later").exists()
    put_back(home, NOWHERE, tmp_path / "backup", force=True)
    assert not (home.nights / "later").exists() and not list(home.root.glob(".*"))
    assert registry.champion(home, NAME).number == 1


def test_a_restore_that_fails_leaves_the_home_as_it_was(home, tmp_path):
    """Something cannot be moved into its place, here since that is taken: all that was moved goes back."""
    back_up(home, NOWHERE, tmp_path / "backup")
    (home.nights / "later").mkdir()
    write_json(tmp_path / "backup" / "home" / ".replaced" / "in-the-way.json", {})
    before = sorted(home.root.rglob("*"))
    with pytest.raises(NightFailed, match="the home stays as it was"):
        put_back(home, NOWHERE, tmp_path / "backup", force=True)
    assert sorted(home.root.rglob("*")) == before


def test_a_restore_waits_for_no_backup(home, tmp_path):
    """What is being copied is not taken away."""
    back_up(home, NOWHERE, tmp_path / "backup")
    with no_night(home), pytest.raises(UserError, match="a night, a cleaning or a backup runs"):
        put_back(home, NOWHERE, tmp_path / "backup", force=True)


def test_a_running_night_is_left_alone(home, tmp_path):
    """Neither is it copied half-way nor is its home taken from under it, also with --force."""
    back_up(home, NOWHERE, tmp_path / "backup")
    with one_night_at_a_time(home, NAME):
        with pytest.raises(UserError, match="a night, a cleaning or another backup runs"):
            back_up(home, NOWHERE, tmp_path / "second")
        with pytest.raises(UserError, match="a process holds this model"):
            put_back(home, NOWHERE, tmp_path / "backup", force=True)
    assert not (tmp_path / "second" / "manifest.json").exists()


def test_a_night_waits_for_a_backup(home, tmp_path):
    """Its model is not held meanwhile: a scheduled night that found it so would do nothing."""
    begun: list[bool] = []

    def night() -> None:
        with one_night_at_a_time(home, NAME):
            begun.append((tmp_path / "backup" / "home" / "ledger").exists())

    def alone() -> bool:
        with no_night(home) as found:
            return found

    threads = [Thread(target=back_up, args=(home, NOWHERE, tmp_path / "backup")), Thread(target=night)]
    with registry.one_writer(home, NAME):  # the backup waits for whoever moves an alias
        threads[0].start()
        end = time.monotonic() + 60
        while alone():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert not held(home, NAME)
        threads[1].start()
        threads[1].join(0.5)
        assert threads[1].is_alive() and not begun
    for thread in threads:
        thread.join(60)
    assert begun == [True] and (tmp_path / "backup" / "manifest.json").exists()


def test_a_folder_that_was_there_is_closed(home, tmp_path):
    """Whoever made it for the backup may have left it open to everybody."""
    (tmp_path / "backup").mkdir(mode=0o755)
    back_up(home, NOWHERE, tmp_path / "backup")
    assert os.stat(tmp_path / "backup").st_mode & 0o077 == 0


def test_where_a_backup_may_go(home, tmp_path):
    """Not into the home, not over something else; an empty home has nothing to back up."""
    with pytest.raises(UserError, match="must not lie in the home"):
        back_up(home, NOWHERE, home.root / "backups")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="must be empty"):
        back_up(home, NOWHERE, tmp_path / "full")
    with pytest.raises(UserError, match="nothing to back up"):
        back_up(other(tmp_path), NOWHERE, tmp_path / "nothing")


def test_a_damaged_database_is_noticed(home, tmp_path):
    """A backup that could not be restored is not called one."""
    database = home.root / "mlflow" / "mlflow.db"
    database.write_bytes(database.read_bytes()[:40_000])
    with pytest.raises(NightFailed, match="damaged"):
        back_up(home, NOWHERE, tmp_path / "backup")
    assert not (tmp_path / "backup" / "manifest.json").exists()


def test_shared_servers_are_not_forgotten(home, tmp_path):
    """A server whose database is not named is refused, each in one line without a password; --home-only is explicit."""
    environment = {
        "OVERNIGHT_HOME": str(home.root),
        "PREFECT_API_URL": "http://prefect:4200/api",
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "OVERNIGHT_STUDY_STORAGE": "mysql://ana:secret@host/optuna",
    }
    shared = Home.from_environment(environment)
    with pytest.raises(UserError) as refused:
        back_up(shared, Stores.from_environment(environment), tmp_path / "backup")
    assert [c.where for c in refused.value.complaints] == [
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
        "MLFLOW_BACKEND_STORE_URI",
        "OVERNIGHT_STUDY_STORAGE",
        "MLFLOW_ARTIFACTS_DESTINATION",
    ]
    assert "secret" not in str(refused.value)
    manifest = back_up(shared, NOWHERE, tmp_path / "backup", home_only=True)
    assert manifest["databases"] == [] and manifest["artifacts"] is False


def test_commands(home, tmp_path, monkeypatch, capsys):
    """`overnight backup DIR` and `overnight restore DIR`; what is wrong is one line and exit code 2."""
    monkeypatch.setenv("OVERNIGHT_HOME", str(home.root))
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "OVERNIGHT_STUDY_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    backup = str(tmp_path / "backup")
    assert run(["backup", backup]) == 0
    assert "backed up the home; " in capsys.readouterr().out
    assert run(["restore", backup]) == 2
    assert capsys.readouterr().err.splitlines() == [f"{home.root}: is not empty; --force replaces what it holds"]
    assert run(["restore", backup, "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == len(json.loads((tmp_path / "backup" / "manifest.json").read_text())["files"])
