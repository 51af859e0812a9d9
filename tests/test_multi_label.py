"""Multi-label classification: cells of labels, metrics that equal scikit-learn's, thresholds set by validation rows."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score

from overnight import problems
from overnight.config import Data
from overnight.data.ingest import ingest
from overnight.data.normalise import normalise
from overnight.errors import DataRefused
from overnight.evaluation import evaluate
from overnight.problems.multi_label_classification import ENOUGH, best_threshold
from overnight.settings import Training
from overnight.training.models import load_tokenizer

relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

PROBLEM = problems.get("multi-label-classification")
LABELS = ["a", "b", "c", "d"]
FACTS = {"labels": LABELS, "thresholds": [0.5] * 4}

marks = st.tuples(*[st.booleans()] * 4)
shares = st.tuples(*[st.sampled_from([0.0, 0.1, 0.4, 0.5, 0.7, 1.0]) | st.floats(0, 1)] * 4)
logits = st.one_of(st.integers(-6, 6).map(float), st.floats(-40, 40, width=32))


def answers_of(scores, thresholds=(0.5,) * 4) -> list[dict]:
    return [
        {
            "labels": [x for x, share, t in zip(LABELS, row, thresholds, strict=True) if share >= t],
            "scores": dict(zip(LABELS, row, strict=True)),
        }
        for row in scores
    ]


def names_of(rows) -> list[list[str]]:
    return [[label for label, has in zip(LABELS, row, strict=True) if has] for row in rows]


def outputs_of(scores) -> list[np.ndarray]:
    return [np.array(row, dtype=np.float32) for row in scores]


@settings(relaxed, max_examples=40)
@given(st.lists(st.tuples(marks, shares), min_size=1, max_size=40))
def test_metrics_equal_scikit_learn(rows):
    """Micro over all labels, macro over those the rows have, exact rows, mean average precision; on any data."""
    truth, scores = np.array([row for row, _ in rows], dtype=int), np.array([row for _, row in rows])
    guess = (scores >= 0.5).astype(int)
    found = PROBLEM.metrics(names_of(truth), answers_of(scores.tolist()), FACTS)
    present = truth.any(axis=0)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert found[f"micro_{name}"] == pytest.approx(score(truth, guess, average="micro", zero_division=0))
        each = score(truth, guess, average=None, zero_division=0)
        assert [found[f"{name}/{label}"] for label in LABELS] == pytest.approx(np.where(present, each, 0))
        if present.any():
            kept = np.flatnonzero(present)
            expected = score(truth, guess, labels=kept, average="macro", zero_division=0)
            assert found[f"macro_{name}"] == pytest.approx(expected)
    if present.any():
        expected = average_precision_score(truth[:, present], scores[:, present], average="macro")
        assert found["average_precision"] == pytest.approx(expected)
    else:
        assert found["average_precision"] == found["macro_f1"] == 0


def test_champion_of_other_labels():
    """A label the champion was never told has no score there; one that the rows do not have is a wrong one."""
    answers = [{"labels": ["a", "old"], "scores": {"a": 0.9, "old": 0.8}}]
    found = PROBLEM.metrics([["a", "b"]], answers, FACTS)
    assert found["average_precision"] == pytest.approx((1 + 1) / 2) and found["recall/b"] == 0
    assert not PROBLEM.right(["a"], answers[0], FACTS)
    told = evaluate(PROBLEM, FACTS, [["a", "new"]], answers, metric="micro_f1", resamples=10)
    assert told["labels"] == [*LABELS, "new"] and told["support"]["new"] == 1
    assert told["metrics"]["average_precision"]["low"] is None


@relaxed
@given(st.lists(st.tuples(st.booleans(), logits), min_size=1, max_size=40), st.floats(0, 1))
def test_a_tuned_threshold_is_the_best(rows, other):
    """On the validation rows, of a label alone, no other threshold has a better F1; equal scores are not parted."""
    facts = {"labels": ["a"], "thresholds": [0.5]}
    truth = [["a"] if has else [] for has, _ in rows]
    outputs = outputs_of([[logit] for _, logit in rows])
    tuned = PROBLEM.tuned(outputs, truth, facts, None, "micro_f1")
    assert json.loads(json.dumps(tuned)) == tuned and facts["thresholds"] == [0.5]
    best, *others = (
        PROBLEM.metrics(truth, PROBLEM.decode(outputs, facts | {"thresholds": [t]}), facts)["micro_f1"]
        for t in (*tuned["thresholds"], 0.5, other)
    )
    assert best >= max(others)
    if not any(truth):
        assert tuned["thresholds"] == [0.5]


def test_rare_labels_share_a_threshold():
    """A label that enough rows have gets the threshold that is best for it, the others one for all labels together."""
    draw = np.random.default_rng(5)
    truth = draw.random((200, 4)) < [0.5, 0.3, 0.03, 0.02]
    assert (truth.sum(0) >= ENOUGH).tolist() == [True, True, False, False]
    logits = draw.normal(size=(200, 4)) + 2 * truth + [-3, 2, 0, 0]
    tuned = PROBLEM.tuned(outputs_of(logits), names_of(truth), FACTS, None, "macro_f1")
    one, two, *rare = tuned["thresholds"]
    assert rare[0] == rare[1] and len({one, two, rare[0]}) == 3 and one < 0.5 < two
    before, after = (
        PROBLEM.metrics(names_of(truth), PROBLEM.decode(outputs_of(logits), facts), FACTS) for facts in (FACTS, tuned)
    )
    assert all(after[f"f1/{label}"] > before[f"f1/{label}"] + 0.05 for label in "ab")


def test_thresholds_are_those_of_the_metric():
    """Each label's own are better on average over labels, but say a hard label too often: worse for all together."""
    draw = np.random.default_rng(0)
    truth = draw.random((400, 4)) < [0.4, 0.08, 0.08, 0.08]
    logits = draw.normal(size=(400, 4)) + truth * [3.0, 0.3, 0.3, 0.3] - [1, 3, 3, 3]
    found = {}
    for metric in ("micro_f1", "macro_f1"):
        facts = PROBLEM.tuned(outputs_of(logits), names_of(truth), FACTS, None, metric)
        metrics = PROBLEM.metrics(names_of(truth), PROBLEM.decode(outputs_of(logits), facts), facts)
        found[metric] = (len({*facts["thresholds"]}), metrics["micro_f1"], metrics["macro_f1"])
    assert found["micro_f1"][0] == 1 < found["macro_f1"][0]
    assert found["micro_f1"][1] > found["macro_f1"][1] and found["micro_f1"][2] < found["macro_f1"][2]


