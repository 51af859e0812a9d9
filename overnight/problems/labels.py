"""Metrics of predicted labels, counted for all resamples at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from overnight.problems.texts import SCORES
from overnight.tally import Tally


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


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, in double precision."""
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    found: np.ndarray = shares / shares.sum(axis=-1, keepdims=True)
    return found


def scores_of_counts(actual: np.ndarray, predicted: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, ...]:
    """Precision, recall and F1 from counts of any shape; 0 where nothing was predicted, or is there."""
    pairs = ((hits, predicted), (hits, actual), (2 * hits, actual + predicted))
    return tuple(np.divide(a, b, out=np.zeros_like(a), where=b > 0) for a, b in pairs)


def scores_of_each(
    actual: np.ndarray, predicted: np.ndarray, hits: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Precision, recall and F1 of (resamples × names) counts: the means over names, and `<score>/<name>`.

    A name that no row has, has none (NaN) and is left out of the means.
    """
    present = actual > 0
    count = np.maximum(present.sum(axis=1), 1)
    means: dict[str, np.ndarray] = {}
    each: dict[str, np.ndarray] = {}
    for score, values in zip(SCORES, scores_of_counts(actual, predicted, hits), strict=True):
        means[f"macro_{score}"] = np.where(present, values, 0.0).sum(axis=1) / count
        each |= {f"{score}/{name}": np.where(present[:, i], values[:, i], np.nan) for i, name in enumerate(names)}
    return means, each
