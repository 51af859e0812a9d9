"""`overnight up` for real: servers, worker and schedule of a temporary home, a night that starts by itself, the end."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import httpx
import psutil
import pytest
import yaml
from conftest import Project, prefect_says

from overnight.cli.up import _Watch
from overnight.errors import UserError
from overnight.home import Home, read_json
from overnight.upkeep import Worker, holder, holding

PATIENCE = 1200
"""Seconds: a night on a machine that does much else besides."""


def until(true: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "did not come true"
        time.sleep(0.3)


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# -- quick: the lock and the worker's keeper ---------------------------------------------------------------------------


def test_one_holder_a_home(tmp_path):
    """A second one is refused with who and since when; afterwards the home is free, also after a kill."""
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    assert holder(home) is None
    with holding(home, configs=["a.yaml"]) as tell:
        tell(ready=True)
        assert holder(home) == {**holder(home), "pid": os.getpid(), "ready": True, "configs": ["a.yaml"]}
        with pytest.raises(UserError, match=rf"runs already, as process {os.getpid()} since 20"):
            with holding(home):
                raise AssertionError
    assert holder(home) is None
    code = f"""
from overnight.home import Home
from overnight.upkeep import holding
import os
with holding(Home.from_environment({{"OVERNIGHT_HOME": {str(home.root)!r}}})):
    os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert (home.root / "up.json").exists() and holder(home) is None, "what a killed one left says nothing"


