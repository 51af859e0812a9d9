"""The ledger: the alias and the history never disagree, whatever fails in between, and nothing is ever lost."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from overnight.errors import NightFailed, UserError
from overnight.home import Home
from overnight.tracking import ledger, registry, runs, store

NAME = "sentiment"
VERSIONS = 4


def fine(folder: Path) -> None:
    """A smoke test that the version passes."""
    assert (folder / "model.safetensors").is_file()


def broken(folder: Path) -> None:
    raise ValueError("scores are not a number")


@pytest.fixture(scope="module")
def four_versions(tmp_path_factory, empty_store) -> Path:
    """The root of a home with four finished versions and no champion."""
    root = tmp_path_factory.mktemp("four") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    run_id = runs.open_night(home, store.experiment(home, NAME), "night-1")
    for number in range(1, VERSIONS + 1):
        folder = tmp_path_factory.mktemp("model")
        (folder / "model.safetensors").write_bytes(bytes([number]) * 100)  # the ledger never looks inside
        facts = {"inputs": ("text",), "example": {"text": ["a"]}, "tags": {}, "metrics": {"macro_f1": 0.5}}
        assert registry.register(home, NAME, folder, run_id=run_id, **facts).number == number
    return root


@pytest.fixture
def home(four_versions, tmp_path) -> Home:
    shutil.copytree(four_versions, tmp_path / "home")
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})


def champion(home: Home) -> int | None:
    found = registry.champion(home, NAME)
    return found.number if found else None


def moves(home: Home) -> list[tuple]:
    return [(e.action, e.from_version, e.to_version) for e in ledger.read(home, NAME)]


def test_promote_writes_alias_and_history(home):
    """Alias and entry say the same: from, to, reason, who, night and the gate's numbers."""
    ledger.promote(home, NAME, 1, reason="first night", smoke=fine, who="overnight", night="n1")
    entry = ledger.promote(
        home, NAME, 3, reason="+2 points", smoke=fine, night="n2", gate={"gain": 0.02, "rules": (1,)}
    )
    assert champion(home) == 3
    assert moves(home) == [("promote", None, 1), ("promote", 1, 3)]
    last = ledger.read(home, NAME)[-1]
    assert last == entry and (last.n, last.reason, last.night) == (2, "+2 points", "n2")
    assert last.gate == {"gain": 0.02, "rules": [1]} and last.who and abs(last.time - time.time()) < 600
    assert ledger.problems(ledger.read(home, NAME)) == []


def test_failed_smoke_test_moves_nothing(home):
    """The version does not answer: the champion stays, the ledger has no entry, the error says both."""
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    with pytest.raises(
        NightFailed, match=r"smoke test failed \(ValueError: scores are not a number\); version 1 stays"
    ):
        ledger.promote(home, NAME, 2, reason="r", smoke=broken)
    with pytest.raises(NightFailed):
        ledger.rollback(home, NAME, reason="r", to=3, smoke=broken)
    assert champion(home) == 1 and moves(home) == [("promote", None, 1)]


@pytest.mark.parametrize("before", [None, 1])
def test_failed_ledger_puts_the_alias_back(home, monkeypatch, before):
    """The entry cannot be written: the alias goes back to where it was, also to nowhere."""
    if before:
        ledger.promote(home, NAME, before, reason="r", smoke=fine)
    kind = type(store.client(home))

    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kind, "set_registered_model_tag", fails)
        with pytest.raises(KeyboardInterrupt):
            ledger.promote(home, NAME, 2, reason="r", smoke=fine)
    assert champion(home) == before and len(ledger.read(home, NAME)) == bool(before)


