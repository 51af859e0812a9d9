"""Evaluation: metrics, intervals, comparison, calibration, slices and latency of predictions."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, precision_recall_fscore_support

from overnight import problems
from overnight.errors import NightFailed, UserError
from overnight.evaluation import compare, evaluate, latencies
from overnight.evaluation.bootstrap import resample, resample_pair
from overnight.evaluation.slices import slice_masks
from overnight.problems.labels import label_tally
from overnight.tally import Tally

# a busy machine is no reason to fail
relaxed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])

PROBLEM = problems.get("sequence-classification")
LABELS = ["bad", "good", "plain"]


def predictions_of(labels, score=0.8, known=LABELS):
    rest = (1 - score) / (len(known) - 1)
    return [{"label": x, "score": score, "scores": {k: score if k == x else rest for k in known}} for x in labels]


def judged(targets, predictions, labels=LABELS, metric="macro_f1", **options):
    return evaluate(PROBLEM, {"labels": labels}, targets, predictions, metric=metric, **options)


def compared(targets, candidate, champion, labels=LABELS, metric="macro_f1", **options):
    return compare(PROBLEM, {"labels": labels}, targets, candidate, champion, metric=metric, **options)


def draw(rows: int, right: float, seed: int, known=LABELS) -> tuple[list[str], list[str]]:
    generator = np.random.default_rng(seed)
    targets = generator.choice(known, rows)
    guesses = np.where(generator.random(rows) < right, targets, generator.choice(known, rows))
    return targets.tolist(), guesses.tolist()


def sklearn_metrics(targets, guesses, labels) -> dict[str, float]:
    """The oracle: scikit-learn on the classes that have rows."""
    present = [x for x in labels if x in targets]
    found = {"accuracy": accuracy_score(targets, guesses)}
    for average in ("macro", "weighted", None):
        values = precision_recall_fscore_support(targets, guesses, labels=present, average=average, zero_division=0)
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            if average:
                found[f"{average}_{name}"] = value
            else:
                found |= {f"{name}/{label}": v for label, v in zip(present, value, strict=True)}
    return found


pairs = st.integers(2, 6).flatmap(
    lambda k: st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, k)), min_size=1, max_size=60).map(
        lambda rows: ([f"c{i}" for i in range(k)], [f"c{t}" for t, _ in rows], [f"c{p}" for _, p in rows])
    )
)


@relaxed
@given(pairs)
def test_counted_metrics_equal_scikit_learn(drawn):
    """On any data, also with absent classes and unknown predictions, the counted metrics are scikit-learn's."""
    labels, targets, guesses = drawn
    found = {k: v for k, v in label_tally(targets, guesses, labels).values().items() if not np.isnan(v)}
    assert found == pytest.approx(sklearn_metrics(targets, guesses, labels))


def test_counted_metrics_equal_the_problems():
    """The search optimises what the gate compares: same names, same values."""
    targets, guesses = draw(300, 0.6, seed=2)
    of_problem = PROBLEM.metrics(targets, predictions_of(guesses), {"labels": LABELS})
    assert label_tally(targets, guesses, LABELS).values() == pytest.approx(of_problem)


def test_each_resample_equals_scikit_learn_on_the_drawn_rows():
    """The matrix product of draws and counts is the metric of the rows that were drawn, for every resample."""
    targets, guesses = draw(50, 0.6, seed=3)
    tally = label_tally(targets, guesses, LABELS)
    drawn = np.random.default_rng(0).integers(0, 50, size=(20, 50))
    sums = np.stack([np.bincount(tally.group[rows], minlength=len(tally.adds)) for rows in drawn]) @ tally.adds
    for i, rows in enumerate(drawn):
        oracle = sklearn_metrics([targets[r] for r in rows], [guesses[r] for r in rows], LABELS)
        assert {name: values[i] for name, values in tally.metrics(sums).items()} == pytest.approx(oracle)


