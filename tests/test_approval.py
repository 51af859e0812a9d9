"""A version that waits for a person: answered in Prefect's pages or in the terminal, once, or by nobody in time."""

from __future__ import annotations

import os
import shutil
import sqlite3
import threading
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest
from conftest import Command, prefect_says

from overnight import approval
from overnight.config import Config
from overnight.errors import NightFailed, UserError
from overnight.healing import heal
from overnight.home import Home, read_json
from overnight.nights import Night, begin_night, unchanged
from overnight.promotion import Decision, Reason
from overnight.tracking import ledger, registry, runs, store

NAME = "sentiment"
CONFIG = Config.model_validate({"name": NAME, "model": {"base": "b"}, "data": {"source": "s"}})
WAIT = Decision("wait", "promote", "manual", (Reason("floor", True, "macro_f1 0.812 reaches the floor 0.700"),))
YES = {"approve": True, "reason": "looks right", "who": "ana"}
NO = {"approve": False, "reason": "wrong on weekend chats", "who": "ben"}


@pytest.fixture(scope="module")
def three_versions(tmp_path_factory, empty_store, tiny_model) -> Path:
    """The root of a home with three real versions; the first is the champion."""
    from overnight import problems
    from overnight.settings import Training
    from overnight.training.card import Card, finish_model_folder

    folder = tmp_path_factory.mktemp("finished") / "best"
    facts = {"labels": ["bad", "good"]}
    problem = problems.get("sequence-classification")
    problem.load_model(str(tiny_model), facts, Training()).save_pretrained(folder)
    finish_model_folder(folder, Card(problem.name, facts, 64, "macro_f1"), str(tiny_model))
    root = tmp_path_factory.mktemp("three") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    for number in (1, 2, 3):
        run = runs.open_night(home, store.experiment(home, NAME), f"night-{number}")
        example = {"text": ["a text"]}
        registry.register(
            home, NAME, folder, run_id=run, inputs=("text",), example=example, tags={}, metrics={"macro_f1": 0.8}
        )
    ledger.promote(home, NAME, 1, reason="the first", smoke=lambda _: None, who="overnight")
    return root


@pytest.fixture
def home(three_versions, tmp_path, monkeypatch) -> Home:
    shutil.copytree(three_versions, tmp_path / "home")
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path / "home"))
    return Home.from_environment()


def waits(home: Home, number: int, champion: int | None = 1, config: Config = CONFIG) -> Night:
    """A night that leaves a version waiting, as the flow does it."""
    from tasks.model import promote

    night = begin_night(home, config, f"data-{number}", forced=False)
    with night:
        registry.set_alias(home, NAME, registry.CANDIDATE, number)
        compared = {"version": champion} if champion else None
        entry = promote.fn(home, registry.version_of(home, NAME, number), compared, WAIT, night.record)
        facts = {"candidate": {"version": number}, "champion": compared, "decision": WAIT.record()}
        night.update(ledger=entry, state="waiting", **facts)
    return night


def question(home: Home) -> ledger.Entry:
    return approval.open_questions(ledger.read(home, NAME))[-1]


def champion(home: Home) -> int:
    return registry.champion(home, NAME).number


def record(night: Night) -> dict:
    return read_json(night.folder / "night.json")


def last(home: Home) -> tuple:
    entry = ledger.read(home, NAME)[-1]
    return entry.action, entry.to_version, entry.who, entry.reason


# -- the ledger and the records ----------------------------------------------------------------------------------------


def test_a_question_is_open_until_it_is_answered(home):
    """The ledger alone says what waits, also when the answer is taken back later."""
    waits(home, 2)
    asked = approval.waiting(home, NAME, 2)
    assert (asked.from_version, asked.to_version) == (1, 2) and asked.gate["outcome"] == "wait"
    with pytest.raises(UserError, match="version 3: waits for nobody's word; version 2 does"):
        approval.waiting(home, NAME, 3)
    entry = approval.promote(home, NAME, 2, reason="r", smoke=lambda _: None)
    assert (entry.night, entry.gate) == (asked.night, asked.gate) and champion(home) == 2
    ledger.rollback(home, NAME, reason="r", smoke=lambda _: None)
    assert approval.open_questions(ledger.read(home, NAME)) == []
    assert approval.approve(home, asked, reason="late", smoke=lambda _: None) == entry and champion(home) == 1
    assert approval.refuse(home, asked, reason="late") == entry
    with pytest.raises(UserError, match="no version does"):
        approval.waiting(home, NAME, 2)