def lose_an_answer(home: Home, patch, *, away: bool) -> None:
    """MLflow moves an alias, but its answer gets lost; `away`: and then it does not answer at all."""
    import requests

    kind = type(store.client(home))
    move, look, lost = kind.set_registered_model_alias, kind.get_model_version_by_alias, []

    def moves_silently(client, *arguments):
        move(client, *arguments)
        if not lost:
            lost.append(True)
            raise requests.ReadTimeout("the answer was lost")

    def looks(client, *arguments):
        if lost and away:
            raise requests.ConnectionError("nobody there")
        return look(client, *arguments)

    patch.setattr(kind, "set_registered_model_alias", moves_silently)
    patch.setattr(kind, "get_model_version_by_alias", looks)


@pytest.mark.parametrize("before", [None, 1])
def test_a_lost_answer_puts_the_alias_back(home, monkeypatch, before):
    """The alias moved, but nobody said so: it goes back, and what is raised is what happened first."""
    if before:
        ledger.promote(home, NAME, before, reason="r", smoke=fine)
    with monkeypatch.context() as patch:
        lose_an_answer(home, patch, away=False)
        with pytest.raises(store.TrackingUnavailable, match="the answer was lost"):
            ledger.promote(home, NAME, 2, reason="r", smoke=fine)
    assert champion(home) == before and len(ledger.read(home, NAME)) == bool(before)


def test_a_lost_answer_and_then_silence(home, monkeypatch):
    """The alias cannot be put back: what is raised is what happened first, and the next look completes the ledger."""
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    with monkeypatch.context() as patch:
        lose_an_answer(home, patch, away=True)
        with pytest.raises(store.TrackingUnavailable, match="the answer was lost"):
            ledger.promote(home, NAME, 2, reason="r", smoke=fine)
    assert champion(home) == 2 and moves(home) == [("promote", None, 1)]
    ledger.observe(home, NAME, smoke=fine)
    assert moves(home) == [("promote", None, 1), ("observed", 1, 2)]


def test_a_failure_does_not_undo_what_somebody_else_did(home, monkeypatch):
    """Another machine moves the alias in the same moment: ours fails, theirs stays."""
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    kind = type(store.client(home))
    move = kind.set_registered_model_alias

    def overtaken(client, name, alias, version):
        move(client, name, alias, version)
        move(client, name, alias, "3")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "set_registered_model_alias", overtaken)
        with pytest.raises(NightFailed, match="moved by somebody else, expected 2, got version 3"):
            ledger.promote(home, NAME, 2, reason="r", smoke=fine)
    assert champion(home) == 3


def test_user_mistakes(home):
    """Promoting the champion, an unknown version or model, a half-made version; rolling back when there is nothing."""
    with pytest.raises(UserError, match="there is no champion"):
        ledger.rollback(home, NAME, reason="r", smoke=fine)
    ledger.promote(home, NAME, 1, reason="r", smoke=fine, night="n1")
    with pytest.raises(UserError, match="version 1 is the champion already"):
        ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    with pytest.raises(UserError, match=r"no such version \(it has 1, 2, 3, 4\), got 9"):
        ledger.promote(home, NAME, 9, reason="r", smoke=fine)
    with pytest.raises(UserError, match="did you mean sentiment"):
        ledger.promote(home, "sentimnt", 1, reason="r", smoke=fine)
    with pytest.raises(UserError, match="did you mean sentiment"):
        ledger.read(home, "sentimnt")
    with pytest.raises(UserError, match="version 1 is the first"):
        ledger.rollback(home, NAME, reason="r", smoke=fine)
    store.client(home).set_model_version_tag(NAME, "2", "overnight.complete", "false")
    with pytest.raises(UserError, match="never finished"):
        ledger.promote(home, NAME, 2, reason="r", smoke=fine)
    assert champion(home) == 1 and len(moves(home)) == 1


def test_continued_night_promotes_once(home):
    """A night killed behind its promotion and continued finds it done: no error, no second entry."""
    first = ledger.promote(home, NAME, 1, reason="r", smoke=fine, night="n1")
    assert ledger.promote(home, NAME, 1, reason="r", smoke=broken, night="n1") == first
    facts = {"from_version": 1, "to_version": 2, "reason": "a tie", "night": "n2"}
    assert ledger.record(home, NAME, "keep", **facts) == ledger.record(home, NAME, "keep", **facts)
    assert moves(home) == [("promote", None, 1), ("keep", 1, 2)]


