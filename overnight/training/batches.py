"""Which rows make which step: rows of similar length together, as many as fit a budget of tokens.

Padding is work on nothing: in batches of mixed lengths it is about half of all tokens of short texts.
"""

from __future__ import annotations

import numpy as np

JITTER = 0.02
"""Lengths are blurred by this share before sorting, so that each epoch puts other rows together."""


def token_budget(lengths: np.ndarray, batch_size: int) -> int:
    """Padded tokens of one step: `batch_size` × the median row's tokens."""
    return int(batch_size * np.median(lengths))


def bucket(lengths: np.ndarray, budget: int, order: np.ndarray | None = None) -> list[np.ndarray]:
    """Cuts rows into batches whose padded size (rows × longest row) is within the budget; a longer row stands alone.

    Args:
        lengths: tokens of each row.
        budget: padded tokens of a batch.
        order: the rows, longest first or nearly so; absent: sorted by length.

    Returns:
        arrays of row numbers, every row in exactly one.
    """
    if order is None:
        order = np.argsort(-lengths, kind="stable")
    cuts, start, longest = [], 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if place > start and longest * (place + 1 - start) > budget:
            cuts.append(place)
            start, longest = place, length
    if cuts:
        # the rows left over for the last batch are few: share them evenly with the one before it
        before = cuts[-2] if len(cuts) > 1 else 0
        middle = (before + len(order) + 1) // 2
        if middle < cuts[-1] and longest_of(lengths, order[middle:]) * (len(order) - middle) <= budget:
            cuts[-1] = middle
    return np.split(order, cuts)


def longest_of(lengths: np.ndarray, rows: np.ndarray) -> int:
    """Tokens of the longest of these rows."""
    return int(lengths[rows].max())


class Plan:
    """The steps of a run: a pure function of the row lengths, the settings and the seed, so that a run can resume.

    `steps` is the number of optimizer steps, `rows(step)` the row numbers of one of them. A step has `batch_size` rows
    as chance has it; `by_length`, for models that work on padded batches, puts rows of similar length together, as many
    as fit the budget of tokens.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, epochs: float, seed: int, *, by_length: bool):
        self._lengths = np.asarray(lengths)
        self._batch_size, self._by_length = batch_size, by_length
        self._budget = token_budget(self._lengths, batch_size)
        self._seed = seed
        whole, part = int(epochs), epochs - int(epochs)
        counts = [len(self.epoch(number)) for number in range(whole)]
        if part > 0 or not counts:
            counts.append(max(1, round(part * len(self.epoch(whole)))))
        self._ends = np.cumsum(counts)
        self.steps = int(self._ends[-1])
        self._current: tuple[int, list[np.ndarray]] = (-1, [])

    def epoch(self, number: int) -> list[np.ndarray]:
        """The batches of one whole epoch, in their order."""
        draw = np.random.default_rng([self._seed, number])
        if not self._by_length:
            order = draw.permutation(len(self._lengths))
            return np.split(order, range(self._batch_size, len(order), self._batch_size))
        blurred = self._lengths * (1 + draw.uniform(-JITTER, JITTER, len(self._lengths)))
        batches = bucket(self._lengths, self._budget, np.argsort(-blurred, kind="stable"))
        return [batches[i] for i in draw.permutation(len(batches))]

    def rows(self, step: int) -> np.ndarray:
        number = int(np.searchsorted(self._ends, step, side="right"))
        if self._current[0] != number:
            self._current = (number, self.epoch(number))
        return self._current[1][step - int(self._ends[number - 1] if number else 0)]