def test_a_failed_smoke_test_leaves_the_question_open(home):
    """The champion stays, and somebody may still refuse."""
    waits(home, 2)

    def broken(_):
        raise ValueError("no numbers")

    with pytest.raises(NightFailed, match="version 1 stays champion"):
        approval.promote(home, NAME, 2, reason="r", smoke=broken)
    assert champion(home) == 1 and question(home).to_version == 2
    assert approval.refuse(home, question(home), reason="broken").action == "refuse"


def test_the_record_follows(home):
    """An answer reaches the record, the page, MLflow and the next night's reasons not to train."""
    night = waits(home, 2)
    assert "waits for a person" in unchanged(home, CONFIG, "data-2", lambda: None)
    assert [step["command"].split()[1] for step in record(night)["next"]] == ["promote", "refuse"]
    approval.refuse(home, question(home), reason="wrong on <b>weekends</b>", who="ben")
    assert approval.settle(home, NAME) == [f"night {night.id}: version 2 refused by ben: wrong on <b>weekends</b>"]
    found = record(night)
    assert (found["state"], found["why"]) == ("kept", "refused by ben: wrong on <b>weekends</b>")
    assert found["next"][0]["command"] == f"overnight models {NAME}"
    assert "refused by ben: wrong on &lt;b&gt;weekends" in (night.folder / "report.html").read_text()
    assert "was kept out of production" in unchanged(home, CONFIG, "data-2", lambda: None)
    run = store.client(home).get_run(runs.open_night(home, store.experiment(home, NAME), night.id))
    assert run.data.tags["overnight.state"] == "kept"
    assert approval.settle(home, NAME) == []


@pytest.mark.parametrize("moved", ["night", "promotion"])
def test_superseded(home, moved):
    """A newer version that waits, or another champion, closes what waited before; the ledger says by what."""
    night = waits(home, 2)
    if moved == "night":
        waits(home, 3)
        why = "superseded: version 3 waits now"
    else:
        ledger.promote(home, NAME, 3, reason="by hand", smoke=lambda _: None)
        why = "superseded: the champion is version 3 by now"
    approval.settle(home, NAME)
    assert last(home) == ("refuse", 2, "overnight", why)
    assert (record(night)["state"], record(night)["why"]) == ("kept", why)


@pytest.mark.parametrize("how", ["alias", "rollback"])
def test_a_version_that_waits_became_champion_by_other_means(home, how):
    """As after a promotion whose answer was lost: the question is answered with yes, not closed by itself."""
    night = waits(home, 2)
    night.update(approval={"run": "r", "page": "p", "until": 1.0, "hours": 24.0})
    if how == "alias":
        registry.set_alias(home, NAME, registry.CHAMPION, 2)
        assert approval.settle(home, NAME, overdue=True) == [] and question(home).to_version == 2, "not known yet"
        heal(home, NAME)
        why = "the alias was moved without a ledger entry"
        assert last(home) == ("observed", 2, "overnight", why)
    else:
        ledger.rollback(home, NAME, reason="the better one", to=2, smoke=lambda _: None, who="ana")
        approval.settle(home, NAME, overdue=True)
        why = "approved by ana: the better one"
        assert last(home) == ("rollback", 2, "ana", "the better one")
    assert champion(home) == 2 and approval.open_questions(ledger.read(home, NAME)) == []
    assert (record(night)["state"], record(night)["why"]) == ("promoted", why)


def test_overdue_without_a_worker(home):
    """The next night closes what nobody answered in time, when nothing ran at the deadline."""
    night = waits(home, 2)
    night.update(approval={"run": "r", "page": "p", "until": 1.0, "hours": 24.0})
    approval.settle(home, NAME)
    assert record(night)["state"] == "waiting", "an answer may be on its way"
    assert heal(home, NAME)[-1].endswith("version 2 nobody approved within 24 h; the champion stays")
    assert last(home) == ("refuse", 2, "overnight", "nobody approved within 24 h; the champion stays")


