"""The command line: `overnight COMMAND`. Starts in a fraction of a second; heavy packages are imported by the commands.

Exit codes: 0 done (promoted, kept or skipped), 2 the user's input, 3 the data was refused, 4 the night failed,
130 interrupted.
"""

from __future__ import annotations

import atexit
import errno
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from importlib import import_module

import typer

from overnight import __version__
from overnight.errors import OvernightError
from overnight.home import Home
from overnight.processes import end_children, end_fork_server
from overnight.services import leave_servers, set_quiet_environment

INTERRUPTED = 130
PATIENCE = 30.0
"""Seconds that an interrupted command has to end by itself."""
FULL = 2_000_000
"""Bytes: with fewer left on the home's disk, that is what a failure is about."""

app = typer.Typer(
    name="overnight",
    help="Retrains text models every night and promotes a version only when it is really better.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"overnight {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


# the commands register themselves on `app`, in the order in which the help lists them
for _module in ("night", "notify", "up", "schedule", "models", "clean", "serve", "score", "monitor", "state", "stack"):
    import_module(f"overnight.cli.{_module}")


def main() -> None:
    """Entry point of the `overnight` command."""
    set_quiet_environment()
    code = run(sys.argv[1:])
    # what must happen at an exit happens, but the interpreter is not taken apart: after a night that takes seconds
    atexit._run_exitfuncs()
    end_fork_server()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe, or stream
            stream.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Runs one command; errors are printed as a user reads them. Returns the exit code."""
    interrupted = _interruptible()
    try:
        code = int(app(arguments, standalone_mode=False) or 0)
        if code == INTERRUPTED:  # typer turns a KeyboardInterrupt into this
            raise KeyboardInterrupt
        return code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except Exception as error:
        # an interrupt in the middle of Prefect's book-keeping comes out as whatever that trips over
        return _interrupted() if interrupted else _failed(error)


def _interruptible() -> list[int]:
    """Makes SIGTERM, which whoever stops a service sends, end a command as ctrl-c does; lists the signals that came.

    An interrupt can fall between the taking of a library's lock and the block that gives it back, and then everything
    waits for ever. So a command that does not end by itself is ended; what a night has done is on the disk.
    """
    came: list[int] = []
    asked = threading.Event()

    def interrupt(number: int, frame: object) -> None:
        came.append(number)
        asked.set()
        raise KeyboardInterrupt

    def end() -> None:
        asked.wait()
        time.sleep(PATIENCE)
        end_children()
        leave_servers()
        os._exit(_interrupted())

    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # as shells do for jobs in the background
    for number in (signal.SIGTERM,) if ignored else (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    threading.Thread(target=end, daemon=True, name="interrupt").start()
    return came


def _interrupted() -> int:
    return _complain("interrupted; run it again to continue", code=INTERRUPTED)


def _failed(error: Exception) -> int:
    if isinstance(error, OvernightError):
        return _complain(*map(str, error.complaints), *_full_disk(), code=error.exit_code)
    if isinstance(error, typer.TyperException):
        show = getattr(error, "show", None)
        if show is not None:
            show()
        return int(getattr(error, "exit_code", 2))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _complain(f"{error.filename or 'the disk'}: no space left", *_full_disk(), code=4)
    return _unexpected()


def _complain(*lines: str, code: int) -> int:
    for line in lines:
        print(line, file=sys.stderr)
    return code


def _full_disk() -> list[str]:
    """One line when the home's disk is full: databases and servers report that in a hundred ways."""
    try:
        root = Home.from_environment().root
        free = shutil.disk_usage(root).free
    except (OSError, OvernightError):
        return []
    return [f"{root}: the disk is full; free some and run again, the night continues"] if free < FULL else []


def _unexpected() -> int:
    """A mistake of ours, not the user's: the traceback goes to a file, its last line to the user."""
    full, text = _full_disk(), traceback.format_exc()
    if full:
        return _complain(*full, code=4)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="overnight-", suffix=".log", delete=False) as file:
            file.write(text)
        where = f" (traceback in {file.name})"
    except OSError:
        where = f"\n{text}"
    return _complain(f"overnight failed unexpectedly: {text.strip().splitlines()[-1]}{where}", code=4)
