"""Whole nights through the real command line, on a tiny model: real Prefect, MLflow, Optuna, Great Expectations."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Project, make_rows, prefect_says


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model, prefect_api) -> Project:
    return Project(tmp_path_factory.mktemp("project"), tiny_model, prefect_api)


@pytest.fixture(scope="module")
def first(project) -> dict:
    """The record of a first night, run once for the tests below, by the installed command itself."""
    from overnight.home import Home
    from overnight.monitor import state

    windows = [{"findings": {}, "drifted": drifted} for drifted in (False, True)]
    said = {"model": "tiny", "version": 7, "windows": windows, "text": "1 of the last 2 windows drifted"}
    state.save(Home.from_environment(project.environment), said)
    overnight = Path(sys.executable).with_name("overnight")
    done = subprocess.run(
        [overnight, "run", project.config, "--json"], env=project.environment, cwd=project.folder, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_first_night_promotes(project, first):
    """From raw text to version 1 behind the alias champion, with lineage, trials, intervals and a report."""
    assert first["state"] == "promoted" and project.champion() == 1
    assert first["candidate"]["evaluation"]["metrics"]["macro_f1"]["value"] > 0.8
    assert {"reconcile", "ingest", "validate", "split", "tokenize", "search", "evaluate"} <= set(first["stages"])
    assert {"register", "gate", "promote", "report"} <= set(json.loads(_record(project, first).read_text())["stages"])
    assert [trial["state"] for trial in first["search"]["trials"]].count("finished") >= 1
    version = project.facts("models", "tiny")[0]
    assert version["tags"]["overnight.fingerprint"] == first["fingerprint"]
    assert version["tags"]["overnight.config_hash"] == first["config_hash"]
    assert project.facts("history", "tiny")[0]["action"] == "promote"
    page = (project.home / "nights" / first["id"] / "report.html").read_text()
    assert "promoted" in page.lower() and first["id"] in page and "1 of the last 2 windows drifted" in page
    assert first["monitor"]["windows"] == [{"findings": {}, "drifted": True}], (
        "what was said before, and its last window"
    )
    assert "scheduled" not in first
    kept = list((project.home / "nights" / first["id"] / "trials").glob("*/best"))
    assert len(kept) == 1, "checkpoints of losers are deleted"


def test_stages_are_task_runs_with_artifacts(project, first, prefect_api):
    """Every stage of the night is a finished task run in Prefect, and those with something to show have an artifact."""
    own = {"flow_runs": {"id": {"any_": first["flow_runs"]}}}  # other tests' nights are on the same server
    runs = prefect_says("POST", f"{prefect_api}/task_runs/filter", json=own)
    finished = {run["name"].split("-")[0] for run in runs if run["state_type"] == "COMPLETED"}
    for stage in "reconcile ingest validate split tokenize search evaluate register gate promote report".split():
        assert stage in finished
    assert "trial 0" in {run["name"] for run in runs}
    artifacts = {a["key"]: a for a in prefect_says("POST", f"{prefect_api}/artifacts/filter", json=own)}
    assert {"validation", "trials", "evaluation", "decision", "report"} <= set(artifacts)
    assert artifacts["search"]["type"] == "progress" and artifacts["search"]["data"] == 100.0
    assert "of 2 trials; best is trial" in artifacts["search"]["description"]
    page = (project.home / "nights" / first["id"] / "report.html").as_uri()
    assert f"[report.html]({page})" in artifacts["report-page"]["data"]
    assert "mlflow-run" not in artifacts, "MLflow's pages are served nowhere"


def test_mlflow_holds_the_night(project, first):
    """One parent run with the data sets and the report, one child run a trial with its true status."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.home / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(run for run in runs if run.data.tags.get("overnight.kind") == "night")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert parent.info.status == "FINISHED" and parent.data.tags["overnight.state"] == "promoted"
    assert {i.tags[0].value for i in parent.inputs.dataset_inputs} == {"train", "validation", "test"}
    states = {trial["number"]: trial["state"] for trial in first["search"]["trials"]}
    assert len(children) == len(states)
    for run in children:
        number = int(run.data.tags["overnight.trial"].rsplit("/", 1)[1])
        assert run.data.tags["overnight.state"] == states[number]
        assert run.info.status == {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}[states[number]]
        assert client.get_metric_history(run.info.run_id, "validation/macro_f1")
        assert all(len(value) <= 500 for value in run.data.params.values())
    assert {a.path for a in client.list_artifacts(parent.info.run_id, "report")} >= {"report/report.html"}
    assert {a.path for a in client.list_artifacts(parent.info.run_id)} >= {"config.json", "data_docs", "report"}


