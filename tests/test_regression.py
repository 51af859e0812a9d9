"""Regression: which numbers are read, what is learnt of them, metrics that equal those of scipy and scikit-learn."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

from overnight import problems
from overnight.config import Data
from overnight.data.ingest import ingest
from overnight.evaluation import compare, evaluate
from overnight.training import data
from overnight.training.models import load_tokenizer

relaxed = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

PROBLEM = problems.get("regression")
numbers = st.one_of(st.integers(-20, 20).map(lambda n: n / 4), st.floats(-1000, 1000).map(lambda x: round(x, 3)))


def predictions_of(values) -> list[dict]:
    return [{"value": float(value)} for value in values]


def metrics_of(truth, guess) -> dict[str, float]:
    facts = PROBLEM.facts({"value": [repr(float(value)) for value in truth]})
    return PROBLEM.metrics([float(value) for value in truth], predictions_of(guess), facts)


def oracle(truth, guess) -> dict[str, float]:
    """scipy's and scikit-learn's; 0 where a correlation or a share of nothing is asked for."""
    found = dict.fromkeys(("pearson", "spearman", "r2"), 0.0)
    if len({*truth}) > 1:
        found["r2"] = r2_score(truth, guess)
        if len({*guess}) > 1:
            found |= {"pearson": pearsonr(truth, guess).statistic, "spearman": spearmanr(truth, guess).statistic}
    return found | {"rmse": mean_squared_error(truth, guess) ** 0.5, "mae": mean_absolute_error(truth, guess)}


@relaxed
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=60))
def test_metrics_equal_scipy_and_scikit_learn(pairs):
    """Any numbers, many of them equal: ranks share the mean of their places."""
    truth, guess = zip(*pairs, strict=True)
    assert metrics_of(truth, guess) == pytest.approx(oracle(truth, guess), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("offset", [0, -5e5, 1.7e9])
def test_large_values_with_a_small_spread(offset):
    """Points in time keep their digits."""
    draw = np.random.default_rng(3)
    truth = offset + draw.normal(size=500)
    guess = truth + draw.normal(size=500)
    found = metrics_of(truth, guess)
    assert 0.5 < found["pearson"] < 0.9
    assert found == pytest.approx(oracle(truth, guess), rel=1e-5)


@relaxed
@given(st.floats(-1e9, 1e9), st.lists(numbers, min_size=1, max_size=200), st.booleans())
def test_values_that_do_not_differ(value, others, known):
    """Without differences on one side there is no correlation: 0, None in the evaluation, and no warning."""
    constant = [value] * len(others)
    truth, guess = (constant, others) if known else (others, constant)
    facts = {"mean": 0.7, "std": 3.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = PROBLEM.metrics(truth, predictions_of(guess), facts)
        judged = evaluate(PROBLEM, facts, truth, predictions_of(guess), metric="rmse", resamples=20)
    assert found["pearson"] == found["spearman"] == 0
    assert judged["metrics"]["pearson"] == judged["metrics"]["spearman"] == {"value": None, "low": None, "high": None}
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, guess))
    if len({*truth}) == 1:
        assert found["r2"] == 0
    else:
        assert found["r2"] == pytest.approx(r2_score(truth, guess), rel=1e-6)


@relaxed
@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9), st.integers(2, 300))
def test_a_resample_of_one_row(truth, guess, often):
    """A row drawn again and again has no correlation with itself, whatever rounding makes of its squares."""
    tally = PROBLEM.tally([truth, 0.1, 7.0], predictions_of([guess, 0.3, -2.0]), {"mean": 0.0, "std": 1.0})
    sums = np.array([[often, 0, 0], [0, often, 0], [0, 0, often]]) @ tally.adds
    found = tally.metrics(sums)
    assert all(np.isnan(found[name]).all() for name in ("pearson", "spearman", "r2"))


def test_intervals_and_gains():
    """Less error is a gain, and is drawn on the same rows for both models; the values lie within."""
    draw = np.random.default_rng(4)
    truth = draw.normal(size=200)
    good, bad = (predictions_of(truth + scale * draw.normal(size=200)) for scale in (0.3, 0.6))
    facts = {"mean": 0.0, "std": 1.0}
    for metric in ("pearson", "spearman", "r2", "rmse", "mae"):
        lower = metric in PROBLEM.lower_is_better
        found = compare(PROBLEM, facts, truth, good, bad, metric=metric, lower_is_better=lower)
        assert lower == (metric in ("rmse", "mae"))
        assert 0 < found["gain"]["low"] < found["gain"]["value"] < found["gain"]["high"] and found["probability"] == 1
        judged = evaluate(PROBLEM, facts, truth, good, metric=metric)["metrics"][metric]
        assert judged["low"] < judged["value"] < judged["high"]


@pytest.mark.parametrize(
    ("cell", "number"),
    [("4", "4.0"), ("4.0", "4.0"), (" 4. ", "4.0"), ("1e3", "1000.0"), ("-0.5", "-0.5"), ("0.1", "0.1"), (None, None)],
)
def test_numbers_that_are_read(cell, number):
    """One number is one cell, however it is written; an absent one stays absent."""
    columns = {"text": ["x"], "value": [cell]}
    assert PROBLEM.prepare(columns, str) == [None]
    assert columns == {"text": ["x"], "value": [number]}


@pytest.mark.parametrize("cell", ["nan", "inf", "-Infinity", "1e999", "four", "4,5", "", "4 5", "0x10"])
def test_numbers_that_are_refused(cell):
    """What is no finite number costs its row, and no other."""
    columns = {"text": ["x"] * 3, "value": ["1", cell, "2"]}
    assert PROBLEM.prepare(columns, str) == [None, "not_a_number", None]
    assert columns["value"] == ["1.0", None, "2.0"]


def test_ingest(tmp_path):
    """4 and 4.0 are the same row; the reason of a refused one is kept beside it; names of grades can be replaced."""
    (tmp_path / "a.csv").write_text("text,value\none,4\none,4.0\ntwo,nan\nthree,\nfour,bad\n")
    given = Data(source=str(tmp_path / "a.csv"), replace={"value": {"bad": "-1"}})
    rows = sorted(
        pq.read_table(ingest(given, tmp_path / "out", PROBLEM).path).to_pylist(), key=lambda row: row["source_row"]
    )
    assert [row["value"] for row in rows] == ["4.0", "4.0", None, None, "-1.0"]
    assert [row["refusal"] for row in rows] == [None, None, "not_a_number", None, None]
    assert rows[0]["row_id"] == rows[1]["row_id"]


def test_facts():
    """Mean and standard deviation of the training rows; equal values have a spread to divide by."""
    assert PROBLEM.facts({"value": ["1.0", "3.0"]}) == {"mean": 2.0, "std": 1.0}
    assert PROBLEM.facts({"value": ["5.0", "5.0"]}) == {"mean": 5.0, "std": 1.0}
    assert json.loads(json.dumps(PROBLEM.facts({"value": ["0.1"]}))) == {"mean": 0.1, "std": 1.0}


@pytest.mark.parametrize("offset", [0.0, 1.7e9, 1e300])
def test_learnt_in_standard_deviations(tmp_path, tiny_model, offset):
    """The model's labels have mean 0 and deviation 1; targets and answers come back in the unit of the values."""
    step = max(1.0, offset * 1e-3 if offset > 1e200 else 0)
    values = [offset + step * i for i in range(20)]
    rows = {"text": ["good"] * 20, "value": [repr(value) for value in values]}
    facts = PROBLEM.facts(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = PROBLEM.encode(load_tokenizer(str(tiny_model)), rows, facts, 16)
        stored = data.write(tmp_path, [features], {})
    labels = stored.column("labels")
    assert (labels.mean(), labels.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))
    assert PROBLEM.targets(stored, facts) == pytest.approx(values, rel=0, abs=1e-6 * facts["std"])
    answers = PROBLEM.decode([np.array([label], dtype=np.float32) for label in labels], facts)
    assert [one["value"] for one in answers] == pytest.approx(values, rel=0, abs=1e-6 * facts["std"])


def test_right_and_same():
    """Right is within half a standard deviation; the same is equal but for what rounding does."""
    facts = {"mean": 0.0, "std": 2.0}
    assert PROBLEM.right(1.0, {"value": 2.0}, facts) and not PROBLEM.right(1.0, {"value": 2.01}, facts)
    assert PROBLEM.same({"value": 1.0}, {"value": 1.0005}) and not PROBLEM.same({"value": 1.0}, {"value": 1.01})
    assert PROBLEM.better("rmse", 0.4, 0.5) and not PROBLEM.better("pearson", 0.4, 0.5)
