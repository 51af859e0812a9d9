"""Candidate against champion on the same rows, by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from overnight.evaluation.bootstrap import Metric, intervals, resample_pair
from overnight.evaluation.evaluate import all_labels, check_metric
from overnight.evaluation.labels import label_tally


class Comparison(TypedDict):
    metric: str
    rows: int
    confidence: float
    resamples: int
    gain: Metric
    """Gain of the candidate in the metric, above 0 when it is better (also where less of the metric is better)."""
    probability: float
    """Share of the resamples in which the candidate is the better one."""
    differences: dict[str, Metric]
    """Candidate − champion, every metric."""
    classes: dict[str, Metric]
    """Candidate − champion, F1 of each class that has rows."""
    changed: int
    """Rows that the two predict differently."""
    fixed: int
    """Rows the champion got wrong and the candidate gets right (the two counts of McNemar's test)."""
    broken: int
    """Rows the champion got right and the candidate gets wrong."""
    unknown_labels: list[str]
    """Labels of the rows that the champion was not trained on; it gets these rows wrong."""
    unknown_rows: int


def compare(
    targets: Sequence[str],
    candidate: Sequence[dict[str, Any]],
    champion: Sequence[dict[str, Any]],
    *,
    labels: Sequence[str],
    champion_labels: Sequence[str] | None = None,
    metric: str = "macro_f1",
    lower_is_better: bool = False,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 17,
) -> Comparison:
    """Compares the predictions of two models for the same rows in the same order.

    Each resample draws rows and judges both models on them (Efron & Tibshirani 1993; for NLP: Berg-Kirkpatrick et
    al. 2012, An Empirical Investigation of Statistical Significance in NLP), so that rows hard for both do not widen
    the interval. Equal predictions give differences of exactly 0.

    Args:
        targets: the label of each row.
        candidate, champion: predictions, as for `evaluate`.
        labels: the candidate's labels.
        champion_labels: the champion's; absent: the same.

    Raises:
        UserError: there is no such metric.
    """
    known = all_labels(labels, targets)
    ours, theirs = [p["label"] for p in candidate], [p["label"] for p in champion]
    one, other = label_tally(targets, ours, known), label_tally(targets, theirs, known)
    values, values_of_champion = one.values(), other.values()
    check_metric(metric, values)
    resampled = resample_pair(one, other, resamples, seed)
    found = intervals({name: values[name] - values_of_champion[name] for name in values}, resampled, confidence)
    sign = -1 if lower_is_better else 1
    right = np.array([a == t for a, t in zip(ours, targets, strict=True)])
    right_before = np.array([b == t for b, t in zip(theirs, targets, strict=True)])
    unknown = sorted(set(targets) - set(known if champion_labels is None else champion_labels))
    return {
        "metric": metric,
        "rows": len(targets),
        "confidence": confidence,
        "resamples": resamples,
        "gain": _negated(found[metric]) if lower_is_better else found[metric],
        "probability": float((sign * resampled[metric] > 0).mean()),
        "differences": found,
        "classes": {label: found[f"f1/{label}"] for label in known if found[f"f1/{label}"]["value"] is not None},
        "changed": sum(a != b for a, b in zip(ours, theirs, strict=True)),
        "fixed": int((right & ~right_before).sum()),
        "broken": int((~right & right_before).sum()),
        "unknown_labels": unknown,
        "unknown_rows": sum(t in set(unknown) for t in targets),
    }


def _negated(metric: Metric) -> Metric:
    value, low, high = (None if x is None else 0 - x for x in (metric["value"], metric["high"], metric["low"]))
    return {"value": value, "low": low, "high": high}
