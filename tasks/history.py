"""What Prefect remembers of old nights, and its removal, through the client that knows the server's address and key."""

from __future__ import annotations

from collections.abc import Iterable
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.exceptions import ObjectNotFound, PrefectException

from overnight.errors import Complaint, NightFailed

PAGE = 200


def delete_flow_runs(ids: Iterable[str]) -> None:
    """Deletes flow runs with their task runs, logs and artifacts; those that are gone already are passed over.

    Raises:
        NightFailed: Prefect refuses or does not answer.
    """
    try:
        _delete(ids)
    except (PrefectException, httpx.HTTPError) as error:
        raise NightFailed(Complaint("Prefect", f"{type(error).__name__}: {' '.join(str(error).split())}")) from None


def _delete(ids: Iterable[str]) -> None:
    with get_client(sync_client=True) as client:
        for id in map(UUID, ids):
            # the server deletes task runs and logs with the run, but artifacts only by and by
            mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[id]))
            while artifacts := client.read_artifacts(artifact_filter=mine, limit=PAGE):
                for artifact in artifacts:
                    client.delete_artifact(artifact.id)
            try:
                client.delete_flow_run(id)
            except ObjectNotFound:
                continue
