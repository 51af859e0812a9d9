"""Breaks the test rows down by the values of a column: one mask a value, numbers in quantiles, rare values together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

MISSING = "(missing)"
QUANTILES = 4
MANY_NUMBERS = 8
"""A column with more different numbers than this is cut at its quantiles, one with fewer is taken value by value."""
FEWEST_ROWS = 20
MOST_VALUES = 12
LONGEST_VALUE = 40


def slice_masks(values: Sequence[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """(value as shown, mask of its rows), the largest first; numbers in their order; what is rare or missing last."""
    missing = np.array([_is_missing(v) for v in values])
    numbers = _numbers(values, missing)
    if numbers is not None and len(np.unique(numbers[~missing])) > MANY_NUMBERS:
        yield from _quantiles(numbers, missing)
    else:
        yield from _values([_shown(v) for v in values], missing)
    if missing.any():
        yield MISSING, missing


def _quantiles(numbers: np.ndarray, missing: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    known = numbers[~missing]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, QUANTILES + 1)))
    for i, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        above = numbers >= low if i == 0 else numbers > low
        mask = ~missing & above & (numbers <= high)
        if mask.any():
            yield f"{low:.4g} to {high:.4g}" if i == 0 else f"over {low:.4g} to {high:.4g}", mask


def _values(shown: list[str], missing: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    counts = Counter(v for v, gone in zip(shown, missing, strict=True) if not gone)
    frequent = sorted(counts, key=lambda v: (-counts[v], v))[:MOST_VALUES]
    kept = [v for v in frequent if counts[v] >= FEWEST_ROWS]
    column = np.array(shown, dtype=object)
    for value in kept:
        yield value, ~missing & (column == value)
    rare = len(counts) - len(kept)
    if rare:
        mask = ~missing & ~np.isin(shown, kept)
        yield f"({rare} rarer values)" if rare > 1 else "(one rarer value)", mask


def _is_missing(value: Any) -> bool:
    return value is None or value == "" or value != value  # NaN and NaT differ from themselves


def _numbers(values: Sequence[Any], missing: np.ndarray) -> np.ndarray | None:
    """The column as numbers, NaN where missing; None when it holds anything else (booleans are no numbers)."""
    found = np.full(len(values), math.nan)
    for i, value in enumerate(values):
        if missing[i]:
            continue
        if isinstance(value, bool | np.bool_):
            return None
        try:
            found[i] = float(value)
        except (TypeError, ValueError):
            return None
    return found if np.isfinite(found[~missing]).all() and not missing.all() else None


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 1] + "…"
