"""`overnight deploy`: what a real Prefect server holds afterwards, and what the written prefect.yaml says."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Timer
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest
import yaml
from conftest import Project, prefect_says

from overnight.schedule import latest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model, prefect_api) -> Project:
    """A project with one config that has a schedule."""
    project = Project(tmp_path_factory.mktemp("deployed"), tiny_model, prefect_api)
    facts = yaml.safe_load(project.config.read_text())
    schedule(project, "tiny", "0 2 * * *", facts)
    return project


def schedule(project: Project, name: str, cron: str | None, facts: dict | None = None) -> Path:
    """Writes configs/NAME.yaml, with a schedule or without."""
    path = project.folder / "configs" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    facts = facts or yaml.safe_load((path.parent / "tiny.yaml").read_text())
    facts |= {"name": name, "schedule": {"cron": cron, "timezone": "Europe/Berlin"}}
    if cron is None:
        del facts["schedule"]
    path.write_text(yaml.safe_dump(facts))
    return path


def deploy(project: Project, *arguments: str) -> dict[str, str]:
    """What was changed, by name."""
    return {change["what"]: change["kind"] for change in project.facts("deploy", *arguments)}


def held(api: str, what: str, **query) -> dict[str, dict]:
    """Everything of a kind that the server holds, by name."""
    return {facts["name"]: facts for facts in prefect_says("POST", f"{api}/{what}/filter", json=query)}


@pytest.fixture(scope="module")
def deployed(project) -> dict[str, str]:
    return deploy(project)


SILENT = "overnight: nights that fell silent have crashed"


def test_what_prefect_holds(project, deployed, prefect_api):
    """A deployment in the work pool with its schedule, one run at a time, the folder to run in, and two automations."""
    assert deployed == dict.fromkeys(("tiny", "work pool", "automation", "prefect.yaml"), "created")
    found = held(prefect_api, "deployments")["tiny"]
    assert found["entrypoint"] == "flows.retrain.retrain" and found["work_pool_name"] == "overnight"
    assert found["parameters"] == {"config_path": "configs/tiny.yaml"}
    assert found["schedules"][0]["schedule"] == {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "day_or": True}
    assert found["global_concurrency_limit"]["limit"] == 1
    assert found["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"
    assert found["job_variables"]["working_dir"] == str(project.folder)
    assert found["job_variables"]["env"]["OVERNIGHT_HOME"] == str(project.home)
    assert held(prefect_api, "work_pools")["overnight"]["type"] == "process"
    automations = held(prefect_api, "automations")
    silent = automations[SILENT]
    assert silent["trigger"]["posture"] == "Proactive" and "prefect.flow-run.heartbeat" in silent["trigger"]["expect"]
    assert [action["state"] for action in silent["actions"]] == ["CRASHED"]
    assert 60 <= silent["trigger"]["within"] <= 300, "several heartbeats of thirty seconds"
    drifted = automations["overnight: tiny drifted"]
    assert drifted["trigger"]["match"] == {"prefect.resource.id": "overnight.model.tiny"}
    assert [action["deployment_id"] for action in drifted["actions"]] == [found["id"]]


def test_twice_is_once(project, deployed, prefect_api):
    """The second time nothing changes: the same deployment, the same automations."""
    before = held(prefect_api, "deployments"), held(prefect_api, "automations")
    assert set(deploy(project).values()) == {"unchanged"}
    assert (held(prefect_api, "deployments"), held(prefect_api, "automations")) == before


def test_what_would_change_is_only_told(project, deployed, prefect_api):
    """`--check` names old and new, and neither Prefect nor the file is touched."""
    schedule(project, "tiny", "0 3 * * *")
    written = (project.folder / "prefect.yaml").read_text()
    said = project.run("deploy", "--check").stdout
    assert "would be updated    tiny: schedule 0 2 * * * Europe/Berlin → 0 3 * * * Europe/Berlin" in said
    assert held(prefect_api, "deployments")["tiny"]["schedules"][0]["schedule"]["cron"] == "0 2 * * *"
    assert (project.folder / "prefect.yaml").read_text() == written
    assert deploy(project)["tiny"] == "updated"
    assert held(prefect_api, "deployments")["tiny"]["schedules"][0]["schedule"]["cron"] == "0 3 * * *"


def test_a_lost_schedule_takes_its_deployment_along(project, deployed, prefect_api):
    """Deployment and automation go; those of other configs, and of other folders, stay."""
    schedule(project, "other", "0 4 * * *")
    elsewhere = {"name": "elsewhere", "entrypoint": "flows.retrain.retrain", "tags": ["overnight"]}
    flow = held(prefect_api, "deployments")["tiny"]["flow_id"]
    prefect_says("POST", f"{prefect_api}/deployments/", json=elsewhere | {"flow_id": flow})
    assert deploy(project)["other"] == "created"
    assert "overnight: other drifted" in held(prefect_api, "automations")
    schedule(project, "other", None)
    assert deploy(project, "configs/tiny.yaml").get("other") is None, "asked for one config alone"
    assert deploy(project)["other"] == "removed"
    assert "overnight: other drifted" not in held(prefect_api, "automations")
    assert set(held(prefect_api, "deployments")) >= {"tiny", "elsewhere"}
    assert "other" not in held(prefect_api, "deployments")


def test_a_second_machine_has_a_pool_of_its_own(project, deployed, prefect_api, tmp_path):
    """Another folder of the same path, as in containers: its deployments are in its pool, and those of ours stay ours.

    Nothing but the pool tells the two apart.
    """
    configs = schedule(project, "tiny", "0 2 * * *").parent
    deploy(project)
    configs.rename(tmp_path / "first")
    try:
        facts = yaml.safe_load((tmp_path / "first" / "tiny.yaml").read_text()) | {"promotion": {"mode": "manual"}}
        schedule(project, "theirs", "0 3 * * *", facts)
        again = ("--pool", "second", "--file", str(tmp_path / "prefect.yaml"))
        assert deploy(project, *again)["theirs"] == "created"
        for flow, pool in (("retrain", "overnight"), ("approve", None)):
            found = held(prefect_api, "deployments", flows={"name": {"any_": [flow]}})
            assert found["theirs"]["work_pool_name"] == "second"
            assert found.get("tiny", {}).get("work_pool_name") == pool
        assert held(prefect_api, "work_pools")["second"]["type"] == "process"
        assert set(deploy(project, *again).values()) == {"unchanged"}
        written = yaml.safe_load((tmp_path / "prefect.yaml").read_text())["deployments"]
        assert {definition["work_pool"]["name"] for definition in written} == {"second"}
        (configs / "theirs.yaml").rename(tmp_path / "theirs.yaml")
        assert deploy(project, *again)["theirs"] == "removed"
        assert "tiny" in held(prefect_api, "deployments")
    finally:
        shutil.rmtree(configs)
        (tmp_path / "first").rename(configs)


def test_mistakes_are_told(project, deployed):
    """A config without a schedule, two of one name, and a file of somebody else."""
    lost = schedule(project, "other", None)
    assert "has no schedule" in project.run("deploy", str(lost), code=2).stderr
    twin = lost.with_name("twin.yaml")
    twin.write_text((lost.parent / "tiny.yaml").read_text())
    assert "has the name of" in project.run("deploy", code=2).stderr
    twin.unlink()
    theirs = project.folder / "theirs.yaml"
    theirs.write_text("deployments: []\n")
    assert "was not written by" in project.run("deploy", "--file", "theirs.yaml", code=2).stderr
    assert theirs.read_text() == "deployments: []\n"


def test_entrypoints_load(project, deployed):
    """What the written file names is a flow, also without Prefect's stand-in for one that cannot be imported."""
    from prefect.flows import load_flow_from_entrypoint

    facts = yaml.safe_load((project.folder / "prefect.yaml").read_text())
    assert [d["name"] for d in facts["deployments"]] == ["tiny"]
    for definition in facts["deployments"]:
        flow = load_flow_from_entrypoint(definition["entrypoint"], use_placeholder_flow=False)
        assert flow.name == "retrain" and set(definition["parameters"]) <= set(flow.parameters.properties)


