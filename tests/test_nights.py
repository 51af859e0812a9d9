"""The record of a night: what is continued, what is skipped, what is compared with what."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading

import pytest

from overnight.config import Config
from overnight.errors import DataRefused, UserError
from overnight.home import Home, read_json, write_json
from overnight.nights import begin_night, find_night, held, last_accepted, night_records, one_night_at_a_time, unchanged

CONFIG = Config.model_validate({"name": "m", "model": {"base": "b"}, "data": {"source": "s"}})
OTHER = Config.model_validate({"name": "m", "model": {"base": "c"}, "data": {"source": "s"}})


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path)})
    write_json(home.mlflow / "mlflow.db", {})
    return home


def ended(home: Home, state: str, config=CONFIG, fingerprint="f"):
    night = begin_night(home, config, fingerprint, forced=False)
    with night:
        night.update(state=state)
    return night


def test_the_record_is_on_disk_at_every_moment(home):
    """What a night has learnt survives the process at any point."""
    night = begin_night(home, CONFIG, "f", forced=False, stages={"ingest": 1.0})
    with night, night.stage("validate"):
        night.update(data={"rows": 3})
        assert read_json(night.folder / "night.json")["data"] == {"rows": 3}
    assert set(read_json(night.folder / "night.json")["stages"]) == {"ingest", "validate"}


@pytest.mark.parametrize(
    ("error", "state"),
    [(DataRefused("bad"), "refused"), (ValueError("x"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_how_a_night_ended_is_recorded(home, error, state):
    """Refused, failed and interrupted are told apart, and the error goes on to the caller."""
    night = begin_night(home, CONFIG, "f", forced=False)
    with pytest.raises(type(error)), night:
        raise error
    assert night.record["state"] == state and night.record["ended"]


@pytest.mark.parametrize("state", ["running", "failed", "interrupted"])
def test_an_unfinished_night_is_continued(home, state):
    """The same data and config go on in the same folder; other data or another config begin a new night."""
    first = begin_night(home, CONFIG, "f", forced=False)
    first.update(state=state, why="x")
    again = begin_night(home, CONFIG, "f", forced=False)
    assert again.id == first.id and again.record["continued"] == 1 and "why" not in again.record
    again.update(state=state)
    assert begin_night(home, CONFIG, "g", forced=False).id != first.id


@pytest.mark.parametrize("state", ["promoted", "kept", "waiting", "refused"])
def test_a_finished_night_is_not_continued(home, state):
    """What was decided or refused begins anew."""
    first = ended(home, state)
    assert begin_night(home, CONFIG, "f", forced=False).id != first.id


@pytest.mark.parametrize("state", ["promoted", "kept", "waiting"])
def test_unchanged(home, state):
    """Decided data and config are not tried again; changed ones are; a lost store is no reason to skip."""
    ended(home, state)
    assert "f" in (unchanged(home, CONFIG, "f", lambda: None) or "")
    assert unchanged(home, CONFIG, "g", lambda: None) is None
    assert unchanged(home, OTHER, "f", lambda: None) is None
    (home.mlflow / "mlflow.db").unlink()
    assert unchanged(home, CONFIG, "f", lambda: None) is None


def test_failed_and_refused_nights_are_no_decision(home):
    """A night that decided nothing does not make the next one skip."""
    ended(home, "refused")
    begin_night(home, CONFIG, "f", forced=False).update(state="failed")
    assert unchanged(home, CONFIG, "f", lambda: None) is None


def test_last_accepted_comes_from_decided_nights(home):
    """Label shares are compared with the last data that were accepted, not with refused ones."""
    ended(home, "kept").update(data={"facts": {"labels": ["a"]}})
    ended(home, "refused", fingerprint="g").update(data={"facts": {"labels": ["z"]}})
    assert last_accepted(home, "m") == {"labels": ["a"]}
    assert last_accepted(home, "other") is None


def test_find_night(home):
    """The last one by default; a wrong id is told with the nearest."""
    with pytest.raises(UserError, match="no night has run yet"):
        find_night(home, None)
    night = ended(home, "kept")
    assert find_night(home, None)["id"] == find_night(home, night.id)["id"] == night.id
    with pytest.raises(UserError, match=night.id):
        find_night(home, night.id[:-1] + "x")
    (home.nights / "half").mkdir()
    (home.nights / "half" / "night.json").write_text('{"id": ')
    assert len(night_records(home)) == 1, "half a record is passed over"


def test_one_night_a_model_at_a_time(home):
    """A second process is refused and told which process holds the model; a dead process holds nothing."""
    script = (
        "import os, sys\nfrom overnight.home import Home\nfrom overnight.nights import one_night_at_a_time\n"
        "with one_night_at_a_time(Home.from_environment(), 'm'):\n    print('held', flush=True); sys.stdin.readline()\n"
    )
    environment = os.environ | {"OVERNIGHT_HOME": str(home.root)}
    other = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    assert held(home, "m") and not held(home, "n")
    with pytest.raises(UserError, match=f"process {other.pid}"), one_night_at_a_time(home, "m"):
        pass
    other.kill()
    other.wait()
    assert not held(home, "m")
    with one_night_at_a_time(home, "m"):
        pass


def test_who_only_looks_keeps_no_night_from_starting(home):
    """A look holds the lock for a moment, in which a night that starts waits instead of taking it for another night."""
    with one_night_at_a_time(home, "m"):
        pass
    with open(home.root / "locks" / "m.lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `held` does
        moment = threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        moment.start()
        with one_night_at_a_time(home, "m"):
            assert held(home, "m")
        moment.join()
