"""A night: one execution of the retraining flow, its folder and its record.

    nights/<id>/night.json      the record, rewritten as the night proceeds; the report is drawn from it
    nights/<id>/config.json     the configuration as it was
    nights/<id>/trials/…        one folder a trial
    nights/<id>/quarantine.parquet, report.html, …

A night that was killed, failed or was interrupted is continued by the next run that has the same data and config.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from overnight.config import Config, config_hash
from overnight.errors import Complaint, DataRefused, UserError, nearest
from overnight.home import Home, read_json, take_lock, write_json
from overnight.progress import emit

if TYPE_CHECKING:
    from overnight.tracking.registry import Version

# what a night's `state` can be: the first three may be continued, the others are its end
UNFINISHED = ("running", "failed", "interrupted")
DECIDED = ("promoted", "kept", "waiting")
KILLED = "its process ended without a word"
"""Why a night is `interrupted` that nobody interrupted."""
RECORD = "night.json"
EVERY = ".every"
"""The lock that the nights of all models share; no model's name begins with a dot."""


class Night:
    """One night; use it as a context, which records how it ended.

    `record` holds what has become known: the sections that the report shows.
    """

    def __init__(self, folder: Path, record: dict[str, Any]):
        self.folder, self.record = folder, record

    @property
    def id(self) -> str:
        return str(self.record["id"])

    def update(self, **facts: Any) -> None:
        """Adds facts to the record, on disk at once; a fact that is None is taken out."""
        self.record.update(facts)
        for name in [name for name, fact in self.record.items() if fact is None]:
            del self.record[name]
        write_json(self.folder / RECORD, self.record)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, as `timed`, and keeps it in the record."""
        try:
            with timed(self.record.setdefault("stages", {}), name):
                yield
        finally:
            self.update()

    def __enter__(self) -> Night:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = time.time()
        if isinstance(error, DataRefused):
            self.update(state="refused", why=str(error))
        elif isinstance(error, Exception):
            self.update(state="failed", why=str(error) or type(error).__name__)
        elif error is not None:
            self.update(state="interrupted", why="interrupted")
        self.update(ended=ended, next=next_steps(self.record), overhead=_overhead(self.record, ended))


@contextmanager
def timed(stages: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a stage to `stages` and tells whoever watches; a continued night's stages add up."""
    emit(stage=name, state="running")
    begun = time.monotonic()
    try:
        yield
    finally:
        seconds = time.monotonic() - begun
        stages[name] = round(stages.get(name, 0.0) + seconds, 3)
        emit(stage=name, state="done", seconds=seconds)


def begin_night(
    home: Home, config: Config, fingerprint: str, *, forced: bool, stages: Mapping[str, float] | None = None
) -> Night:
    """A new night, or the unfinished one with the same data and config, to be continued."""
    # only the latest: an older one's study has been overtaken
    for record in night_records(home, config.name)[-1:]:
        if same_work(record, config, fingerprint) and record["state"] in UNFINISHED:
            night = Night(home.nights / record["id"], record)
            before = record.get("stages", {})
            added = {name: round(before.get(name, 0.0) + s, 3) for name, s in (stages or {}).items()}
            times = record.get("continued", 0) + 1
            night.update(state="running", continued=times, why=None, ended=None, stages={**before, **added})
            return night
    now = datetime.now(UTC)
    folder = _new_folder(home, f"{config.name}-{now:%Y%m%d-%H%M%S}")
    facts = {"id": folder.name, "model": config.name, "state": "running", "started": now.timestamp(), "forced": forced}
    night = Night(folder, {**facts, "fingerprint": fingerprint, "config_hash": config_hash(config)})
    write_json(folder / "config.json", config.model_dump(mode="json"))
    config_facts = {"description": config.description, "problem": config.problem, "base": config.model.base}
    night.update(config=config_facts, mode=config.promotion.mode, stages=dict(stages or {}))
    if config.notify:
        night.update(notified={})
    return night


def unchanged(home: Home, config: Config, fingerprint: str, champion: Callable[[], Version | None]) -> str | None:
    """Why there is nothing to do, or None: the same data under the same config have been decided about.

    The home's own records answer first, since they cost no MLflow; `champion` is asked where they know nothing.
    """
    decided = [record for record in night_records(home, config.name) if record["state"] in DECIDED]
    kept = not home.embedded_tracking or (home.mlflow / "mlflow.db").exists()  # else the versions are gone
    if decided and kept and same_work(decided[-1], config, fingerprint):
        last = decided[-1]
        version = (last.get("candidate") or {}).get("version")
        outcome = {"promoted": "was promoted", "kept": "was kept out of production", "waiting": "waits for a person"}
        return (
            f"the data and the config are those of night {last['id']}, whose version {version} "
            f"{outcome[last['state']]}; --force trains all the same"
        )
    found = champion()
    if found and found.tags.get("overnight.fingerprint") == fingerprint:
        if found.tags.get("overnight.config_hash") == config_hash(config):
            return (
                f"the champion, version {found.number}, was trained on this data with this config; --force trains anew"
            )
    return None


