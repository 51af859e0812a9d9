"""The service while things change: no failed request while the alias moves, beside the answers, and as a command."""

from __future__ import annotations

import gc
import http.client
import json
import logging
import os
import re
import signal
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import served_home
from conftest import Command
from served_home import ANSWER, BROKEN, rows, serving, until, worker_held
from test_registry import answers, end, free_port

from overnight.errors import UserError
from overnight.home import Home
from overnight.serving import server as serving_server
from overnight.serving.follow import Follower
from overnight.serving.metrics import Metrics
from overnight.serving.options import Options
from overnight.tracking import ledger, registry, store

home, versions = served_home.home, served_home.versions

# -- following ---------------------------------------------------------------------------------------------------------


class Load:
    """Clients that ask without pause; every answer is checked against the version that it names."""

    def __init__(self, port: int, clients: int):
        self.port, self.end = port, threading.Event()
        self.failed: list[str] = []
        self.versions: list[int] = []
        """In the order of their answers."""
        self.threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(clients)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end.set()
        for thread in self.threads:
            thread.join()

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps({"rows": rows(*["a lovely flight"] * (1 + number % 3))})
        while not self.end.is_set():
            try:
                connection.request("POST", "/predict", body)
                response = connection.getresponse()
                answer = json.loads(response.read())
                labels = {one["label"] for one in answer["predictions"]}
                assert response.status == 200 and len(answer["predictions"]) == 1 + number % 3, answer
                assert labels == {ANSWER[answer["version"]]}, answer
                self.versions.append(answer["version"])
            except Exception as error:
                self.failed.append(repr(error))
                return

    def answered_by(self, version: int) -> None:
        """Waits until every client has been answered by it."""
        until(lambda: self.failed or set(self.versions[-3 * len(self.threads) :]) == {version}, 120)


def test_alias_moves_under_load(home):
    """Three versions and back under clients that never pause: no failed request, each answer by the version named."""
    with serving(home) as served, Load(served.port, clients=4) as load:
        for number in (1, 2, 3, 2):
            served.move(number)
            load.answered_by(number)
    assert load.failed == []
    order = [a for a, b in zip(load.versions, [*load.versions[1:], 0], strict=True) if a != b]
    assert set(order) == {1, 2, 3} and order[-1] == 2
    assert served.metric("switches_total") == 3


def test_rollback_switches_at_once(home):
    """The version before is still loaded: going back takes the very same model, and the next look suffices."""
    with serving(home) as served:
        follower = served.service.follower
        first = follower.current
        served.move(2)
        until(lambda: served.ready()["version"] == 2)
        assert served.ready()["previous"] == 1
        served.move(1)
        until(lambda: served.ready()["version"] == 1)
        assert follower.current is first and served.ready()["previous"] == 2
        assert served.predict("a")["predictions"][0]["label"] == ANSWER[1]


def test_in_flight_requests_finish_on_the_old_version(home):
    """A request that waits while the alias moves is answered by the version that took it."""
    with serving(home) as served:
        found: list[dict[str, Any]] = []
        with worker_held(served):
            thread = threading.Thread(target=lambda: found.append(served.predict("a")))
            thread.start()
            until(lambda: served.service.batcher.waiting)
            served.move(2)
            until(lambda: served.ready()["version"] == 2)
        thread.join()
        assert (found[0]["version"], found[0]["predictions"][0]["label"]) == (1, ANSWER[1])
        assert served.predict("a")["version"] == 2


def test_failed_smoke_test_keeps_the_old_version(home, caplog):
    """Scores that are not numbers never serve: the old version goes on, it is said once, and metrics tell."""
    caplog.set_level(logging.INFO, "overnight.serving")
    with serving(home) as served:
        served.move(BROKEN)
        problem = until(lambda: served.ready()["problem"])
        assert problem.startswith("version 4: cannot be served: smoke test: the scores are no finite numbers")
        looked = served.service.follower.looked
        until(lambda: served.service.follower.looked > looked + 0.5)
        assert served.ready()["version"] == 1 and served.predict("a")["version"] == 1
        assert served.metric("failed_versions_total") == 1, "it is not loaded again and again"
        assert served.metric("behind") == 1
        served.move(2)
        until(lambda: served.ready()["version"] == 2)
        until(lambda: served.ready()["problem"] is None)
        assert served.metric("behind") == 0
    assert sum("version 4" in record.getMessage() for record in caplog.records) == 1


def test_a_version_that_cannot_serve_is_not_kept_in_memory(home):
    """Only why is remembered: not the model, which the error's traceback would hold."""
    from overnight.training.predict import Scorer

    def loaded() -> int:
        gc.collect()
        return sum(type(thing) is Scorer for thing in gc.get_objects())

    follower = Follower(home, Options("sentiment"), Metrics())
    follower.look()
    assert follower.current.version.number == 1
    before = loaded()
    registry.set_alias(home, "sentiment", registry.CHAMPION, BROKEN)
    for _ in range(2):  # found out, and told from memory
        follower.look()
        assert follower.problem.startswith("version 4: cannot be served: smoke test: the scores are no finite numbers")
        assert loaded() == before


