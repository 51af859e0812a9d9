"""Work in a process of its own, forked from a warm server so that it costs no import time.

    child = Child(train, folder, threads=2, settings=...)      # train(folder, settings=...) -> dict, in the child
    while child.alive: ...
    child.outcome()                                            # the dict, or the child's error, raised here

The child has its own session, writes what it prints to `worker.log`, dies with its parent (also when that is killed),
and writes `result.json` last, so that file's existence proves completion.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from overnight import errors
from overnight.home import read_json, write_json

RESULT, ERROR, LOG = "result.json", "error.json", "worker.log"

PRELOAD = ["overnight.warm"]
TO_ASK = ["overnight.training.predict", "transformers.models.bert.modeling_bert"]
"""What a process needs that only asks a finished model: a sixth less to import than for training one."""
VISIBLE = "CUDA_VISIBLE_DEVICES"

_children: set[Child] = set()
_refused = threading.Event()


class Child:
    """One running function; `arguments` must be picklable by reference or plain data.

    Args:
        function: importable `function(folder, **arguments) -> dict` with JSON-able values.
        folder: where log, result and error are written; an old result or error there is removed.
        threads: cores that the child's matrix products use.
        cores: processor numbers to pin the child to; None leaves it free.
        gpus: those of the visible GPUs that the child sees; empty: all.
    """

    def __init__(
        self,
        function: Callable[..., dict[str, Any]],
        folder: Path,
        threads: int,
        cores: Sequence[int] | None = None,
        gpus: Sequence[int] = (),
        **arguments: Any,
    ):
        if _refused.is_set():  # a thread that was on its way here when the night was interrupted
            raise errors.NightFailed("interrupted before the process was started")
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for left in (RESULT, ERROR):  # else a failure would pass for what an earlier child gave
            (folder / left).unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._process = context.Process(
            target=_child_main, args=(function, str(folder), threads, cores, gpus, arguments)
        )
        self._process.start()
        _children.add(self)
        if _refused.is_set():
            self.kill()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def join(self, seconds: float | None = None) -> bool:
        """Waits; True when the child has ended."""
        self._process.join(seconds)
        return not self.alive

    def kill(self) -> None:
        """Ends the child and whatever it started, at once."""
        if self._process.pid is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):  # not yet the leader of its own group
                os.kill(self._process.pid, signal.SIGKILL)
        self._process.join(10)
        _children.discard(self)

    def outcome(self) -> dict[str, Any]:
        """The function's return value.

        Raises:
            OvernightError: the one that the child raised.
            NightFailed: any other error, with the last line of its log, or the signal that ended it.
        """
        self._process.join()
        _children.discard(self)
        result = read_json(self.folder / RESULT)
        if result is not None:
            return dict(result)
        error = read_json(self.folder / ERROR)
        if error:
            kind = getattr(errors, error["kind"], errors.NightFailed)
            raise kind(*[errors.Complaint(**c) for c in error["complaints"]])
        code = self._process.exitcode
        how = f"exit code {code}"
        if code and code < 0:
            how = f"signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
        raise errors.NightFailed(errors.Complaint(str(self.folder / LOG), "the process ended before its work", how))


def cores() -> tuple[int, ...]:
    """Numbers of the processor cores that this process may use."""
    return tuple(sorted(os.sched_getaffinity(0)))


def warm_up(modules: Sequence[str] = tuple(PRELOAD)) -> None:
    """Starts the fork server, whose imports take half a minute on a small machine, while other work goes on."""
    from multiprocessing import forkserver

    forkserver.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


def end_fork_server() -> None:
    """For a process that ends: its fork server would take seconds to take itself apart, for nobody."""
    from multiprocessing import forkserver

    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)  # there is no public name for it
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def accept_children() -> None:
    """Takes back `end_children`."""
    _refused.clear()


def end_children() -> None:
    """Kills every child of this process and refuses new ones: for an interrupted night."""
    _refused.set()
    for child in list(_children):
        child.kill()


def ending() -> bool:
    """Whether the children are ended because the night is, not by a fault of their own."""
    return _refused.is_set()


def run_child(function: Callable[..., dict[str, Any]], folder: Path, threads: int, **arguments: Any) -> dict[str, Any]:
    """Starts a child, waits for it and returns its outcome; an interrupt ends it."""
    child = Child(function, folder, threads, **arguments)
    try:
        return child.outcome()
    except BaseException:
        child.kill()
        raise


def _child_main(
    function: Callable[..., dict[str, Any]],
    folder: str,
    threads: int,
    cores: Sequence[int] | None,
    gpus: Sequence[int],
    arguments: dict[str, Any],
) -> None:
    os.setsid()  # a terminal's ctrl-c is the parent's to handle
    threading.Thread(target=die_with_parent, daemon=True).start()
    _redirect_output(Path(folder) / LOG)
    if cores:
        os.sched_setaffinity(0, cores)
    if gpus:  # before CUDA is woken, which looks only once
        visible = os.environ.get(VISIBLE, "").split(",")
        os.environ[VISIBLE] = ",".join(visible[gpu] if visible != [""] else str(gpu) for gpu in gpus)
    import torch

    torch.set_num_threads(threads)
    try:
        write_json(Path(folder) / RESULT, function(Path(folder), **arguments))
    except Exception as error:
        write_error(Path(folder), error)
        sys.exit(1)


def write_error(folder: Path, error: Exception) -> None:
    """From within a handler: leaves the error for `Child.outcome` to raise, and its traceback in the log."""
    traceback.print_exc()
    complaints = (
        [c.__dict__ for c in error.complaints]
        if isinstance(error, errors.OvernightError)
        else [{"where": str(folder / LOG), "rule": f"{type(error).__name__}: {error}"}]
    )
    kinds = [c.__name__ for c in type(error).__mro__ if hasattr(errors, c.__name__)]
    write_json(folder / ERROR, {"kind": kinds[0] if kinds else "NightFailed", "complaints": complaints})


def die_with_parent() -> None:
    """For a thread: ends this process's group when its parent is gone."""
    # the parent of a forked child is the fork server, which outlives a killed night: wait for the night itself
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(os.getpgrp(), signal.SIGKILL)


def _redirect_output(log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