def test_who_only_looks_keeps_nobody_from_holding(tmp_path):
    """A look holds the lock for a moment, in which `up` waits."""
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path)})
    (tmp_path / "up.lock").touch()
    with open(tmp_path / "up.lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `holder` does
        moment = threading.Timer(0.3, lambda: fcntl.flock(looking, fcntl.LOCK_UN))
        moment.start()
        with holding(home):
            assert holder(home)["pid"] == os.getpid()
        moment.join()


STUBBORN = "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"


def test_a_worker_that_dies_is_started_again_with_pauses(tmp_path):
    """Told once a death, with the log; what does not want to end is killed."""
    log = tmp_path / "worker.log"
    worker = Worker([sys.executable, "-c", STUBBORN], log, {})
    try:
        assert worker.alive and worker.tend() is None
        first = worker._process.pid
        until(lambda: log.read_text() == "here\n", 30)
        os.kill(first, signal.SIGKILL)
        worker._process.wait()
        assert "died (-9)" in (worker.tend() or "") and not worker.alive
        assert worker.tend() is None, "not at once"
        until(lambda: worker.tend() == "the worker was started again", 30)
        assert worker.alive and worker._process.pid != first
    finally:
        worker.end(seconds=0.5)
    assert not worker.alive


def test_a_worker_that_cannot_be_started_is_tried_again(tmp_path):
    """A full disk, or no memory, is said and waited for; so is a server that cannot be started. `up` goes on."""
    folder = tmp_path / "logs"
    folder.mkdir()
    worker = Worker([sys.executable, "-c", STUBBORN], folder / "worker.log", {})
    try:
        worker.end(seconds=0.5)
        folder.rename(tmp_path / "away")
        assert "cannot be started" in (worker.tend() or "") and not worker.alive
        assert worker.tend() is None, "not at once"
        until(lambda: "started again in 4 s" in (worker.tend() or ""), 30)
        (tmp_path / "away").rename(folder)
        until(lambda: worker.tend() == "the worker was started again", 30)
        assert worker.alive
    finally:
        worker.end(seconds=0.5)


def test_a_look_survives_what_it_cannot_mend(tmp_path, monkeypatch, capsys):
    """A server that cannot even be tried to start ends neither the look nor the worker."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    for name in ("prefect", "mlflow"):
        home.folder(name, "start.lock")  # a folder cannot be opened
    worker = Worker([sys.executable, "-c", STUBBORN], tmp_path / "worker.log", {})
    try:
        _Watch(home, worker, {}, SimpleQueue()).look()
        assert worker.alive
    finally:
        worker.end(seconds=0.5)
    said = capsys.readouterr().out
    assert all(f"the {name} server died" in said for name in ("prefect", "mlflow")) and "Is a directory" in said


NIGHT = """
import signal, sys, time
from pathlib import Path
from queue import SimpleQueue
from flows.worker import end_with_worker

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
end_with_worker()
print("runs", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("was interrupted", flush=True)
    Path(sys.argv[1]).write_text("recorded")
"""


def test_a_night_ends_with_its_worker(tmp_path):
    """Interrupted at once when nobody reads its output any more, it can still say and record that."""
    record = tmp_path / "night"
    night = subprocess.Popen([sys.executable, "-c", NIGHT, str(record)], stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert night.stdout.readline() == b"runs\n"
        with pytest.raises(subprocess.TimeoutExpired):
            night.wait(0.5)
        night.stdout.close()  # as the kernel does for a worker that is killed
        assert night.wait(30) == 0 and record.read_text() == "recorded"
    finally:
        night.kill()


ENDS = f"""
import subprocess, sys, threading, time
from flows import worker

worker.PATIENCE = 3.0

def night():
    process = subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    print(process.pid, flush=True)

night()
threading.Thread(target=worker._end_with_pipe, daemon=True).start()
time.sleep(0.5)
night()
time.sleep(600)
"""


def test_a_worker_leaves_no_night(tmp_path):
    """Neither one that does not want to end, nor one that it started after it had been told to end itself."""
    worker = subprocess.Popen([sys.executable, "-c", ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    nights = [int(worker.stdout.readline())]
    worker.stdin.close()
    nights += map(int, worker.stdout.read().split())
    assert worker.wait(30) == -signal.SIGTERM and len(nights) == 2
    until(lambda: not any(lives(pid) for pid in nights), 10)


# -- slow: the whole ---------------------------------------------------------------------------------------------------


class Standing:
    """A project with a schedule, and `overnight up` on it."""

    def __init__(self, folder: Path, model: Path):
        self.project = Project(folder, model, "")
        self.home, self.folder = self.project.home, folder
        del self.project.environment["PREFECT_API_URL"]
        self.write("* * * * *")

    def write(self, cron: str, **training) -> None:
        facts = yaml.safe_load(self.project.config.read_text())
        facts |= {"schedule": {"cron": cron}, "training": facts["training"] | training}
        self.project.write(facts)

    def command(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "overnight", *arguments]
        environment = self.project.environment
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
        return done.stdout + done.stderr

    @contextmanager
    def up(self) -> Iterator[subprocess.Popen]:
        """Until its worker runs; ended by SIGTERM, and then no process of it is left."""
        self.log = self.folder / "up.txt"
        with open(self.log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "overnight", "up", "tiny.yaml"],
                cwd=self.folder,
                env=self.project.environment,
                stdout=output,
                stderr=output,
            )
        try:
            until(lambda: process.poll() is not None or "Next nights" in self.said)
            assert process.poll() is None, self.said
            yield process
            process.terminate()
            assert process.wait(150) == 0, self.said
            assert self.said.endswith("ended\n") and "Traceback" not in self.said
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(150)
            left = self.processes()
            for survivor in left:
                with suppress(psutil.NoSuchProcess):
                    survivor.kill()
        assert not left

    @property
    def said(self) -> str:
        return self.log.read_text()

    def processes(self) -> list[psutil.Process]:
        """Every process that works for the home."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = process.environ().get("OVERNIGHT_HOME") == str(self.home)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def runs(self) -> list[dict]:
        """The flow runs that are, or were, due; the oldest first."""
        api = read_json(self.home / "prefect" / "server.json")["api"]
        query = {"sort": "EXPECTED_START_TIME_ASC", "limit": 200}
        runs = prefect_says("POST", f"{api}/flow_runs/filter", json=query)
        return [run for run in runs if run["state_name"] != "Scheduled"]

    def nights(self) -> list[dict]:
        return [json.loads(path.read_text()) for path in sorted((self.home / "nights").glob("*/night.json"))]


@pytest.fixture(scope="module")
def standing(tmp_path_factory, tiny_model) -> Standing:
    return Standing(tmp_path_factory.mktemp("standing"), tiny_model)


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_night_by_itself_and_a_backlog(standing):
    """Due within the minute, it runs to the end; a second up is refused; several missed times make one night."""
    with standing.up() as up:
        assert f"process {up.pid} since" in standing.command("up", "tiny.yaml", code=2)
        facts = json.loads(standing.command("status", "--json"))
        assert facts["up"]["pid"] == up.pid and facts["up"]["ready"]
        assert all(server["running"] for server in facts["servers"].values())
        assert [night["model"] for night in facts["nights"]] == ["tiny"] and facts["disk"]["used"] > 0
        for server in facts["servers"].values():
            assert httpx.get(server["link"], timeout=30).status_code == 200
        until(lambda: any(night["state"] == "promoted" for night in standing.nights()))
        until(lambda: any(run["state_type"] == "COMPLETED" for run in standing.runs()))
        due, started = (standing.nights()[0][name] for name in ("scheduled", "started"))
        assert due % 60 == 0 and 0 <= started - due < 600
        # a night by hand, of another model, uses the server that runs
        server = read_json(standing.home / "prefect" / "server.json")
        other = standing.folder / "other.yaml"
        other.write_text(standing.project.config.read_text().replace("name: tiny", "name: other"))
        assert json.loads(standing.command("run", "other.yaml", "--json").partition("}\n{")[0])["state"] == "promoted"
        assert read_json(standing.home / "prefect" / "server.json") == server
        facts = json.loads(standing.command("status", "--json"))
        assert {model["model"]: model["champion"] for model in facts["models"]} == {"tiny": 1, "other": 1}
    assert "promoted" in standing.said
    assert "not running" in standing.command("status")
    assert "nothing to end" in standing.command("down")

    api_runs = len(standing.nights())
    standing.write("* * * * *", epochs=5)  # so that there is something to do
    time.sleep(150)
    with standing.up():
        assert "missed runs; the newest runs for all" in standing.said
        until(lambda: len(standing.nights()) == api_runs + 1 and standing.nights()[-1]["state"] in ("kept", "promoted"))
        missed = [run for run in standing.runs() if "runs for all" in (run["state"]["message"] or "")]
        assert len(missed) >= 1 and {run["state_type"] for run in missed} == {"CANCELLED"}
        assert not any(run["state_name"] == "Late" for run in standing.runs())


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_what_dies_is_started_again(standing):
    """A killed server comes back, and so does a killed worker, with which its night ends; the next one continues it."""
    standing.write("* * * * *", epochs=2000)
    before = len(standing.nights())
    with standing.up() as up:
        until(lambda: any(night["state"] == "running" for night in standing.nights()))
        until(lambda: any(run["state_name"] == "Running" for run in standing.runs()))
        night = next(p for p in standing.processes() if "prefect.engine" in " ".join(p.cmdline()))
        night.kill()
        until(lambda: any("status code: -9" in (run["state"]["message"] or "") for run in standing.runs()), 60)
        until(lambda: any(run["state_name"] == "Running" for run in standing.runs()))
        server = psutil.Process(read_json(standing.home / "prefect" / "server.json")["pid"])
        link = read_json(standing.home / "prefect" / "server.json")["ui"]
        server.kill()
        until(lambda: "prefect runs again" in standing.said)
        assert read_json(standing.home / "prefect" / "server.json")["ui"] == link
        worker = next(p for p in psutil.Process(up.pid).children() if "flows.worker" in " ".join(p.cmdline()))
        (night,) = worker.children()
        (run,) = [run for run in standing.runs() if run["state_name"] == "Running"]
        until(lambda: standing.nights()[-1].get("continued") == 1)
        worker.kill()
        until(lambda: not lives(night.pid), 60)
        (ended,) = [other for other in standing.runs() if other["id"] == run["id"]]
        assert ended["state_type"] == "CRASHED" and "termination signal" in ended["state"]["message"]
        until(lambda: "the worker was started again" in standing.said)
        until(lambda: standing.nights()[-1].get("continued") == 2)
        assert len(standing.nights()) == before + 1 and standing.nights()[-1]["state"] == "running"
    last = standing.nights()[-1]
    assert last["state"] == "interrupted" and not list(
        (standing.home / "nights" / last["id"]).glob("trials/*/result.json")
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_detached(standing):
    """It returns once all is well, and `overnight down` ends all of it."""
    standing.write("0 2 * * *")
    said = standing.command("up", "tiny.yaml", "--detach")
    assert "Next nights" in said and "goes on" in said
    pid = json.loads(standing.command("status", "--json"))["up"]["pid"]
    assert f"as process {pid}" in standing.command("up", "tiny.yaml", "--detach", code=2)
    assert f"ended process {pid}" in standing.command("down")
    until(lambda: not standing.processes(), 30)
