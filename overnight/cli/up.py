"""`overnight up`, `down`: the servers, the schedules and the worker of a team of one, kept running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from overnight.cli import app
from overnight.cli.schedule import Configs, scheduled, show_nights
from overnight.config import Config
from overnight.errors import NightFailed, OvernightError
from overnight.home import Home, redact

LOOK_SECONDS = 5.0
DEAF_SECONDS = 60.0
"""A server that lives may be silent for this long before it is looked at more closely."""


@app.command()
def up(
    configs: Configs = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once all is healthy.")] = False,
) -> None:
    """Run the nights of all schedules: Prefect, MLflow and a worker, until ctrl-c or `overnight down`."""
    home, chosen = Home.from_environment(), scheduled(configs, required=True)
    if detach:
        _detach(home, configs or [])
        return
    from overnight import status
    from overnight.services import mlflow_server, prefect_server
    from overnight.tracking import store, webhooks
    from overnight.upkeep import Worker, holding

    with holding(home, configs=[os.path.abspath(path) for path in chosen]) as tell:
        _say("starting")
        store.prepare(home)
        # in a process of its own: what a deployment has to import would stay in this one's memory
        command = [sys.executable, "-m", "overnight", "deploy", *(configs or ()), "--no-file", "--json"]
        environment = dict(os.environ)  # in which a server of the home's own is not named, so that it is known as that
        with (
            prefect_server(home) as api,
            _running(command, environment) as deploying,
            mlflow_server(home) as pages,
        ):
            for change in json.loads(_output(deploying)):
                if change["kind"] != "unchanged":
                    _say(f"{change['kind']} {change['what']}: {change['details']}")
            log = home.folder("prefect") / "worker.log"
            links = {"prefect": redact(api.removesuffix("/api")), "mlflow": redact(pages)}
            with _stoppable() as stop, webhooks.moved_aliases(home, pages) as moved:
                worker = Worker(
                    [sys.executable, "-m", "flows.worker"], log, {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO"}
                )
                try:
                    _show(links, log)
                    show_nights(status.next_nights(chosen, datetime.now(UTC)))
                    tell(ready=True, links=links)
                    watch = _Watch(home, worker, chosen, moved)
                    with _line(watch) as refresh:
                        while not stop.wait(LOOK_SECONDS):
                            watch.look()
                            refresh()
                finally:
                    _say("ending; a night that runs is interrupted and can be continued")
                    worker.end()
    _say("ended")


@app.command()
def down() -> None:
    """End what `overnight up` started."""
    from overnight.upkeep import holder

    home = Home.from_environment()
    pid: int | None = None
    for _ in range(1500):
        who = holder(home)
        if who is None:
            nothing = f"{home.root}: nothing to end, `overnight up` does not run"
            typer.echo(f"ended process {pid}" if pid else nothing)
            return
        if pid is None and who.get("pid"):  # unknown in its first moment
            pid = int(who["pid"])
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        time.sleep(0.1)
    raise NightFailed(f"process {pid or '?'} does not end; its log may say why")


class _Watch:
    """Looks after servers and worker, and says what changes: also which nights begin and end."""

    def __init__(self, home: Home, worker: Any, configs: dict[str, Config], moved: SimpleQueue[str]):
        self._home, self._worker, self._configs, self._moved = home, worker, configs, moved
        self._deaf: dict[str, float] = {}
        self._nights = self._states()

    def look(self) -> None:
        from overnight.services import revive_server, server_states

        for name, state in server_states(self._home).items():
            if state == "fine":
                if self._deaf.pop(name, None):
                    _say(f"{name} answers again")
                continue
            since = self._deaf.get(name)
            own = name == "mlflow" and self._home.embedded_tracking or name == "prefect" and not self._home.prefect_api
            if own and (state == "dead" or since and time.monotonic() - since > DEAF_SECONDS):
                _say(f"the {name} server {'died' if state == 'dead' else 'is deaf'}; starting it again")
                address = os.environ.get("PREFECT_API_URL")
                try:
                    revive_server(self._home, name)
                    _say(f"{name} runs again")
                except (NightFailed, OSError) as error:  # looked at again in a moment; what runs goes on
                    _say(str(error))
                if os.environ.get("PREFECT_API_URL") != address:
                    self._worker.end()  # and started again below
            elif since is None:
                self._deaf[name] = time.monotonic()
                _say(f"{name} does not answer")
        for line in (self._worker.tend(), *self._news(), *self._observed()):
            if line:
                _say(line)

    def __rich__(self) -> str:
        """What a terminal shows: how all is, and when the next night is."""
        from overnight.report.words import duration
        from overnight.status import next_nights

        now = datetime.now(UTC)
        following = next_nights(self._configs, now)[0]
        left = duration((datetime.fromisoformat(following["at"]) - now).total_seconds())
        troubled = [*self._deaf, *([] if self._worker.alive else ["worker"])]
        how = f"not well: {', '.join(troubled)}" if troubled else "Prefect, MLflow and worker are well"
        running = "".join(f" · {night} runs" for night, state in self._nights.items() if state == "running")
        return f"{time.strftime('%H:%M:%S')} {how}{running} · {following['model']} in {left}"

    def _states(self) -> dict[str, str]:
        from overnight.nights import night_records

        return {record["id"]: record["state"] for record in night_records(self._home)}

    def _news(self) -> Iterator[str]:
        before, self._nights = self._nights, self._states()
        for night, state in self._nights.items():
            if before.get(night) != state:
                yield f"{night}: {state}"

    def _observed(self) -> Iterator[str]:
        """What became of champions that somebody set in MLflow's pages."""
        from overnight.scoring import smoke_in_child
        from overnight.tracking import ledger

        names = {self._moved.get() for _ in range(self._moved.qsize())}
        for name in sorted(names):
            try:
                entry = ledger.observe(self._home, name, smoke=partial(smoke_in_child, self._home))
                doubt = ledger.doubt(self._home, name)
            except OvernightError as error:  # the next night looks again
                yield f"{name}: {error}"
                continue
            if entry is not None:
                yield f"{name}: version {entry.to_version} became champion by other means"
                if doubt:
                    yield f"{name}: {doubt}"


