"""What `overnight up` keeps: one holder a home, and a worker that is started again when it dies.

with holding(home, configs=[...]) as tell:      # refuses where another process holds the home
    worker = Worker(command, log, environment)
    while …: worker.tend()
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from overnight.errors import Complaint, UserError
from overnight.home import Home, read_json, take_lock, write_json

RECORD = "up.json"
STEADY = 600.0
"""Seconds after which a worker counts as well again."""
LONGEST = 300.0
"""Seconds: the longest wait before a worker is started again."""


@contextmanager
def holding(home: Home, **facts: Any) -> Iterator[Callable[..., None]]:
    """Holds the home for this process; yields a function that adds facts to what others read about the holder.

    Raises:
        UserError: when another process holds it, saying which and since when.
    """
    with open(home.folder() / "up.lock", "a+") as lock:
        while not take_lock(lock):
            refuse_second(home)
        record = {"pid": os.getpid(), "since": time.time(), "ready": False, **facts}

        def tell(**more: Any) -> None:
            record.update(more)
            write_json(home.root / RECORD, record)

        tell()
        try:
            yield tell
        finally:
            (home.root / RECORD).unlink(missing_ok=True)


def refuse_second(home: Home) -> None:
    """Passes where nobody holds the home.

    Raises:
        UserError: when a process does, saying which and since when.
    """
    who = holder(home)
    if who is not None:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(who.get("since")))
        rule = f"`overnight up` runs already, as process {who.get('pid', '?')} since {since}"
        raise UserError(Complaint(str(home.root), f"{rule}; `overnight down` ends it"))


def holder(home: Home) -> dict[str, Any] | None:
    """What is known of the process that holds the home; None: none does."""
    try:
        lock = open(home.root / "up.lock")
    except OSError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return dict(read_json(home.root / RECORD) or {})
    return None


class Worker:
    """A worker in a session of its own, with a pipe by which it notices that we are gone.

    Args:
        command: started with the environment of this process and `environment`.
        log: where its output is appended.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]):
        self._command, self._log, self._environment = list(command), log, dict(environment)
        self._deaths = 0
        self._again = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._begun = 0.0
        self._start()

    def tend(self) -> str | None:
        """Starts the worker again when it died or was ended, with growing pauses; returns what there is to say."""
        if self._process is None:
            if time.monotonic() < self._again:
                return None
            try:
                self._start()
            except OSError as error:  # no memory, a full disk: it may pass
                return f"the worker cannot be started ({error}); {self._pause()}"
            return "the worker was started again"
        code = self._process.poll()
        if code is None:
            return None
        if time.monotonic() - self._begun > STEADY:
            self._deaths = 0
        self._process = None
        return f"the worker died ({code}); {self._pause()}"

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def end(self, seconds: float = 60.0) -> None:
        """Ends the worker, which ends its nights, gently first; killed when it has not ended after a while."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def _pause(self) -> str:
        self._deaths += 1
        pause = min(2.0**self._deaths, LONGEST)
        self._again = time.monotonic() + pause
        return f"it is started again in {pause:.0f} s, its log is {self._log}"

    def _start(self) -> None:
        with open(self._log, "ab") as output:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        self._begun = time.monotonic()
