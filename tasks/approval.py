"""A waiting version in Prefect: the run that asks in its pages, what it is told, and how it ends when others answer."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Completed, Scheduled, State
from prefect.utilities.urls import url_for

from overnight import approval
from overnight.errors import Complaint, UserError
from overnight.home import Home
from overnight.nights import night_records
from overnight.progress import emit
from overnight.report import night_markdown
from overnight.scoring import smoke_in_child
from overnight.tracking import ledger, registry, store
from overnight.tracking.ledger import Entry
from tasks.model import AWAY, server_away

FLOW = "approve"


def after_decision(home: Home, name: str, hours: float, *, ask: bool) -> dict[str, Any] | None:
    """Closes the questions that a night made moot, and asks the open one in Prefect's pages when somebody serves them.

    The night is decided by now: whatever breaks here is said, and changes nothing.

    Args:
        hours: how long a person may answer.
        ask: whether this night runs from a deployment, so that there is a worker to run the one that asks.

    Returns:
        `run`, `page`, `until` and `hours` of the run that asks; None where there is none.
    """
    try:
        approval.settle(home, name)
        questions = resolve(home, name)
        return request_approval(questions[-1], hours) if questions and ask else None
    except Exception as error:
        emit(warning=f"waiting versions were not looked after: {type(error).__name__}: {error}")
        return None


def request_approval(question: Entry, hours: float) -> dict[str, Any] | None:
    """Makes two runs of the deployment `approve/NAME`: one that asks now, one that closes the question in the end.

    The same question is never asked by a second run.

    Returns:
        As `after_decision`; None when there is no such deployment.
    """
    until = datetime.fromtimestamp(question.time, UTC) + timedelta(hours=hours)
    facts = {"model": question.name, "version": question.to_version, "question": question.id, "hours": hours}
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"{FLOW}/{question.name}")
        except ObjectNotFound:
            return None

        def run(key: str, state: State | None = None, **more: Any) -> Any:
            return client.create_flow_run_from_deployment(
                deployment.id,
                parameters=facts | more,
                state=state,
                tags=[_tag(question.name)],
                idempotency_key=f"{question.id}-{key}",
            )

        asking = run("ask")
        run("close", Scheduled(scheduled_time=until), last_call=True)
    page = url_for(asking) or ""
    return {"run": str(asking.id), "page": page, "until": until.timestamp(), "hours": hours}


def resolve(home: Home, name: str) -> list[Entry]:
    """Ends the runs whose question has been answered elsewhere; returns the questions that are open.

    A run without a process, waiting for a person or for its time, needs no more than another state. Those of questions
    that are not in this ledger belong to another installation on the same server.
    """
    entries = ledger.read(home, name)
    known = {entry.id: entry for entry in entries}
    idle = FlowRunFilterStateType(any_=[StateType.PAUSED, StateType.SCHEDULED])
    tags = FlowRunFilterTags(all_=[_tag(name)])
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=tags, state=FlowRunFilterState(type=idle)), limit=200
        )
        for run in runs:
            question = known.get(str(run.parameters.get("question")))
            answer = approval.answer_to(entries, question) if question else None
            if answer:
                client.set_flow_run_state(run.id, _ended(answer, closing=bool(run.parameters.get("last_call"))))
    return approval.open_questions(entries)


@task(name="look", cache_policy=NO_CACHE, retries=5, retry_delay_seconds=AWAY, retry_condition_fn=server_away)
def look(home: Home, name: str, question: str) -> tuple[Entry, Entry | None]:
    """Closes the questions that have become moot; returns the one of this id, and its answer so far.

    Raises:
        UserError: this installation's ledger has no such entry.
    """
    store.prepare(home)
    ledger.observe(home, name, smoke=partial(smoke_in_child, home))  # it may be the champion by other means
    approval.settle(home, name)
    entries = ledger.read(home, name)
    for entry in entries:
        if entry.id == question:
            return entry, approval.answer_to(entries, entry)
    raise UserError(Complaint(name, f"the ledger of {home.root} has no entry of this id", question))


@task(name="newer", cache_policy=NO_CACHE, retries=5, retry_delay_seconds=AWAY, retry_condition_fn=server_away)
def newer_candidate(home: Home, question: Entry) -> int | None:
    """The newest candidate where that is another version than the one asked about."""
    newest = registry.by_alias(home, question.name, registry.CANDIDATE)
    return None if newest is None or newest.number == question.to_version else newest.number


@task(name="answer", cache_policy=NO_CACHE, retries=5, retry_delay_seconds=AWAY, retry_condition_fn=server_away)
def answer(home: Home, question: Entry, approved: bool, reason: str, who: str) -> Entry:
    """Does what a person said, unless somebody else was quicker; retried, since a server may be away for minutes."""
    if not approved:
        return approval.refuse(home, question, reason=reason, who=who)
    return approval.approve(home, question, reason=reason, smoke=lambda model: smoke_in_child(home, model), who=who)


@task(name="follow", cache_policy=NO_CACHE, retries=5, retry_delay_seconds=AWAY, retry_condition_fn=server_away)
def follow(home: Home, name: str) -> None:
    """Lets the nights' records follow what was answered."""
    approval.settle(home, name)


def question_markdown(home: Home, question: Entry, until: datetime) -> str:
    """What a person should know before answering: the night's report in short."""
    text = f"# Version {question.to_version} waits for your word\n\n```text\n{question.reason}\n```\n"
    for record in night_records(home, question.name):
        if record["id"] == question.night:
            text = night_markdown(cast(Any, record))
            text += f"\nReport: `{home.nights / record['id'] / 'report.html'}`\n"
    return f"{text}\nWithout an answer until {until:%Y-%m-%d %H:%M %Z} the champion stays.\n"


def said(answer: Entry) -> str:
    """An answer as the page of its run shows it."""
    what = f"version {answer.to_version} {'was promoted' if approval.said_yes(answer) else 'was kept out'}"
    return f"{what} by {answer.who}: {answer.reason}"


def _ended(answer: Entry, closing: bool) -> State:
    nobody = closing or answer.who == ledger.OURSELVES
    return Cancelled(message=said(answer)) if nobody else Completed(message=said(answer))


def _tag(name: str) -> str:
    return f"{FLOW}:{name}"
