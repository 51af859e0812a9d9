"""Shadow mode: a share of the texts is put to the candidate too, after the answer is out; it never answers.

The candidate works when the model has nothing else to do, a few texts at a time, and what would pile up is dropped:
so it can delay a request by those few texts at most.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from overnight.problems.base import Prediction
from overnight.serving.batching import Batcher, Row, Scored
from overnight.serving.follow import Served
from overnight.serving.metrics import Metrics

AT_ONCE = 8
"""Texts that the candidate is given at once."""


class Shadow:
    """Compares answers and counts."""

    def __init__(self, share: float, batcher: Batcher, metrics: Metrics, draw: Callable[[], float] = random.random):
        self.share, self.batcher, self.metrics, self.draw = share, batcher, metrics, draw

    def offer(self, candidate: Served, rows: Sequence[Row], scored: Sequence[Scored]) -> None:
        """Draws texts of an answered request for the candidate."""
        drawn = [(row, one) for row, (one, _) in zip(rows, scored, strict=True) if self.draw() < self.share]
        for start in range(0, len(drawn), AT_ONCE):
            part = drawn[start : start + AT_ONCE]
            if not self.batcher.spare(partial(self._compare, candidate, part)):
                self.metrics.shadow_dropped.inc(len(part))

    def _compare(self, candidate: Served, part: Sequence[tuple[Row, Prediction]]) -> None:
        found = candidate.score([row for row, _ in part])
        for (one, _), (_, answered) in zip(found, part, strict=True):
            agree = "yes" if candidate.problem.same(one, answered) else "no"
            self.metrics.shadow.labels(candidate.version.number, agree).inc()
