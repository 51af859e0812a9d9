"""Candidate against champion on the same rows, by a paired bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from overnight.evaluation.bootstrap import Metric, intervals, resample_pair
from overnight.evaluation.evaluate import check_metric
from overnight.problems.base import Facts, Prediction, Problem


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
    """Candidate − champion, F1 of each class that the rows have."""
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
    problem: Problem,
    facts: Facts,
    targets: Sequence[Any],
    candidate: Sequence[Prediction],
    champion: Sequence[Prediction],
    *,
    champion_facts: Facts | None = None,
    metric: str,
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
        problem, facts: the candidate's; both are judged by these.
        targets: the truth of each row.
        candidate, champion: predictions, as for `evaluate`.
        champion_facts: the champion's; absent: the same.

    Raises:
        UserError: there is no such metric.
    """
    classes = list(problem.classes(targets, facts))
    one, other = (problem.tally(targets, predictions, facts) for predictions in (candidate, champion))
    values, values_of_champion = one.values(), other.values()
    check_metric(metric, values)
    resampled = resample_pair(one, other, resamples, seed)
    found = intervals({name: values[name] - values_of_champion[name] for name in values}, resampled, confidence)
    sign = -1 if lower_is_better else 1
    right, right_before = (
        np.array([problem.right(target, p, facts) for target, p in zip(targets, predictions, strict=True)])
        for predictions in (candidate, champion)
    )
    known = champion_facts["labels"] if problem.labelled and champion_facts else targets
    unknown = sorted(set(targets) - set(known)) if problem.labelled else []
    return {
        "metric": metric,
        "rows": len(targets),
        "confidence": confidence,
        "resamples": resamples,
        "gain": _negated(found[metric]) if lower_is_better else found[metric],
        "probability": float((sign * resampled[metric] > 0).mean()),
        "differences": found,
        "classes": {label: found[f"f1/{label}"] for label in classes if found[f"f1/{label}"]["value"] is not None},
        "changed": sum(not problem.same(a, b) for a, b in zip(candidate, champion, strict=True)),
        "fixed": int((right & ~right_before).sum()),
        "broken": int((~right & right_before).sum()),
        "unknown_labels": unknown,
        "unknown_rows": sum(t in unknown for t in targets) if unknown else 0,
    }


def _negated(metric: Metric) -> Metric:
    value, low, high = (None if x is None else 0 - x for x in (metric["value"], metric["high"], metric["low"]))
    return {"value": value, "low": low, "high": high}