# -- Prefect's pages ---------------------------------------------------------------------------------------------------


class Pages:
    """What a worker and a person do with the runs of one home."""

    def __init__(self, api: str, home: Home):
        self.api, self.home = api, home

    def ask(self, hours: float = 24.0) -> dict | None:
        from tasks.approval import after_decision

        return after_decision(self.home, NAME, hours, ask=True)

    def runs(self) -> dict[str, object]:
        """`ask` and `close` → the runs about the newest question."""
        from prefect.client.orchestration import get_client

        asked = [e.id for e in ledger.read(self.home, NAME) if e.gate and e.action == "keep"]
        with get_client(sync_client=True) as client:
            found = [run for run in client.read_flow_runs() if run.parameters.get("question") == asked[-1]]
        return {"close" if run.parameters.get("last_call") else "ask": run for run in found}

    def work(self, which: str = "ask") -> object:
        """Runs the flow as a worker does; its state afterwards."""
        from prefect.exceptions import Pause
        from prefect.flow_engine import run_flow

        from flows.approval import approve

        run = self.runs()[which]
        try:
            run_flow(approve, flow_run=run, parameters=run.parameters, return_type="state")
        except Pause:
            pass
        return self.runs()[which].state

    def answer(self, given: dict | None) -> None:
        from prefect.flow_runs import resume_flow_run

        resume_flow_run(self.runs()["ask"].id, run_input=given)

    def command(self, *arguments: str, code: int = 0) -> Command:
        environment = os.environ | {"OVERNIGHT_HOME": str(self.home.root), "PREFECT_API_URL": self.api}
        done = Command(arguments, environment, self.home.root)
        assert done.wait() == code, done.stderr
        return done


@pytest.fixture
def pages(prefect_api, home, monkeypatch):
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows.approval import approve

    monkeypatch.setenv("PREFECT_API_URL", prefect_api)
    with temporary_settings({PREFECT_API_URL: prefect_api}):
        with get_client(sync_client=True) as client:
            client.create_deployment(client.create_flow(approve), NAME)
        yield Pages(prefect_api, home)


def test_approved_in_the_pages(home, pages):
    """Asked once; a wrong form leaves the run waiting; the right one promotes, with name, reason and gate."""
    night = waits(home, 2)
    asked = pages.ask()
    assert pages.ask() == asked and asked["page"].endswith(asked["run"])
    night.update(approval=asked)
    assert pages.runs()["ask"].id == UUID(asked["run"])
    assert pages.work().name == "Suspended"
    for wrong in (None, {}, YES | {"approve": "perhaps"}, YES | {"reason": ""}, YES | {"mood": "good"}):
        with pytest.raises(RuntimeError, match="Cannot resume this run"):
            pages.answer(wrong)
    assert pages.runs()["ask"].state.is_paused() and champion(home) == 1

    pages.answer(YES)
    state = pages.work()
    assert state.is_completed() and state.message == "version 2 was promoted by ana: looks right"
    assert champion(home) == 2 and last(home) == ("promote", 2, "ana", "looks right")
    entry = ledger.read(home, NAME)[-1]
    assert entry.night == night.id and entry.gate == WAIT.record() | {"reasons": [vars(WAIT.reasons[0])]}
    assert (record(night)["state"], record(night)["why"]) == ("promoted", "approved by ana: looks right")
    assert pages.runs()["close"].state.is_cancelled()


def test_what_a_person_sees(home, pages, prefect_api):
    """The form shows the night's report and the deadline; the run has them as an artifact too."""
    night = waits(home, 2)
    run = pages.ask()["run"]
    pages.work()
    inputs = prefect_says("POST", f"{prefect_api}/flow_runs/{run}/input/filter", json={"prefix": "", "limit": 9})
    text = next(one["value"] for one in inputs if one["key"].endswith("description"))
    assert "Version 2 passed every rule and waits for your word" in text and str(night.folder) in text
    assert "the champion stays" in text
    own = {"flow_runs": {"id": {"any_": [run]}}}
    artifacts = prefect_says("POST", f"{prefect_api}/artifacts/filter", json=own)
    assert [a["key"] for a in artifacts] == [f"approval-{NAME}"]


