"""A Prefect worker that ends with the pipe on its standard input: `python -m flows.worker`.

Whoever starts it ends it by closing the pipe, or by dying. Prefect's own way to end a worker kills its nights without a
word; here they are interrupted first, as ctrl-c interrupts `overnight run`, so that they can be continued.
"""

from __future__ import annotations

import os
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


def _end_with_pipe() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    nights = psutil.Process().children()
    for night in nights:
        with suppress(psutil.NoSuchProcess):
            night.terminate()
    end = time.monotonic() + PATIENCE
    while any(map(_alive, nights)) and time.monotonic() < end:
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVING)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _alive(process: psutil.Process) -> bool:
    # not by waiting for it: the worker itself wants to know how it ended
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
