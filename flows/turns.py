"""What a night is to do that the schedule started: its turn, once for a whole backlog, or nothing and why.

And what to do about the runs of nights that a power cut ended.
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Crashed

from overnight import schedule
from overnight.config import Config, Search
from overnight.home import Home
from overnight.nights import DECIDED, held, night_records
from overnight.upkeep import holder

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

RAN = (StateType.RUNNING, StateType.COMPLETED, StateType.FAILED)
"""A run in one of these states has done its night, well or not; a crashed or cancelled one has not."""
PATIENCE = 900.0
"""Seconds for which a night waits until its model has been cleaned."""


def take_turn(home: Home, config: Config) -> schedule.Turn | None:
    """The turn of the flow run that this is called in; None where no schedule started it.

    Runs of earlier times that wait still are cancelled, with the reason on them: whoever is here first answers for all.
    """
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    if config.schedule is None or run is None or run.deployment_id is None or not run.auto_scheduled:
        return None
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        others = [other for other in _until(client, run.deployment_id, now) if other.id != run.id]
        started = [other.start_time for other in others if other.start_time and other.state_type in RAN]
        stages = last_stages(home, config.name) or {}
        needed = timedelta(seconds=sum(s for name, s in stages.items() if name != "search"))
        turn = schedule.decide(config.schedule, run.expected_start_time or now, now, started, needed)
        if turn.why is None and _overtaken(home, config.name):
            turn = schedule.Turn(turn.due, "another night of this model is running")
        reason = turn.why or f"missed; {run.name} runs for all"
        for other in others:
            if _waits(other):
                client.set_flow_run_state(other.id, Cancelled(message=reason), force=True)
    return turn


def _overtaken(home: Home, name: str) -> bool:
    """Whether another night of the model runs. Who holds the model without one cleans it: that is waited for."""
    end = time.monotonic() + PATIENCE
    while held(home, name):
        if any(record["state"] == "running" for record in night_records(home, name)) or time.monotonic() > end:
            return True
        time.sleep(1)
    return False


def thin_backlog(client: SyncPrefectClient, deployment: UUID) -> int:
    """Leaves the newest of the deployment's runs that wait although they were due; returns how many it cancelled."""
    late = [run for run in _until(client, deployment, datetime.now(UTC)) if _waits(run)]
    for run in late[1:]:
        client.set_flow_run_state(run.id, Cancelled(message=f"missed; {late[0].name} runs for all"), force=True)
    return len(late[1:])


def within(search: Search, turn: schedule.Turn | None, home: Home, name: str) -> Search:
    """The search section with no more minutes than the deadline leaves."""
    if turn is None or turn.until is None:
        return search
    left = schedule.minutes_for_search(turn.until, datetime.now(UTC), last_stages(home, name))
    return search.model_copy(update={"minutes": min(left, search.minutes or left)})


def end_dead_runs(home: Home, client: SyncPrefectClient) -> list[tuple[str, str]]:
    """Sets those runs to Crashed that the home's own server believes alive, while no process holds their model.

    A server that was down together with a night waits for ever for its next heartbeat, and keeps its model's slot.

    Returns:
        The model and the run of each.
    """
    up = holder(home)
    if home.prefect_api or up and up.get("pid") != os.getppid():
        return []  # a worker may be starting a night, here or elsewhere; the automation on heartbeats watches those
    anybody = any(held(home, path.stem) for path in (home.root / "locks").glob("*.lock"))
    open_states = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    wanted = FlowRunFilter.model_validate({"state": {"type": {"any_": open_states}}})
    models = {deployment.id: deployment.name for deployment in client.read_deployments()}
    ended = []
    for run in client.read_flow_runs(flow_run_filter=wanted):
        name = models.get(run.deployment_id) if run.deployment_id else None
        young = run.state is not None and datetime.now(UTC) - run.state.timestamp < timedelta(minutes=1)
        if not young and not (held(home, name) if name else anybody):
            client.set_flow_run_state(run.id, Crashed(message="its process ended without a word"), force=True)
            ended.append((name or "a night by hand", f"the run {run.name} had no process"))
    return ended


def last_stages(home: Home, name: str) -> dict[str, float] | None:
    """Seconds of each stage of the model's last night that was decided."""
    decided = [record for record in night_records(home, name) if record["state"] in DECIDED]
    return dict(decided[-1].get("stages", {})) if decided else None


def _waits(run: FlowRun) -> bool:
    return run.auto_scheduled and run.state_type == StateType.SCHEDULED


def _until(client: SyncPrefectClient, deployment: UUID, now: datetime) -> list[FlowRun]:
    """The deployment's last runs that should have started by now, the newest first."""
    facts = {"deployment_id": {"any_": [deployment]}, "expected_start_time": {"before_": now}}
    wanted = FlowRunFilter.model_validate(facts)
    return client.read_flow_runs(flow_run_filter=wanted, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=200)