def same_work(record: dict[str, Any], config: Config, fingerprint: str) -> bool:
    """Whether a night's record is about the same data under the same config."""
    return bool(record.get("fingerprint") == fingerprint and record.get("config_hash") == config_hash(config))


def night_records(home: Home, name: str | None = None) -> list[dict[str, Any]]:
    """Records of a model's nights (or of all), oldest first."""
    found = [read_json(path) for path in home.nights.glob(f"*/{RECORD}")]
    records = [r for r in found if r and "id" in r and (name is None or r.get("model") == name)]
    return sorted(records, key=lambda r: (r["started"], r["id"]))


def find_night(home: Home, wanted: str | None) -> dict[str, Any]:
    """The record of the named night, or of the last one.

    Raises:
        UserError: when there is none of that name, or none at all.
    """
    records = night_records(home)
    if not records:
        raise UserError(Complaint(str(home.nights), "no night has run yet; start one with `overnight run CONFIG`"))
    if wanted is None:
        return records[-1]
    for record in records:
        if record["id"] == wanted:
            return record
    ids = [r["id"] for r in reversed(records)]
    raise UserError(Complaint("night", "no such night", repr(wanted), nearest(wanted, ids) or ids[0]))


def last_accepted(home: Home, name: str) -> dict[str, Any] | None:
    """The data facts of the last night whose data were accepted, for comparing label shares."""
    for record in reversed(night_records(home, name)):
        facts = record.get("data", {}).get("facts")
        if facts and record["state"] in DECIDED:
            return dict(facts)
    return None


@contextmanager
def one_night_at_a_time(home: Home, name: str) -> Iterator[None]:
    """Holds the model for this process; the kernel gives it back when the process dies.

    Raises:
        UserError: when another process holds it, saying which.
    """
    path = home.folder("locks") / f"{re.sub(r'[^a-z0-9_-]', '_', name)}.lock"
    with open(path, "a+") as lock, open(path.with_name(EVERY), "a+") as every:
        if not take_lock(lock):
            lock.seek(0)
            raise UserError(
                Complaint(name, "another night of this model is running", f"process {lock.read().strip() or '?'}")
            )
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        fcntl.flock(every, fcntl.LOCK_SH)
        yield


@contextmanager
def no_night(home: Home) -> Iterator[bool]:
    """Lets nights that would start wait until the block is over; False when one of any model is running."""
    with open(home.folder("locks") / EVERY, "a+") as every:
        try:
            fcntl.flock(every, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def held(home: Home, name: str) -> bool:
    """Whether a live process holds the model."""
    path = home.root / "locks" / f"{name}.lock"
    if not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def next_steps(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """What a person may want to do about a night, each with the command to paste."""
    name, state = record["model"], record["state"]
    config = record.get("lineage", {}).get("config", "CONFIG")
    version = (record.get("candidate") or {}).get("version")
    if state == "waiting":
        answer = f"{name} {version} --reason '…'"
        steps = [
            {"text": f"make version {version} the champion", "command": f"overnight promote {answer}"},
            {"text": "or keep it out", "command": f"overnight refuse {answer}"},
        ]
        asked = record.get("approval")
        if asked:
            until = datetime.fromtimestamp(asked["until"]).astimezone()
            text = f"or answer in Prefect's pages until {until:%Y-%m-%d %H:%M %Z}"
            steps.append({"text": text, "command": asked["page"]})
        return steps
    if state == "promoted":
        undo = (
            [{"text": "take it back", "command": f"overnight rollback {name} --reason '…'"}]
            if record.get("champion")
            else []
        )
        return [{"text": "look at the runs and the version", "command": "overnight ui"}, *undo]
    if state == "kept":
        return [{"text": "compare the versions", "command": f"overnight models {name}"}]
    if state == "refused":
        return [{"text": "look at the data alone, after mending it", "command": f"overnight validate {config}"}]
    return [{"text": "continue from where it stopped", "command": f"overnight run {config}"}]


def _overhead(record: Mapping[str, Any], ended: float) -> float | None:
    """Seconds since this process started that no stage accounts for; unknown for a night of several processes."""
    if record.get("continued"):
        return None
    return round(ended - psutil.Process().create_time() - sum(record.get("stages", {}).values()), 2)


def _new_folder(home: Home, name: str) -> Path:
    nights = home.folder("nights")
    for suffix in ("", *(f"-{n}" for n in range(2, 100))):
        try:
            (nights / f"{name}{suffix}").mkdir()
            return nights / f"{name}{suffix}"
        except FileExistsError:
            continue
    raise UserError(Complaint(str(nights), "100 nights began in the same second"))