def test_interval_agrees_with_drawing_rows():
    """Multinomial counts give the interval that drawing rows with replacement gives."""
    targets, guesses = draw(200, 0.6, seed=4)
    ours = judged(targets, predictions_of(guesses), resamples=4000)["metrics"]["accuracy"]
    right = np.array([t == g for t, g in zip(targets, guesses, strict=True)])
    plain = right[np.random.default_rng(1).integers(0, 200, size=(4000, 200))].mean(axis=1)
    assert (ours["low"], ours["high"]) == pytest.approx(tuple(np.quantile(plain, (0.025, 0.975))), abs=0.008)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Over 300 worlds of known accuracy, the 95 % interval holds it in about 95 % of them."""
    held = 0
    for seed in range(300):
        generator = np.random.default_rng(seed)
        right = generator.random(200) < 0.7
        tally = Tally(right.astype(int), np.array([[1.0, 0.0], [1.0, 1.0]]), lambda s: {"accuracy": s[:, 1] / s[:, 0]})
        low, high = np.quantile(resample(tally, 400, seed)["accuracy"], (0.025, 0.975))
        held += low <= 0.7 <= high
    assert 0.91 <= held / 300 <= 0.985


def test_chunks_change_nothing_but_memory(monkeypatch):
    """Continuous per-row sums (as many groups as rows) are resampled in chunks, each of the full number of rows."""
    monkeypatch.setattr("overnight.evaluation.bootstrap.CELLS_AT_ONCE", 1000)
    error = np.random.default_rng(0).random(300)
    tally = Tally(
        np.arange(300), np.stack([np.ones(300), error], axis=1), lambda s: {"rows": s[:, 0], "error": s[:, 1]}
    )
    found = resample(tally, 50, seed=1)
    assert found["rows"].tolist() == [300.0] * 50
    assert found["error"].std() > 0


def test_evaluation_is_json_and_whole():
    """The record survives JSON, has every metric inside its interval, and counts every row once."""
    targets, guesses = draw(400, 0.7, seed=5)
    found = judged(targets, predictions_of(guesses), slices={"topic": ["a", "b"] * 200})
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = {"accuracy"} | {f"{a}_{m}" for a in ("macro", "weighted") for m in ("precision", "recall", "f1")}
    names |= {f"{m}/{label}" for m in ("precision", "recall", "f1") for label in LABELS}
    assert set(found["metrics"]) == names
    assert all(m["low"] < m["value"] < m["high"] for m in found["metrics"].values())
    assert found["confusion"]["counts"] == confusion_matrix(targets, guesses, labels=LABELS).tolist()
    assert found["support"] == {label: targets.count(label) for label in LABELS}
    assert [s["rows"] for s in found["slices"]] == [200, 200]


def test_label_that_only_the_rows_have():
    """A label the model cannot say counts as wrong rows, not as an error of ours; a class without rows has no F1."""
    found = judged(["a", "a", "new"], predictions_of(["a", "a", "a"], known=["a", "b"]), labels=["a", "b"])
    assert found["labels"] == ["a", "b", "new"]
    assert found["metrics"]["recall/new"]["value"] == 0
    assert found["metrics"]["f1/b"] == {"value": None, "low": None, "high": None}
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(2 / 3)


def test_no_rows_and_unknown_metric_are_refused():
    """No test rows: the night fails. A metric that does not exist: the user is told the nearest one."""
    with pytest.raises(NightFailed, match="no test rows"):
        judged([], [])
    with pytest.raises(UserError, match="did you mean macro_f1"):
        judged(["good"], predictions_of(["good"]), metric="makro_f1")
    with pytest.raises(UserError, match="did you mean accuracy"):
        compared(["good"], predictions_of(["good"]), predictions_of(["bad"]), metric="acuracy")


def test_calibration_of_known_scores():
    """80 % confidence and 60 % accuracy is an error of 0.2; Brier and log-loss are their definitions'."""
    targets = ["good"] * 60 + ["bad"] * 40
    found = judged(targets, predictions_of(["good"] * 100))["calibration"]
    assert found["expected_calibration_error"] == pytest.approx(0.2)
    assert found["bins"] == [{"low": 0.8, "high": 0.9, "rows": 100, "confidence": pytest.approx(0.8), "accuracy": 0.6}]
    assert found["brier"] == pytest.approx(0.6 * (0.2**2 + 2 * 0.1**2) + 0.4 * (0.8**2 + 0.9**2 + 0.1**2))
    scores = [[p["scores"][x] for x in LABELS] for p in predictions_of(["good"] * 100)]
    assert found["log_loss"] == pytest.approx(log_loss(targets, scores, labels=LABELS))


