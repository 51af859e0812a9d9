"""The gate: a table of cases, and properties that hold for any numbers."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overnight import problems
from overnight.config import Promotion
from overnight.evaluation import compare, evaluate
from overnight.promotion import decide

# a busy machine is no reason to fail
relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])

RULES = ["numbers", "floor", "gain", "chance", "class_drop", "latency"]


def metric(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high}


def evaluation(value=0.8, milliseconds=10.0, broken=0):
    quantiles = {"p50": milliseconds, "p95": milliseconds}
    latency = {"single": quantiles, "batch": quantiles, "batch_size": 8, "repeats": 5}
    return {
        "metric": "macro_f1",
        "rows": 900,
        "metrics": {"macro_f1": metric(value)},
        "latency": None if milliseconds is None else latency,
        "broken_predictions": broken,
    }


def comparison(gain=0.02, low=0.005, high=0.035, classes=None, changed=90, unknown=()):
    return {
        "metric": "macro_f1",
        "rows": 900,
        "confidence": 0.95,
        "gain": metric(gain, low, high),
        "classes": classes or {"good": metric(gain, low, high)},
        "changed": changed,
        "unknown_labels": list(unknown),
        "unknown_rows": 31 * len(unknown),
    }


def failed(decision):
    return [reason.rule for reason in decision.failed]


CASES = [
    # what, promotion, candidate, champion, comparison → failed rules
    ("first night", {}, evaluation(), None, None, []),
    ("first night at the floor", {"floor": 0.8}, evaluation(0.8), None, None, []),
    ("first night below the floor", {"floor": 0.9}, evaluation(), None, None, ["floor"]),
    ("better", {}, evaluation(), evaluation(0.78), comparison(), []),
    ("better, but below the floor", {"floor": 0.9}, evaluation(), evaluation(0.78), comparison(), ["floor"]),
    ("gain by chance", {}, evaluation(), evaluation(), comparison(low=-0.001), ["chance"]),
    ("lower bound exactly 0", {}, evaluation(), evaluation(), comparison(low=0.0), ["chance"]),
    ("gain too small", {"min_gain": 0.03}, evaluation(), evaluation(), comparison(), ["gain"]),
    ("gain just enough", {"min_gain": 0.02}, evaluation(), evaluation(), comparison(gain=0.82 - 0.80), []),
    ("tie", {}, evaluation(), evaluation(), comparison(0.0, 0.0, 0.0, changed=0), ["gain", "chance"]),
    ("worse", {}, evaluation(), evaluation(), comparison(-0.02, -0.03, -0.01), ["gain", "chance"]),
    ("much slower", {}, evaluation(milliseconds=15.1), evaluation(), comparison(), ["latency"]),
    ("slower, allowed", {}, evaluation(milliseconds=15.0), evaluation(), comparison(), []),
    ("latency unknown", {}, evaluation(milliseconds=None), evaluation(), comparison(), ["latency"]),
    ("latency no number", {}, evaluation(milliseconds=math.nan), evaluation(), comparison(), ["latency"]),
    ("champion takes no time", {}, evaluation(), evaluation(milliseconds=0.0), comparison(), ["latency"]),
    ("no comparison", {}, evaluation(), evaluation(), None, ["chance"]),
    ("value NaN", {}, evaluation(math.nan), None, None, ["floor"]),
    ("value infinite", {}, evaluation(math.inf), None, None, ["floor"]),
    ("value undefined", {}, evaluation(None), None, None, ["floor"]),
    ("scores NaN", {}, evaluation(broken=3), None, None, ["numbers"]),
    ("gain NaN", {}, evaluation(), evaluation(), comparison(math.nan, classes={"a": metric(0.1)}), ["gain", "chance"]),
    (
        "bound NaN",
        {},
        evaluation(),
        evaluation(),
        comparison(low=math.nan, classes={"a": metric(0)}),
        ["gain", "chance"],
    ),
    ("class F1 NaN", {}, evaluation(), evaluation(), comparison(classes={"a": metric(math.nan)}), ["class_drop"]),
    (
        "a class lost surely",
        {},
        evaluation(),
        evaluation(),
        comparison(classes={"good": metric(0.05), "bad": metric(-0.06, -0.1, -0.01)}),
        ["class_drop"],
    ),
    (
        "a class lost, perhaps by chance",
        {},
        evaluation(),
        evaluation(),
        comparison(classes={"bad": metric(-0.2, -0.45, 0.05)}),
        [],
    ),
    (
        "a class lost surely, but little",
        {},
        evaluation(),
        evaluation(),
        comparison(classes={"bad": metric(-0.05, -0.06, -0.04)}),
        [],
    ),
    (
        "everything wrong at once",
        {"floor": 0.9, "min_gain": 0.1},
        evaluation(0.5, milliseconds=99.0, broken=1),
        evaluation(),
        comparison(-0.3, -0.4, -0.2),
        RULES,
    ),
]


@pytest.mark.parametrize(
    ("what", "numbers", "candidate", "champion", "found", "expected"), CASES, ids=[c[0] for c in CASES]
)
def test_cases(what, numbers, candidate, champion, found, expected):
    """Each rule alone decides its case, and every rule is reported, also after another has failed."""
    decision = decide(Promotion(**numbers), candidate, champion, found)
    assert failed(decision) == expected
    assert decision.outcome == decision.would == ("keep" if expected else "promote")
    rules = [reason.rule for reason in decision.reasons]
    assert rules == (RULES[:2] if champion is None else RULES if found else ["numbers", "floor", "chance", "latency"])


def test_reasons_read_as_sentences_with_numbers():
    """The text of a reason alone tells what was seen, what was asked and what follows."""
    texts = {r.rule: r.text for r in decide(Promotion(floor=0.6), evaluation(), evaluation(), comparison()).reasons}
    assert texts["floor"] == "macro_f1 0.800 reaches the floor 0.600"
    assert texts["gain"] == "gain +0.020 macro_f1 over the champion (asked: any gain)"
    assert texts["chance"] == "gain +0.020 macro_f1, 95 % interval [+0.005, +0.035]: better than chance explains"
    assert texts["class_drop"] == "no class lost anything"
    assert texts["latency"] == "10.0 ms a text, 1.00 times the champion's 10.0 ms (allowed: 1.50)"
    tie = decide(Promotion(), evaluation(), evaluation(), comparison(0.0, 0.0, 0.0, changed=0))
    assert "a tie, the same predictions on all 900 rows" in tie.failed[1].text
    lost = comparison(classes={"bad": metric(-0.06, -0.1, -0.01)})
    text = decide(Promotion(), evaluation(), evaluation(), lost).failed[0].text
    assert text == "lost more than the 0.050 allowed: bad -0.060 F1, interval [-0.100, -0.010]"


def test_champion_of_other_labels_is_told():
    """A gain that comes from labels the champion never saw says so."""
    found = comparison(unknown=["refund"])
    text = decide(Promotion(), evaluation(), evaluation(), found).reasons[2].text
    assert text.endswith("; the champion does not know refund and gets those 31 rows wrong")


def test_metric_of_which_less_is_better():
    """The floor becomes a ceiling; 0, the default, sets none."""
    assert failed(decide(Promotion(floor=0.5), evaluation(0.4), lower_is_better=True)) == []
    assert failed(decide(Promotion(floor=0.5), evaluation(0.6), lower_is_better=True)) == ["floor"]
    assert failed(decide(Promotion(), evaluation(7.0), lower_is_better=True)) == []


def test_record_is_json():
    """The decision is stored on the version and in the ledger."""
    record = decide(Promotion(), evaluation(), evaluation(), comparison()).record()
    assert json.loads(json.dumps(record)) == record
    assert record["outcome"] == "promote" and record["reasons"][3]["limit"] == 0.0


def test_real_predictions_through_evaluation_and_gate():
    """Evaluation's records are what the gate reads: better predictions promote, the same ones tie."""
    targets = ["a", "b", "c"] * 100
    worse = [t if i % 4 else "a" for i, t in enumerate(targets)]
    latency = evaluation()["latency"]
    problem, facts = problems.get("sequence-classification"), {"labels": ["a", "b", "c"]}
    options = {"metric": "macro_f1", "resamples": 300}

    def rows(labels):
        return [{"label": x, "score": 1.0, "scores": {x: 1.0}} for x in labels]

    def judged(labels):
        return evaluate(problem, facts, targets, rows(labels), latency=latency, **options)

    better = compare(problem, facts, targets, rows(targets), rows(worse), **options)
    same = compare(problem, facts, targets, rows(worse), rows(worse), **options)
    assert decide(Promotion(), judged(targets), judged(worse), better).outcome == "promote"
    assert failed(decide(Promotion(), judged(worse), judged(worse), same)) == ["gain", "chance"]


