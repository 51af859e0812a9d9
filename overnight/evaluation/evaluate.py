"""One model on the frozen test rows: metrics with intervals, confusion, calibration, slices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from overnight.errors import Complaint, NightFailed, UserError, nearest
from overnight.evaluation.bootstrap import Metric, intervals, resample
from overnight.evaluation.labels import Calibration, Confusion, calibration, confusion
from overnight.evaluation.latency import Latency
from overnight.evaluation.slices import slice_masks
from overnight.problems.base import Facts, Prediction, Problem
from overnight.tally import Tally


class Slice(TypedDict):
    """The metric on the rows in which `column` has `value`."""

    column: str
    value: str
    rows: int
    metric: Metric


class Evaluation(TypedDict):
    metric: str
    """The one that the gate compares."""
    rows: int
    labels: list[str]
    """What has an F1 of its own: labels, or the types of entities; none where the problem has no classes."""
    support: dict[str, int]
    """How often the test rows have each."""
    metrics: dict[str, Metric]
    """As the problem names them; `accuracy`, `macro_f1`, `f1/<label>`."""
    confusion: Confusion | None
    """Of a problem whose rows have one label each; `calibration` too."""
    calibration: Calibration | None
    slices: list[Slice]
    latency: Latency | None
    broken_predictions: int
    """Rows whose scores are not finite numbers; a model that has any is never promoted."""
    confidence: float
    resamples: int


def evaluate(
    problem: Problem,
    facts: Facts,
    targets: Sequence[Any],
    predictions: Sequence[Prediction],
    *,
    metric: str,
    slices: Mapping[str, Sequence[Any]] | None = None,
    latency: Latency | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 17,
) -> Evaluation:
    """Evaluates a model's predictions.

    Args:
        problem: what the predictions are of.
        facts: of the model. A label that only the rows have is added, since its rows are wrong for the model.
        targets: the truth of each test row, as `Problem.truth` gives it.
        predictions: of each row, in the same order.
        metric: the one by which slices are compared and the gate decides.
        slices: column → its value in each row.
        latency: measured by `latencies`; passed through.
        confidence: level of the intervals.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        NightFailed: there are no test rows.
        UserError: there is no such metric.
    """
    if not len(targets):
        raise NightFailed(Complaint("evaluation", "there are no test rows to judge a model by"))
    classes = problem.classes(targets, facts)
    known = list(classes)
    tally = problem.tally(targets, predictions, facts)
    values = tally.values()
    check_metric(metric, values)
    told = problem.metrics(targets, predictions, facts) if problem.without_interval else {}
    more: dict[str, Metric] = {n: {"value": told[n], "low": None, "high": None} for n in problem.without_interval}
    one_label = [p["label"] for p in predictions] if problem.labelled else None
    return {
        "metric": metric,
        "rows": len(targets),
        "labels": known,
        "support": classes,
        "metrics": intervals(values, resample(tally, resamples, seed), confidence) | more,
        "confusion": confusion(targets, one_label, known) if one_label is not None else None,
        "calibration": calibration(targets, predictions, known) if one_label is not None else None,
        "slices": [
            found
            for column, column_values in (slices or {}).items()
            for found in _slices(column, column_values, tally, metric, confidence, resamples, seed)
        ],
        "latency": latency,
        "broken_predictions": sum(problem.broken(p) is not None for p in predictions),
        "confidence": confidence,
        "resamples": resamples,
    }


def check_metric(metric: str, known: Mapping[str, Any]) -> None:
    """Raises UserError when the problem has no such metric."""
    if metric not in known:
        rule = "not a metric of this problem"
        raise UserError(Complaint("evaluation → metric", rule, repr(metric), nearest(metric, known)))


def _slices(
    column: str, values: Sequence[Any], tally: Tally, metric: str, confidence: float, resamples: int, seed: int
) -> list[Slice]:
    found: list[Slice] = []
    for value, mask in slice_masks(values):
        part = tally.take(mask)
        measured = intervals({metric: part.values()[metric]}, resample(part, resamples, seed), confidence)[metric]
        found.append({"column": column, "value": value, "rows": int(mask.sum()), "metric": measured})
    return found
