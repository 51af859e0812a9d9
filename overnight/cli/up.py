"""`overnight up`, `down`: the servers, the schedules and the worker of a team of one, kept running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from overnight.cli import app
from overnight.cli.schedule import Configs, scheduled, show_nights
from overnight.errors import NightFailed
from overnight.home import Home, redact

LOOK_SECONDS = 5.0
DEAF_SECONDS = 120.0
"""A server that lives is given this long to answer: beside a training one, on two cores, it may be slow."""


@app.command()
def up(
    configs: Configs = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once all is healthy.")] = False,
) -> None:
    """Run the nights of all schedules: Prefect, MLflow and a worker, until ctrl-c or `overnight down`."""
    home, chosen = Home.from_environment(), scheduled(configs, required=True)
    if detach:
        _detach(home, list(chosen))
        return
    from overnight import status
    from overnight.services import mlflow_server, prefect_server
    from overnight.tracking import store
    from overnight.upkeep import Worker, holding

    with holding(home, configs=list(chosen), folder=str(Path.cwd())) as tell:
        _say("starting")
        store.prepare(home)
        with prefect_server(home, meanwhile=lambda: import_module("flows.deployments")) as api:
            from flows.deployments import deploy
            from flows.turns import end_dead_runs

            with mlflow_server(home) as pages:
                for line in end_dead_runs(home):
                    _say(line)
                for change in deploy(chosen, Path.cwd(), complete=not configs):
                    if change.kind != "unchanged":
                        _say(str(change))
                log = home.folder("prefect") / "worker.log"
                command = [sys.executable, "-m", "flows.worker"]
                with _stoppable() as stop:
                    worker = Worker(command, log, {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO"})
                    try:
                        links = {"prefect": redact(api.removesuffix("/api")), "mlflow": redact(pages)}
                        _show(links, log)
                        show_nights(status.next_nights(chosen, datetime.now(UTC)))
                        tell(ready=True, links=links)
                        watch = _Watch(home, worker)
                        while not stop.wait(LOOK_SECONDS):
                            watch.look()
                    finally:
                        _say("ending; a night that runs is interrupted and can be continued")
                        worker.end()
    _say("ended")


@app.command()
def down() -> None:
    """End what `overnight up` started."""
    from overnight.upkeep import holder

    home = Home.from_environment()
    who = holder(home)
    if who is None:
        typer.echo(f"{home.root}: nothing to end, `overnight up` does not run")
        return
    with suppress(ProcessLookupError):
        os.kill(who["pid"], signal.SIGTERM)
    for _ in range(1500):
        if holder(home) is None:
            typer.echo(f"ended process {who['pid']}")
            return
        time.sleep(0.1)
    raise NightFailed(f"process {who['pid']} does not end; its log may say why")


class _Watch:
    """Looks after servers and worker, and says what changes: also which nights begin and end."""

    def __init__(self, home: Home, worker: Any):
        self._home, self._worker = home, worker
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
                except NightFailed as error:
                    _say(str(error))
                if os.environ.get("PREFECT_API_URL") != address:
                    self._worker.end()
                    self._worker.start()
            elif since is None:
                self._deaf[name] = time.monotonic()
                _say(f"{name} does not answer")
        for line in (self._worker.tend(), *self._news()):
            if line:
                _say(line)

    def _states(self) -> dict[str, str]:
        from overnight.nights import night_records

        return {record["id"]: record["state"] for record in night_records(self._home)}

    def _news(self) -> Iterator[str]:
        before, self._nights = self._nights, self._states()
        for night, state in self._nights.items():
            if before.get(night) != state:
                yield f"{night}: {state}"


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
def _stoppable() -> Iterator[threading.Event]:
    """An event that ctrl-c and SIGTERM set, for a block that must not be left in the middle of its clean-up."""
    stop = threading.Event()
    before = {}
    for number in (signal.SIGINT, signal.SIGTERM):
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
    typer.echo(f"{time.strftime('%H:%M:%S')} {text}")
