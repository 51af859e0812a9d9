"""A person's word about a version that waits, given in Prefect's pages.

A night of mode `manual` makes a run of this flow. It asks, ends its process, and is run again with the answer, so that
nothing is held for hours. A second run comes when the time is over. Answers from elsewhere (`overnight promote`,
`overnight refuse`, a newer night) end both.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from itertools import count

from prefect import flow
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, State
from pydantic import Field

from overnight import approval
from overnight.home import Home
from overnight.scoring import smoke_in_child
from overnight.tracking import ledger, registry, store
from overnight.tracking.ledger import Entry
from tasks.approval import answer, find_question, question_markdown, resolve, said
from tasks.artifacts import markdown


class Approval(RunInput):
    """The form in Prefect's pages."""

    approve: bool = Field(description="On: the version becomes the champion. Off: the champion stays.")
    reason: str = Field(min_length=1, description="Why; kept in the ledger.")
    who: str = Field(min_length=1, description="Your name; kept in the ledger.")
    although_newer: bool = Field(False, description="Promote it although it is no longer the newest candidate.")


@flow(name="approve", flow_run_name="{model} version {version}", log_prints=False)
def approve(model: str, version: int, question: str, hours: float, last_call: bool = False) -> State:
    """Asks about one version, and does what the answer says.

    Args:
        question: id of the ledger's entry that says that the version waits.
        hours: how long a person may answer.
        last_call: this is the run that closes the question when nobody has answered.
    """
    home = Home.from_environment()
    store.prepare(home)
    ledger.observe(home, model, smoke=partial(smoke_in_child, home))  # it may be the champion by other means
    approval.settle(home, model)
    asked, answered = find_question(home, model, question)
    if answered is None and last_call:
        answered = approval.refuse(home, asked, reason=approval.nobody(hours), who=ledger.OURSELVES)
    answered = answered or ask(home, asked, hours)
    approval.settle(home, model)
    resolve(home, model)
    return Completed(message=said(answered))


def ask(home: Home, question: Entry, hours: float) -> Entry:
    """What came of a person's word; the process ends here until there is one."""
    until = datetime.fromtimestamp(question.time).astimezone() + timedelta(hours=hours)
    text = question_markdown(home, question, until)
    markdown(f"approval-{question.name}", text, f"version {question.to_version} waits")
    for attempt in count():
        # run again with an answer, this returns the answers in the order in which they were given
        given = suspend_flow_run(wait_for_input=Approval.with_initial_data(description=text), key=f"answer-{attempt}")
        newest = registry.by_alias(home, question.name, registry.CANDIDATE)
        if not given.approve or given.although_newer or newest is None or newest.number == question.to_version:
            break
        text = f"**Version {newest.number} is the newest candidate by now.** To promote all the same, turn on "
        text += f"`although_newer`.\n\n{question_markdown(home, question, until)}"
    return answer(home, question, given.approve, given.reason, given.who)
