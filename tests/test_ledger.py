"""The ledger: the alias and the history never disagree, whatever fails in between, and nothing is ever lost."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import ledger_home
import pytest
from ledger_home import NAME, broken, champion, fine, moves

from overnight.errors import NightFailed, UserError
from overnight.home import Home
from overnight.tracking import ledger, registry, store

four_versions, home = ledger_home.four_versions, ledger_home.home


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
    other = Home(home.root / "other", home.tracking_uri, home.study_storage, None)
    assert ledger.rebuild(other, NAME) == 0, "what other machines wrote is no loss of this one"
    assert ledger._ordered(ledger._mirrored(other, NAME)) == entries
    store.client(home).delete_registered_model_tag(NAME, entries[0].key)
    assert ledger.rebuild(other, NAME) == 1
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
