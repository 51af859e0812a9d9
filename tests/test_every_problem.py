"""Every problem through the whole night: trained, registered, decided, loaded by MLflow, served, scored in bulk.

Slow, since each is a night; the problems' own tests say whether their numbers are right.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
from conftest import WORDS, Project, make_rows
from starlette.testclient import TestClient

from overnight import problems
from overnight.home import Home
from overnight.serving.app import create_app
from overnight.serving.options import Options
from overnight.tracking import ledger, store

Rows = pd.DataFrame


def of_pairs(rows: Rows) -> Rows:
    """Whether two texts are of one kind."""
    second = rows.text.sample(frac=1, random_state=1).tolist()
    kinds = dict(zip(rows.text, rows.label, strict=True))
    same = ["same" if kinds[b] == a else "other" for a, b in zip(rows.label, second, strict=True)]
    return pd.DataFrame({"text": rows.text, "second": second, "label": same})


def of_labels(rows: Rows) -> Rows:
    found = [json.dumps([] if label == "plain" else [label, "marked"]) for label in rows.label]
    return pd.DataFrame({"text": rows.text, "labels": found})


def of_numbers(rows: Rows) -> Rows:
    return pd.DataFrame({"text": rows.text, "value": rows.label.map({"bad": -1, "plain": 0, "good": 1})})


def of_spans(rows: Rows) -> Rows:
    """The words that tell the label are entities of its name."""
    tokens = [text.split() for text in rows.text]
    tags = [
        [f"B-{label}" if word in WORDS[label] else "O" for word in words]
        for words, label in zip(tokens, rows.label, strict=True)
    ]
    return pd.DataFrame({"tokens": list(map(json.dumps, tokens)), "tags": list(map(json.dumps, tags))})


def of_questions(rows: Rows) -> Rows:
    """Which of the words tells the label?"""
    found = []
    for text, label in zip(rows.text, rows.label, strict=True):
        word = next(word for word in text.split() if word in WORDS[label])
        found.append(json.dumps([{"text": word, "start": text.index(word)}]))
    return pd.DataFrame({"question": "which one", "context": rows.text, "answers": found})


def of_targets(rows: Rows) -> Rows:
    return pd.DataFrame({"text": rows.text, "target": rows.label})


def of_texts(rows: Rows) -> Rows:
    return rows[["text"]]


def of_sentences(rows: Rows) -> Rows:
    """Good follows good, and bad follows bad."""
    pairs = of_pairs(rows)
    return pairs.assign(label=pairs.label.map({"same": "next", "other": "other"}))


SMALL = {"max_new_tokens": 4}
CASES: dict[str, tuple[Callable[[Rows], Rows], dict[str, Any]]] = {
    "sequence-classification": (lambda rows: rows, {}),
    "pair-classification": (of_pairs, {}),
    "multi-label-classification": (of_labels, {}),
    "regression": (of_numbers, {}),
    "token-classification": (of_spans, {}),
    "question-answering": (of_questions, {}),
    "masked-lm": (of_texts, {}),
    "masked-lm-next-sentence": (of_sentences, {}),
    "translation": (of_targets, {"generation": SMALL}),
    "summarization": (of_targets, {"generation": SMALL}),
    "text-generation": (
        of_texts,
        {
            "base": "new",
            "new": {"architecture": "gpt2", "layers": 1, "width": 32, "heads": 2, "vocabulary": 400},
            "generation": SMALL,
        },
    ),
}


def test_no_problem_is_left_out():
    assert CASES.keys() == problems.PROBLEMS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_night(name, tmp_path, tiny_model, prefect_api, monkeypatch):
    make, model = CASES[name]
    project = Project(tmp_path, tiny_model, prefect_api)
    make(make_rows(240)).to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    problem = problems.get(name)
    project.write(
        {
            "name": "tiny",
            "problem": name,
            "model": {"base": str(tiny_model), "max_length": 48} | model,
            "data": {"source": str(tmp_path / "rows.jsonl")},
            "validation": {
                "show_examples": True,
                "max_refused": 0.5,
                "expect": {"characters": {"min": 1}, "duplicates": {"severity": "off"}},
            },
            "training": {"epochs": 1, "learning_rate": 2e-3, "batch_size": 16, "evaluations_per_epoch": 1},
            "search": {"trials": 1},
            "promotion": {"floor": 1e6 if problem.default_metric in problem.lower_is_better else -1},
        }
    )
    record = project.facts("run", "tiny.yaml")
    assert record["state"] == "promoted", record.get("decision")
    assert record["metric"] == problem.default_metric
    assert len(record["samples"]) == (5 if problem.generates else 0)
    home = Home.from_environment({"OVERNIGHT_HOME": str(project.home)})
    for entry in ledger.read(home, "tiny"):
        assert entry.action == "promote"

    texts = [dict.fromkeys(problem.text_roles, text) for text in ("a lovely flight", "the crew was late")]
    served = answers_of_service(home, texts)
    loaded = answers_of_pyfunc(home, texts, monkeypatch)
    scored = answers_of_bulk(project, texts)
    assert len(served) == len(loaded) == len(scored) == 2
    for one, other in zip(served, loaded, strict=True):
        assert one.keys() == other.keys() and problem.same(one, other)
    columns = problem.columns(record["facts"], scores=False)
    for one, row in zip(served, scored, strict=True):
        expected = dict(zip(columns, problem.cells(one, record["facts"], scores=False), strict=True))
        for column, value in expected.items():
            assert row[column] == (pytest.approx(value, abs=1e-3) if isinstance(value, float) else value)
        assert not row["error"]
    assert "Traceback" not in project.run("report").stdout


def answers_of_service(home: Home, texts: list[dict[str, str]]) -> list[dict[str, Any]]:
    with TestClient(create_app(home, Options("tiny", follow_seconds=0.1))) as client:
        end = time.monotonic() + 120
        while client.get("/ready").status_code != 200 and time.monotonic() < end:
            time.sleep(0.1)
        answer = client.post("/predict", json={"rows": texts})
        assert answer.status_code == 200, answer.text
        return answer.json()["predictions"]


def answers_of_pyfunc(home: Home, texts: list[dict[str, str]], monkeypatch) -> list[dict[str, Any]]:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow leaves the model's code folder there
    with store.globally(home):
        found = mlflow.pyfunc.load_model("models:/tiny@champion").predict(pd.DataFrame(texts))
    return json.loads(found.to_json(orient="records"))


def answers_of_bulk(project: Project, texts: list[dict[str, str]]) -> list[dict[str, Any]]:
    (project.folder / "in.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    project.run("score", "tiny", "in.jsonl", "out.jsonl")
    return [json.loads(line) for line in (project.folder / "out.jsonl").read_text().splitlines()]
