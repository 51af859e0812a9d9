"""`overnight serve` under load while the champion changes: three promotions and a rollback.

    python -m bench.load --clients 16 --seconds 60

The clients ask for one tweet at a time, without pause. Versions are the base model with other untrained heads; each is
promoted as `overnight promote` does it, with its smoke test in a process of its own, on the same machine. A request
fails when its status is not 200, its answer is not one prediction with a version, or its connection breaks.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from bench import texts
from bench.results import record
from bench.serve import finish
from overnight.home import Home
from overnight.services import set_quiet_environment

NAME = "sentiment"
VERSIONS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--follow", type=float, default=1.0, help="seconds between two looks at the alias")
    arguments = parser.parse_args()
    set_quiet_environment()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        some = texts.frame(texts.sides("short", folder)["test"]).text.tolist()
        home = Home.from_environment({"OVERNIGHT_HOME": str(folder / "home")})
        register(home, folder)
        with server(home, folder, arguments.follow) as port:
            clients = Clients(port, some, arguments.clients)
            moved = promote(home, clients, arguments.seconds)
            clients.end()
    for failure in clients.failures[:5]:
        print(failure, file=sys.stderr)
    answered = Counter(version for _, version in clients.answers)
    milliseconds: Any = quantiles([1000 * seconds for seconds, _ in clients.answers], n=100)
    facts = [
        str(arguments.clients),
        f"{len(clients.answers) + len(clients.failures):,}",
        str(len(clients.failures)),
        f"{len(clients.answers) / clients.seconds:.0f}",
        f"{milliseconds[49]:.0f}",
        f"{milliseconds[98]:.0f}",
        ", ".join(f"{version}: {count:,}" for version, count in sorted(answered.items())),
    ]
    header = ["clients", "requests", "failed", "requests/s", "p50 ms", "p99 ms", "answers by version"]
    notes = f"{clients.seconds:.0f} s, one tweet a request; champion: {' → '.join(moved)}; MiniLM with untrained heads."
    record("load", "Serving while the champion changes", header, [facts], notes)
    if clients.failures or set(answered) != set(range(1, VERSIONS + 1)):
        raise SystemExit("a request failed, or a version never answered")


def register(home: Home, folder: Path) -> None:
    """Versions 1 to 3; the first is the champion."""
    from overnight.tracking import ledger, registry, runs, store

    store.prepare(home)
    experiment = store.experiment(home, NAME)
    for number in range(1, VERSIONS + 1):
        registry.register(
            home,
            NAME,
            finish(folder / f"finished-{number}"),
            run_id=runs.open_night(home, experiment, f"night-{number}"),
            inputs=["text"],
            example={"text": ["a text"]},
            tags={},
            metrics={},
        )
    ledger.promote(home, NAME, 1, reason="the first", smoke=smoke(home))


def smoke(home: Home) -> Any:
    from overnight.scoring import smoke_in_child

    return lambda model: smoke_in_child(home, model)


def promote(home: Home, clients: Clients, seconds: float) -> list[str]:
    """Versions 2, 3 and 1 become champion at a fifth, two and three of the time, and at four 3 comes back."""
    from overnight.tracking import ledger

    began, moved = time.monotonic(), ["1"]
    for part, number in enumerate((2, 3, 1, 3), start=1):
        time.sleep(max(0.0, began + part * seconds / 5 - time.monotonic()))
        if part < 4:
            ledger.promote(home, NAME, number, reason="better", smoke=smoke(home))
        else:
            ledger.rollback(home, NAME, reason="worse", to=number, smoke=smoke(home))
        moved.append(f"{number} after {time.monotonic() - clients.began:.0f} s")
    time.sleep(max(0.0, began + seconds - time.monotonic()))
    return moved


@contextmanager
def server(home: Home, folder: Path, follow: float) -> Iterator[int]:
    """`overnight serve` on a free port, once it is ready."""
    command = [sys.executable, "-c", "from overnight.cli import main; main()", "serve", NAME]
    command += ["--port", "0", "--follow", str(follow)]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, env=os.environ | {"OVERNIGHT_HOME": str(home.root)})
    try:
        while not (found := re.search(r"127\.0\.0\.1:(\d+),", log.read_text())) or not ready(int(found[1])):
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield int(found[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        print(log.read_text(), file=sys.stderr)


def ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Clients:
    """Threads that ask without pause from their making to `end`."""

    def __init__(self, port: int, some: list[str], clients: int):
        self.port, self.some = port, some
        self.answers: list[tuple[float, int]] = []
        """Seconds and version of each."""
        self.failures: list[str] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]
        self.began = time.monotonic()
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        self.seconds = time.monotonic() - self.began

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        place = number * 31
        while not self._end.is_set():
            body = json.dumps({"text": self.some[place % len(self.some)]})
            place += 1
            begun = time.perf_counter()
            try:
                connection.request("POST", "/predict", body)
                response = connection.getresponse()
                answer = response.read()
                assert response.status == 200, answer
                facts = json.loads(answer)
                assert len(facts["predictions"]) == 1, answer
                self.answers.append((time.perf_counter() - begun, facts["version"]))
            except Exception as error:
                self.failures.append(repr(error))
                connection.close()


if __name__ == "__main__":
    main()
