"""The servers of one home: Prefect's and MLflow's, started on demand, shared, ended by whoever leaves last.

    with prefect_server(home) as api, mlflow_server(home) as pages:      # "http://127.0.0.1:PORT/api"
        ...

Who uses a server holds a shared lock on `users.lock` in its folder. The kernel drops a dead process's lock, so a killed
night leaves at worst an idle server, which the next command finds by `server.json`, reuses and then ends. A home's
servers keep their ports, so that links stay valid and a server that died can be started again under its clients.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from overnight.errors import Complaint, NightFailed
from overnight.home import Home, read_json, redact, write_json

LOOPBACK = "127.0.0.1"
START_SECONDS = 120.0
DEAF_SECONDS = 60.0
"""A server that lives is given this long to answer before it is ended: beside a training one it may be slow."""

ServerState = Literal["fine", "deaf", "dead"]

_leaving: list[Callable[[], None]] = []


def quiet_environment() -> dict[str, str]:
    """Settings of Prefect, MLflow and Hugging Face that keep a night offline, quiet and off other people's servers.

    Applied with `setdefault`, so that what the user has set stays.
    """
    return {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # the pages that come up first: those of version 2 ask amplitude.com, whatever the line above says
        "PREFECT_SERVER_UI_V2_ENABLED": "false",
        # the pages keep the log, the terminal shows our own progress
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        # threads that wait sleep: beside other work, spinning ones made training three times slower
        "OMP_WAIT_POLICY": "PASSIVE",
        # a task run's state is written in batches; the defaults let a short night end before its last row is stored
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
        # a night whose process is gone is told from a slow one by these: flows/deployments.py
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        # four minutes instead of one in which a server may be away without a night noticing
        "PREFECT_CLIENT_MAX_RETRIES": "7",
    }


def set_quiet_environment() -> None:
    """Puts `quiet_environment` into this process's environment, before the heavy packages are imported."""
    for name, value in quiet_environment().items():
        os.environ.setdefault(name, value)


@contextmanager
def prefect_server(home: Home, meanwhile: Callable[[], object] = lambda: None) -> Iterator[str]:
    """The API address of a Prefect server: the shared one of $PREFECT_API_URL, else the home's own.

    Sets `PREFECT_API_URL` and `PREFECT_HOME` for this process, so enter it before Prefect is imported.

    Args:
        meanwhile: called once the address is known, while the server still starts.

    Raises:
        NightFailed: when no server answers in time; the text names its log file.
    """
    if home.prefect_api:
        meanwhile()
        _await_health(home.prefect_api, None, None, START_SECONDS)
        yield home.prefect_api
        return
    folder = home.folder("prefect")
    os.environ["PREFECT_HOME"] = str(folder)
    with _shared(folder, partial(_start_prefect, home, folder, meanwhile)) as facts:
        os.environ["PREFECT_API_URL"] = facts["api"]
        yield facts["api"]


@contextmanager
def mlflow_server(home: Home) -> Iterator[str]:
    """The address of MLflow's pages: the shared server's own, else of the home's server on the embedded store.

    Raises:
        NightFailed: when it does not answer in time; the text names its log file.
    """
    if not home.embedded_tracking:
        yield home.tracking_uri
        return
    folder = home.folder("mlflow")
    with _shared(folder, partial(_start_mlflow, home, folder)) as facts:
        yield facts["ui"]


def server_states(home: Home) -> dict[str, ServerState]:
    """How each of the servers that this home uses is; a deaf one lives, but does not answer within seconds."""
    states: dict[str, ServerState] = {}
    shared = {"prefect": home.prefect_api, "mlflow": None if home.embedded_tracking else home.tracking_uri}
    for name, address in shared.items():
        if address is None:
            record = home.root / name / "server.json"
            health = (read_json(record) or {}).get("health")
            alive = server_process(record) is not None
            states[name] = "dead" if not alive else "fine" if _answers(str(health), 5) else "deaf"
        elif address.startswith("http"):  # a database has no health to ask for
            states[name] = "fine" if _answers(f"{address.rstrip('/')}/health", 5) else "deaf"
    return states


def revive_server(home: Home, name: str) -> None:
    """Starts the home's own server again for those who use it, at its old address where that is free.

    Raises:
        NightFailed: when it does not start.
    """
    folder = home.folder(name)
    with open(folder / "start.lock", "a+") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        if _running(folder) is None:
            if name == "prefect":
                _start_prefect(home, folder, lambda: None)
            else:
                _start_mlflow(home, folder)


