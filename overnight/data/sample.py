"""A smaller data set that is the same every night, with each label's share kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from overnight.data.normalise import uniform


def sample_rows(
    row_ids: Sequence[str], text_ids: Sequence[str], labels: Sequence[str | None], size: int | None
) -> list[int]:
    """Indices of the rows to keep: all of them when `size` is absent or no smaller.

    Each label gets its share of `size` (largest remainder) and fills it with the rows whose text hashes lowest. Rows of
    one text are thus kept together, in whatever labels they occur, so the validation meets duplicates and
    contradictions: as many as in the source on average, more or fewer where a few texts have very many copies. The
    order of the rows does not matter, and growth of the source changes the sample only at its edge.
    """
    if size is None or size >= len(row_ids):
        return list(range(len(row_ids)))
    by_label: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        by_label.setdefault("" if label is None else label, []).append(index)
    kept: list[int] = []
    for label, quota in quotas({label: len(rows) for label, rows in by_label.items()}, size).items():
        drawn = {index: uniform(text_ids[index], b"sample") for index in by_label[label]}
        kept += sorted(drawn, key=lambda i: (drawn[i], row_ids[i]))[:quota]
    return kept


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