def test_rollback_walks_back_through_the_champions(home):
    """Each rollback goes one champion further back; kept candidates and deleted versions are passed over."""
    for number in (1, 2, 3, 4):
        ledger.promote(home, NAME, number, reason="r", smoke=fine)
    ledger.record(home, NAME, "keep", from_version=4, to_version=2, reason="a tie")
    assert ledger.rollback(home, NAME, reason="complaints", smoke=fine, who="ana").to_version == 3
    store.client(home).delete_model_version(NAME, "2")
    assert ledger.rollback(home, NAME, reason="complaints", smoke=fine).to_version == 1
    with pytest.raises(UserError, match="no earlier champion"):
        ledger.rollback(home, NAME, reason="r", smoke=fine)
    assert ledger.rollback(home, NAME, reason="it was fine", to=4, smoke=fine).from_version == 1
    assert champion(home) == 4
    assert ledger.rollback(home, NAME, reason="r", smoke=fine).to_version == 3


def test_alias_moved_by_hand_is_observed(home):
    """Somebody moves the alias in MLflow's pages: the ledger learns of it once, and rollback knows the way back."""
    assert ledger.observe(home, NAME, smoke=fine) is None
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    assert ledger.observe(home, NAME, smoke=broken) is None, "no new champion, no test"
    store.client(home).set_registered_model_alias(NAME, "champion", "3")
    entry = ledger.observe(home, NAME, smoke=fine)
    said = ("observed", "overnight", "the alias was moved without a ledger entry")
    assert (entry.action, entry.who, entry.reason) == said
    assert ledger.observe(home, NAME, smoke=fine) is None and ledger.doubt(home, NAME) is None
    assert moves(home) == [("promote", None, 1), ("observed", 1, 3)]
    assert ledger.rollback(home, NAME, reason="r", smoke=fine).to_version == 1


def test_alias_moved_by_hand_to_a_version_that_does_not_work(home):
    """The entry says that its smoke test failed, every later look says so too, and nobody but a person moves it."""
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    assert ledger.doubt(home, NAME) is None
    store.client(home).set_registered_model_alias(NAME, "champion", "3")
    entry = ledger.observe(home, NAME, smoke=broken)
    assert entry.reason.endswith("; its smoke test failed: scores are not a number")
    for _ in range(2):
        assert ledger.observe(home, NAME, smoke=fine) is None
        said = ledger.doubt(home, NAME)
        assert "version 3" in said and "scores are not a number" in said and "overnight rollback sentiment" in said
    assert champion(home) == 3
    ledger.rollback(home, NAME, reason="r", smoke=fine)
    assert ledger.doubt(home, NAME) is None


def test_weights_that_are_gone_are_a_failed_smoke_test(home):
    """The version somebody put behind the alias cannot even be fetched; MLflow being away is no verdict."""
    store.client(home).set_registered_model_alias(NAME, "champion", "2")

    def away(folder: Path) -> None:
        raise store.TrackingUnavailable("MLflow: cannot be used now")

    with pytest.raises(store.TrackingUnavailable):
        ledger.observe(home, NAME, smoke=away)
    assert not moves(home)
    weights = registry.download(home, registry.version_of(home, NAME, 2)) / "model.safetensors"
    gone = weights.rename(weights.with_name("gone"))  # put back: the homes of the tests share the artifacts
    try:
        assert "its weights are gone" in ledger.observe(home, NAME, smoke=fine).reason
    finally:
        gone.rename(weights)


def test_killed_between_alias_and_ledger(home):
    """The alias moved, the entry was never written: promoting again completes the history."""
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    registry.set_alias(home, NAME, registry.CHAMPION, 2)
    ledger.promote(home, NAME, 2, reason="r", smoke=fine)
    assert moves(home) == [("promote", None, 1), ("promote", 1, 2)]


