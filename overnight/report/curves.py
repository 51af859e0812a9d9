"""The learning curves of a night's trials, from their folders or from the record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from overnight.report.record import Searched

MOST_POINTS = 120
"""Of one curve; a training loss logged every two seconds has far more."""


class Point(NamedTuple):
    """One point of a trial's curve; `x` in epochs, or the number of the evaluation where epochs are not known."""

    trial: int
    series: str
    x: float
    y: float


def read_curves(folder: Path, metric: str) -> list[Point]:
    """The curves of a night's trials as their folders hold them: the metric and the losses over the epochs."""
    found: list[Point] = []
    for path in sorted(folder.glob("trials/*/metrics.jsonl")):
        keys = {metric: "value", "validation loss": "validation_loss", "training loss": "loss"}
        curves: dict[str, list[tuple[float, float]]] = {series: [] for series in keys}
        for line in _lines(path):
            for series, key in keys.items():
                x, y = line.get("epoch"), line.get(key)
                if isinstance(x, int | float) and isinstance(y, int | float) and math.isfinite(y):
                    curves[series].append((x, y))
        for series, curve in curves.items():
            found += [Point(int(path.parent.name), series, x, y) for x, y in _thinned(curve)]
    return found


def evaluated(search: Searched, metric: str) -> list[Point]:
    """The curves that the record alone knows: the metric at each evaluation, numbered from 1."""
    return [
        Point(trial["number"], metric, int(step) + 1, value)
        for trial in search.get("trials", ())
        for step, value in trial.get("evaluations", {}).items()
    ]


def _thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every so many-th point, the last one always."""
    step = math.ceil(len(curve) / MOST_POINTS)
    return curve if step <= 1 else [*curve[:-1:step], curve[-1]]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return
    for line in text.splitlines():
        try:
            facts = json.loads(line)
        except ValueError:  # half a line of a process killed while writing
            continue
        if isinstance(facts, dict):
            yield facts
