"""The event that says a model's data drifted; an automation of Prefect starts the retraining night.

heard = tell_drift("sentiment", {"version": 3, "recent": {…}})     # an API must be configured: $PREFECT_API_URL
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flows.automations import DRIFT, model_resource
from overnight.errors import Complaint, NightFailed

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events import Resource
    from prefect.events.schemas.automations import Automation


def tell_drift(name: str, facts: Mapping[str, Any]) -> bool:
    """Emits `overnight.drift` about the resource `overnight.model.<name>`; returns when the server has it.

    By a request of its own: the worker by which Prefect emits events tells nobody that one was lost.

    Returns:
        Whether an automation listens. Where none does, nothing is emitted: the event would be gone for good.

    Raises:
        NightFailed: Prefect refuses or does not answer.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource
    from prefect.exceptions import PrefectException

    labels = {"prefect.resource.id": model_resource(name), "prefect.resource.name": name}
    resource = Resource.model_validate(labels)
    event = Event(event=DRIFT, resource=resource, payload=dict(facts))
    try:
        with get_client(sync_client=True) as client:
            if not any(_listens(automation, resource) for automation in _automations(client)):
                return False
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
            return True
    except (PrefectException, httpx.HTTPError, RuntimeError) as error:  # the last one: its version cannot be asked for
        raise NightFailed(Complaint("Prefect", f"{type(error).__name__}: {' '.join(str(error).split())}")) from None


def _automations(client: SyncPrefectClient) -> Iterator[Automation]:
    count = 0
    while page := client.read_automations(limit=200, offset=count):
        count += len(page)
        yield from page


def _listens(automation: Automation, resource: Resource) -> bool:
    """Also one that a person made, which starts no night but writes to somebody."""
    from prefect.events.schemas.automations import EventTrigger
    from prefect.events.schemas.events import ResourceSpecification

    trigger = automation.trigger
    if not automation.enabled or not isinstance(trigger, EventTrigger) or DRIFT not in trigger.expect:
        return False
    return ResourceSpecification.model_validate(trigger.match).matches(resource)
