"""Runs: one a night, one child a trial. A trial folder on disk is the spool that they are written from.

    night = open_night(home, experiment_id, "2026-11-23-0200", name="sentiment", tags={...})
    with Syncer(home, lambda: (experiment_id, night)) as syncer:
        syncer.watch(trial_folder)          # sent about every two seconds, replayed after an outage
    close_night(home, night, "FINISHED")

A trial folder holds `params.json` (written first), `metrics.jsonl` (appended to) and `result.json` (written last).
What MLflow has already got stands beside them in `tracked.json`; when that is lost, everything is sent again, which
changes nothing, because steps and times are those of the lines.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.home import Home, read_json, write_json
from overnight.tracking.store import TrackingUnavailable, client, reaching, redact

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param

NIGHT, TRIAL, STATE = "overnight.night", "overnight.trial", "overnight.state"
STATUS = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED", "stopped": "KILLED"}
# MLflow has no status for a pruned run; KILLED is what its pages set apart from success and from failure,
# and the tag overnight.state says which of the two it was
METRICS_PER_BATCH = 500
BYTES_PER_PASS = 1 << 20
VALUE_LENGTH = 500
NO_METRICS = {"step", "steps", "time", "kind", "evaluation"}


@dataclass(frozen=True)
class DatasetUsed:
    """A data set as MLflow shows it on a run: `digest` is our own sha256, `context` train, validation or test."""

    name: str
    digest: str
    source: str
    context: str
    rows: int


def metric_key(name: str) -> str:
    """The name as MLflow accepts it; names that differ stay different (labels may hold any character)."""
    clean = re.sub(r"[^\w/ .:-]", "_", name)
    clean = "/".join(part for part in clean.split("/") if part.strip(".")) or "_"
    if clean == name and len(name) <= 250:
        return name
    return f"{clean[:240]}-{hashlib.blake2b(name.encode(), digest_size=3).hexdigest()}"


def flat_numbers(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested facts, with its path as the name; `metrics` adds no level of its own."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from flat_numbers(value, prefix if name == "metrics" else f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + str(name), float(value)


def open_night(
    home: Home, experiment_id: str, night: str, *, name: str = "", params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The run id of a night: the run it already has, set to running again, or a new one.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    with reaching(home):
        mlflow = client(home)
        run_id = _find(home, experiment_id, f"tags.`{NIGHT}` = '{night}' and tags.`overnight.kind` = 'night'")
        if run_id is None:
            fixed = {
                NIGHT: night,
                "overnight.kind": "night",
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": "overnight",
                "mlflow.source.type": "JOB",
            }
            run = mlflow.create_run(experiment_id, tags=fixed | _short(tags or {}), run_name=f"{name} {night}".strip())
            run_id = run.info.run_id
            mlflow.log_batch(run_id, params=_params(params or {}))
        else:
            mlflow.update_run(run_id, status="RUNNING")
        return run_id


def log_night(
    home: Home,
    run_id: str,
    *,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, Any] | None = None,
    artifacts: Mapping[str, str | Path] | None = None,
    datasets: Iterable[DatasetUsed] = (),
) -> None:
    """Adds to a night's run. `artifacts` maps a file or folder on disk to the folder it goes to ("" is the top).

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag

    with reaching(home):
        mlflow = client(home)
        now = int(time.time() * 1000)
        numbers = [Metric(metric_key(key), value, now, 0) for key, value in flat_numbers(metrics or {})]
        for start in range(0, len(numbers), METRICS_PER_BATCH):
            mlflow.log_batch(run_id, metrics=numbers[start : start + METRICS_PER_BATCH])
        if tags:
            mlflow.log_batch(run_id, tags=[RunTag(key, value) for key, value in _short(tags, 5000).items()])
        inputs = [
            DatasetInput(
                Dataset(
                    # MLflow keeps one input for each name and digest: the sides of one data set need names of their own
                    name=f"{used.name}-{used.context}",
                    digest=used.digest[:32],
                    source_type="local",
                    source=json.dumps({"uri": redact(used.source)}),
                    profile=json.dumps({"num_rows": used.rows, "sha256": used.digest}),
                ),
                [InputTag("mlflow.data.context", used.context)],
            )
            for used in datasets
        ]
        if inputs:
            mlflow.log_inputs(run_id, inputs)
        for path, folder in (artifacts or {}).items():
            if Path(path).is_dir():
                mlflow.log_artifacts(run_id, str(path), str(folder) or None)
            else:
                mlflow.log_artifact(run_id, str(path), str(folder) or None)


