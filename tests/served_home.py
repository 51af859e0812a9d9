"""A home with versions to serve, and a server that runs, for the tests of the HTTP service."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from test_registry import register

from overnight.home import Home
from overnight.serving import server as serving_server
from overnight.serving.app import create_app
from overnight.serving.options import Options
from overnight.tracking import registry

LABELS = ["bad", "good", "plain"]
ANSWER = {1: "bad", 2: "good", 3: "plain"}
"""Each version always gives its own label, so that an answer shows which one made it."""
BROKEN = 4


@pytest.fixture(scope="module")
def versions(tmp_path_factory, empty_store, tiny_model) -> Path:
    """The root of a home with three versions and a fourth whose scores are not numbers; champion is version 1."""
    import torch

    from overnight import problems
    from overnight.settings import Training
    from overnight.training.card import Card, finish_model_folder

    place = tmp_path_factory.mktemp("served")
    shutil.copytree(empty_store, place / "home")
    home = Home.from_environment({"OVERNIGHT_HOME": str(place / "home")})
    problem = problems.get("sequence-classification")
    for number in range(1, 5):
        folder = place / f"model-{number}"
        model: Any = problem.load_model(str(tiny_model), {"labels": LABELS}, Training())
        with torch.no_grad():
            if number == BROKEN:
                model.classifier.bias.fill_(float("nan"))
            else:
                model.classifier.bias[LABELS.index(ANSWER[number])] += 10
        model.save_pretrained(folder)
        finish_model_folder(folder, Card(problem.name, {"labels": LABELS}, 64, "macro_f1"), str(tiny_model))
        register(home, folder, night=f"night-{number}")
    registry.set_alias(home, "sentiment", registry.CHAMPION, 1)
    return place / "home"


@pytest.fixture
def home(versions, tmp_path) -> Home:
    """A home whose aliases the test may move; the artifacts are shared."""
    shutil.copytree(versions, tmp_path / "home")
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})


@dataclass
class Served:
    """A server that runs, and a client for it."""

    home: Home
    port: int
    service: Any
    client: httpx.Client

    def post(self, body: Any, path: str = "/predict") -> httpx.Response:
        return self.client.post(path, json=body)

    def predict(self, *texts: str) -> dict[str, Any]:
        answer = self.post({"rows": [{"text": text} for text in texts]})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def ready(self) -> dict[str, Any]:
        return self.client.get("/ready").json()

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(f"overnight_{name}", labels) or 0.0

    def move(self, number: int, alias: str = registry.CHAMPION) -> None:
        registry.set_alias(self.home, "sentiment", alias, number)


def until(true: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "not within the time"
        time.sleep(0.02)
    return found


@contextmanager
def serving(home: Home, wait: bool = True, **options: Any) -> Iterator[Served]:
    """A real server in a thread."""
    app = create_app(home, Options("sentiment", **{"follow_seconds": 0.1} | options))
    with serving_server.bound("127.0.0.1", 0) as place:
        port = place.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(app, lifespan="on", log_level="warning", access_log=False))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
                served = Served(home, port, app.state.service, client)
                if wait:
                    until(lambda: served.ready()["ready"])
                yield served
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def worker_held(served: Served) -> Iterator[None]:
    """The worker thread is busy with something else for the time of the block."""
    release, begun = threading.Event(), threading.Event()
    served.service.batcher._worker.submit(lambda: (begun.set(), release.wait(60)))
    assert begun.wait(30)
    try:
        yield
    finally:
        release.set()


def rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]