def test_thresholds_lie_between():
    """Half-way between neighbours; below the last one when all are wanted; at a score with nothing below but equals."""
    assert best_threshold(np.array([0.2, 0.9, 0.4]), np.array([0.0, 1.0, 1.0])) == pytest.approx(0.3)
    assert 0 < best_threshold(np.array([0.2, 0.9]), np.array([1.0, 1.0])) < 0.2
    assert 0.1 < best_threshold(np.array([0.3, 0.3, 0.1]), np.array([1.0, 0.0, 0.0])) < 0.3
    for above in (1.0, np.nextafter(1.0, 0.0)):
        below = np.nextafter(above, 0.0)
        assert below < best_threshold(np.array([above, below]), np.array([1.0, 0.0])) <= above


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ('["b", "a", "b"]', ["a", "b"]),
        ('[" a  x ", "e\u0301"]', ["a x", "é"]),
        ("[1, 2.5]", ["1", "2.5"]),
        ("[]", []),
        (" [] ", []),
        ("b; a", ["a", "b"]),
        ("b|a|b", ["a", "b"]),
        ("a;;", ["a"]),
        ("one label, with a comma", ["one label, with a comma"]),
        ("true", ["true"]),
    ],
)
def test_cells_that_are_read(cell, labels):
    """A JSON list, or labels with ; or | between them: cleaned, in order, each once."""
    columns = {"text": ["x"], "labels": [cell]}
    assert PROBLEM.prepare(columns, normalise) == [None]
    assert json.loads(columns["labels"][0]) == PROBLEM.truth(columns["labels"][0]) == labels


