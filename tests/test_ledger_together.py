"""The ledger under many hands at once: writers, processes, machines, events in any order."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ledger_home
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from ledger_home import NAME, VERSIONS, broken, champion, fine, moves

from overnight.errors import NightFailed, UserError
from overnight.home import Home
from overnight.tracking import ledger, store

four_versions, home = ledger_home.four_versions, ledger_home.home


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
