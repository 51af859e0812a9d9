"""The HTTP service: right answers and clear refusals."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import served_home
from served_home import Served, rows, serving, until, worker_held

from overnight.home import Home
from overnight.tracking import registry

home, versions = served_home.home, served_home.versions

# -- answers and refusals ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(versions, tmp_path_factory) -> Iterator[Served]:
    """A server with small limits for the tests that move no alias."""
    root = tmp_path_factory.mktemp("one") / "home"
    shutil.copytree(versions, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    with serving(home, max_rows=8, max_queue=8, max_bytes=5000) as found:
        yield found


def test_answers_are_those_of_the_model(served):
    """One text or many: the predictions of the model folder in the order of the rows, and the version they are of."""
    from overnight.training.predict import Scorer

    texts = ["a lovely flight", "", "the rude crew was late " * 20]
    version = registry.version_of(served.home, "sentiment", 1)
    expected = Scorer(registry.download(served.home, version)).predict_texts(rows(*texts))
    found = served.predict(*texts)
    assert (found["model"], found["version"]) == ("sentiment", 1)
    assert [one["label"] for one in found["predictions"]] == [one["label"] for one in expected]
    for one, same in zip(found["predictions"], expected, strict=True):
        assert one["scores"] == pytest.approx(same["scores"], abs=1e-5)
    single = served.client.post("/predict", content='{"text": "a lovely flight"}')
    assert single.headers["overnight-version"] == "1" and len(single.json()["predictions"]) == 1
    assert served.predict() == {"model": "sentiment", "version": 1, "predictions": []}


def test_many_clients_get_their_own_answers(served):
    """Eight requests at the same time while the worker is busy: few batches, and nobody gets another's answer."""
    texts = [f"a {'lovely ' * n}flight" for n in range(8)]
    alone = [served.predict(text)["predictions"][0]["score"] for text in texts]
    before = served.metric("batch_texts_count")
    found: dict[int, float] = {}
    with worker_held(served):
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: served.predict(texts[n])["predictions"][0]["score"]}))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        until(lambda: served.service.batcher.waiting == 8)
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(8)] == pytest.approx(alone, abs=1e-5)
    assert served.metric("batch_texts_count") - before <= 2


@pytest.mark.parametrize(
    ("body", "complaints"),
    [
        ({"txet": "a"}, ["txet: not a field of this model; did you mean text?", "text: is missing"]),
        ({"row": []}, ["row: not a field of this model; did you mean rows?", "text: is missing"]),
        (
            {"rows": [{"text": "a"}, {"text": 5}, {}]},
            ["rows[1] → text: must be text, got a number", "rows[2] → text: is missing"],
        ),
        ({"rows": [{"text": "a"}], "text": "b"}, ["text: cannot stand beside rows"]),
        ({"rows": "a"}, ["rows: must be a list, got text"]),
        ({"rows": ["a"]}, ["rows[0]: must be an object with text, got text"]),
        (["a"], ["body: must be an object with text, or with rows, got a list"]),
        ({"text": "\ud800"}, ["text: holds half of a surrogate pair, which is no character"]),
        ({"text": None}, ["text: must be text, got nothing"]),
    ],
)
def test_wrong_fields_are_told_all_at_once(served, body, complaints):
    """422: which field, what is wrong, the nearest right name; never the text itself."""
    answer = served.client.post("/predict", content=json.dumps(body))
    assert answer.status_code == 422
    found = answer.json()
    assert found["error"] == "; ".join(complaints)
    assert all(set(one) == {"where", "rule", "got", "nearest"} for one in found["complaints"])


