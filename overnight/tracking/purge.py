"""What nights left in MLflow, and its removal for good: rows and bytes.

    for trace in find_traces(home, "sentiment", decided=("promoted", "kept")).values():
        purge(home, things_of(home, trace, whole=False, needed={...}))
    purge_versions(home, "sentiment", [1, 2])

`MlflowClient.delete_run` and its like only mark. `mlflow gc` removes what is marked, but with it all else in the store
that is marked, such as an experiment that somebody may want to restore. So here bytes are removed first, and then rows
are marked and taken out one by one, by what `mlflow gc` itself calls. A server offers no such call: there the bytes
go, and the marked rows wait for its own `mlflow gc`.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from overnight.home import Home
from overnight.tracking import registry
from overnight.tracking.runs import NIGHT
from overnight.tracking.store import client, globally, reaching

MISSING = "RESOURCE_DOES_NOT_EXIST"


@dataclass(frozen=True)
class Thing:
    """A run or a logged model, and where its artifacts are."""

    kind: Literal["run", "logged_model"]
    id: str
    artifacts: str

    @property
    def folder(self) -> Path | None:
        """The artifacts, when they are on this machine."""
        parts = urlsplit(self.artifacts)
        return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


@dataclass
class Trace:
    """What one night left in MLflow."""

    night: str
    started: float
    """Unix seconds."""
    running: bool = False
    decided: bool = False
    own: Thing | None = None
    """Its own run; `trials` are those of its trials."""
    trials: list[Thing] = field(default_factory=list)
    models: list[Thing] = field(default_factory=list)
    """What it registered, and what a killed registration left."""
    made: tuple[str, ...] = ()
    """Ids of the models that its run names as its outputs; some may be gone."""


def find_traces(home: Home, name: str, decided: Collection[str]) -> dict[str, Trace]:
    """Night → what it left in the model's experiment.

    Args:
        decided: values of the tag `overnight.state` that mean that a night decided.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    from mlflow.entities import ViewType

    with reaching(home):
        mlflow = client(home)
        experiment = mlflow.get_experiment_by_name(name)
        if experiment is None:
            return {}
        place = [experiment.experiment_id]
        # on a server, what is marked has been dealt with; in a database it may be the work of a killed command
        view = ViewType.ACTIVE_ONLY if rows_stay(home) else ViewType.ALL
        traces: dict[str, Trace] = {}
        for run in _pages(mlflow.search_runs, place, f"tags.`{NIGHT}` != ''", run_view_type=view):
            info, tags = run.info, run.data.tags
            trace = traces.setdefault(tags[NIGHT], Trace(tags[NIGHT], info.start_time / 1000))
            trace.started = min(trace.started, info.start_time / 1000)
            thing = Thing("run", info.run_id, info.artifact_uri)
            if tags.get("overnight.kind") == "trial":
                trace.trials.append(thing)
                continue
            trace.own = thing
            trace.running = info.status == "RUNNING" and info.lifecycle_stage == "active"
            trace.decided = tags.get("overnight.state") in decided
            trace.made = tuple(made.model_id for made in run.outputs.model_outputs) if run.outputs else ()
        owners = {trace.own.id: trace for trace in traces.values() if trace.own}
        for model in _pages(mlflow.search_logged_models, place):
            if model.source_run_id in owners:
                thing = Thing("logged_model", model.model_id, model.artifact_location)
                owners[model.source_run_id].models.append(thing)
        return traces


def sources(home: Home) -> dict[tuple[str, int], str]:
    """(Model, version) → what it is made of, over the whole registry: `models:/m-…`, or `models:/<name>/<number>` for
    a copy, which shares the bytes of that version.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    with reaching(home):
        found = _pages(client(home).search_model_versions, filter_string=None)
        return {(version.name, int(version.version)): version.source or "" for version in found}


def things_of(home: Home, trace: Trace, *, whole: bool, needed: Collection[str]) -> list[Thing]:
    """What of a night is to be purged, in the order in which that can be interrupted.

    Args:
        whole: False leaves the night's own run, by which a version tells where it comes from.
        needed: ids of the models that are behind a version that stays.
    """
    known = {model.id for model in trace.models}
    with reaching(home):
        marked = [_marked(home, id) for id in trace.made if id not in known]
    models = [model for model in [*trace.models, *filter(None, marked)] if model.id not in needed]
    return [*models, *trace.trials, *([trace.own] if whole and trace.own else [])]


def purge(home: Home, things: Iterable[Thing]) -> None:
    """Removes runs and models with their artifacts.

    Raises:
        TrackingUnavailable: when MLflow or the artifact store does not answer.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    store = _store(home)
    with reaching(home):
        for thing in things:
            if thing.folder is not None:
                if thing.folder.exists():
                    shutil.rmtree(thing.folder)
                with suppress(OSError):  # the folder that bears the id, when nothing else is in it
                    thing.folder.parent.rmdir()
            else:
                with globally(home):  # artifacts behind a server are found through the global URI
                    get_artifact_repository(thing.artifacts).delete_artifacts()
            for call in (getattr(store, f"delete_{thing.kind}"), getattr(store, f"_hard_delete_{thing.kind}", None)):
                try:
                    if call is not None:
                        call(thing.id)
                except MlflowException as error:
                    if error.error_code != MISSING:
                        raise


def purge_versions(home: Home, name: str, numbers: Iterable[int]) -> None:
    """Deletes versions with their tags, which MLflow would keep for ever; their bytes are the night's to lose.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    with registry.one_writer(home, name), reaching(home):
        mlflow = client(home)
        for number in numbers:
            tags = set(registry.version_of(home, name, number).tags)
            # first the mark of completion: half-deleted, it must not become champion; the night's name is left, by
            # which the next command finds what a killed one left
            for key in sorted(tags - {NIGHT}, key=lambda key: key != registry.COMPLETE):
                mlflow.delete_model_version_tag(name, str(number), key)
            mlflow.delete_model_version(name, str(number))


def rows_stay(home: Home) -> bool:
    """Whether MLflow is a server, on which only its own `mlflow gc` takes marked rows out of the database."""
    return not hasattr(_store(home), "_hard_delete_run")


def _store(home: Home) -> Any:
    return client(home)._tracking_client.store


def _marked(home: Home, id: str) -> Thing | None:
    """A model that was marked as deleted, and that a killed command did not get to remove."""
    from mlflow.exceptions import MlflowException

    if rows_stay(home):
        return None
    try:
        return Thing("logged_model", id, _store(home).get_logged_model(id, allow_deleted=True).artifact_location)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        return None


def _pages(search: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(*arguments, max_results=1000, page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return
