"""The home's own Prefect server: started once, shared, ended by the last to leave, found again after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from conftest import prefect_says

from overnight.errors import NightFailed
from overnight.home import Home, read_json, write_json
from overnight.services import free_port, prefect_server, server_process, start_server, stop_server

HOLD = """
import os, sys
os.environ["OVERNIGHT_HOME"] = sys.argv[1]
os.environ.pop("PREFECT_API_URL", None)
from overnight.home import Home
from overnight.services import prefect_server
with prefect_server(Home.from_environment()) as api:
    print(api, flush=True)
    sys.stdin.readline()
"""
DIES = """
import os, sys
os.environ["OVERNIGHT_HOME"] = sys.argv[1]
os.environ.pop("PREFECT_API_URL", None)
from overnight.home import Home
from overnight.services import prefect_server
with prefect_server(Home.from_environment(), meanwhile=lambda: os.kill(os.getpid(), 9)):
    raise AssertionError
"""


@pytest.fixture
def own_home(tmp_path, monkeypatch) -> Home:
    for name in ("PREFECT_API_URL", "PREFECT_HOME"):
        monkeypatch.delenv(name, raising=False)
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})


def holder(home: Home) -> tuple[subprocess.Popen[str], str]:
    """Another process that uses the server."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_one_server_for_all_ended_by_the_last(own_home):
    """A second process gets the same server; it survives a killed user, and ends with the last to leave."""
    record = own_home.prefect / "server.json"
    process, theirs = holder(own_home)
    try:
        with prefect_server(own_home) as ours:
            assert ours == theirs
            process.kill()  # a killed night does not count as a user any more
            process.wait()
            with urllib.request.urlopen(f"{ours}/health", timeout=10) as answer:
                assert answer.status == 200
            assert "127.0.0.1" in ours
            pid = read_json(record)["pid"]
        assert not psutil.pid_exists(pid) and not record.exists()
    finally:
        process.kill()
        stop_server(record)


def test_a_server_left_by_a_killed_night_is_found_and_ended(own_home):
    """kill -9 leaves an idle server; the next command uses it instead of starting another, and ends it."""
    process, theirs = holder(own_home)
    process.kill()
    process.wait()
    pid = read_json(own_home.prefect / "server.json")["pid"]
    assert psutil.pid_exists(pid)
    begun = time.monotonic()
    with prefect_server(own_home) as ours:
        assert ours == theirs and time.monotonic() - begun < 5
    assert not psutil.pid_exists(pid)


def test_a_server_whose_starter_was_killed_is_found_and_ended(own_home):
    """kill -9 while the server still starts: the next command waits for the very same one, and ends it."""
    record = own_home.prefect / "server.json"
    try:
        assert subprocess.run([sys.executable, "-c", DIES, str(own_home.root)]).returncode == -signal.SIGKILL
        left = server_process(record)
        assert left is not None, "nobody would know the server"
        with prefect_server(own_home) as api:
            assert server_process(record) == left
            with urllib.request.urlopen(f"{api}/health", timeout=10) as answer:
                assert answer.status == 200
        assert not left.is_running() and not record.exists()
    finally:
        stop_server(record)


def test_a_server_that_does_not_start_leaves_no_record(tmp_path):
    """What it said before it ended is named; the next command starts another."""
    record, log = tmp_path / "server.json", tmp_path / "server.log"
    health = f"http://127.0.0.1:{free_port()}/health"
    with pytest.raises(NightFailed, match=r"server\.log: the server ended while starting, got exit code 3"):
        start_server([sys.executable, "-c", "raise SystemExit(3)"], record, log, health, {}, {})
    assert not record.exists()


def test_a_record_is_no_proof_of_a_process(own_home):
    """A process that got a dead server's number is neither taken for it nor ended."""
    record = own_home.folder("prefect") / "server.json"
    write_json(record, {"pid": os.getpid(), "created": 12345.0, "api": f"http://127.0.0.1:{free_port()}/api"})
    assert server_process(record) is None
    assert stop_server(record) is False and psutil.pid_exists(os.getpid())


def test_a_shared_server_is_used_as_it_is(prefect_api, tmp_path):
    """With PREFECT_API_URL no server is started, and none is ended."""
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path), "PREFECT_API_URL": prefect_api})
    with prefect_server(home) as api:
        assert api == prefect_api
    assert not (tmp_path / "prefect").exists()
    with urllib.request.urlopen(f"{prefect_api}/health", timeout=10) as answer:
        assert answer.status == 200


def test_the_scheduler_of_the_capped_versions_works(prefect_api):
    """The caps in pyproject.toml do what they are for: with this SQLAlchemy, Prefect's scheduler makes cron runs."""
    flow = prefect_says("POST", f"{prefect_api}/flows/", json={"name": "cron-probe"})
    deployment = {
        "name": "probe",
        "flow_id": flow["id"],
        "schedules": [{"schedule": {"cron": "* * * * *", "timezone": "UTC"}, "active": True}],
    }
    made = prefect_says("POST", f"{prefect_api}/deployments/", json=deployment)
    end, runs = time.monotonic() + 60, []
    while not runs and time.monotonic() < end:
        wanted = {"deployments": {"id": {"any_": [made["id"]]}}}
        runs = prefect_says("POST", f"{prefect_api}/flow_runs/filter", json=wanted)
        time.sleep(0.5)
    prefect_says("DELETE", f"{prefect_api}/deployments/{made['id']}")
    assert runs and runs[0]["state_type"] == "SCHEDULED"


@pytest.mark.slow
def test_ui_ends_its_servers_when_it_is_told_to(tmp_path):
    """A service manager sends SIGTERM, and may have started the command with SIGINT ignored: both servers end."""
    environment = os.environ | {"OVERNIGHT_HOME": str(tmp_path)}
    environment.pop("PREFECT_API_URL", None)
    overnight = Path(sys.executable).with_name("overnight")
    command = f"trap '' INT; exec {overnight} ui"
    with subprocess.Popen(["sh", "-c", command], env=environment, stdout=subprocess.PIPE, text=True) as ui:
        links = [ui.stdout.readline().split()[-1] for _ in range(2)]
        for link in links:
            assert urllib.request.urlopen(link, timeout=30).status == 200
        ui.terminate()
        assert ui.wait(60) == 0
    for link in links:
        with pytest.raises(OSError):
            urllib.request.urlopen(link, timeout=5)


HANG = """
import sys, time
from overnight import cli
from overnight.home import Home
from overnight.services import prefect_server

cli.PATIENCE = 1.0
cli._interruptible()
with prefect_server(Home.from_environment()) as api:
    told = False
    while True:
        try:
            if not told:  # in here, since the interrupt comes as soon as it is read
                told = True
                print(api, flush=True)
            time.sleep(600)
        except KeyboardInterrupt:
            print("stuck", flush=True)
"""


def test_interrupted_command_that_hangs_is_ended(tmp_path):
    """Whatever a library makes of an interrupt: exit 130 after a while, and the server is not left behind."""
    environment = os.environ | {"OVERNIGHT_HOME": str(tmp_path)}
    environment.pop("PREFECT_API_URL", None)
    with subprocess.Popen(
        [sys.executable, "-c", HANG], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        api = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read().strip() == "stuck" and "interrupted" in process.stderr.read()
    with pytest.raises(OSError):
        urllib.request.urlopen(api + "/health", timeout=5)