def test_either_copy_is_rebuilt_from_the_other(home):
    """The mirror lost, MLflow's tags lost, a line cut short: one call brings all entries back, in both places."""
    for number in (1, 2, 3):
        ledger.promote(home, NAME, number, reason=f"r{number}", smoke=fine)
    entries = ledger.read(home, NAME)
    mirror = home.root / "ledger" / f"{NAME}.jsonl"
    assert ledger.rebuild(home, NAME) == 0
    mirror.unlink()
    assert ledger.read(home, NAME) == entries and ledger.rebuild(home, NAME) == 3 and mirror.exists()
    for entry in entries[:2]:
        store.client(home).delete_registered_model_tag(NAME, entry.key)
    assert ledger.read(home, NAME) == entries and ledger.rebuild(home, NAME) == 2
    mirror.write_bytes(mirror.read_bytes()[:-20])
    assert ledger.rebuild(home, NAME) == 1
    mirror_alone = Home(home.root, "http://127.0.0.1:9", home.study_storage, None)
    assert ledger._ordered(ledger._mirrored(mirror_alone, NAME)) == entries
    assert ledger._ordered(ledger._kept(home, NAME)) == entries


def test_history_is_readable_while_mlflow_is_away(home, monkeypatch):
    """`overnight history` answers from the home's copy; without one the outage is the answer."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    away = Home(home.root, "http://127.0.0.1:9", home.study_storage, None)
    assert [e.to_version for e in ledger.read(away, NAME)] == [1]
    with pytest.raises(store.TrackingUnavailable):
        ledger.read(away, "topics")
    with pytest.raises(store.TrackingUnavailable):
        ledger.promote(away, NAME, 2, reason="r", smoke=fine)
    assert champion(home) == 1


def test_changed_and_missing_entries_show(home):
    """An entry that was edited, or taken out of the middle in both places, is told by name."""
    for number in (1, 2, 3):
        ledger.promote(home, NAME, number, reason="r", smoke=fine)
    first, second, third = ledger.read(home, NAME)
    assert ledger.problems([first, third]) == ["the entry before 3 is missing"]
    assert ledger.problems([first, replace(second, who="nobody"), third]) == [
        "entry 2 was changed after it was written"
    ]


def test_long_reasons_fit_the_column(home):
    """MLflow's column holds 5,000 characters on a server database: the longest parts of the gate go first."""
    gate = {"outcome": "promote", "confusion": list(range(4000)), "words": "ü" * 3000}
    ledger.promote(home, NAME, 1, reason="because " * 900, smoke=fine, gate=gate)
    tags = store.client(home).get_registered_model(NAME).tags
    assert all(len(value) <= 5000 for value in tags.values())
    assert ledger.read(home, NAME)[0].gate == {"outcome": "promote"}
    assert ledger.problems(ledger.read(home, NAME)) == []


def test_writers_at_the_same_time_are_put_in_line(home):
    """Four threads promote four versions at once: every one succeeds, the chain is whole, the alias is the last's."""
    inside: list[int] = []

    def slow(folder: Path) -> None:
        inside.append(1)
        assert sum(inside) == 1, "one writer at a time"
        time.sleep(0.05)
        inside.append(-1)

    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            ledger.promote(home, NAME, number, reason="r", smoke=slow)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, VERSIONS + 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = ledger.read(home, NAME)
    assert not errors and [e.n for e in entries] == [1, 2, 3, 4]
    assert [e.from_version for e in entries[1:]] == [e.to_version for e in entries[:-1]]
    assert champion(home) == entries[-1].to_version and ledger.problems(entries) == []