def test_damaged_weights_do_not_serve(home, versions, tmp_path):
    """A changed byte in the artifact: the checksum of the registration keeps it out."""
    folder = registry.download(home, registry.version_of(home, "sentiment", 2))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    with serving(home) as served:
        try:
            weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            served.move(2)
            assert "not those that were registered" in until(lambda: served.ready()["problem"])
            assert served.predict("a")["version"] == 1
        finally:
            weights.write_bytes(whole)


def test_registry_away_keeps_serving(home, caplog):
    """The store cannot be read for a while: answers go on, /ready says so, it is logged once, and it heals."""

    def rename(old: str, new: str) -> None:
        with closing(sqlite3.connect(home.mlflow / "mlflow.db", timeout=30)) as database, database:
            database.execute(f"alter table {old} rename to {new}")

    with serving(home) as served:
        rename("registered_model_aliases", "away")
        assert "cannot be used now" in until(lambda: served.ready()["problem"])
        time.sleep(0.5)
        assert served.predict("a")["version"] == 1 and served.ready()["ready"]
        rename("away", "registered_model_aliases")
        until(lambda: served.ready()["problem"] is None)
        served.move(2)
        until(lambda: served.ready()["version"] == 2)
    assert sum("cannot be used now" in record.getMessage() for record in caplog.records) == 1


def test_not_ready_is_503(home):
    """Before a version is loaded: alive, not ready, and requests are told to come back."""
    registry.set_alias(home, "sentiment", registry.CHAMPION, BROKEN)
    with serving(home, wait=False) as served:
        until(lambda: served.ready()["problem"])
        answer = served.post({"text": "a"})
        assert answer.status_code == 503 and "not ready: version 4" in answer.json()["error"]
        assert answer.headers["retry-after"]
        assert served.client.get("/ready").status_code == 503 and served.client.get("/health").status_code == 200


# -- beside the answers ------------------------------------------------------------------------------------------------


def test_shadow_never_answers(home):
    """The candidate is asked too and compared; every answer is the champion's."""
    registry.set_alias(home, "sentiment", registry.CANDIDATE, 2)
    with serving(home, shadow=1.0) as served:
        until(lambda: served.ready()["shadow"] == 2)
        found = served.predict(*["a lovely flight"] * 20)
        assert {one["label"] for one in found["predictions"]} == {ANSWER[1]} and found["version"] == 1
        until(lambda: served.metric("shadow_texts_total", version="2", agree="no") == 20)
        served.move(2)  # the candidate was promoted: nothing to compare with
        until(lambda: served.ready()["version"] == 2 and served.ready()["shadow"] is None)
        served.predict("a")
        served.move(3, registry.CANDIDATE)
        until(lambda: served.ready()["shadow"] == 3)
        assert served.metric("shadow_texts_total", version="2", agree="no") == 20


def test_shadow_takes_its_share_and_drops_when_busy(home):
    """Without a candidate or share nothing is asked; what piles up while the worker is busy is dropped and counted."""
    registry.set_alias(home, "sentiment", registry.CANDIDATE, 2)
    with serving(home) as served:
        served.predict("a")
        assert served.ready()["shadow"] is None
    with serving(home, shadow=0.5) as served:
        until(lambda: served.ready()["shadow"] == 2)
        served.service.shadow.draw = iter([0.4, 0.6] * 400).__next__
        candidate = served.service.follower.shadow
        with worker_held(served):
            scored = [({"label": "bad"}, 1)] * 800
            served.service.shadow.offer(candidate, rows(*["a"] * 800), scored)
            assert served.metric("shadow_dropped_texts_total") == 0, "400 texts are 50 pieces, 64 may wait"
            served.service.shadow.draw = lambda: 0.0
            served.service.shadow.offer(candidate, rows(*["a"] * 200), scored[:200])
            assert served.metric("shadow_dropped_texts_total") == 11 * 8


def test_scores_are_logged_without_texts(home):
    """A JSON line a text, in a file a day; the texts only where asked for, and nothing where not."""
    kept = home.root / "scored" / "sentiment"
    with serving(home) as served:
        served.predict("a lovely flight")
    assert not kept.exists()
    with serving(home, log_scores=True) as served:
        served.predict("  a lovely\n flight ", " ")
    with serving(home, log_scores=True, log_texts=True) as served:
        garbled = served.predict("spÃ¤te  Ankunft")
        assert garbled == served.predict("späte Ankunft"), "the model sees what it would have been trained on"
    file = next(kept.glob("20??-??-??.jsonl"))
    first, empty, repaired, last = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert set(first) == {"time", "version", "label", "score", "characters", "tokens"}
    assert abs(first["time"] - time.time()) < 600 and (first["version"], first["label"]) == (1, ANSWER[1])
    assert (first["characters"], first["tokens"]) == (15, 5) and (empty["characters"], empty["tokens"]) == (0, 2)
    assert (repaired["text"], repaired["characters"]) == ("späte Ankunft", 13), "as the monitor knows its training rows"
    assert last["text"] == "späte Ankunft" and 0 < last["score"] <= 1


