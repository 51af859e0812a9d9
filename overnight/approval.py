"""A version that waits for a person: the question, its answer, and the record of the night that asked.

The ledger holds all of it, wherever the answer is given. The entry of a night whose gate says `wait` is the question;
the next one that makes the version the champion, or refuses it, is its answer. Nights' records follow the ledger.

    question = waiting(home, "sentiment", 7)
    refuse(home, question, reason="wrong on weekend chats")
    settle(home, "sentiment")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from overnight.errors import Complaint, UserError
from overnight.home import Home
from overnight.nights import Night, next_steps, night_records
from overnight.notify import announce_answer
from overnight.progress import emit
from overnight.report import night_markdown, write_report
from overnight.tracking import ledger, registry
from overnight.tracking.ledger import MOVES, OURSELVES, Entry
from overnight.tracking.night import retell_night


def answer_to(entries: Sequence[Entry], question: Entry) -> Entry | None:
    """The entry that answers a question; None while it is open."""
    later = [e for e in entries if e.n > question.n and e.to_version == question.to_version]
    return next((e for e in later if e.action in (*MOVES, "refuse")), None)


def said_yes(answer: Entry) -> bool:
    """Whether the version became the champion, also when that was by other means than a promotion."""
    return answer.action in MOVES


def open_questions(entries: Sequence[Entry]) -> list[Entry]:
    """What nobody has answered yet, oldest first."""
    asked = [e for e in entries if e.action == "keep" and e.gate and e.gate.get("outcome") == "wait"]
    return [e for e in asked if answer_to(entries, e) is None]


def waiting(home: Home, name: str, version: int) -> Entry:
    """The open question about a version.

    Raises:
        UserError: no such model or version, or it waits for nobody.
    """
    registry.version_of(home, name, version)
    questions = open_questions(ledger.read(home, name))
    for question in questions:
        if question.to_version == version:
            return question
    others = ", ".join(str(question.to_version) for question in questions)
    rule = f"waits for nobody's word; {f'version {others} does' if others else 'no version does'}"
    raise UserError(Complaint(f"{name} version {version}", rule))


def promote(
    home: Home, name: str, version: int, *, reason: str, smoke: Callable[[Path], None], who: str | None = None
) -> Entry:
    """Makes a version the champion, as `ledger.promote`; where it waits, that is its answer."""
    for question in open_questions(ledger.read(home, name)):
        if question.to_version == version:
            return approve(home, question, reason=reason, smoke=smoke, who=who)
    return ledger.promote(home, name, version, reason=reason, smoke=smoke, who=who)


def approve(
    home: Home, question: Entry, *, reason: str, smoke: Callable[[Path], None], who: str | None = None
) -> Entry:
    """Makes the version the champion; raises as `ledger.promote`. A question that was answered keeps its answer."""
    name, number = question.name, int(question.to_version or 0)
    with registry.one_writer(home, name):
        answer = answer_to(ledger.read(home, name), question)
        return answer or ledger.promote(
            home, name, number, reason=reason, smoke=smoke, who=who, night=question.night, gate=question.gate
        )


def refuse(home: Home, question: Entry, *, reason: str, who: str | None = None) -> Entry:
    """Keeps the version out; the champion stays. A question that was answered keeps its answer."""
    with registry.one_writer(home, question.name):
        answer = answer_to(ledger.read(home, question.name), question)
        return answer or ledger.record(
            home,
            question.name,
            "refuse",
            from_version=question.from_version,
            to_version=question.to_version,
            reason=reason,
            who=who,
            night=question.night,
        )


def nobody(hours: float) -> str:
    """Why a version is kept out for which nobody has spoken."""
    return f"nobody approved within {hours:g} h; the champion stays"


def settle(home: Home, name: str, *, overdue: bool = False) -> list[str]:
    """Closes the questions that have become moot, and lets the nights' records follow the ledger.

    A question is moot when a newer version waits, or when the champion is another than the one of its comparison. When
    the champion is the very version that waits, the ledger does not know yet, and `ledger.observe` gives the answer.

    Args:
        overdue: closes those too whose time is over; not while an answer may be on its way.

    Returns:
        What was done, one line each.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    records = {r["id"]: r for r in night_records(home, name) if r["state"] == "waiting"}
    with registry.one_writer(home, name):
        questions = open_questions(ledger.read(home, name))
        champion = registry.champion(home, name) if questions else None
        number = champion.number if champion else None
        for question in questions:
            if question.to_version == number:
                continue
            why = _moot(question, questions[-1], number) or (_late(records.get(question.night)) if overdue else None)
            if why:
                refuse(home, question, reason=why, who=OURSELVES)
        entries = ledger.read(home, name) if questions or records else []
    done = []
    for question in entries:
        record, answer = records.get(question.night), answer_to(entries, question)
        if record and answer and question.action == "keep":
            _follow(home, record, answer)
            done.append(f"night {record['id']}: version {answer.to_version} {record['why']}")
    return done


def _moot(question: Entry, last: Entry, champion: int | None) -> str | None:
    if last.to_version != question.to_version:
        return f"superseded: version {last.to_version} waits now"
    if champion != question.from_version:
        return f"superseded: the champion is {f'version {champion}' if champion else 'gone'} by now"
    return None


def _late(record: Mapping[str, Any] | None) -> str | None:
    asked = (record or {}).get("approval")
    return nobody(asked["hours"]) if asked and asked["until"] < time.time() else None


def _follow(home: Home, record: dict[str, Any], answer: Entry) -> None:
    """Writes the answer into the record of the night, its page and its run in MLflow; tells those who want to know."""
    promoted, folder = said_yes(answer), home.nights / record["id"]
    said = f"{'approved' if promoted else 'refused'} by {answer.who}: {answer.reason}"
    facts = {"state": "promoted" if promoted else "kept", "why": answer.reason if answer.who == OURSELVES else said}
    night = Night(folder, record)
    night.update(**facts, next=next_steps(record | facts))
    try:
        page = write_report(cast(Any, record), folder)
        retell_night(home, record, night_markdown(cast(Any, record)), {page: "report", folder / "night.json": "report"})
    except Exception as error:
        emit(warning=f"the report of {record['id']} could not be drawn again: {type(error).__name__}: {error}")
    announce_answer(night)