def test_other_refusals(served):
    """No JSON, too many rows, too many bytes, unknown routes: a status and JSON that says why."""
    answer = served.client.post("/predict", content=b"{text: 1}")
    assert answer.status_code == 400 and "must be JSON" in answer.json()["error"]
    assert served.client.post("/predict", content=b"\xff\xfe").status_code == 400
    assert served.client.post("/predict", content=b"[" * 4000).status_code == 400
    answer = served.post({"rows": [{"text": "a"}] * 9})
    assert answer.status_code == 413 and "at most 8 rows" in answer.json()["error"]
    answer = served.post({"text": "a" * 5000})
    assert answer.status_code == 413 and "at most 5,000 bytes" in answer.json()["error"]
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    connection.request("POST", "/predict", b"a" * 30_000_000)  # sent whole before the answer is read
    assert connection.getresponse().status == 413
    connection.close()
    answer = served.client.post("/predict", content=iter([b"a" * 3000] * 3))  # chunked: no length is told before
    assert answer.status_code == 413
    with socket.create_connection(("127.0.0.1", served.port)) as gone:  # before its body was whole
        gone.sendall(b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 4000\r\n\r\n{")
    until(lambda: served.metric("requests_total", route="/predict", status="499"))
    assert served.client.get("/nothing").status_code == 404 and served.client.get("/predict").status_code == 405


def test_full_queue_is_429(served):
    """A full queue refuses at once and says when to come back; those who wait are answered."""
    with worker_held(served):
        waiting: list[dict[str, Any]] = []
        thread = threading.Thread(target=lambda: waiting.append(served.predict(*["a"] * 8)))
        thread.start()
        until(lambda: served.service.batcher.waiting == 8)
        answer = served.post({"text": "a"})
        assert answer.status_code == 429 and "wait already" in answer.json()["error"]
        assert int(answer.headers["retry-after"]) >= 1
        assert served.client.get("/health").json() == {"alive": True}, "the loop is free"
    thread.join()
    assert len(waiting[0]["predictions"]) == 8


def test_metrics_and_description(served):
    """Prometheus text by route and status; the OpenAPI page lists the routes."""
    served.predict("a")
    served.post({"txet": "a"})
    page = served.client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    for line in (
        r'overnight_requests_total\{route="/predict",status="200"\} \d',
        r'overnight_requests_total\{route="/predict",status="422"\} \d',
        r'overnight_texts_total\{version="1"\} \d',
        r'overnight_request_seconds_bucket\{le="0.005",route="/predict"\} \d',
        r"overnight_batch_texts_count \d",
        r"overnight_served_version 1\.0",
        r"overnight_switches_total 0\.0",
    ):
        assert re.search(line, page.text), line
    assert set(served.client.get("/openapi.json").json()["paths"]) == {
        "/predict", "/invocations", "/health", "/ready", "/metrics"
    }  # fmt: skip
    assert served.client.get("/docs").status_code == 200


TEXTS = ["a lovely flight", "the rude crew was late"]
ONE_TEXT = [
    {"dataframe_split": {"columns": ["text"], "data": [[t] for t in TEXTS]}},
    {"dataframe_split": {"columns": ["n", "text"], "index": [4, 5], "data": [[1, t] for t in TEXTS]}},
    {"dataframe_split": {"columns": ["text"], "data": TEXTS}},
    {"dataframe_records": [{"text": t, "n": 1} for t in TEXTS]},
    {"instances": [{"text": t} for t in TEXTS]},
    {"instances": TEXTS},
    {"instances": {"text": TEXTS}},
    {"inputs": {"text": TEXTS}},
    {"inputs": {"text": TEXTS[0]}},
    {"inputs": TEXTS},
    {"inputs": [{"text": t} for t in TEXTS]},
    {"inputs": TEXTS, "params": {"a": 1}},
]
REFUSED = [
    {"dataframe_split": {"data": [[t] for t in TEXTS]}},
    {"dataframe_split": {"columns": ["text"], "data": [[1, 2]]}},
    {"dataframe_split": []},
    {"dataframe_records": [{"text": "a"}, {"n": 1}]},
    {"dataframe_records": [{"text": None}]},
    {"dataframe_records": [{"text": 5}]},
    {"dataframe_records": {"text": "a"}},
    {"instances": [["a"], ["b"]]},
    {"inputs": "a"},
    {"inputs": {"txt": TEXTS}},
    {"inputs": {"text": [["a"], ["b"]]}},
    {"inputs": TEXTS, "instances": TEXTS},
    {},
    [],
    5,
]


@pytest.mark.parametrize("body", ONE_TEXT)
def test_invocations(served, body):
    """All of MLflow's formats give the same predictions."""
    answer = served.post(body, "/invocations")
    assert answer.status_code == 200 and set(answer.json()) == {"predictions"}
    found = answer.json()["predictions"]
    expected = served.predict(*TEXTS[: len(found)])["predictions"]
    assert [one["score"] for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-5)
    assert answer.headers["overnight-version"] == "1"


@pytest.mark.parametrize("body", REFUSED)
def test_invocations_refused(served, body):
    """What MLflow's server refuses with 400 is refused with 400, in its words for an error and in ours."""
    answer = served.post(body, "/invocations")
    assert answer.status_code == 400
    assert {"error_code", "message", "error", "complaints"} == set(answer.json())
    assert served.post({"inputs": ["a"] * 9}, "/invocations").status_code == 413


@pytest.mark.slow
def test_invocations_as_mlflow_answers(served, monkeypatch):
    """The application that `mlflow models serve` runs, on the same bodies: the same status, keys and numbers."""
    import sys

    import mlflow.pyfunc
    from mlflow.pyfunc import scoring_server
    from starlette.testclient import TestClient

    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = registry.download(served.home, registry.version_of(served.home, "sentiment", 1)).parents[1]
    theirs = TestClient(scoring_server.init(mlflow.pyfunc.load_model(str(folder))))
    for body in ONE_TEXT + REFUSED:
        ours, other = served.post(body, "/invocations"), theirs.post("/invocations", json=body)
        assert ours.status_code == other.status_code, body
        if other.status_code == 200:
            assert ours.json().keys() == other.json().keys()
            for one, same in zip(ours.json()["predictions"], other.json()["predictions"], strict=True):
                assert one.keys() == same.keys() and one["label"] == same["label"]
                assert one["scores"] == pytest.approx(same["scores"], abs=1e-5)
        else:
            assert {"error_code", "message"} <= ours.json().keys() & other.json().keys()
