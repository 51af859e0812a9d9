"""Runs: whatever is killed, lost or away, MLflow ends up with what the trial folders say, once."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.home import Home, read_json, write_json
from overnight.tracking import runs, store


def make_trial(home: Home, number: int, lines: int = 3, state: str | None = None, **result) -> Path:
    """A trial folder as the search writes it."""
    folder = home.nights / "night-1" / "trials" / f"{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    params = {"learning_rate": 3e-5}
    facts = {"number": number, "night": "night-1", "study": "night-1", "params": params, "started": 1_790_000_000.5}
    write_json(
        folder / "params.json", {**facts, "training": {"epochs": 2, "learning_rate": 3e-5}, "job": {"facts": {}}}
    )
    add_lines(folder, 0, lines)
    if state:
        write_json(folder / "result.json", {"state": state, **result})
    return folder


def add_lines(folder: Path, start: int, end: int) -> None:
    with open(folder / "metrics.jsonl", "a") as file:
        for step in range(start, end):
            line = {"kind": "log", "time": 1_790_000_001 + step, "step": step, "steps": 99, "epoch": step / 10}
            file.write(json.dumps({**line, "loss": 1 / (step + 1), "learning_rate": 3e-5}) + "\n")


def history(home: Home, run_id: str, key: str) -> list[tuple[int, int, float]]:
    return [(m.step, m.timestamp, m.value) for m in store.client(home).get_metric_history(run_id, key)]


@pytest.fixture
def night(home) -> tuple[str, str]:
    experiment_id = store.experiment(home, "sentiment")
    return experiment_id, runs.open_night(home, experiment_id, "night-1", name="sentiment")


def test_trial_becomes_a_child_run_with_its_own_times(home, night):
    """Parent, name, settings, steps and times are those of the folder, not of the moment of sending."""
    folder = make_trial(home, 3)
    with open(folder / "metrics.jsonl", "a") as file:
        facts = {"kind": "evaluation", "time": 1_790_000_060, "step": 3, "evaluation": 0, "validation_loss": 0.5}
        file.write(json.dumps({**facts, "metrics": {"macro_f1": 0.7, "f1/so-so ☹": 0.4}, "value": 0.7}) + "\n")
    assert runs.sync_trial(home, *night, folder) is False, "it still runs"
    run = store.client(home).get_run(read_json(folder / "tracked.json")["run_id"])
    assert (run.info.run_name, run.info.status, run.info.start_time) == ("trial-03", "RUNNING", 1_790_000_000_500)
    assert run.data.tags["mlflow.parentRunId"] == night[1]
    assert run.data.params == {"epochs": "2", "learning_rate": "3e-05"}
    assert history(home, run.info.run_id, "train/loss") == [
        (step, 1_790_000_001_000 + 1000 * step, 1 / (step + 1)) for step in range(3)
    ]
    assert history(home, run.info.run_id, "validation/loss") == [(3, 1_790_000_060_000, 0.5)]
    assert history(home, run.info.run_id, "validation/macro_f1") == [(3, 1_790_000_060_000, 0.7)]
    assert len([key for key in run.data.metrics if key.startswith("validation/f1/so-so")]) == 1
    assert not {"train/step", "train/steps", "train/time", "validation/evaluation"} & run.data.metrics.keys()


@pytest.mark.parametrize(
    ("state", "status"), [("finished", "FINISHED"), ("pruned", "KILLED"), ("failed", "FAILED"), ("stopped", "KILLED")]
)
def test_true_status(home, night, state, status):
    """A pruned trial is neither success nor failure in MLflow; the tag says which of them it was."""
    error = {"error": "out of memory"} if state == "failed" else {"value": 0.7, "metrics": {"macro_f1": 0.7}}
    folder = make_trial(home, 1, state=state, ended=1_790_000_100, **error)
    assert runs.sync_trial(home, *night, folder) is True
    run = store.client(home).get_run(read_json(folder / "tracked.json")["run_id"])
    assert (run.info.status, run.data.tags["overnight.state"], run.info.end_time) == (status, state, 1_790_000_100_000)
    assert run.data.tags.get("overnight.error") == error.get("error")
    assert run.data.metrics.get("best/macro_f1") == error.get("metrics", {}).get("macro_f1")


def test_lost_memory_makes_no_second_run_and_no_second_line(home, night):
    """Without tracked.json everything is sent again, into the same run, and nothing doubles."""
    folder = make_trial(home, 1, lines=5)
    runs.sync_trial(home, *night, folder)
    first = read_json(folder / "tracked.json")["run_id"]
    (folder / "tracked.json").unlink()
    add_lines(folder, 5, 7)
    runs.sync_trial(home, *night, folder)
    assert read_json(folder / "tracked.json")["run_id"] == first
    assert [step for step, _, _ in history(home, first, "train/loss")] == list(range(7))
    assert len(store.client(home).search_runs([night[0]])) == 2


def test_half_a_line_waits_for_its_other_half(home, night):
    """A line that is being written is sent once, when whole; one cut by a kill is passed over, the next is not."""
    folder = make_trial(home, 1, lines=2)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"kind": "log", "time": 1790000003, "step"')
    runs.sync_trial(home, *night, folder)
    run_id = read_json(folder / "tracked.json")["run_id"]
    assert [step for step, _, _ in history(home, run_id, "train/loss")] == [0, 1]
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(': 2, "loss": 0.25}\n{"kind": "log", "ti\nnot json\n[1]\n{"time": 5, "step": 9, "loss": null}\n')
    add_lines(folder, 3, 4)
    runs.sync_trial(home, *night, folder)
    assert [step for step, _, _ in history(home, run_id, "train/loss")] == [0, 1, 2, 3]


def test_many_lines_go_in_batches(home, night, monkeypatch):
    """A spool of hours is replayed whole, in pieces that MLflow accepts, also when a piece ends inside a line."""
    monkeypatch.setattr(runs, "BYTES_PER_PASS", 10_000)
    folder = make_trial(home, 1, lines=700, state="finished")
    assert runs.sync_trial(home, *night, folder) is True
    run_id = read_json(folder / "tracked.json")["run_id"]
    assert [step for step, _, _ in history(home, run_id, "train/loss")] == list(range(700))


def test_resumed_trial_is_running_again(home, night):
    """A trial of a killed night: healed as killed, then continued in the same run, its cut-back file sent anew."""
    folder = make_trial(home, 1, lines=6)
    runs.sync_trial(home, *night, folder)
    run_id = read_json(folder / "tracked.json")["run_id"]
    assert set(runs.heal(home, night[0], nights=None)) == {run_id, night[1]}
    assert runs.open_night(home, night[0], "night-1") == night[1], "one night, one run"
    (folder / "metrics.jsonl").unlink()
    add_lines(folder, 4, 5)
    tracked = read_json(folder / "tracked.json")
    write_json(folder / "tracked.json", tracked | {"process": 1})  # it was another process then
    runs.sync_trial(home, *night, folder)
    run = store.client(home).get_run(run_id)
    assert run.info.status == store.client(home).get_run(night[1]).info.status == "RUNNING"
    assert [step for step, _, _ in history(home, run_id, "train/loss")] == list(range(6))


def test_run_deleted_by_a_person_stays_deleted(home, night):
    """Deleting a run in MLflow's pages neither brings it back nor stops the sending of others."""
    folder = make_trial(home, 1)
    runs.sync_trial(home, *night, folder)
    run_id = read_json(folder / "tracked.json")["run_id"]
    store.client(home).delete_run(run_id)
    add_lines(folder, 3, 5)
    assert runs.sync_trial(home, *night, folder) is True
    assert store.client(home).get_run(run_id).info.lifecycle_stage == "deleted"
    assert len(store.client(home).search_runs([night[0]])) == 1