def test_there_is_a_champion_at_every_moment(home):
    """Somebody who asks for the champion all the time, as a server does, gets one before, during and after a move."""
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    seen: list[int | None] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            seen.append(champion(home))

    reader = threading.Thread(target=look)
    reader.start()
    for number in (2, 3, 4):
        ledger.promote(home, NAME, number, reason="r", smoke=fine)
    with pytest.raises(NightFailed):
        ledger.promote(home, NAME, 1, reason="r", smoke=broken)
    for _ in range(3):
        ledger.rollback(home, NAME, reason="r", smoke=fine)
    over.set()
    reader.join()
    order = [number for number, before in zip(seen, [None, *seen], strict=False) if number != before]
    story = iter((1, 2, 3, 4, 3, 2, 1))
    assert None not in seen and all(number in story for number in order), "a part of the story, in its order"
    assert len(order) > 2 and ledger.problems(ledger.read(home, NAME)) == []


WRITER = """
import sys
from pathlib import Path
from overnight.errors import OvernightError
from overnight.home import Home
from overnight.tracking import ledger
uri, *arguments = sys.argv[1:]
for root, numbers in zip(arguments[::2], arguments[1::2]):
    home = Home(Path(root), uri, "", None)
    ledger.read(home, "sentiment")
    print("ready", flush=True)
    sys.stdin.readline()
    for number in numbers:
        try:
            print(ledger.promote(home, "sentiment", int(number), reason="r", smoke=lambda folder: None).id, flush=True)
        except OvernightError as error:
            print("refused:", error, flush=True)
"""


def test_two_processes_at_once(home, tmp_path):
    """In one home they are put in line; on two machines with one server one may be refused. The ledger stays whole."""
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    rounds = [[("home", "23"), ("home", "42")], [("one", "1313"), ("two", "4242")]]
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, home.tracking_uri, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for arguments in (
            [part for pairs in rounds for part in (str(tmp_path / pairs[which][0]), pairs[which][1])]
            for which in (0, 1)
        )
    ]
    written = {entry.id for entry in ledger.read(home, NAME)}
    for pairs in rounds:
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        said = [
            [writer.stdout.readline().strip() for _ in pair[1]] for writer, pair in zip(writers, pairs, strict=True)
        ]
        refused = [line for lines in said for line in lines if line.startswith("refused: ")]
        written |= {line for lines in said for line in lines} - set(refused)
        ledger.observe(home, NAME, smoke=fine)
        entries = ledger.read(home, NAME)
        assert written <= {entry.id for entry in entries} and ledger.problems(entries) == []
        assert {e.action for e in entries if e.id not in written} <= {"observed"}
        assert champion(home) == ledger._last_move(entries).to_version
        if pairs[0][0] == pairs[1][0]:
            assert all("is the champion already" in line for line in refused)
            assert [e.from_version for e in entries[1:]] == [e.to_version for e in entries[:-1]]
        written = {entry.id for entry in entries}
    for writer in writers:
        writer.communicate(timeout=60)
        assert writer.returncode == 0


def test_the_doctor_heals_the_ledger_and_tells_of_a_bad_champion(home):
    """Entries that one of the two places has lost come back; a champion that does not answer is broken, not healed."""
    from overnight.doctor import _models

    for number in (1, 2):
        ledger.promote(home, NAME, number, reason="r", smoke=fine)
    entries = ledger.read(home, NAME)
    (home.root / "ledger" / f"{NAME}.jsonl").unlink()
    found = list(_models(home))
    assert any(f.state == "healed" and f.found.startswith("2 ledger entries") for f in found)
    store.client(home).delete_registered_model_tag(NAME, entries[0].key)
    store.client(home).set_registered_model_alias(NAME, "champion", "3")
    found = list(_models(home))
    assert any(f.state == "healed" and f.found.startswith("1 ledger entries") for f in found)
    assert any(f.state == "healed" and "its smoke test failed" in f.found for f in found), "observed"
    broken_ones = [f.found for f in found if f.state == "broken"]
    assert (
        len(broken_ones) == 1 and "champion is version 3; " in broken_ones[0] and "no overnight.json" in broken_ones[0]
    )
    assert ledger._ordered(ledger._mirrored(home, NAME)) == ledger._ordered(ledger._kept(home, NAME))
    assert champion(home) == 3


