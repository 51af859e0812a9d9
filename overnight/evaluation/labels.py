"""Metrics of predicted labels, counted for all resamples at once, and how far the scores can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from overnight.evaluation.bootstrap import Tally

OTHER = "(other)"
BINS = 10


class Confusion(TypedDict):
    """Rows: the labels of the data; columns: what was predicted, with `(other)` for labels the data does not have."""

    rows: list[str]
    columns: list[str]
    counts: list[list[int]]


class Bin(TypedDict):
    low: float
    high: float
    rows: int
    confidence: float
    accuracy: float


class Calibration(TypedDict):
    """How far scores can be read as probabilities; all three errors: less is better."""

    expected_calibration_error: float
    brier: float
    log_loss: float
    bins: list[Bin]


def codes(values: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Position of each value in `labels`; len(labels) for one that is not there."""
    position = {label: i for i, label in enumerate(labels)}
    return np.array([position.get(value, len(labels)) for value in values], dtype=np.int64)


def label_tally(targets: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Tally:
    """Counts of rows, predictions and hits of each class; `labels` must hold every target.

    A prediction outside `labels` (of a champion trained on other labels) is a wrong one and counts for no class.
    """
    k = len(labels)
    cells, group = np.unique(codes(targets, labels) * (k + 1) + codes(predicted, labels), return_inverse=True)
    target, guess = cells // (k + 1), cells % (k + 1)
    adds = np.zeros((len(cells), 3 * k))
    row = np.arange(len(cells))
    adds[row, target] = 1
    known = guess < k
    adds[row[known], k + guess[known]] = 1
    hit = target == guess
    adds[row[hit], 2 * k + target[hit]] = 1
    return Tally(group, adds, lambda sums: label_metrics(sums, labels))


def label_metrics(sums: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """Accuracy, precision, recall and F1 (macro, weighted, per class) from (resamples, rows | predictions | hits).

    A class that is never predicted has precision 0. A class without rows has no metrics (NaN) and is left out of the
    macro mean: what a resample, or the test side, does not hold cannot be judged. Where every class has rows this is
    scikit-learn's result with zero_division=0.
    """
    rows, predictions, hits = np.split(sums, 3, axis=1)
    present = rows > 0
    recall = np.divide(hits, rows, out=np.full_like(hits, np.nan), where=present)
    precision = np.divide(hits, predictions, out=np.zeros_like(hits), where=predictions > 0)
    precision[~present] = np.nan
    f1 = np.divide(2 * hits, rows + predictions, out=np.full_like(hits, np.nan), where=present)
    total = rows.sum(axis=1)
    found = {"accuracy": hits.sum(axis=1) / total}
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        zeroed = np.where(present, values, 0.0)
        found[f"macro_{name}"] = zeroed.sum(axis=1) / present.sum(axis=1)
        found[f"weighted_{name}"] = (zeroed * rows).sum(axis=1) / total
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        found |= {f"{name}/{label}": values[:, i] for i, label in enumerate(labels)}
    return found


def confusion(targets: Sequence[str], predicted: Sequence[str], labels: Sequence[str]) -> Confusion:
    """Counts of each pair of target and prediction."""
    k = len(labels)
    guess = codes(predicted, labels)
    counts = np.bincount(codes(targets, labels) * (k + 1) + guess, minlength=k * (k + 1)).reshape(k, k + 1)
    columns = [*labels, OTHER] if (guess == k).any() else list(labels)
    return {"rows": list(labels), "columns": columns, "counts": counts[:, : len(columns)].tolist()}


def calibration(
    targets: Sequence[str], predictions: Sequence[dict[str, Any]], labels: Sequence[str]
) -> Calibration | None:
    """Reliability in equal bins and expected calibration error (Guo et al. 2017, On Calibration of Modern Neural
    Networks), Brier score over all classes (Brier 1950, from 0 to 2) and log-loss in nats; None without finite scores.
    """
    # a label that the model knows and the data does not have takes its share of the error too
    known = [*labels, *sorted({label for p in predictions for label in p["scores"]} - set(labels))]
    scores = np.array([[p["scores"].get(label, 0.0) for label in known] for p in predictions], dtype=np.float64)
    confidence = np.array([p["score"] for p in predictions], dtype=np.float64)
    if not (np.isfinite(scores).all() and np.isfinite(confidence).all()):
        return None
    right = np.array([p["label"] == target for p, target in zip(predictions, targets, strict=True)])
    truth = codes(targets, known)
    of_truth = scores[np.arange(len(truth)), truth]
    place = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    bins: list[Bin] = []
    for i in np.unique(place):
        chosen = place == i
        bins.append(
            {
                "low": i / BINS,
                "high": (i + 1) / BINS,
                "rows": int(chosen.sum()),
                "confidence": float(confidence[chosen].mean()),
                "accuracy": float(right[chosen].mean()),
            }
        )
    error = sum(b["rows"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(truth)
    return {
        "expected_calibration_error": float(error),
        "brier": float(((scores - np.eye(len(known))[truth]) ** 2).sum(axis=1).mean()),
        "log_loss": float(-np.log(np.clip(of_truth, 1e-15, 1)).mean()),
        "bins": bins,
    }