def test_heal_spares_other_nights(home, night):
    """Only runs of the named nights are closed, with the reason: others may run on another machine."""
    other = runs.open_night(home, night[0], "night-2")
    assert runs.heal(home, night[0], nights={"night-1"}) == [night[1]]
    dead, alive = (store.client(home).get_run(run_id) for run_id in (night[1], other))
    assert (dead.info.status, alive.info.status) == ("KILLED", "RUNNING")
    assert dead.data.tags["overnight.healed"] and dead.info.end_time


def test_pending_names_what_is_left(home, night):
    """After a closed trial is sent it is pending no more; one without a result is."""
    done, open_ = make_trial(home, 1, state="finished"), make_trial(home, 2)
    assert runs.pending(home.nights) == [done, open_]
    for folder in (done, open_):
        runs.sync_trial(home, *night, folder)
    assert runs.pending(home.nights) == [open_]


def test_night_run_holds_data_sets_numbers_and_files(home, night, tmp_path):
    """Data sets appear as MLflow inputs by our own digest, the source without its password; files as artifacts."""
    (tmp_path / "report.html").write_text("<p>")
    (tmp_path / "config.json").write_text("{}")
    source = "https://ana:secret@host/rows.csv"
    used = [runs.DatasetUsed("sentiment", "ab" * 32, source, side, 100) for side in ("train", "test")]
    runs.log_night(
        home,
        night[1],
        metrics={"test/macro_f1": 0.8, "seconds/search": math.nan, "test/f1/a#b": 0.1, "test/f1/a@b": 0.2},
        tags={"overnight.state": "promoted", "long": "x" * 9000, "none": None},
        artifacts={tmp_path / "report.html": "report", str(tmp_path / "config.json"): ""},
        datasets=used,
    )
    runs.close_night(home, night[1], "FINISHED")
    run = store.client(home).get_run(night[1])
    assert run.info.status == "FINISHED" and run.data.metrics["test/macro_f1"] == 0.8
    assert len(run.data.metrics) == 4, "labels that differ by a character MLflow refuses stay two metrics"
    assert run.data.tags["overnight.state"] == "promoted" and len(run.data.tags["long"]) == 5000
    inputs = run.inputs.dataset_inputs
    assert {(i.tags[0].value, i.dataset.name, i.dataset.digest) for i in inputs} == {
        ("train", "sentiment-train", "ab" * 16),
        ("test", "sentiment-test", "ab" * 16),
    }
    assert all("secret" not in i.dataset.source for i in inputs)
    files = {file.path for file in store.client(home).list_artifacts(night[1])}
    assert files == {"report", "config.json"}


