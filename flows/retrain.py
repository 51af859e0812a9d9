"""The night: from raw text to a decided model version.

    overnight run configs/sentiment.yaml

reconcile → ingest → (validate → split → tokenize → search → evaluate → register → gate → promote) → report (→ clean)
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, cast

from prefect import State, flow
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

from flows.decision import reach_decision
from flows.turns import take_turn
from flows.worker import end_with_worker
from overnight import monitor, problems
from overnight.config import load_config
from overnight.home import Home
from overnight.lineage import lineage_of
from overnight.nights import begin_night, one_night_at_a_time, timed, unchanged
from overnight.notify import announce, announce_skipped, announce_untold, mistakes_told
from overnight.processes import warm_up
from overnight.schedule import Turn
from overnight.services import set_quiet_environment
from overnight.tracking import registry
from overnight.tracking.bases import on_its_base
from tasks.approval import after_decision
from tasks.care import cleaned_afterwards, reconcile, report
from tasks.data import ingest


def run_night(config_path: str, overrides: list[str], force: bool) -> dict[str, Any]:
    """The flow, from a process that ends with it: Prefect's last logs and events are sent before the server may go."""
    try:
        return cast(dict[str, Any], retrain(config_path=config_path, overrides=overrides, force=force))
    finally:
        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=15)


@flow(name="retrain", flow_run_name="{config_path}", log_prints=False)
def retrain(config_path: str, overrides: list[str] | None = None, force: bool = False) -> dict[str, Any] | State:
    """Runs one night; returns its record, or why it was not this night's turn.

    Raises:
        UserError: the config or the source is wrong.
        DataRefused: the data did not pass the validation.
        NightFailed: the night could not finish.
    """
    set_quiet_environment()  # a worker may not have
    if deployment.id:
        end_with_worker()
    home = Home.from_environment()
    stages: dict[str, float] = {}
    with ExitStack() as stack:
        with mistakes_told(config_path):
            config = load_config(config_path, overrides or (), problems=problems.roles())
            turn = take_turn(home, config)
            if turn and turn.why:
                return Cancelled(message=turn.why)
            stack.enter_context(cleaned_afterwards(home, config.name, config.retention))
            stack.enter_context(one_night_at_a_time(home, config.name))
            with timed(stages, "reconcile"):
                reconcile(home, config.name)
            announce_untold(home, config)
            config, base = on_its_base(home, config)
            with timed(stages, "ingest"):
                rows = ingest(config.data, config.problem, home.data / config.name, f"{config_path}: data")
        why = None if force else unchanged(home, config, rows.fingerprint, lambda: registry.champion(home, config.name))
        if why:
            skipped = {"model": config.name, "state": "skipped", "why": why, "stages": stages}
            announce_skipped(config, skipped)
            return skipped
        warm_up()
        night = begin_night(home, config, rows.fingerprint, forced=force, stages=stages)
        try:
            with night:
                runs = [*night.record.get("flow_runs", []), flow_run.get_id()]
                lineage = lineage_of(config_path) | ({"base": base} if base else {})
                night.update(data=asdict(rows), lineage=lineage, flow_runs=runs)
                night.update(**_circumstances(home, config.name, turn))
                reach_decision(home, config, night, rows, turn)
                hours, deployed = config.promotion.approval_hours, bool(deployment.id)
                night.update(approval=after_decision(home, config.name, hours, ask=deployed))
        finally:
            if night.record["state"] != "interrupted":
                with night.stage("report"):
                    report(home, night.folder, night.record)
                announce(config.notify, night)
        return night.record


def _circumstances(home: Home, name: str, turn: Turn | None) -> dict[str, Any]:
    """For the report: when the night was due, and what the champion's monitor said last."""
    facts: dict[str, Any] = {"scheduled": turn.due.timestamp()} if turn else {}
    watched = monitor.latest(home, name)
    if watched:
        facts["monitor"] = {**watched, "windows": watched["windows"][-1:]}
    return facts