def _detach(home: Home, configs: list[str]) -> None:
    """Starts `overnight up` in a session of its own and waits until all is healthy."""
    from overnight.upkeep import holder, refuse_second

    refuse_second(home)
    log = home.folder() / "up.log"
    with open(log, "ab") as output:
        start = output.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "overnight", "up", *configs],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            who = holder(home)
            if who and who.get("pid") == process.pid and who["ready"]:
                break
            time.sleep(0.2)
    except BaseException:
        process.terminate()
        raise
    typer.echo(log.read_bytes()[start:].decode(errors="replace"), nl=False)
    if process.poll() is not None:
        raise typer.Exit(process.returncode or 4)
    typer.echo(f"process {process.pid} goes on; its log is {log}, `overnight down` ends it")


@contextmanager
def _running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that does not outlive the block."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _output(process: subprocess.Popen[str]) -> str:
    """What it prints.

    Raises:
        Exit: with its code when that is not 0; it has said why.
    """
    text, _ = process.communicate()
    if process.returncode:
        raise typer.Exit(process.returncode)
    return text


@contextmanager
def _line(watch: _Watch) -> Iterator[Callable[[], None]]:
    """A line that tells how all is, where there is a terminal; yields what brings it up to date."""
    console = Console()
    if not console.is_terminal:
        yield lambda: None
        return
    with Live(watch, console=console, auto_refresh=False, transient=True) as live:
        yield live.refresh


@contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """An event that ctrl-c, SIGTERM and a closed terminal set, for a block whose clean-up must not be cut short."""
    stop = threading.Event()
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(links: dict[str, str], log: Path) -> None:
    for name, link in links.items():
        typer.echo(f"{name:<8} {link}")
    typer.echo(f"worker   its log is {log}\n")


def _say(text: str) -> None:
    with suppress(OSError):  # a log on a full disk, a reader that has gone: no reason to end the nights
        typer.echo(f"{time.strftime('%H:%M:%S')} {text}")