def test_two_machines_lose_no_entry(home, tmp_path):
    """Two homes on one server, each writing entry n: both are kept, neither overwrites the other's."""
    other = Home(tmp_path / "other", home.tracking_uri, home.study_storage, None)
    ledger.promote(home, NAME, 1, reason="r", smoke=fine)
    first = ledger.record(home, NAME, "keep", from_version=1, to_version=2, reason="here")
    store.client(home).delete_registered_model_tag(NAME, first.key)  # not yet seen by the other
    ledger.record(other, NAME, "keep", from_version=1, to_version=3, reason="there")
    store.client(home).set_registered_model_tag(NAME, first.key, ledger._line(first))
    assert sorted(e.reason for e in ledger.read(other, NAME)) == ["here", "r", "there"]


class LedgerMachine(RuleBasedStateMachine):
    """Any order of promotions, failures, rollbacks and hand-made moves, against a plain model of what must come out."""

    root: Path

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        shutil.copytree(self.root, Path(self.folder.name) / "home")
        self.home = Home.from_environment({"OVERNIGHT_HOME": str(Path(self.folder.name) / "home")})
        self.now: int | None = None
        self.came_from: dict[int, int | None] = {}
        self.history: list[tuple] = []

    def moved(self, action: str, to: int) -> None:
        self.history.append((action, self.now, to))
        if action != "rollback" or to not in self.came_from:
            self.came_from[to] = self.now
        self.now = to

    @rule(number=st.integers(1, VERSIONS), works=st.booleans())
    def promote(self, number: int, works: bool) -> None:
        try:
            ledger.promote(self.home, NAME, number, reason="r", smoke=fine if works else broken)
        except UserError:
            assert number == self.now
        except NightFailed:
            assert not works
        else:
            assert works and number != self.now
            self.moved("promote", number)

    @rule(works=st.booleans())
    def rollback(self, works: bool) -> None:
        expected = self.came_from.get(self.now) if self.now else None
        try:
            entry = ledger.rollback(self.home, NAME, reason="r", smoke=fine if works else broken)
        except UserError:
            assert expected is None
        except NightFailed:
            assert expected is not None and not works
        else:
            assert works and entry.to_version == expected
            self.moved("rollback", expected)

    @rule(number=st.integers(1, VERSIONS))
    def by_hand(self, number: int) -> None:
        store.client(self.home).set_registered_model_alias(NAME, "champion", str(number))
        entry = ledger.observe(self.home, NAME, smoke=fine)
        assert (entry is None) == (number == self.now)
        if entry:
            self.moved("observed", number)

    @rule(here=st.booleans())
    def lose_a_copy(self, here: bool) -> None:
        if here:
            (self.home.root / "ledger" / f"{NAME}.jsonl").unlink(missing_ok=True)
        else:
            for entry in ledger.read(self.home, NAME):
                store.client(self.home).delete_registered_model_tag(NAME, entry.key)
        ledger.rebuild(self.home, NAME)

    @invariant()
    def alias_and_history_agree(self) -> None:
        if not hasattr(self, "home"):
            return
        assert champion(self.home) == self.now
        assert moves(self.home) == self.history
        assert ledger.problems(ledger.read(self.home, NAME)) == []

    def teardown(self) -> None:
        self.folder.cleanup()


def test_any_order_of_events(four_versions):
    """Alias, history and the way back agree after every step of random sequences (see LedgerMachine)."""
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (LedgerMachine,), {"root": four_versions})
    checks = list(HealthCheck)
    limits = settings(
        max_examples=6, stateful_step_count=10, deadline=None, suppress_health_check=checks, database=None
    )
    run_state_machine_as_test(machine, settings=limits)


def test_entry_is_plain_json(home):
    """The mirror can be read by anything: one JSON object a line with the words of the design."""
    ledger.promote(home, NAME, 1, reason="größer", smoke=fine)
    line = (home.root / "ledger" / f"{NAME}.jsonl").read_text(encoding="utf-8").strip()
    assert "größer" in line and json.loads(line)["action"] == "promote"