def test_scores_that_are_no_numbers_are_counted():
    """NaN scores leave no calibration and are counted, so that the gate can refuse them."""
    rows = predictions_of(["good", "bad"])
    rows[1]["scores"]["good"] = float("nan")
    found = judged(["good", "bad"], rows)
    assert found["broken_predictions"] == 1 and found["calibration"] is None
    json.dumps(found, allow_nan=False)


def test_equal_predictions_differ_by_exactly_nothing():
    """A tie is exact: no rounding ever makes a gain of it."""
    targets, guesses = draw(300, 0.6, seed=6)
    found = compared(targets, predictions_of(guesses), predictions_of(guesses, score=0.5))
    assert all(m == {"value": 0.0, "low": 0.0, "high": 0.0} for m in found["differences"].values())
    assert (found["probability"], found["changed"], found["fixed"], found["broken"]) == (0.0, 0, 0, 0)


def test_comparison_is_paired():
    """Twelve rows put right among 300 are a sure gain, though the two intervals on their own overlap widely."""
    targets, guesses = draw(300, 0.6, seed=7)
    wrong = [i for i in range(300) if guesses[i] != targets[i]]
    better = list(guesses)
    for i in wrong[:12]:
        better[i] = targets[i]
    found = compared(targets, predictions_of(better), predictions_of(guesses))
    alone = [judged(targets, predictions_of(g))["metrics"]["macro_f1"] for g in (better, guesses)]
    assert found["gain"]["low"] > 0 and found["probability"] == 1.0
    assert alone[0]["low"] < alone[1]["high"]
    assert (found["changed"], found["fixed"], found["broken"]) == (12, 12, 0)
    assert set(found["classes"]) == set(LABELS)
    json.dumps(found, allow_nan=False)


@relaxed
@given(st.integers(0, 1000))
def test_comparison_mirrors(seed):
    """Candidate and champion exchanged: every difference changes its sign and nothing else."""
    targets, ours = draw(80, 0.6, seed)
    theirs = draw(80, 0.5, seed)[1]
    sums = [label_tally(targets, g, LABELS) for g in (ours, theirs)]
    value = sums[0].values()["macro_f1"] - sums[1].values()["macro_f1"]
    one = compared(targets, predictions_of(ours), predictions_of(theirs), resamples=200)
    other = compared(targets, predictions_of(theirs), predictions_of(ours), resamples=200)
    assert one["gain"]["value"] == pytest.approx(value) and other["gain"]["value"] == pytest.approx(-value)
    assert (one["fixed"], one["broken"]) == (other["broken"], other["fixed"])
    mirrored = compared(targets, predictions_of(ours), predictions_of(theirs), resamples=200, lower_is_better=True)
    assert mirrored["gain"]["value"] == pytest.approx(-value)
    assert mirrored["gain"]["low"] <= mirrored["gain"]["high"]


def test_pairs_are_drawn_together():
    """In each resample both models meet the same rows: the difference of a model and itself, relabelled, is 0."""
    right = np.array([0, 1, 1, 0, 1, 1, 1, 0] * 20)
    metrics = lambda s: {"accuracy": s[:, 1] / s[:, 0]}  # noqa: E731
    one = Tally(right, np.array([[1.0, 0.0], [1.0, 1.0]]), metrics)
    other = Tally(1 - right, np.array([[1.0, 1.0], [1.0, 0.0]]), metrics)
    assert not resample_pair(one, other, 100, seed=0)["accuracy"].any()