def close_night(home: Home, run_id: str, status: str, *, tags: Mapping[str, Any] | None = None) -> None:
    """Ends a night's run; `status` is FINISHED, FAILED or KILLED.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    log_night(home, run_id, tags=tags)
    with reaching(home):
        client(home).set_terminated(run_id, status)


def heal(home: Home, experiment_id: str, nights: Collection[str] | None) -> list[str]:
    """Ends the runs that killed nights left open; only those of `nights`, by their ids, when that is given.

    Send what the trial folders still hold first (`sync_trial`): a trial with a result then gets its true status.

    Returns:
        The ids of the runs that were ended.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    with reaching(home):
        mlflow = client(home)
        healed = []
        for run in _search(home, experiment_id, f"attributes.status = 'RUNNING' and tags.`{NIGHT}` != ''"):
            if nights is None or run.data.tags[NIGHT] in nights:
                mlflow.set_tag(run.info.run_id, STATE, "killed")
                mlflow.set_tag(run.info.run_id, "overnight.healed", "the process of this night ended without a word")
                mlflow.set_terminated(run.info.run_id, "KILLED")
                healed.append(run.info.run_id)
        return healed


def pending(folder: Path) -> list[Path]:
    """The trial folders below `folder` of which MLflow has not got everything yet."""
    trials = (path.parent for path in sorted(folder.rglob("params.json")))
    return [trial for trial in trials if not (read_json(trial / "tracked.json") or {}).get("closed")]


def sync_trial(home: Home, experiment_id: str, parent_run_id: str, folder: Path) -> bool:
    """Sends what MLflow has not got yet of one trial folder; any number of times, from any process.

    Returns:
        Whether the trial is done and nothing is left to send.

    Raises:
        TrackingUnavailable: when MLflow does not answer; what was not sent is sent by the next call.
    """
    from filelock import FileLock, Timeout

    params = read_json(folder / "params.json")
    if params is None:
        return False
    tracked = read_json(folder / "tracked.json") or {}
    if tracked.get("closed"):
        return True
    try:
        with FileLock(folder / ".tracked.lock", timeout=0), reaching(home):
            return _Trial(home, experiment_id, parent_run_id, folder, params).send()
    except Timeout:
        return False


