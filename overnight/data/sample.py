"""A smaller data set that is the same every night, with each label's share kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from overnight.data.digests import hexes
from overnight.data.normalise import uniform


def sample_rows(
    row_ids: np.ndarray, text_ids: np.ndarray, labels: np.ndarray, names: Sequence[str], size: int | None
) -> np.ndarray:
    """Numbers of the rows to keep: all of them when `size` is absent or no smaller.

    Each label gets its share of `size` (largest remainder) and fills it with the rows whose text hashes lowest. Rows of
    one text are thus kept together, in whatever labels they occur, so the validation meets duplicates and
    contradictions: as many as in the source on average, more or fewer where a few texts have very many copies. The
    order of the rows does not matter, and growth of the source changes the sample only at its edge.

    Args:
        row_ids, text_ids: packed digests.
        labels: the place of each row's label in `names`.
    """
    if size is None or size >= len(row_ids):
        return np.arange(len(row_ids))
    counts = dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))
    quota = quotas({label: count for label, count in counts.items() if count}, size)
    drawn = np.fromiter((uniform(one, b"sample") for one in hexes(text_ids)), float, len(text_ids))
    kept = []
    for number, label in enumerate(names):
        rows = np.flatnonzero(labels == number)
        kept.append(rows[np.lexsort((row_ids[rows], drawn[rows]))[: quota.get(label, 0)]])
    return np.concatenate(kept)


def quotas(counts: dict[str, int], size: int) -> dict[str, int]:
    """Rows of each label in a sample of `size`, by the largest remainder; a label is never left without a row."""
    total = sum(counts.values())
    exact = {label: size * count / total for label, count in counts.items()}
    quota = Counter({label: int(share) for label, share in exact.items()})
    by_remainder = sorted(exact, key=lambda label: (int(exact[label]) - exact[label], label))
    for label in by_remainder[: size - quota.total()]:
        quota[label] += 1
    for label in [label for label, rows in quota.items() if rows == 0]:
        quota[label] = 1
        largest = max(quota, key=lambda label: (quota[label], label))
        quota[largest] -= quota[largest] > 1
    return dict(quota)
