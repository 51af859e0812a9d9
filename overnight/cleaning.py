"""Removes what no kept night needs: files, rows of databases, artifacts. What is kept, `overnight.retention` decides.

    done = clean(home, {"sentiment": Retention(nights=14)}, apply=True)
    done["sentiment"].items, done[SHARED].notes

Killed at any moment, it can be run again: the record of a night, by which all the rest is found, goes last.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from overnight.approval import open_questions
from overnight.config import Retention
from overnight.home import Home, read_json
from overnight.nights import DECIDED, UNFINISHED, Night, held, night_records, no_night, one_night_at_a_time
from overnight.retention import NightFacts, Retained, VersionFacts, keep_and_let_go
from overnight.search import studies
from overnight.services import server_process
from overnight.tracking import ledger, purge, registry, store
from overnight.tracking.runs import NIGHT
from overnight.unused import disk_usage, left_behind, remove, small, unused_files

SHARED = ""
"""Stands for a model's name where something belongs to all of them."""


@dataclass(frozen=True)
class Item:
    """How many of what go, and the bytes that frees on this machine's disk; None: only known afterwards."""

    what: str
    count: int
    bytes: int | None = None


@dataclass(frozen=True)
class Cleaned:
    """What went, or would go; `whole` are the nights that stay, None where none were looked at."""

    items: list[Item]
    whole: tuple[str, ...] | None
    notes: list[str]
    """What was left to others, one sentence each."""


def clean(
    home: Home,
    keeps: Mapping[str, Retention],
    *,
    apply: bool,
    forget_flow_runs: Callable[[list[str]], object] | None = None,
) -> dict[str, Cleaned]:
    """Removes what no kept night needs; a model whose night is running is left alone.

    Args:
        keeps: model → what stays of it.
        apply: False only looks.
        forget_flow_runs: deletes flow runs of Prefect by their ids; None: no server answers.

    Returns:
        What went of each model, and under `SHARED` of what they share.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    store.prepare(home)
    done: dict[str, Cleaned] = {}
    for name, keep in keeps.items():
        if held(home, name):
            done[name] = Cleaned([], None, [f"{name}: its night is running; left alone"])
            continue
        with one_night_at_a_time(home, name) if apply else nullcontext():
            done[name] = _clean_model(home, name, keep, apply, forget_flow_runs)
    whole = {name: cleaned.whole for name, cleaned in done.items() if cleaned.whole is not None}
    return {**done, SHARED: _clean_shared(home, whole, apply)}


def last_retention(home: Home, name: str) -> Retention:
    """The `retention` of the config that the model's last night ran with; the defaults where that says nothing."""
    for record in reversed(night_records(home, name)):
        config = read_json(home.nights / record["id"] / "config.json")
        if config:
            try:
                return Retention.model_validate(config.get("retention") or {})
            except ValidationError:  # of another version of overnight
                break
    return Retention()


@dataclass(frozen=True)
class _Plan:
    retained: Retained
    records: list[dict[str, Any]]
    versions: list[int]
    """Numbers of those that go."""
    things: list[purge.Thing]
    """Runs and models in MLflow that go."""
    aliased: dict[int, str | None]
    """Versions behind an alias, and the night of each."""
    gaps: bool
    """Whether the ledger has any, so that nobody knows which versions were champion."""


def _plan(home: Home, name: str, keep: int) -> _Plan:
    records = night_records(home, name)
    traces = purge.find_traces(home, name, DECIDED)
    versions = registry.versions(home, name) if name in registry.names(home) else []
    entries = ledger.read(home, name) if versions else []
    moves = [entry for entry in entries if entry.action in ledger.MOVES]
    named = [number for move in moves for number in (move.from_version, move.to_version)]
    named += [question.to_version for question in open_questions(entries)]
    needed = {number for number in named if number is not None}
    gaps = bool(ledger.problems(entries))
    if gaps:
        needed = {version.number for version in versions}
    sources = purge.sources(home)
    facts = [
        VersionFacts(v.number, v.tags.get(NIGHT), v.created, bool(v.aliases) or v.model_uri in sources.values())
        for v in versions
    ]
    retained = keep_and_let_go(_nights(records, traces), facts, needed, keep)
    going = {(name, number) for number in retained.versions}
    behind = {source.removeprefix("models:/") for version, source in sources.items() if version not in going}
    things = [
        thing
        for night in (*retained.gone, *retained.shrunk)
        if night in traces
        for thing in purge.things_of(home, traces[night], whole=night in retained.gone, needed=behind)
    ]
    numbers = [version.number for version in versions if version.number in retained.versions]
    aliased = {version.number: version.tags.get(NIGHT) for version in versions if version.aliases}
    return _Plan(retained, records, numbers, things, aliased, gaps)


