"""Metrics as functions of sums over rows, so that a bootstrap can have thousands of them from one matrix product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tally:
    """What each row adds to the sums that a problem's metrics are made of.

    Rows that add the same are one group, so that a resample draws how often each *group* occurs (multinomial), which
    has the distribution of drawing rows with replacement and costs groups, not rows.
    """

    group: np.ndarray
    """(rows,) the group each row belongs to."""
    adds: np.ndarray
    """(groups, sums) what one row of a group adds."""
    metrics: Callable[[np.ndarray], dict[str, np.ndarray]]
    """(resamples, sums) → name → (resamples,) values, NaN where undefined."""

    def take(self, rows: np.ndarray) -> Tally:
        """The tally of some of the rows, given as a mask or as positions."""
        kept, group = np.unique(self.group[rows], return_inverse=True)
        return Tally(group, self.adds[kept], self.metrics)

    def values(self) -> dict[str, float]:
        """The metrics of the rows as they are."""
        counts = np.bincount(self.group, minlength=len(self.adds))
        return {name: float(v[0]) for name, v in self.metrics((counts @ self.adds)[None, :]).items()}