@contextmanager
def _shared(folder: Path, start: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """The record of the server of a folder, which is started when it does not run and ended by the last to leave."""
    with open(folder / "users.lock", "a+") as users, open(folder / "start.lock", "a+") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        leave = partial(_leave, folder, users, starting)
        _leaving.append(leave)
        try:
            facts = _running(folder)
            if facts is None:
                start()
                facts = dict(read_json(folder / "server.json") or {})
            fcntl.flock(starting, fcntl.LOCK_UN)
            yield facts
        finally:
            _leaving.remove(leave)
            leave()


def known_server(home: Home) -> str | None:
    """The API address of the Prefect server that answers now, the shared one or the home's own; none is started.

    Sets `PREFECT_API_URL` and `PREFECT_HOME` for this process, as `prefect_server` does.
    """
    record = home.prefect / "server.json"
    if home.prefect_api:
        api = home.prefect_api
    elif server_process(record) is None:
        return None
    else:
        api = (read_json(record) or {}).get("api", "")
        os.environ |= {"PREFECT_HOME": str(home.prefect), "PREFECT_API_URL": api}
    return api if _answers(f"{api.rstrip('/')}/health", seconds=5) else None


def leave_servers() -> None:
    """Leaves the servers that this process uses, for one that cannot leave its blocks any more."""
    for leave in list(_leaving):
        leave()


def _leave(folder: Path, users: IO[str], starting: IO[str]) -> None:
    # nobody can arrive between the test and the end: arriving needs the lock that is held here
    fcntl.flock(starting, fcntl.LOCK_EX)
    fcntl.flock(users, fcntl.LOCK_UN)
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    stop_server(folder / "server.json")


def server_process(record: Path) -> psutil.Process | None:
    """The live process that a server record names; its start time tells it from a later process of the same number."""
    facts = read_json(record)
    if not facts:
        return None
    try:
        process = psutil.Process(facts["pid"])
        same = abs(process.create_time() - facts["created"]) < 1 and process.status() != psutil.STATUS_ZOMBIE
        return process if same else None
    except (psutil.Error, KeyError):
        return None


def stop_server(record: Path, seconds: float = 15.0) -> bool:
    """Ends the server of a record, gently first; True when one was running."""
    process = server_process(record)
    if process is not None:
        with suppress(psutil.Error):
            family = [*process.children(recursive=True), process]
            process.send_signal(signal.SIGTERM)
            _, alive = psutil.wait_procs(family, timeout=seconds)
            for survivor in alive:
                with suppress(psutil.Error):
                    survivor.kill()
            psutil.wait_procs(alive, timeout=5)
    record.unlink(missing_ok=True)
    return process is not None


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _port_of(folder: Path) -> int:
    """The port that the folder's server had before, where it is free; else another, which it then keeps."""
    port = read_json(folder / "port.json")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((LOOPBACK, int(port or 0)))
        except OSError:
            probe.bind((LOOPBACK, 0))
        kept = int(probe.getsockname()[1])
    write_json(folder / "port.json", kept)
    return kept


def start_server(
    command: list[str],
    record: Path,
    log: Path,
    health: str,
    environment: Mapping[str, str],
    facts: dict[str, Any],
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Starts a server in a session of its own and waits until `health` answers.

    `record` is written first, so that the next command finds the server of a process that was killed while waiting.
    """
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, **quiet_environment(), **environment},
            start_new_session=True,
        )
    try:
        created = psutil.Process(process.pid).create_time()
        write_json(record, {"pid": process.pid, "created": created, "health": health, **facts})
        meanwhile()
        _await_health(health, process, log, START_SECONDS)
    except BaseException:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        record.unlink(missing_ok=True)
        raise


def mlflow_pages(home: Home) -> str | None:
    """Where MLflow's pages are served now, by the shared server or on the home's own store; None: nowhere."""
    if home.tracking_uri.startswith(("http://", "https://")):
        return re.sub("//[^/@]*@", "//", home.tracking_uri).rstrip("/")
    record = home.mlflow / "server.json"
    return str((read_json(record) or {}).get("ui")) if server_process(record) else None


def _running(folder: Path) -> dict[str, Any] | None:
    record = folder / "server.json"
    facts = read_json(record)
    end = time.monotonic() + DEAF_SECONDS
    while facts is not None and server_process(record) is not None:
        if _answers(str(facts.get("health")), seconds=10):
            return dict(facts)
        if time.monotonic() > end:
            stop_server(record)
        time.sleep(0.1)
    return None


def _start_prefect(home: Home, folder: Path, meanwhile: Callable[[], object]) -> None:
    port = _port_of(folder)
    api = f"http://{LOOPBACK}:{port}/api"
    os.environ["PREFECT_API_URL"] = api  # what is imported meanwhile reads it
    environment = {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": api,
        "PREFECT_UI_API_URL": api,
        "PREFECT_API_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{folder / 'prefect.db'}",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # old rows slow every page down; the default trims events only
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": '["events", "flow_runs"]',
        # kept in memory, they would be lost with the server, and Prefect ends a night that lost its lease
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
    facts = {"api": api, "ui": f"http://{LOOPBACK}:{port}"}
    start_server(command, folder / "server.json", folder / "server.log", f"{api}/health", environment, facts, meanwhile)


def _start_mlflow(home: Home, folder: Path) -> None:
    port = _port_of(folder)
    address = f"http://{LOOPBACK}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", home.tracking_uri, "--default-artifact-root", str(folder / "artifacts")]
    # what MLflow refuses unless told otherwise, and `overnight up` is told by: webhooks to this machine, unencrypted
    environment = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    facts = {"ui": address}
    start_server(command, folder / "server.json", folder / "server.log", f"{address}/health", environment, facts)


def _await_health(address: str, process: subprocess.Popen[bytes] | None, log: Path | None, seconds: float) -> None:
    end = time.monotonic() + seconds
    health = address if address.endswith("/health") else f"{address.rstrip('/')}/health"
    while time.monotonic() < end:
        if process is not None and process.poll() is not None:
            raise NightFailed(Complaint(str(log), "the server ended while starting", f"exit code {process.returncode}"))
        if _answers(health, seconds=5):
            return
        time.sleep(0.1)
    where = str(log) if log else redact(address)
    raise NightFailed(Complaint(where, "no server answers", f"nothing in {seconds:.0f} s"))


def _answers(address: str, seconds: float) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=seconds) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError, ValueError):
        return False
