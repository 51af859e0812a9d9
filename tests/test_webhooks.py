"""A champion set in MLflow's pages is noticed at once where `overnight up` runs the server."""

from __future__ import annotations

from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from overnight.cli.up import _Watch
from overnight.home import Home
from overnight.services import mlflow_server
from overnight.tracking import ledger, registry, runs, store
from overnight.tracking.webhooks import EVENTS, NAME, moved_aliases

MODEL = "sentiment"


class Idle:
    """A worker that needs no tending."""

    alive = True

    def tend(self) -> None:
        return None


@pytest.fixture
def watched(home, tmp_path, monkeypatch) -> Home:
    """A home with a champion that its ledger knows, and a second version; neither is a model that loads."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_id = runs.open_night(home, store.experiment(home, MODEL), "night-1")
    for number in (1, 2):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes([number]) * 100)
        facts: dict[str, Any] = {"inputs": ("text",), "example": {"text": ["a"]}, "tags": {}, "metrics": {"f1": 0.5}}
        registry.register(home, MODEL, folder, run_id=run_id, **facts)
    ledger.promote(home, MODEL, 1, reason="the first", smoke=lambda folder: None)
    return home


def test_an_alias_moved_in_the_pages_is_noticed(watched: Home):
    with mlflow_server(watched) as server:
        pages = store.client_of(server)
        pages.create_webhook(NAME, "http://127.0.0.1:9/of-an-up-that-was-killed", EVENTS)
        with moved_aliases(watched, server) as moved:
            (webhook,) = pages.list_webhooks()
            assert pages.test_webhook(webhook.webhook_id).success
            moved.get(timeout=30)
            pages.set_registered_model_alias(MODEL, registry.CHAMPION, "2")
            assert moved.get(timeout=30) == MODEL
            moved.put(MODEL)
            said = list(_Watch(watched, Idle(), {}, moved)._observed())
            assert said[0] == f"{MODEL}: version 2 became champion by other means"
            assert "not a finished model folder" in said[1] and "`overnight rollback sentiment`" in said[1]
            last = ledger.read(watched, MODEL)[-1]
            assert (last.action, last.from_version, last.to_version) == ("observed", 1, 2)
            moved.put(MODEL)  # our own moves write the ledger, and are no news
            assert list(_Watch(watched, Idle(), {}, moved)._observed()) == []
            strangers(webhook.url, moved)
        assert not list(pages.list_webhooks())


def strangers(address: str, moved: SimpleQueue[str]) -> None:
    """What does not come from the server changes nothing."""
    parts = urlsplit(address)
    assert parts.hostname == "127.0.0.1"
    assert httpx.post(f"http://{parts.netloc}/guess", json={"data": {"name": MODEL}}).status_code == 404
    assert httpx.post(address, content=b"[1").status_code == 400
    assert httpx.post(address, json={"data": []}).status_code == 400
    assert httpx.get(address).status_code == 501
    assert moved.empty()


def test_a_server_of_other_people_is_left_alone(tmp_path: Path):
    shared = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path), "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"})
    with moved_aliases(shared, shared.tracking_uri) as moved:
        assert moved.empty()