def test_registry_says_why_and_how(project, first):
    """The version's page in MLflow says why it was promoted and where all stands, the model's how to use it."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project.home / 'mlflow' / 'mlflow.db'}")
    version = client.get_model_version("tiny", "1")
    assert version.description.startswith(f"Promoted by night {first['id']}, with no champion before.\n")
    run = f"#/experiments/{client.get_run(version.run_id).info.experiment_id}/runs/{version.run_id}"
    assert f"[Morning report]({run}/artifacts/report/report.html?" in version.description
    assert "models:/tiny@champion" in client.get_registered_model("tiny").description


def test_nothing_changed_nothing_done(project, first):
    """The same data and config: no server, no training, a reason, exit 0."""
    again = project.facts("run", str(project.config))
    assert again["state"] == "skipped" and "version 1" in again["why"]
    assert len(list((project.home / "nights").iterdir())) == 1


def test_force_on_equal_data_is_a_tie(project, first):
    """Retrained on the same rows with the same seeds: no gain beyond chance, so the champion stays."""
    record = project.facts("run", str(project.config), "--force")
    assert record["state"] == "kept" and project.champion() == 1
    failed = [reason["rule"] for reason in record["decision"]["reasons"] if not reason["passed"]]
    assert "chance" in failed or "gain" in failed
    assert project.facts("history", "tiny")[-1]["action"] == "keep"


def test_promote_and_rollback_by_hand(project, first):
    """A person may promote what the gate kept, and take it back; both are in the ledger with the reason."""
    if len(project.facts("models", "tiny")) < 2:
        project.run("run", str(project.config), "--force")
    project.run("promote", "tiny", "2", "--reason", "support asked for it")
    assert project.champion() == 2
    project.run("rollback", "tiny", "--reason", "it was a mistake")
    assert project.champion() == 1
    assert [e["reason"] for e in project.facts("history", "tiny")[-2:]] == ["support asked for it", "it was a mistake"]
    project.run("promote", "tiny", "99", "--reason", "x", code=2)
    project.run("rollback", "tini", "--reason", "x", code=2)
    assert project.champion() == 1


def test_refused_data_stop_the_night(project, first):
    """Half the labels unknown: exit 3, the expectation named, champion and ledger untouched."""
    before = project.facts("history", "tiny")
    rows = make_rows(500, seed=2)
    rows.loc[rows.index % 2 == 0, "label"] = "surprise"
    rows.to_csv(project.folder / "bad.csv", index=False)
    done = project.run("run", str(project.config), "--set", f"data.source={project.folder / 'bad.csv'}", code=3)
    assert "label" in done.stderr
    assert project.champion() == 1 and project.facts("history", "tiny") == before
    assert project.facts("report")["state"] == "refused"


@pytest.mark.parametrize("moment", ["split", "search", "evaluate"])
def test_a_killed_night_is_continued(project, first, moment):
    """kill -9 during a stage: the next run continues the same night and repeats no finished trial."""
    rows = make_rows(500, seed=2 + len(moment))
    source = project.folder / f"{moment}.csv"
    rows.to_csv(source, index=False)
    arguments = ["run", str(project.config), "--set", f"data.source={source}"]
    arguments += ["--set", "search.trials=3", "--set", "search.pruner=none"]
    night = project.start(*arguments)
    night.until({"split": "✓ validate", "search": "trial 1:", "evaluate": "✓ search"}[moment])
    if moment == "search":
        time.sleep(0.5)
    night.signal(signal.SIGKILL)
    night.wait()
    killed = _last(project)
    assert killed["state"] == "running"
    done = {t.parent.name: t.read_text() for t in (project.home / "nights" / killed["id"]).glob("trials/*/result.json")}
    record = project.facts(*arguments)
    assert record["id"] == killed["id"] and record["continued"] == 1
    assert record["state"] in ("promoted", "kept")
    assert len(record["search"]["trials"]) == 3
    for name, text in done.items():
        assert (project.home / "nights" / killed["id"] / "trials" / name / "result.json").read_text() == text


def test_ctrl_c_ends_with_130_and_leaves_no_process(project, first):
    """An interrupt in the middle of a trial: exit 130, no traceback, no training process, champion untouched."""
    import psutil

    before = project.champion()
    night = project.start("run", str(project.config), "--force", "--set", "training.epochs=500").until("trial 0:")
    trials, end = [], time.monotonic() + 60
    while not trials and time.monotonic() < end:
        trials = [process for process in psutil.process_iter() if _trains(process, project)]
    night.signal(signal.SIGINT)
    assert night.wait(60) == 130, night.stderr
    said = night.stderr
    assert "Traceback" not in said
    assert trials
    _, alive = psutil.wait_procs(trials, timeout=20)
    assert not alive
    assert project.champion() == before
    assert _last(project)["state"] == "interrupted"


def _trains(process, project: Project) -> bool:
    """Whether a process writes a trial's log below the project's home."""
    import psutil

    try:
        return any(str(project.home / "nights") in f.path for f in process.open_files())
    except psutil.Error:
        return False


def _record(project: Project, record: dict) -> Path:
    return project.home / "nights" / record["id"] / "night.json"


def _last(project: Project) -> dict:
    records = [json.loads(path.read_text()) for path in (project.home / "nights").glob("*/night.json")]
    return max(records, key=lambda record: record["started"])
