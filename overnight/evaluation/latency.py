"""How long a model takes for a text, measured so that two models can be compared on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

Score = Callable[[list[dict[str, str]]], Any]


class Quantiles(TypedDict):
    """Milliseconds a text."""

    p50: float
    p95: float


FEWEST = 3
"""Calls of each kind that are made, however long they take."""


class Latency(TypedDict):
    single: Quantiles
    """Texts sent one by one."""
    batch: Quantiles
    """Texts sent `batch_size` at a time; the milliseconds are still those of one text."""
    batch_size: int
    repeats: int
    """Calls of each kind that were timed."""


def latencies(
    scorers: Mapping[str, Score],
    rows: Sequence[dict[str, str]],
    *,
    repeats: int = 30,
    batch_size: int = 32,
    seconds: float = 30.0,
) -> dict[str, Latency]:
    """Times each scorer on the same rows, in turns, so that a busy spell of the machine hits all of them alike.

    Args:
        scorers: name → function of a list of rows (role → text).
        rows: at least one; taken round and round.
        repeats: calls of each kind a scorer makes, after two that are not counted.
        seconds: after these no more calls are made than `FEWEST`, since a model of long texts may take minutes.
    """
    if not rows:
        raise ValueError("latency needs at least one row")
    size = min(batch_size, len(rows))
    taken: dict[str, dict[int, list[float]]] = {name: {1: [], size: []} for name in scorers}
    end = time.perf_counter() + seconds
    for i in range(-2, repeats):
        if i >= FEWEST and time.perf_counter() > end:
            repeats = i
            break
        for width in {1, size}:
            sent = [rows[(max(i, 0) * width + j) % len(rows)] for j in range(width)]
            for name, score in scorers.items():
                begun = time.perf_counter()
                score(sent)
                seconds = time.perf_counter() - begun
                if i >= 0:
                    taken[name][width].append(1000 * seconds / width)
    return {
        name: {"single": _quantiles(t[1]), "batch": _quantiles(t[size]), "batch_size": size, "repeats": repeats}
        for name, t in taken.items()
    }


def _quantiles(milliseconds: list[float]) -> Quantiles:
    p50, p95 = np.quantile(milliseconds, (0.5, 0.95))
    return {"p50": float(p50), "p95": float(p95)}
