"""A Prefect worker that ends with the pipe on its standard input: `python -m flows.worker`.

Whoever starts it ends it by closing the pipe, or by dying. Prefect's own way to end a worker kills its nights without a
word; here they are interrupted first, as ctrl-c interrupts `overnight run`, so that they can be continued. A night
whose worker was killed interrupts itself.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress

import psutil

POOL = "overnight"
PATIENCE = 30.0
"""Seconds that the nights have to end."""
LEAVING = 10.0
"""Seconds that the worker then has. It sometimes hangs, and has nothing left to lose."""


def main() -> None:
    """Runs until the other end of the pipe is gone."""
    threading.Thread(target=_end_with_pipe, daemon=True).start()
    from prefect.cli import app

    sys.argv = ["prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    app()


def end_with_worker() -> None:
    """For a night that a worker started: interrupts this process when the worker is gone, however that died.

    Without a worker the night would go on unseen and hold its model, until its next log line meets the broken pipe.
    """
    threading.Thread(target=_interrupt_without_reader, daemon=True, name="end with worker").start()


def _interrupt_without_reader() -> None:
    # the worker reads our output: the kernel says at once, also of a worker that died before we came to ask
    pipe = select.poll()
    pipe.register(1, 0)
    pipe.poll()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # else Prefect, which says that the night was interrupted, would die of saying it
        os.dup2(nowhere, stream)
    os.kill(os.getpid(), signal.SIGTERM)


def _end_with_pipe() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    told: set[psutil.Process] = set()
    end = time.monotonic() + PATIENCE
    while (nights := _nights()) and time.monotonic() < end:
        for night in nights - told:  # the worker goes on starting some
            with suppress(psutil.NoSuchProcess):
                night.terminate()
        told |= nights
        time.sleep(0.1)
    for night in nights:  # each leads a group of its own
        with suppress(ProcessLookupError):
            os.killpg(night.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _nights() -> set[psutil.Process]:
    """The children that live."""
    return set(filter(_alive, psutil.Process().children()))


def _alive(process: psutil.Process) -> bool:
    # not by waiting for it: the worker itself wants to know how it ended
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