class _Trial:
    """One pass over one trial folder."""

    def __init__(self, home: Home, experiment_id: str, parent: str, folder: Path, params: dict[str, Any]):
        self.home, self.experiment_id, self.parent = home, experiment_id, parent
        self.folder, self.params = folder, params
        self.mlflow = client(home)
        self.tracked: dict[str, Any] = read_json(folder / "tracked.json") or {}

    def send(self) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self._attach()
            # the result is looked for first: what is written after the lines were read would be missed
            result = read_json(self.folder / "result.json")
            while self._send_lines():
                pass
            if result is not None:
                self._close(result)
        except MlflowException as error:
            run_id = self.tracked.get("run_id")
            if error.error_code == "RESOURCE_DOES_NOT_EXIST" and run_id:
                # another store, or removed for good: start over there
                self._remember(run_id=None, offset=0, process=None)
                return False
            if run_id is None or self.mlflow.get_run(run_id).info.lifecycle_stage != "deleted":
                raise
            self._remember(closed=True)  # someone deleted the run; that is their wish
        return bool(self.tracked.get("closed"))

    def _remember(self, **facts: Any) -> None:
        self.tracked |= facts
        write_json(self.folder / "tracked.json", self.tracked)

    def _attach(self) -> None:
        """Finds or makes the child run; a trial that goes on after a kill is running again."""
        if self.tracked.get("process") == os.getpid() and self.tracked.get("run_id"):
            return
        trial = f"{self.params.get('study', '')}/{self.params.get('number', 0)}"
        run_id = self.tracked.get("run_id") or _find(
            self.home,
            self.experiment_id,
            f"tags.`{TRIAL}` = '{trial}' and tags.`mlflow.parentRunId` = '{self.parent}'",
        )
        if run_id is None:
            tags = {
                "mlflow.parentRunId": self.parent,
                "mlflow.user": getpass.getuser(),
                "mlflow.source.name": "overnight",
                "mlflow.source.type": "JOB",
                TRIAL: trial,
                NIGHT: str(self.params.get("night", "")),
                "overnight.kind": "trial",
                STATE: "running",
            }
            started = _milliseconds(self.params.get("started"), self.folder / "params.json")
            name = f"trial-{int(self.params.get('number', 0)):02d}"
            run_id = self.mlflow.create_run(self.experiment_id, started, tags, name).info.run_id
            self._remember(run_id=run_id, offset=0)
        else:
            self.mlflow.update_run(run_id, status="RUNNING")
        settings = {**(self.params.get("training") or {}), **(self.params.get("params") or {})}
        self.mlflow.log_batch(run_id, params=_params(settings))
        self._remember(run_id=run_id, process=os.getpid())

    def _send_lines(self) -> bool:
        """Sends the whole lines of the next piece of the file; says whether there may be more."""
        path = self.folder / "metrics.jsonl"
        offset = int(self.tracked.get("offset") or 0)
        if not path.exists():
            return False
        if path.stat().st_size < offset:  # a resumed trial has cut the file back to its snapshot
            offset = 0
        with path.open("rb") as file:
            file.seek(offset)
            piece = file.read(BYTES_PER_PASS)
        whole = piece[: piece.rfind(b"\n") + 1]
        if not whole:
            return False
        metrics: list[Metric] = [metric for line in whole.splitlines() for metric in _metrics(line)]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self.mlflow.log_batch(self.tracked["run_id"], metrics=metrics[start : start + METRICS_PER_BATCH])
        self._remember(offset=offset + len(whole))
        return len(piece) == BYTES_PER_PASS

    def _close(self, result: dict[str, Any]) -> None:
        from mlflow.entities import Metric, RunTag

        run_id = self.tracked["run_id"]
        ended = _milliseconds(result.get("ended"), self.folder / "result.json")
        numbers = [
            Metric(metric_key(f"best/{key}"), value, ended, 0)
            for key, value in flat_numbers({k: v for k, v in result.items() if k != "params"})
        ]
        state = str(result.get("state", "failed"))
        tags = [RunTag(STATE, state)]
        if result.get("error"):
            tags.append(RunTag("overnight.error", str(result["error"])[:5000]))
        for start in range(0, len(numbers), METRICS_PER_BATCH):
            self.mlflow.log_batch(run_id, metrics=numbers[start : start + METRICS_PER_BATCH])
        self.mlflow.log_batch(run_id, tags=tags)
        self.mlflow.set_terminated(run_id, STATUS.get(state, "FAILED"), ended)
        self._remember(closed=True)


