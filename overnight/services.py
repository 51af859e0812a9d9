"""The servers of one home: a Prefect server of its own, started on demand, shared, ended by whoever leaves last.

    with prefect_server(home) as api:      # "http://127.0.0.1:PORT/api"
        ...

Who uses the server holds a shared lock on `prefect/users.lock`. The kernel drops a dead process's lock, so a killed
night leaves at worst an idle server, which the next command finds by `prefect/server.json`, reuses and then ends.
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
from typing import IO, Any

import psutil

from overnight.errors import Complaint, NightFailed
from overnight.home import Home, read_json, redact, write_json

LOOPBACK = "127.0.0.1"
START_SECONDS = 120.0

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
    with open(folder / "users.lock", "a+") as users, open(folder / "start.lock", "a+") as starting:
        fcntl.flock(starting, fcntl.LOCK_EX)
        fcntl.flock(users, fcntl.LOCK_SH)
        os.environ["PREFECT_HOME"] = str(folder)
        leave = partial(_leave, folder, users, starting)
        _leaving.append(leave)
        try:
            api = _running(folder) or _start(home, folder, meanwhile)
            os.environ["PREFECT_API_URL"] = api
            fcntl.flock(starting, fcntl.LOCK_UN)
            yield api
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


def start_server(
    command: list[str],
    record: Path,
    log: Path,
    health: str,
    environment: Mapping[str, str],
    facts: dict[str, Any],
    meanwhile: Callable[[], object] = lambda: None,
) -> None:
    """Starts a server in a session of its own and waits until `health` answers; `record` is written last."""
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
        meanwhile()
        _await_health(health, process, log, START_SECONDS)
        created = psutil.Process(process.pid).create_time()
        write_json(record, {"pid": process.pid, "created": created, **facts})
    except BaseException:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def mlflow_pages(home: Home) -> str | None:
    """Where MLflow's pages are served now, by the shared server or on the home's own store; None: nowhere."""
    if home.tracking_uri.startswith(("http://", "https://")):
        return re.sub("//[^/@]*@", "//", home.tracking_uri).rstrip("/")
    record = home.mlflow / "server.json"
    return str((read_json(record) or {}).get("ui")) if server_process(record) else None


def _running(folder: Path) -> str | None:
    record = folder / "server.json"
    facts = read_json(record)
    if facts is None or server_process(record) is None:
        return None
    api = str(facts["api"])
    if _answers(f"{api}/health", seconds=10):
        return api
    stop_server(record)  # alive but deaf
    return None


def _start(home: Home, folder: Path, meanwhile: Callable[[], object]) -> str:
    port = free_port()
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
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
    facts = {"api": api, "ui": f"http://{LOOPBACK}:{port}"}
    start_server(command, folder / "server.json", folder / "server.log", f"{api}/health", environment, facts, meanwhile)
    return api


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


@contextmanager
def mlflow_server(home: Home) -> Iterator[str]:
    """The address of MLflow's pages: the shared server's own, else a server on the embedded store for this block."""
    if not home.embedded_tracking:
        yield home.tracking_uri
        return
    folder, port = home.folder("mlflow"), free_port()
    record = folder / "server.json"
    stop_server(record)  # of a command that was killed
    address = f"http://{LOOPBACK}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", LOOPBACK, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", home.tracking_uri, "--default-artifact-root", str(folder / "artifacts")]
    start_server(command, record, folder / "server.log", f"{address}/health", {}, {"ui": address})
    try:
        yield address
    finally:
        stop_server(record)
