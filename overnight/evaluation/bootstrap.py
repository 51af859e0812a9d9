"""Bootstrap intervals of metrics that are functions of sums over rows.

Almost every metric is one: a row adds its counts to a few sums (hits, predictions and rows of each class; n-grams
matched; squared error), and the metric is computed from the sums. So 2,000 resamples are one matrix product of "how
often each kind of row was drawn" with "what that kind of row adds", and no metric is ever called row by row.

Intervals are percentile intervals (Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypedDict

import numpy as np

from overnight.tally import Tally

CELLS_AT_ONCE = 4_000_000  # of one chunk of draws: 32 MB


class Metric(TypedDict):
    """A value and its interval; None where it is undefined (a class without rows) or beyond all numbers."""

    value: float | None
    low: float | None
    high: float | None


def draws(group: np.ndarray, groups: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks of (some resamples, groups): how often each group occurs in a resample of as many rows."""
    generator = np.random.default_rng(seed)
    shares = np.bincount(group, minlength=groups) / len(group)
    at_once = max(1, CELLS_AT_ONCE // groups)
    for start in range(0, resamples, at_once):
        yield generator.multinomial(len(group), shares, size=min(at_once, resamples - start)).astype(np.float64)


def resample(tally: Tally, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """name → (resamples,) values of each metric."""
    chunks = [tally.metrics(drawn @ tally.adds) for drawn in draws(tally.group, len(tally.adds), resamples, seed)]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def resample_pair(one: Tally, other: Tally, resamples: int, seed: int) -> dict[str, np.ndarray]:
    """name → (resamples,) differences one − other, both on the rows that were drawn (paired)."""
    joint, group = np.unique(one.group.astype(np.int64) * len(other.adds) + other.group, return_inverse=True)
    first, second = one.adds[joint // len(other.adds)], other.adds[joint % len(other.adds)]
    chunks: list[dict[str, np.ndarray]] = []
    for drawn in draws(group, len(joint), resamples, seed):
        ours, theirs = one.metrics(drawn @ first), other.metrics(drawn @ second)
        chunks.append({name: ours[name] - theirs[name] for name in ours})
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def intervals(values: Mapping[str, float], resampled: Mapping[str, np.ndarray], confidence: float) -> dict[str, Metric]:
    """Each value with its percentile interval; resamples in which it was undefined are left out."""
    tail = (1 - confidence) / 2
    found: dict[str, Metric] = {}
    for name, value in values.items():
        defined = resampled[name][np.isfinite(resampled[name])]
        if not np.isfinite(value) or not len(defined):
            found[name] = {"value": None, "low": None, "high": None}
        else:
            low, high = np.quantile(defined, (tail, 1 - tail))
            found[name] = {"value": float(value), "low": float(low), "high": float(high)}
    return found