def test_full_disk_stops_no_answer(home):
    """Lines that cannot be written are dropped and counted; answers go on."""
    (home.root / "scored").write_text("in the way")
    with serving(home, log_scores=True) as served:
        assert served.predict("a", "b")["version"] == 1
        until(lambda: served.metric("score_lines_dropped_total") == 2)
        assert served.predict("a")["version"] == 1


# -- the command -------------------------------------------------------------------------------------------------------


def test_refused_in_one_line(home):
    """A taken port, a host that is not ours, an unknown model or alias: the user's mistake, before anything starts."""

    def refused(name: str = "sentiment", alias: str = "champion", host: str = "127.0.0.1", port: int = 0) -> str:
        with pytest.raises(UserError) as caught:
            serving_server.run(home, Options(name, alias), host, port, lambda address: None)
        return str(caught.value)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refused(port=port) == f"--port: is taken by another program, got {port}"
    assert "--host, --port: cannot be bound" in refused(host="192.0.2.1")
    assert refused("sentimnet") == "models: no such model, got 'sentimnet'; did you mean sentiment?"
    assert refused(alias="chmapion") == (
        "sentiment: no version is behind this alias (it has champion), got chmapion; did you mean champion?"
    )


@contextmanager
def command(home: Home, folder: Path, *arguments: str) -> Iterator[tuple[Any, int]]:
    """`overnight serve sentiment` in a process of its own, and its port."""
    environment = os.environ | {"OVERNIGHT_HOME": str(home.root), "MLFLOW_TRACKING_URI": home.tracking_uri}
    process = Command(["serve", "sentiment", "--port", "0", *arguments], environment, folder)
    try:
        process.until("ctrl-c ends it")
        port = int(re.search(r"http://127\.0\.0\.1:(\d+),", process.stderr)[1])
        until(lambda: httpx.get(f"http://127.0.0.1:{port}/ready", timeout=60).status_code == 200, 120)
        yield process, port
    finally:
        if process._process.is_alive():
            process._process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_ends_clean_on_a_signal(home, tmp_path, number):
    """ctrl-c and SIGTERM: requests in flight are answered, the exit code is 0, and nothing of a traceback is shown."""
    with command(home, tmp_path, "--follow", "0.2", "--log-scores") as (process, port):
        asked = rows(*["a lovely flight"] * 1000)
        found: list[httpx.Response] = []
        thread = threading.Thread(
            target=lambda: found.append(
                httpx.post(f"http://127.0.0.1:{port}/predict", json={"rows": asked}, timeout=60)
            )
        )
        thread.start()
        metrics = f"http://127.0.0.1:{port}/metrics"
        until(lambda: "overnight_waiting_texts 1000.0" in httpx.get(metrics, timeout=60).text)
        process.signal(number)
        thread.join()
        assert process.wait(60) == 0
    assert found[0].status_code == 200 and len(found[0].json()["predictions"]) == 1000
    assert "version 1 answers" in process.stderr and "Traceback" not in process.stderr, process.stderr
    lines = next((home.root / "scored" / "sentiment").iterdir()).read_text().splitlines()
    assert len(lines) == 1000, "written before the end"


@pytest.mark.slow
def test_sixteen_clients_three_promotions_and_a_rollback(home, tmp_path):
    """The command itself, with real promotions and their smoke tests meanwhile: zero failed requests."""
    from overnight.scoring import smoke_in_child

    def smoke(folder: Path) -> None:
        smoke_in_child(home, folder)

    with command(home, tmp_path, "--follow", "0.5", "--shadow", "0.2") as (process, port), Load(port, 16) as load:
        for number in (2, 3, 1):
            ledger.promote(home, "sentiment", number, reason="better", smoke=smoke)
            load.answered_by(number)
            time.sleep(2)
        ledger.rollback(home, "sentiment", reason="worse", smoke=smoke, to=3)
        load.answered_by(3)
        time.sleep(2)
    assert load.failed == [] and set(load.versions) == {1, 2, 3} and len(load.versions) > 500
    assert load.versions[-1] == 3


@pytest.mark.slow
def test_shared_server_that_goes_away(home, tmp_path, versions):
    """With MLFLOW_TRACKING_URI: the version comes over HTTP; the server's end does not end the service."""
    import subprocess
    import sys

    port = free_port()
    address = f"http://127.0.0.1:{port}"
    start = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    start += ["--backend-store-uri", home.tracking_uri, "--artifacts-destination", str(tmp_path / "art")]
    shared = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "other"), "MLFLOW_TRACKING_URI": address})
    with serving(shared, wait=False, follow_seconds=0.5) as served:
        assert "cannot be used now" in until(lambda: served.ready()["problem"]), "started before the server"
        server = subprocess.Popen(start, env=os.environ | store.QUIET, cwd=tmp_path, start_new_session=True)
        try:
            assert answers(f"{address}/health", server)
            until(lambda: served.ready()["ready"], 120)
            assert served.predict("a")["version"] == 1
        finally:
            end(server)
        assert "cannot be used now" in until(lambda: served.ready()["problem"], 120)
        assert served.predict("a")["version"] == 1