numbers = st.one_of(st.floats(-1, 1), st.sampled_from([math.nan, math.inf, -math.inf, 0.0]), st.none())
metrics = st.builds(lambda a, b, c: {"value": a, "low": b, "high": c}, numbers, numbers, numbers)
evaluations = st.builds(
    evaluation, numbers, st.one_of(st.none(), st.floats(0, 100), st.just(math.nan)), st.integers(0, 2)
)
comparisons = st.builds(
    lambda gain, classes, changed: comparison(classes=classes, changed=changed) | {"gain": gain},
    metrics,
    st.dictionaries(st.sampled_from("abc"), metrics, min_size=1),
    st.integers(0, 900),
)
promotions = st.builds(
    Promotion,
    mode=st.sampled_from(["auto", "manual", "dry-run"]),
    floor=st.floats(-1, 1),
    min_gain=st.floats(0, 0.1),
    max_class_drop=st.floats(0, 0.2),
    max_latency_ratio=st.floats(0.5, 3),
)


@relaxed
@given(promotions, evaluations, st.one_of(st.none(), evaluations), comparisons)
def test_any_numbers(promotion, candidate, champion, found):
    """Whatever is measured: an outcome with all its reasons, and a promotion only on finite numbers that all pass."""
    decision = decide(promotion, candidate, champion, found)
    assert [reason.rule for reason in decision.reasons] == (RULES if champion else RULES[:2])
    assert decision.would == ("keep" if decision.failed else "promote")
    if decision.would == "promote":
        assert math.isfinite(candidate["metrics"]["macro_f1"]["value"]) and candidate["broken_predictions"] == 0
        if champion:
            assert 0 < found["gain"]["low"] and found["gain"]["value"] > 0
            assert all(math.isfinite(x) for x in found["gain"].values())
    assert decision.outcome != "promote" or promotion.mode == "auto"