@pytest.mark.parametrize("given", [YES, NO])
def test_mlflow_is_away_when_the_answer_comes(home, pages, given):
    """Its database is in the middle of a change for some seconds: the answer is kept, and holds afterwards."""
    night = waits(home, 2)
    pages.ask()
    pages.work()
    pages.answer(given)

    def rename(was: str, now: str) -> None:
        with closing(sqlite3.connect(home.mlflow / "mlflow.db", timeout=30)) as database:
            database.execute(f"alter table {was} rename to {now}")

    rename("registered_model_aliases", "elsewhere")
    back = threading.Timer(2.0, rename, ("elsewhere", "registered_model_aliases"))
    back.start()
    state = pages.work()
    back.join()
    assert state.is_completed(), state.message
    assert champion(home) == (2 if given["approve"] else 1)
    assert last(home)[2:] == (given["who"], given["reason"]) and record(night)["state"] != "waiting"


def test_the_team_hears_of_a_yes(home, pages, hooks, monkeypatch):
    """As soon as it is followed, once; a team whose server is broken costs no answer."""
    monkeypatch.setenv("TEAM", hooks.address("json"))
    monkeypatch.setenv("BROKEN", hooks.address("500"))
    told = {"notify": [{"to_env": "TEAM"}, {"to_env": "BROKEN"}]}
    waits(home, 2, config=Config.model_validate(CONFIG.model_dump() | told))
    pages.ask()
    pages.work()
    pages.answer(YES)
    assert pages.work().is_completed() and champion(home) == 2
    approval.settle(home, NAME)
    (body,) = hooks.at("json")
    assert body["title"] == f"{NAME} promoted: Version 2 is the new champion"
    assert "approved by ana: looks right" in body["message"]


def test_refused_in_the_pages(home, pages):
    """The champion stays; who and why are in the ledger."""
    night = waits(home, 2)
    pages.ask()
    pages.work()
    pages.answer(NO)
    assert pages.work().is_completed()
    assert champion(home) == 1 and last(home) == ("refuse", 2, "ben", "wrong on weekend chats")
    assert record(night)["why"] == "refused by ben: wrong on weekend chats"


def test_nobody_answers(home, pages):
    """When the time is over the other run comes, keeps the champion, and ends the one that asks."""
    night = waits(home, 2)
    asked = pages.ask(hours=0.001)
    assert abs(pages.runs()["close"].expected_start_time.timestamp() - asked["until"]) < 1
    pages.work()
    assert pages.work("close").is_completed()
    why = "nobody approved within 0.001 h; the champion stays"
    assert champion(home) == 1 and last(home) == ("refuse", 2, "overnight", why)
    assert record(night)["why"] == why
    state = pages.runs()["ask"].state
    assert state.is_cancelled() and why in state.message
    assert pages.ask() is None, "what has been answered is not asked again"


def test_answered_in_the_terminal(home, pages):
    """`overnight promote` is the answer: the run ends, and whoever answers there later is told that it is over."""
    from prefect.exceptions import NotPausedError

    night = waits(home, 2)
    pages.ask()
    pages.work()
    pages.command("promote", NAME, "2", "--reason", "seen in the terminal")
    states = {which: run.state for which, run in pages.runs().items()}
    assert states["ask"].is_completed() and "seen in the terminal" in states["ask"].message
    assert states["close"].is_cancelled()
    with pytest.raises(NotPausedError):
        pages.answer(YES)
    assert champion(home) == 2 and record(night)["state"] == "promoted"
    assert [e.to_version for e in ledger.read(home, NAME) if e.action == "promote"] == [1, 2]