def _clean_model(
    home: Home, name: str, keep: Retention, apply: bool, forget_flow_runs: Callable[[list[str]], object] | None
) -> Cleaned:
    plan, items, notes = _plan(home, name, keep.nights), [], []
    if plan.gaps:
        notes.append(f"{name}: its ledger has gaps, so all of its versions stay; `overnight doctor` tells more")
    if plan.things and purge.rows_stay(home):
        notes.append(f"{name}: the MLflow server has marked what went; `mlflow gc` there takes the rows out")
    files = unused_files(home, name, plan.records, plan.retained, plan.aliased, keep.scored_days)
    for what, paths in files.items():  # first, since a full disk takes no change of a database either
        items.append(Item(what, len(paths), disk_usage(paths)))
        for path in paths if apply else ():
            remove(path)
    if apply:
        with registry.one_writer(home, name):
            plan = _plan(home, name, keep.nights)  # somebody may have promoted a version meanwhile
            purge.purge_versions(home, name, plan.versions)
    items.append(Item("versions", len(plan.versions)))
    freed = disk_usage(filter(None, (thing.folder for thing in plan.things)))
    items.append(Item("runs and models in MLflow", len(plan.things), freed))
    if apply:
        purge.purge(home, plan.things)
    whole = plan.retained.whole
    if not studies.is_journal(home.study_storage):
        old_studies = studies.old_studies(home.study_storage, {name: whole})
        items.append(Item("studies", len(old_studies)))
        if apply:
            studies.drop_studies(home.study_storage, old_studies)
    old = [record for record in plan.records if record["id"] not in whole and record.get("flow_runs")]
    if old and forget_flow_runs is None:
        notes.append(f"{name}: no Prefect server answers; its own vacuum takes flow runs out when they are 90 days old")
    if forget_flow_runs is not None:
        items.append(Item("flow runs in Prefect", sum(len(record["flow_runs"]) for record in old)))
        for record in old if apply else ():
            forget_flow_runs(record["flow_runs"])
            Night(home.nights / record["id"], record).update(flow_runs=None)
    gone = [home.nights / record["id"] for record in plan.records if record["id"] in plan.retained.gone]
    items.append(
        Item("nights", len(gone), disk_usage(file for night in gone for file in night.glob("*") if small(file)))
    )
    for night in gone if apply else ():
        remove(night)
    return Cleaned(items, whole, notes)


def _clean_shared(home: Home, whole: Mapping[str, Collection[str]], apply: bool) -> Cleaned:
    """Studies in the journal file, the databases, what killed commands left: nothing of it while any night runs."""
    with no_night(home) as alone:
        if apply and not alone:
            return Cleaned([], None, ["a night is running: studies and databases are cleaned another time"])
        left, notes = left_behind(home), []
        going = studies.old_studies(home.study_storage, whole) if studies.is_journal(home.study_storage) else []
        items = [Item("studies", len(going)), Item("left by killed commands", len(left), disk_usage(left))]
        if apply:
            for path in left:
                remove(path)
            if going:
                studies.rewrite_journal(home.study_storage, going)
            notes += _vacuum(home)
        return Cleaned(items, None, notes)


def _nights(records: list[dict[str, Any]], traces: Mapping[str, purge.Trace]) -> list[NightFacts]:
    known = [
        NightFacts(
            record["id"],
            record["started"],
            # only the latest is continued: an older one's study has been overtaken
            open=record["state"] in UNFINISHED and record is records[-1],
            decided=record["state"] in DECIDED,
        )
        for record in records
    ]
    ids = {night.id for night in known}
    return known + [
        NightFacts(trace.night, trace.started, open=trace.running, decided=trace.decided)
        for trace in traces.values()
        if trace.night not in ids
    ]


def _vacuum(home: Home) -> list[str]:
    """Gives the free pages of the home's databases back to the disk."""
    notes, databases = [], []
    if home.embedded_tracking:
        databases.append(home.mlflow / "mlflow.db")
    if server_process(home.prefect / "server.json") is None:  # else its pages are left for it to use again
        databases.append(home.prefect / "prefect.db")
    for path in filter(Path.exists, databases):
        try:
            with closing(sqlite3.connect(path, timeout=5)) as database:
                if database.execute("pragma freelist_count").fetchone()[0]:
                    database.execute("vacuum")
                database.execute("pragma wal_checkpoint(truncate)")
        except sqlite3.OperationalError as error:
            notes.append(f"{path.name}: not compacted ({error})")
    return notes