@given(st.text(min_size=1, max_size=300))
def test_metric_keys_are_accepted_by_mlflow(name):
    """Whatever a label holds, the metric's name is one that MLflow takes, and the same every time."""
    from mlflow.utils.validation import _validate_metric

    key = runs.metric_key(f"f1/{name}")
    _validate_metric(key, 1.0, 0, 0)
    assert len(key) <= 250 and key == runs.metric_key(f"f1/{name}")


@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=2, unique=True))
def test_metric_keys_stay_apart(names):
    """Two labels never share a metric."""
    assert runs.metric_key(f"f1/{names[0]}") != runs.metric_key(f"f1/{names[1]}")


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


def test_syncer_sends_while_a_trial_runs(home, night):
    """Lines arrive while the trial is still going; leaving the block sends the rest."""
    folder = make_trial(home, 1, lines=1)
    said = []
    with runs.Syncer(home, lambda: night, say=said.append, every=0.05) as syncer:
        syncer.watch(folder)
        syncer.watch(folder)
        wait_for(lambda: (folder / "tracked.json").exists())
        add_lines(folder, 1, 4)
        write_json(folder / "result.json", {"state": "finished"})
    assert syncer.stop() is True and said == []
    run_id = read_json(folder / "tracked.json")["run_id"]
    assert [step for step, _, _ in history(home, run_id, "train/loss")] == [0, 1, 2, 3]
    assert store.client(home).get_run(run_id).info.status == "FINISHED"


def test_outage_from_the_start_loses_nothing(home, monkeypatch):
    """MLflow is away when the night begins: one line says so, training's files fill, all is sent when it is back."""
    folder = make_trial(home, 1, lines=3)
    said: list[str] = []
    up = False

    def parent() -> tuple[str, str]:
        if not up:
            raise store.TrackingUnavailable("MLflow at http://host: cannot be used now")
        experiment_id = store.experiment(home, "sentiment")
        return experiment_id, runs.open_night(home, experiment_id, "night-1")

    with runs.Syncer(home, parent, say=said.append, every=0.02) as syncer:
        syncer.watch(folder)
        wait_for(lambda: said)
        add_lines(folder, 3, 5)
        time.sleep(0.2)
        assert len(said) == 1 and "sent later" in said[0]
        up = True
        write_json(folder / "result.json", {"state": "pruned"})
        wait_for(lambda: len(said) == 2)
    assert "answers again" in said[1] and len(said) == 2
    run_id = read_json(folder / "tracked.json")["run_id"]
    assert [step for step, _, _ in history(home, run_id, "train/loss")] == list(range(5))


def test_outage_to_the_end_leaves_the_spool(tmp_path, monkeypatch):
    """MLflow never answers: stop() returns in time, says that something is left, and the folder is untouched."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
    away = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": uri})
    folder = make_trial(away, 1, state="finished")
    said: list[str] = []
    syncer = runs.Syncer(away, lambda: ("1", "a" * 32), say=said.append, every=0.02).start()
    syncer.watch(folder)
    wait_for(lambda: said)
    began = time.monotonic()
    assert syncer.stop(timeout=20) is False and time.monotonic() - began < 20
    assert len(said) == 1 and runs.pending(away.nights) == [folder]


@pytest.mark.slow
def test_server_that_dies_and_comes_back(tmp_path, monkeypatch):
    """A real MLflow server is killed in the middle of a trial and started again on the same store: no line is lost."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/server.db",
        "--artifacts-destination",
        str(tmp_path / "art"),
    ]
    shared = Home.from_environment(
        {"OVERNIGHT_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    )
    store.prepare(shared)
    folder = make_trial(shared, 1, lines=2)
    said: list[str] = []

    def parent() -> tuple[str, str]:
        experiment_id = store.experiment(shared, "sentiment")
        return experiment_id, runs.open_night(shared, experiment_id, "night-1")

    def start() -> subprocess.Popen:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    server = start()
    try:
        with runs.Syncer(shared, parent, say=said.append, every=0.2) as syncer:
            syncer.watch(folder)
            wait_for(lambda: (read_json(folder / "tracked.json") or {}).get("offset"), 200)
            told = len(said)
            os.killpg(server.pid, signal.SIGKILL)
            add_lines(folder, 2, 6)
            wait_for(lambda: len(said) > told)
            add_lines(folder, 6, 9)
            write_json(folder / "result.json", {"state": "finished"})
            server = start()
            wait_for(lambda: (read_json(folder / "tracked.json") or {}).get("closed"), 200)
        run_id = read_json(folder / "tracked.json")["run_id"]
        assert [step for step, _, _ in history(shared, run_id, "train/loss")] == list(range(9))
        assert store.client(shared).get_run(run_id).info.status == "FINISHED"
        assert len(store.client(shared).search_runs([store.experiment(shared, "sentiment")])) == 2
    finally:
        os.killpg(server.pid, signal.SIGKILL)
