"""What Prefect does by itself: a silent night has crashed, a model whose data drifted gets a night."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse
    from prefect.events.schemas.automations import Automation, AutomationCore

DRIFT = "overnight.drift"
"""The event that says a model's data drifted."""
SILENCE = timedelta(seconds=180)
"""Six heartbeats. Also the price of a machine that slept: its night is shown as crashed until it ends."""
SILENT = "overnight: nights that fell silent have crashed"


@dataclass(frozen=True)
class Change:
    """What was found, or done; `kind` is created, updated, removed, unchanged, paused, crashed, cancelled."""

    kind: str
    what: str
    details: str = ""

    def __str__(self) -> str:
        return f"{self.kind:<9}  {self.what}{f': {self.details}' if self.details else ''}"


def model_resource(name: str) -> str:
    """The resource that events about a model name."""
    return f"overnight.model.{name}"


def drift(name: str) -> dict[str, Any]:
    """The trigger of a deployment, as prefect.yaml has it: an event on a model starts its night.

    Forced: what drifted is what is scored, so the training data may be as it was, and a night that trained on it
    already would be skipped.
    """
    return {
        "name": f"overnight: {name} drifted",
        "enabled": True,
        "type": "event",
        "posture": "Reactive",
        "expect": [DRIFT],
        "match": {"prefect.resource.id": model_resource(name)},
        "parameters": {"force": True},
    }


def trigger_in_words(name: str, resource: str, parameters: Mapping[str, Any] | None) -> str:
    """For comparing what is wanted with what a server holds."""
    return f"{name} on {resource} with {json.dumps(parameters or {}, sort_keys=True)}"


def triggers_of(client: SyncPrefectClient, deployment: DeploymentResponse) -> Iterator[str]:
    """The automations that start a deployment when its model's data drifted, in words."""
    for automation in client.read_automations_by_name(drift(deployment.name)["name"]):
        match = getattr(automation.trigger, "match", None)
        for action in automation.actions:
            if match is not None and getattr(action, "deployment_id", None) == deployment.id:
                resource = match.model_dump()["prefect.resource.id"]
                yield trigger_in_words(automation.name, resource, getattr(action, "parameters", None))


def silence(client: SyncPrefectClient, check: bool) -> Change:
    """Makes the server hold the automation on silent nights.

    Without it a night whose machine died would be running for ever, and its model's slot taken.
    """
    wanted = silent_nights()
    there = client.read_automations_by_name(SILENT)
    if there and _core(there[0]) == _core(wanted):
        return Change("unchanged", "automation", SILENT)
    if there:
        if not check:
            client.update_automation(there[0].id, wanted)
        return Change("updated", "automation", SILENT)
    if not check:
        client.create_automation(wanted)
    return Change("created", "automation", SILENT)


def silent_nights() -> AutomationCore:
    """The automation that sets a night to Crashed when it has sent no heartbeat for a while and did not end."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    from flows.retrain import retrain

    ends = ("Completed", "Failed", "Cancelled", "Crashed")
    trigger = EventTrigger(
        posture=Posture.Proactive,
        after={"prefect.flow-run.heartbeat"},
        expect={"prefect.flow-run.heartbeat", *(f"prefect.flow-run.{end}" for end in ends)},
        match={"prefect.resource.id": "prefect.flow-run.*"},
        match_related={"prefect.resource.role": "flow", "prefect.resource.name": retrain.name},
        for_each={"prefect.resource.id"},
        threshold=1,
        within=SILENCE,
    )
    message = f"no sign of life for {SILENCE.total_seconds():.0f} s: its process, or its machine, is gone"
    crash = ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)
    return AutomationCore(name=SILENT, trigger=trigger, actions=[crash])


def _core(automation: Automation | AutomationCore) -> str:
    facts = automation.model_dump(mode="json", include={"name", "trigger", "actions", "enabled"})
    trigger = {key: sorted(v) if isinstance(v, list) else v for key, v in facts["trigger"].items()}
    return json.dumps({**facts, "trigger": trigger}, sort_keys=True)