@pytest.mark.slow
def test_prefect_reads_the_file_as_we_do(project, deployed, prefect_api):
    """`prefect deploy --all` leaves a server as `overnight deploy` does."""
    schedule(project, "tiny", "0 3 * * *")
    deploy(project)
    prefect_says("DELETE", f"{prefect_api}/deployments/{held(prefect_api, 'deployments')['tiny']['id']}")
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = project.environment | {"PWD": str(project.folder)}
    done = subprocess.run(command, cwd=project.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert project.facts("deploy", "--check")[-2:] == [
        {"kind": "unchanged", "what": "tiny", "details": "0 3 * * * Europe/Berlin"},
        {"kind": "unchanged", "what": "prefect.yaml", "details": ""},
    ]


def test_the_projects_own_file_is_up_to_date(monkeypatch):
    """The prefect.yaml of the repository is what `overnight deploy` writes for the shipped configs."""
    from flows.deployments import prefect_yaml
    from overnight.cli.schedule import scheduled

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("OVERNIGHT_HOME", raising=False)
    assert (ROOT / "prefect.yaml").read_text() == prefect_yaml(scheduled(None))


def test_drift_starts_a_night(project, deployed, prefect_api):
    """The event that says a model's data drifted makes a run of its deployment, and of no other."""
    deploy(project)
    deployment = held(prefect_api, "deployments")["tiny"]["id"]
    event = {
        "id": str(uuid4()),
        "event": "overnight.drift",
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": "overnight.model.tiny"},
    }
    prefect_says("POST", f"{prefect_api}/events", json=[event])
    wanted = {"deployments": {"id": {"any_": [deployment]}}, "limit": 200}
    end, started = time.monotonic() + 60, []
    while not started and time.monotonic() < end:
        runs = prefect_says("POST", f"{prefect_api}/flow_runs/filter", json=wanted)
        started = [run for run in runs if not run["auto_scheduled"]]
        time.sleep(0.5)
    assert [run["parameters"] for run in started] == [{"config_path": "configs/tiny.yaml", "force": True}], (
        "on the same data too: it is the scored texts that changed"
    )
    assert started[0]["created_by"]["type"] == "AUTOMATION"


def test_a_trigger_without_force_is_put_right(project, deployed, prefect_api):
    """One that an earlier `overnight deploy` made, or that somebody changed, is told and replaced."""
    there = held(prefect_api, "automations")["overnight: tiny drifted"]
    facts = {key: there[key] for key in ("name", "description", "enabled", "trigger")}
    actions = [action | {"parameters": None} for action in there["actions"]]
    prefect_says("PUT", f"{prefect_api}/automations/{there['id']}", json=facts | {"actions": actions})
    assert 'with {} → overnight: tiny drifted on overnight.model.tiny with {"force": true}' in (
        project.run("deploy", "--check").stdout
    )
    assert deploy(project)["tiny"] == "updated"
    assert held(prefect_api, "automations")["overnight: tiny drifted"]["actions"][0]["parameters"] == {"force": True}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_silent_night_has_crashed(project, prefect_api):
    """A night by hand that is killed in mid-search, so that nobody can report it, is Crashed when its heart stops."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.automations import silent_nights

    automation = silent_nights()
    quick = automation.trigger.model_copy(update={"within": timedelta(seconds=45)})
    automation = automation.model_copy(update={"name": "silent for the test", "trigger": quick})
    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as client:
        made = client.create_automation(automation)
    time.sleep(5)  # until the server has noticed it
    night = project.start("run", str(project.config), "--set", "training.epochs=2000").until("trial 0:")
    query = {"flow_runs": {"state": {"type": {"any_": ["RUNNING"]}}, "parent_task_run_id": {"is_null_": True}}}
    running = prefect_says("POST", f"{prefect_api}/flow_runs/filter", json=query)
    mine = [run for run in running if run["parameters"].get("config_path") == str(project.config)]
    assert len(mine) == 1
    time.sleep(40)  # a second heartbeat
    assert state(prefect_api, mine[0])[0] == "RUNNING", "slow is not silent"
    night.signal(signal.SIGKILL)
    night.wait()
    end = time.monotonic() + 240
    while state(prefect_api, mine[0])[0] == "RUNNING" and time.monotonic() < end:
        time.sleep(1)
    prefect_says("DELETE", f"{prefect_api}/automations/{made}")
    assert state(prefect_api, mine[0]) == ("CRASHED", automation.actions[0].message)


# -- whose turn it is --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quarters(project, deployed, prefect_api) -> list[dict]:
    """Runs that Prefect's scheduler made of a schedule, the soonest first."""
    schedule(project, "quarters", "*/15 * * * *")
    deploy(project)
    deployment = held(prefect_api, "deployments")["quarters"]["id"]
    wanted = {"deployments": {"id": {"any_": [deployment]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200}
    end, runs = time.monotonic() + 60, []
    while len(runs) < 4 and time.monotonic() < end:
        runs = prefect_says("POST", f"{prefect_api}/flow_runs/filter", json=wanted)
        time.sleep(0.5)
    assert len(runs) >= 4 and all(run["auto_scheduled"] for run in runs)
    return runs


@pytest.fixture
def inside(monkeypatch, prefect_api):
    """Lets the code think that it is called in a run, at a time."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    import flows.turns

    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return cls.moment

    with temporary_settings({PREFECT_API_URL: prefect_api}), get_client(sync_client=True) as client:

        def enter(run: dict, moment: datetime, **other) -> None:
            facts = client.read_flow_run(run["id"]).model_copy(update=other)
            Clock.moment = moment
            context = SimpleNamespace(get=lambda: SimpleNamespace(flow_run=facts))
            monkeypatch.setattr(flows.turns, "FlowRunContext", context)
            monkeypatch.setattr(flows.turns, "datetime", Clock)

        yield enter


def state(api: str, run: dict) -> tuple[str, str | None]:
    facts = prefect_says("GET", f"{api}/flow_runs/{run['id']}")["state"]
    return facts["type"], facts["message"]


def test_one_run_answers_for_a_backlog(project, quarters, prefect_api, inside):
    """The first that starts works for the newest time that was missed; the others are cancelled and say why."""
    from flows.turns import take_turn
    from overnight.config import load_config
    from overnight.home import Home

    home = Home.from_environment({"OVERNIGHT_HOME": str(project.home)})
    config = load_config(project.folder / "configs" / "quarters.yaml", ["schedule.deadline_minutes=10"])
    times = [datetime.fromisoformat(run["expected_start_time"]) for run in quarters]
    inside(quarters[0], times[2] + timedelta(seconds=40))
    turn = take_turn(home, config)
    assert turn.why is None and turn.due == times[2] and turn.until == times[2] + timedelta(minutes=10)
    name = prefect_says("GET", f"{prefect_api}/flow_runs/{quarters[0]['id']}")["name"]
    assert state(prefect_api, quarters[0])[0] == "SCHEDULED", "it runs: its state is its own affair"
    assert [state(prefect_api, run) for run in quarters[1:3]] == [("CANCELLED", f"missed; {name} runs for all")] * 2
    assert state(prefect_api, quarters[3])[0] == "SCHEDULED", "not due yet"


def test_a_night_that_ran_is_not_run_again(project, quarters, prefect_api, inside):
    """A run that was on its way already ends when another one has started since; one that was cancelled is none."""
    from flows.turns import take_turn
    from overnight.config import load_config
    from overnight.home import Home

    home = Home.from_environment({"OVERNIGHT_HOME": str(project.home)})
    config = load_config(project.folder / "configs" / "quarters.yaml")
    cancelled = {"state": {"type": "CANCELLED"}, "force": True}
    prefect_says("POST", f"{prefect_api}/flow_runs/{quarters[1]['id']}/set_state", json=cancelled)
    now = datetime.now(UTC)
    due = latest(config.schedule, now)
    inside(quarters[3], now, expected_start_time=due)
    turn = take_turn(home, config)
    assert turn.due == due and turn.why is None
    url = f"{prefect_api}/deployments/{quarters[0]['deployment_id']}/create_flow_run"
    prefect_says("POST", url, json={"state": {"type": "RUNNING"}})
    inside(quarters[3], datetime.now(UTC), expected_start_time=due)
    assert "already" in take_turn(home, config).why


def test_a_night_by_hand_has_no_turn(project, inside, quarters, prefect_api):
    """Neither a run that a person or a trigger started is late, nor one of a config without a schedule."""
    from flows.turns import take_turn
    from overnight.config import load_config
    from overnight.home import Home

    home = Home.from_environment({"OVERNIGHT_HOME": str(project.home)})
    config = load_config(project.folder / "configs" / "quarters.yaml")
    url = f"{prefect_api}/deployments/{quarters[0]['deployment_id']}/create_flow_run"
    made = prefect_says("POST", url, json={"state": {"type": "PENDING"}})
    inside(made, datetime.now(UTC) + timedelta(days=9))
    assert take_turn(home, config) is None
    inside(quarters[3], datetime.now(UTC))
    assert take_turn(home, config.model_copy(update={"schedule": None})) is None


def test_the_newest_of_a_backlog_is_left(quarters, prefect_api, inside):
    """`overnight deploy` and `up` thin out what waits before a worker sees it."""
    from prefect.client.orchestration import get_client

    from flows.turns import thin_backlog

    waiting = [run for run in quarters if state(prefect_api, run)[0] == "SCHEDULED"]
    inside(waiting[0], datetime.fromisoformat(waiting[-1]["expected_start_time"]) + timedelta(seconds=1))
    with get_client(sync_client=True) as client:
        assert thin_backlog(client, UUID(quarters[0]["deployment_id"])) >= len(waiting) - 1 > 0
        assert thin_backlog(client, UUID(quarters[0]["deployment_id"])) == 0
    assert state(prefect_api, waiting[0])[0] == "CANCELLED"


def test_a_night_waits_for_its_model_to_be_cleaned(project, quarters, inside):
    """Who holds it without a night gives it back in minutes; another night keeps it, and then this one does nothing."""
    from flows.turns import take_turn
    from overnight.config import load_config
    from overnight.home import Home
    from overnight.nights import begin_night, one_night_at_a_time

    home = Home.from_environment({"OVERNIGHT_HOME": str(project.home)})
    config = load_config(project.folder / "configs" / "quarters.yaml")
    inside(quarters[-1], datetime.fromisoformat(quarters[-1]["expected_start_time"]) + timedelta(seconds=1))
    with ExitStack() as cleaning:
        cleaning.enter_context(one_night_at_a_time(home, "quarters"))
        Timer(2.0, cleaning.close).start()
        begun = time.monotonic()
        assert take_turn(home, config).why is None
        assert time.monotonic() - begun > 1.9
    with one_night_at_a_time(home, "quarters"):
        begin_night(home, config, "f", forced=False)
        assert take_turn(home, config).why == "another night of this model is running"


def test_what_asks_a_person_is_deployed_too(project, deployed, prefect_api):
    """A model in mode `manual` has a second deployment, which comes and goes with the mode."""
    path = project.folder / "configs" / "tiny.yaml"
    facts = yaml.safe_load(path.read_text())
    before = path.read_text()
    path.write_text(yaml.safe_dump(facts | {"promotion": {"mode": "manual"}}))
    assert deploy(project)["approval of tiny"] == "created"
    entrypoints = {"flows.retrain.retrain", "flows.approval.approve"}
    found = prefect_says("POST", f"{prefect_api}/deployments/filter", json={})
    assert {one["entrypoint"] for one in found if one["name"] == "tiny"} == entrypoints
    written = yaml.safe_load((project.folder / "prefect.yaml").read_text())["deployments"]
    assert {one["entrypoint"] for one in written} == entrypoints
    assert deploy(project)["approval of tiny"] == "unchanged"
    path.write_text(before)
    assert deploy(project)["approval of tiny"] == "removed"