def test_champion_of_other_labels():
    """Rows of a label the champion was never told count as wrong for it, and are counted for the reader."""
    targets = ["a"] * 30 + ["b"] * 30 + ["new"] * 10
    champion = predictions_of(["a"] * 30 + ["b"] * 25 + ["old"] * 5 + ["a"] * 10, known=["a", "b", "old"])
    found = compared(
        targets,
        predictions_of(targets),
        champion,
        labels=["a", "b", "new"],
        champion_facts={"labels": ["a", "b", "old"]},
    )
    assert (found["unknown_labels"], found["unknown_rows"]) == (["new"], 10)
    assert found["classes"]["new"]["value"] == 1.0
    assert found["fixed"] == 15
    counted = judged(targets, champion, labels=["a", "b", "new"])["confusion"]
    assert counted["columns"][-1] == "(other)" and sum(row[-1] for row in counted["counts"]) == 5


def test_numbers_are_cut_at_quantiles():
    """A numeric column becomes four parts that hold each known row once; missing values are a part of their own."""
    values = [float(i) for i in range(100)] + [None, float("nan")]
    found = list(slice_masks(values))
    assert [int(mask.sum()) for _, mask in found] == [25, 25, 25, 25, 2]
    assert found[0][0] == "0 to 24.75" and found[-1][0] == "(missing)"
    assert np.sum([mask for _, mask in found], axis=0).tolist() == [1] * 102


def test_rare_values_are_put_together():
    """Values with too few rows to judge by share one line; booleans and few numbers are values, not quantiles."""
    found = {value: int(mask.sum()) for value, mask in slice_masks(["news"] * 50 + ["mail"] * 30 + list("abcdefgh"))}
    assert found == {"news": 50, "mail": 30, "(8 rarer values)": 8}
    assert {v: int(m.sum()) for v, m in slice_masks([True] * 30 + [False] * 25)} == {"True": 30, "False": 25}
    assert {v for v, _ in slice_masks([1, 2] * 30)} == {"1", "2"}


@relaxed
@given(st.lists(st.one_of(st.none(), st.integers(-3, 30), st.floats(), st.text(max_size=2)), min_size=1, max_size=80))
def test_slices_hold_every_row_once(values):
    """Whatever the column holds, its slices are a partition of the rows."""
    masks = [mask for _, mask in slice_masks(values)]
    assert np.sum(masks, axis=0).tolist() == [1] * len(values)


def test_slice_metric_is_that_of_its_rows():
    """The line of a slice is the evaluation of its rows alone."""
    targets, guesses = draw(300, 0.6, seed=8)
    column = ["x" if i % 3 else "y" for i in range(300)]
    found = judged(targets, predictions_of(guesses), slices={"col": column})["slices"]
    for line in found:
        rows = [i for i in range(300) if column[i] == line["value"]]
        alone = sklearn_metrics([targets[i] for i in rows], [guesses[i] for i in rows], LABELS)
        assert line["rows"] == len(rows) and line["metric"]["value"] == pytest.approx(alone["macro_f1"])


def test_latency_tells_slow_from_fast_and_single_from_batch():
    """Milliseconds are those of one text: a batch that costs as much as one text is that much cheaper a text."""
    calls: list[int] = []

    def slow(rows):
        calls.append(len(rows))
        time.sleep(0.004)

    found = latencies(
        {"candidate": slow, "champion": lambda rows: None}, [{"text": str(i)} for i in range(10)], repeats=5
    )
    assert found["candidate"]["single"]["p50"] >= 4 > 1 > found["champion"]["single"]["p50"]
    assert 0.4 <= found["candidate"]["batch"]["p50"] < 4
    assert sorted(calls) == [1] * 7 + [10] * 7
    assert found["candidate"]["batch_size"] == 10 and found["candidate"]["repeats"] == 5
    calls.clear()
    rushed = latencies({"candidate": slow}, [{"text": "a"}] * 10, repeats=50, seconds=0)
    assert rushed["candidate"]["repeats"] == 3 and sorted(calls) == [1] * 5 + [10] * 5, "no time: the fewest calls"


def test_bootstrap_is_fast():
    """2,000 resamples of 900 rows stay far below a second; a call of scikit-learn for each would take ten."""
    targets, guesses = draw(900, 0.7, seed=9)
    begun = time.process_time()
    judged(targets, predictions_of(guesses))
    compared(targets, predictions_of(guesses), predictions_of(draw(900, 0.6, seed=9)[1]))
    assert time.process_time() - begun < 2