class Syncer:
    """Keeps MLflow up to date with trial folders, from a thread that training never waits for.

    Args:
        home: where the store is.
        parent: gives (experiment id, run id of the night); asked until it succeeds, so that a night can start
            while MLflow is away.
        say: takes the one line that tells of an outage, and the one that tells of its end.
        every: seconds between two passes.
    """

    def __init__(
        self, home: Home, parent: Callable[[], tuple[str, str]], *, say: Callable[[str], None], every: float = 2.0
    ):
        self._home, self._parent, self._say, self._every = home, parent, say, every
        self._ids: tuple[str, str] | None = None
        self._folders: list[Path] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._run, name="overnight-tracking", daemon=True)

    def start(self) -> Syncer:
        self._thread.start()
        return self

    def watch(self, folder: Path) -> None:
        """Adds a trial folder; adding it again does no harm."""
        with self._lock:
            if folder not in self._folders:
                self._folders.append(folder)

    def stop(self, timeout: float = 30.0) -> bool:
        """One last pass, at most `timeout` seconds long.

        Returns:
            Whether MLflow has got everything; what is left stays in the trial folders for the next night.
        """
        self._stop.set()
        self._thread.join(timeout)
        with self._lock:
            return not self._thread.is_alive() and not self._folders

    def __enter__(self) -> Syncer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            self._pass()
        self._pass()

    def _pass(self) -> None:
        with self._lock:
            folders = list(self._folders)
        try:
            if self._ids is None:
                self._ids = self._parent()
            for folder in folders:
                if sync_trial(self._home, *self._ids, folder):
                    with self._lock:
                        self._folders.remove(folder)
        except Exception as error:  # whatever it is, training goes on; the folders keep what was not sent
            if not self._away:
                reason = error if isinstance(error, TrackingUnavailable) else f"{type(error).__name__}: {error}"
                self._say(f"{reason}; training goes on, its records are sent later")
            self._away = True
        else:
            if self._away:
                self._say(f"MLflow at {redact(self._home.tracking_uri)} answers again")
            self._away = False


def _metrics(line: bytes) -> Iterator[Metric]:
    """The metrics of one line; a line that a kill cut in two is passed over."""
    from mlflow.entities import Metric

    try:
        facts = json.loads(line)
        step, moment = int(facts.get("step") or 0), int(float(facts["time"]) * 1000)
    except (ValueError, TypeError, KeyError, AttributeError):
        return
    evaluation = facts.get("kind") == "evaluation"
    prefix = "validation/" if evaluation else "train/"
    for key, value in flat_numbers({name: fact for name, fact in facts.items() if name not in NO_METRICS}):
        key = key.removeprefix("validation_") if evaluation else key
        if evaluation and key == "epoch":
            continue
        yield Metric(metric_key(prefix + key), value if math.isfinite(value) else math.nan, moment, step)


def _short(facts: Mapping[str, Any], length: int = VALUE_LENGTH) -> dict[str, str]:
    """Values as MLflow's tables can hold them; what is nested belongs into an artifact and is left out."""
    texts = {key: str(value) for key, value in facts.items() if not isinstance(value, Mapping) and value is not None}
    return {key: text if len(text) <= length else text[: length - 1] + "…" for key, text in texts.items()}


def _params(facts: Mapping[str, Any]) -> list[Param]:
    """As many parameters as MLflow takes at once; the whole config is an artifact."""
    from mlflow.entities import Param

    return [Param(metric_key(key), value) for key, value in list(_short(facts).items())[:100]]


def _milliseconds(moment: Any, file: Path) -> int:
    """A time written as epoch seconds or ISO 8601; absent: when the file was written."""
    if isinstance(moment, int | float):
        return int(moment * 1000)
    try:
        return int(datetime.fromisoformat(moment).timestamp() * 1000)
    except (TypeError, ValueError):
        return int(file.stat().st_mtime * 1000)


def _search(home: Home, experiment_id: str, condition: str) -> Iterator[Any]:
    token = None
    while True:
        page = client(home).search_runs([experiment_id], condition, max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _find(home: Home, experiment_id: str, condition: str) -> str | None:
    runs = client(home).search_runs([experiment_id], condition, max_results=1)
    return runs[0].info.run_id if runs else None