@relaxed
@given(promotions, evaluations, st.one_of(st.none(), evaluations), comparisons)
def test_modes(promotion, candidate, champion, found):
    """All modes see the same reasons; `manual` turns a promotion into waiting, `dry-run` into keeping."""
    by_mode = {
        mode: decide(promotion.model_copy(update={"mode": mode}), candidate, champion, found)
        for mode in ("auto", "manual", "dry-run")
    }
    assert by_mode["auto"].outcome == by_mode["auto"].would
    assert by_mode["manual"].outcome == ("wait" if by_mode["auto"].would == "promote" else "keep")
    assert by_mode["dry-run"].outcome == "keep"
    assert len({d.would for d in by_mode.values()}) == 1
    assert repr(by_mode["auto"].reasons) == repr(by_mode["manual"].reasons) == repr(by_mode["dry-run"].reasons)


@relaxed
@given(promotions, st.floats(-1, 1), st.floats(0, 1), evaluations, comparisons)
def test_a_better_candidate_is_never_worse_off(promotion, value, more, champion, found):
    """Raising the metric never makes the floor rule fail; raising the gain never makes the gain rules fail."""

    def passed(value, gain):
        shifted = {k: None if v is None else v + gain for k, v in found["gain"].items()}
        decision = decide(promotion, evaluation(value), champion, found | {"gain": shifted})
        return {reason.rule for reason in decision.reasons if reason.passed}

    assert passed(value, 0) & {"floor", "gain", "chance"} <= passed(value + more, more)


@relaxed
@given(promotions, evaluations, evaluations)
def test_a_tie_keeps(promotion, candidate, champion):
    """Equal predictions never promote, whatever the numbers of the config."""
    tie = comparison(0.0, 0.0, 0.0, changed=0)
    assert decide(promotion, candidate, champion, tie).would == "keep"
