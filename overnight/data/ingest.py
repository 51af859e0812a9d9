"""From a source to `rows.parquet`: read, repaired, normalised, sampled, with an id for each row and one for all.

    ingested = ingest(config.data, home.data / config.name, where="configs/sentiment.yaml: data")

The result depends on the rows alone, not on their order: the file is sorted by `row_id`, so that a source that answers
in another order gives the same bytes to every later stage but the column `source_row`.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from overnight.config import ARROW, Data
from overnight.data.normalise import canonical_row, digest, labels_as_text, normalise, repair, row_digest
from overnight.data.sample import sample_rows
from overnight.data.sources import Table, read_source
from overnight.data.store import write_table
from overnight.errors import Complaint, UserError


@dataclass(frozen=True)
class Ingested:
    """What was ingested; JSON-able by `dataclasses.asdict`."""

    path: str
    """The rows: `row_id`, `text_id`, `source_row`, the roles, the slices."""
    fingerprint: str
    """SHA-256 over the sorted row ids: equal for equal rows in any order."""
    rows: int
    source: str
    source_rows: int
    """Rows of the source, before the sample was drawn."""
    encoding: str
    """Encodings of the files, comma-separated; "" where the source has none of its own."""
    repaired: int
    """Rows in which mojibake was repaired, before the sample was drawn."""
    labels: dict[str, int]
    """Label → rows, most frequent first; rows without a label are not in it."""
    broken_rows: int
    broken: tuple[str, ...]
    """Place and reason of the first 20 broken rows."""
    seconds: float


def ingest(
    data: Data,
    folder: Path,
    *,
    required_roles: Sequence[str] = ("text", "label"),
    optional_roles: Sequence[str] = (),
    text_roles: Sequence[str] = ("text",),
    target: str = "label",
    where: str = "data",
) -> Ingested:
    """Reads `data.source` and writes `<folder>/<fingerprint's first 16 signs>/rows.parquet`.

    Null texts and labels stay null, duplicates and contradictions stay rows: they are for the validation to refuse.

    Raises:
        UserError: when the source, a column or an encoding is wrong, or there are fewer than two labels.
        NightFailed: when the folder cannot be written.
    """
    started = time.perf_counter()
    roles = [*required_roles, *optional_roles]
    table = read_source(
        data,
        {role: data.columns.get(role, role) for role in required_roles},
        {role: data.columns.get(role, role) for role in optional_roles},
        where=where,
    )
    repaired = _clean(table, data.repair, text_roles)
    columns = table.columns
    columns[target] = labels_as_text(columns[target])
    _refuse_one_label(columns[target], data.source, where)

    row_ids = [row_digest(cells) for cells in zip(*(columns[role] for role in roles), strict=True)]
    texts = zip(*(columns[role] for role in text_roles), strict=True)
    text_ids = [digest(canonical_row(row)) for row in texts]
    source_rows = table.source_rows
    kept = sample_rows(row_ids, text_ids, columns[target], data.sample)
    kept.sort(key=lambda i: (row_ids[i], source_rows[i]))

    fingerprint = hashlib.sha256("\n".join(row_ids[i] for i in kept).encode()).hexdigest()
    path = folder / fingerprint[:16] / "rows.parquet"
    ids: dict[str, Sequence[Any]] = {"row_id": row_ids, "text_id": text_ids, "source_row": source_rows}
    write_table({name: [cells[i] for i in kept] for name, cells in (ids | columns).items()}, path)
    labels = Counter(label for i in kept if (label := columns[target][i]) is not None)
    return Ingested(
        path=str(path),
        fingerprint=fingerprint,
        rows=len(kept),
        source=data.source,
        source_rows=len(row_ids),
        encoding=", ".join(sorted(table.encodings)),
        repaired=repaired,
        labels=dict(sorted(labels.items(), key=lambda item: (-item[1], item[0]))),
        broken_rows=len(table.broken),
        broken=tuple(f"{b.place}: {b.reason}" for b in table.broken[:20]),
        seconds=round(time.perf_counter() - started, 3),
    )


def _clean(table: Table, repairing: bool, text_roles: Sequence[str]) -> int:
    """Repairs the text roles and normalises every cell, in place; returns the number of rows repaired."""
    repaired: set[int] = set()
    for name, cells in table.columns.items():
        if repairing and name in text_roles:
            fixed = [cell if cell is None else repair(cell) for cell in cells]
            repaired.update(i for i, (old, new) in enumerate(zip(cells, fixed, strict=True)) if old != new)
            cells = fixed
        table.columns[name] = [cell if cell is None else normalise(cell) for cell in cells]
    return len(repaired)


def _refuse_one_label(labels: Sequence[str | None], source: str, where: str) -> None:
    known = sorted({label for label in labels if label is not None})
    if len(known) < 2:
        got = f"only {known[0]!r}" if known else "none"
        raise UserError(Complaint(f"{where}{ARROW}source", f"needs at least two labels in {source}", got))
