"""Child processes: results, errors, logs, and that none outlives the night."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from overnight.errors import Complaint, DataRefused, NightFailed, UserError
from overnight.processes import Child, accept_children, end_children, run_child


def work(folder: Path, what: str) -> dict:
    print("working on", what)
    if what == "user":
        raise UserError(Complaint("config: model", "no such model", "'x'", "'y'"), Complaint("b", "c"))
    if what == "data":
        raise DataRefused("too few rows")
    if what == "bug":
        raise ZeroDivisionError("one over zero")
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(300)
    import torch

    return {"threads": torch.get_num_threads(), "pid": os.getpid()}


def test_result_comes_back_and_is_the_last_thing_written(tmp_path):
    """The function's dict, computed in another process with the threads asked for; what it prints is in the log."""
    outcome = run_child(work, tmp_path, 1, what="sums")
    assert outcome["threads"] == 1 and outcome["pid"] != os.getpid()
    assert (tmp_path / "worker.log").read_text() == "working on sums\n"
    assert (tmp_path / "result.json").exists()


@pytest.mark.parametrize(
    ("what", "kind", "said"),
    [
        ("user", UserError, "config: model: no such model, got 'x'; did you mean 'y'?\nb: c"),
        ("data", DataRefused, "too few rows"),
        ("bug", NightFailed, "ZeroDivisionError: one over zero"),
        ("killed", NightFailed, "signal 9 (out of memory?)"),
    ],
)
def test_errors_cross_the_border(tmp_path, what, kind, said):
    """An error of ours arrives as itself, any other as a failed night that names the log."""
    with pytest.raises(kind) as caught:
        run_child(work, tmp_path, 1, what=what)
    assert said in str(caught.value)
    assert type(caught.value) is kind
    assert not (tmp_path / "result.json").exists()


def test_an_old_error_is_not_taken_for_a_new_one(tmp_path):
    """A folder whose last run failed can be run in again."""
    with pytest.raises(NightFailed):
        run_child(work, tmp_path, 1, what="bug")
    assert "pid" in run_child(work, tmp_path, 1, what="fine")


def test_end_children_ends_them(tmp_path):
    """An interrupted night leaves no process behind."""
    child = Child(work, tmp_path, 1, what="sleep")
    pid = _pid(tmp_path)
    end_children()
    try:
        assert not child.alive and not psutil.pid_exists(pid)
        with pytest.raises(NightFailed, match="interrupted"):  # by a thread that did not know yet
            Child(work, tmp_path, 1, what="sleep")
    finally:
        accept_children()


def test_children_die_with_a_killed_parent(tmp_path):
    """kill -9 of the night ends its training process: no orphan holds the GPU until morning."""
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_processes import Child, work\n"
        "if __name__ == '__main__':\n"
        f"    Child(work, Path({str(tmp_path)!r}), 1, what='sleep').join()\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    pid = _pid(tmp_path)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def _pid(folder: Path) -> int:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if (folder / "pid").exists() and (folder / "pid").read_text():
            return int((folder / "pid").read_text())
        time.sleep(0.05)
    raise AssertionError((folder / "worker.log").read_text())
