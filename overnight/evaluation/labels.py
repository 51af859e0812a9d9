"""What is told of predicted labels beside their metrics: which are mistaken for which, and how far to trust scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from overnight.problems.labels import codes

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
