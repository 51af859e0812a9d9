"""One model on the frozen test rows: metrics with intervals, confusion, calibration, slices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from overnight.errors import Complaint, NightFailed, UserError, nearest
from overnight.evaluation.bootstrap import Metric, Tally, intervals, resample
from overnight.evaluation.labels import Calibration, Confusion, calibration, confusion, label_tally
from overnight.evaluation.latency import Latency
from overnight.evaluation.slices import slice_masks


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
    support: dict[str, int]
    """Test rows of each label."""
    metrics: dict[str, Metric]
    """`accuracy`, `{macro,weighted}_{precision,recall,f1}`, `{precision,recall,f1}/<label>`."""
    confusion: Confusion
    calibration: Calibration | None
    slices: list[Slice]
    latency: Latency | None
    broken_predictions: int
    """Rows whose scores are not finite numbers; a model that has any is never promoted."""
    confidence: float
    resamples: int


def evaluate(
    targets: Sequence[str],
    predictions: Sequence[dict[str, Any]],
    *,
    labels: Sequence[str],
    metric: str = "macro_f1",
    slices: Mapping[str, Sequence[Any]] | None = None,
    latency: Latency | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 17,
) -> Evaluation:
    """Evaluates predictions of labels.

    Args:
        targets: the label of each test row.
        predictions: `{"label", "score", "scores": {label: probability}}` of each row, in the same order.
        labels: those of the model; a label that only the rows have is added, since its rows are wrong for the model.
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
    known = all_labels(labels, targets)
    predicted = [p["label"] for p in predictions]
    tally = label_tally(targets, predicted, known)
    values = tally.values()
    check_metric(metric, values)
    counts = dict.fromkeys(known, 0)
    for target in targets:
        counts[target] += 1
    return {
        "metric": metric,
        "rows": len(targets),
        "labels": known,
        "support": counts,
        "metrics": intervals(values, resample(tally, resamples, seed), confidence),
        "confusion": confusion(targets, predicted, known),
        "calibration": calibration(targets, predictions, known),
        "slices": [
            found
            for column, column_values in (slices or {}).items()
            for found in _slices(column, column_values, tally, metric, confidence, resamples, seed)
        ],
        "latency": latency,
        "broken_predictions": sum(
            not all(map(math.isfinite, (p["score"], *p["scores"].values()))) for p in predictions
        ),
        "confidence": confidence,
        "resamples": resamples,
    }


def all_labels(labels: Sequence[str], targets: Sequence[str]) -> list[str]:
    """The labels of the model, in their order, then those that only the rows have."""
    return [*labels, *sorted(set(targets) - set(labels))]


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
