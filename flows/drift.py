"""The event that says a model's data drifted; an automation of Prefect starts the retraining night.

tell_drift("sentiment", {"version": 3, "windows": 3})     # an API must be configured: $PREFECT_API_URL
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overnight.errors import Complaint, NightFailed

DRIFT = "overnight.drift"


def tell_drift(name: str, facts: Mapping[str, Any]) -> None:
    """Emits `overnight.drift` about the resource `overnight.model.<name>`; returns when the server has it.

    By a request of its own: the worker by which Prefect emits events tells nobody that one was lost.

    Raises:
        NightFailed: Prefect refuses or does not answer.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource
    from prefect.exceptions import PrefectException

    resource = {"prefect.resource.id": f"overnight.model.{name}", "prefect.resource.name": name}
    event = Event(event=DRIFT, resource=Resource.model_validate(resource), payload=dict(facts))
    try:
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[event.model_dump(mode="json")])
    except (PrefectException, httpx.HTTPError) as error:
        raise NightFailed(Complaint("Prefect", f"{type(error).__name__}: {' '.join(str(error).split())}")) from None