@pytest.mark.parametrize("cell", ["[a, b]", '["a"', '["a", null]', "[true]", '[["a"]]', '[{"a": 1}]', "[" * 200_000])
def test_cells_that_are_refused(cell):
    """What begins as a list and is none of labels costs its row alone; an absent cell is not unreadable."""
    columns = {"text": ["x"] * 3, "labels": ["a", cell, None]}
    assert PROBLEM.prepare(columns, normalise) == [None, "unreadable_labels", None]
    assert columns["labels"] == ['["a"]', None, None]


def test_ingest(tmp_path):
    """Every form of the same labels is the same row."""
    cells = ['["b","a"]', "a;b", "b | a", "[a]", "", "[]"]
    lines = [json.dumps({"text": "one", "labels": json.loads(c) if c[:2] == '["' else c}) for c in cells]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    made = ingest(Data(source=str(tmp_path / "a.jsonl")), tmp_path / "out", PROBLEM)
    rows = sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])
    assert [row["labels"] for row in rows] == ['["a", "b"]'] * 3 + [None, None, "[]"]
    assert [row["refusal"] for row in rows] == [None] * 3 + ["unreadable_labels", None, None]
    assert len({row["row_id"] for row in rows[:3]}) == 1 and made.labels == {}


def test_facts_and_labels(tiny_model):
    """Labels in order; rows without any, and labels that were not learnt, are refused."""
    assert PROBLEM.facts({"labels": ['["b"]', '["a", "b"]', "[]"]}) == {"labels": ["a", "b"], "thresholds": [0.5, 0.5]}
    with pytest.raises(DataRefused, match="no row to train on has a label"):
        PROBLEM.facts({"labels": ["[]"]})
    tokenizer = load_tokenizer(str(tiny_model))
    texts = {"text": ["good", "bad"], "labels": ['["d", "a"]', "[]"]}
    assert PROBLEM.encode(tokenizer, texts, FACTS, 16)["labels"] == [[1, 0, 0, 1], [0, 0, 0, 0]]
    with pytest.raises(DataRefused, match="not a label of the training rows, got 'food'; did you mean foot"):
        PROBLEM.encode(tokenizer, {"text": ["x"], "labels": ['["food"]']}, {"labels": ["foot", "a"]}, 16)


def test_decode():
    """Scores are sigmoids of their own, a label is said from its threshold on."""
    facts = FACTS | {"thresholds": [0.5, 0.5, 0.9, 0.1]}
    first, second = PROBLEM.decode(outputs_of([[0, -0.1, 1, -1], [80, -80, 0, 0]]), facts)
    assert first["labels"] == ["a", "d"]
    assert first["scores"]["c"] == pytest.approx(1 / (1 + np.exp(-1)))
    assert second["labels"] == ["a", "d"] and second["scores"]["a"] == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_torchs(smoothing):
    """Binary cross-entropy, the mean over labels and the sum over rows; smoothing moves both answers towards a half."""
    torch.manual_seed(3)
    outputs = type("Outputs", (), {"logits": torch.randn(8, 4)})
    batch = {"labels": torch.randint(0, 2, (8, 4))}
    wanted = batch["labels"] * (1 - smoothing) + smoothing * 0.5
    expected = torch.nn.BCEWithLogitsLoss(reduction="none")(outputs.logits, wanted).mean(1).sum()
    assert float(PROBLEM.loss(outputs, batch, Training(label_smoothing=smoothing), None)) == pytest.approx(
        float(expected)
    )