def test_refused_in_the_terminal(home, pages):
    """`overnight refuse` likewise; a version that does not wait is the user's mistake, exit 2."""
    night = waits(home, 2)
    pages.ask()
    pages.work()
    done = pages.command("refuse", NAME, "3", "--reason", "x", code=2)
    assert "version 2 does" in done.stderr and "Traceback" not in done.stderr
    pages.command("refuse", NAME, "2", "--reason", "too slow")
    assert pages.runs()["ask"].state.is_completed() and record(night)["state"] == "kept"
    assert champion(home) == 1 and last(home)[::3] == ("refuse", "too slow")


def test_two_answers_at_once(home, pages):
    """The page's answer is on its way when somebody promotes in a terminal that knows no server: promoted once."""
    waits(home, 2)
    pages.ask()
    pages.work()
    pages.answer(NO)
    approval.promote(home, NAME, 2, reason="first", smoke=lambda _: None, who="cleo")
    state = pages.work()
    assert state.is_completed() and state.message == "version 2 was promoted by cleo: first"
    assert champion(home) == 2 and last(home) == ("promote", 2, "cleo", "first")


def test_a_newer_night_asks_instead(home, pages):
    """The older run is cancelled without a word from anybody, and the newer version is asked about."""
    from prefect.client.orchestration import get_client

    old = waits(home, 2)
    pages.ask()
    pages.work()
    run = pages.runs()["ask"]
    waits(home, 3)
    pages.ask()
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run.id).state
    assert state.is_cancelled() and "version 3 waits now" in state.message
    assert record(old)["why"] == "superseded: version 3 waits now"
    assert pages.work().name == "Suspended" and pages.runs()["ask"].parameters["version"] == 3


def test_the_champion_has_moved(home, pages):
    """A yes to a comparison with a champion of yesterday promotes nothing."""
    waits(home, 2)
    pages.ask()
    pages.work()
    ledger.promote(home, NAME, 3, reason="by hand", smoke=lambda _: None)
    pages.answer(YES)
    assert "superseded: the champion is version 3 by now" in pages.work().message
    assert champion(home) == 3


def test_the_champion_is_the_one_that_waits(home, pages):
    """Somebody moved the alias in MLflow's pages: the time is over, and the version is not called kept out."""
    night = waits(home, 2)
    pages.ask(hours=0.001)
    pages.work()
    registry.set_alias(home, NAME, registry.CHAMPION, 2)
    pages.work("close")
    said = "version 2 was promoted by overnight: the alias was moved without a ledger entry"
    assert pages.runs()["close"].state.message == pages.runs()["ask"].state.message == said
    assert champion(home) == 2 and record(night)["state"] == "promoted"


def test_no_longer_the_newest_candidate(home, pages):
    """A newer version was kept out meanwhile: a yes is asked for once more, and holds when it is explicit."""
    waits(home, 2)
    pages.ask()
    pages.work()
    registry.set_alias(home, NAME, registry.CANDIDATE, 3)
    pages.answer(YES)
    assert pages.work().name == "Suspended" and champion(home) == 1
    pages.answer(YES | {"although_newer": True})
    assert pages.work().is_completed() and champion(home) == 2


def test_another_installation_on_the_same_server(home, pages, three_versions, tmp_path):
    """A model of the same name in another home: its answers end no run of this one."""
    from tasks.approval import resolve

    waits(home, 2)
    pages.ask()
    pages.work()
    shutil.copytree(three_versions, tmp_path / "other")
    other = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "other")})
    waits(other, 2)
    approval.promote(other, NAME, 2, reason="r", smoke=lambda _: None)
    assert resolve(other, NAME) == [] and champion(other) == 2
    assert pages.runs()["ask"].state.is_paused() and champion(home) == 1


def test_where_nobody_serves_the_pages(home, pages, monkeypatch):
    """Without a deployment, or a server, a night waits as it always did; the terminal answers."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from tasks.approval import after_decision

    waits(home, 2)
    assert after_decision(home, NAME, 24.0, ask=False) is None and not pages.runs()
    with get_client(sync_client=True) as client:
        client.delete_deployment(client.read_deployment_by_name(f"approve/{NAME}").id)
    assert pages.ask() is None and not pages.runs()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert pages.ask() is None
    assert question(home).to_version == 2
