"""From a source to `rows.parquet`: read, repaired, normalised, sampled, with an id for each row and one for all.

    ingested = ingest(config.data, home.data / config.name, problem, where="configs/sentiment.yaml: data")

The result depends on the rows alone, not on their order: the file is sorted by `row_id`, so that a source that answers
in another order gives the same bytes to every later stage but the column `source_row`.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.config import ARROW, Data
from overnight.data.normalise import canonical_row, digest, labels_as_text, normalise, repair, row_digest
from overnight.data.pairs import next_sentence_pairs
from overnight.data.sample import sample_rows
from overnight.data.sources import Table, read_source
from overnight.data.store import write_table
from overnight.errors import Complaint, UserError, nearest

if TYPE_CHECKING:
    from overnight.problems.base import Problem


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
    """Label → rows, most frequent first; rows without a label are not in it. Empty where there are no labels."""
    broken_rows: int
    broken: tuple[str, ...]
    """Place and reason of the first 20 broken rows."""
    seconds: float


def ingest(
    data: Data,
    folder: Path,
    problem: Problem,
    *,
    where: str = "data",
) -> Ingested:
    """Reads `data.source` and writes `<folder>/<fingerprint's first 16 signs>/rows.parquet`.

    Null texts and labels stay null, duplicates and contradictions stay rows: they are for the validation to refuse, as
    are rows of which the problem can make nothing: the column `refusal`, where there are any, says why.

    Raises:
        UserError: when the source, a column or an encoding is wrong, or there are fewer than two labels.
        NightFailed: when the folder cannot be written.
    """
    started = time.perf_counter()
    roles = [*problem.required_roles, *problem.optional_roles]
    forms = [("text",)] if data.pairs else (problem.required_roles, *problem.sources)
    table = read_source(data, [_named(data, form) for form in forms], _named(data, problem.optional_roles), where=where)
    _replace(table, data.replace, roles, where)
    if data.pairs:
        _pair(table, problem, where)
    columns = table.columns
    refusals = problem.prepare(columns, lambda text: normalise(repair(text) if data.repair else text))
    repaired = _clean(table, data.repair, problem.text_roles)
    labels: Sequence[str | None] = [None] * len(table.source_rows)
    if problem.labelled:
        labels = columns[problem.target] = labels_as_text(columns[problem.target])
        _refuse_one_label(labels, data.source, where)

    row_ids = [row_digest(cells) for cells in zip(*(columns[role] for role in roles), strict=True)]
    texts = zip(*(columns[role] for role in problem.text_roles), strict=True)
    text_ids = [digest(canonical_row(row)) for row in texts]
    source_rows = table.source_rows
    kept = sample_rows(row_ids, text_ids, labels, data.sample)
    kept.sort(key=lambda i: (row_ids[i], source_rows[i]))

    fingerprint = hashlib.sha256("\n".join(row_ids[i] for i in kept).encode()).hexdigest()
    path = folder / fingerprint[:16] / "rows.parquet"
    ids: dict[str, Sequence[Any]] = {"row_id": row_ids, "text_id": text_ids, "source_row": source_rows}
    if any(refusals):
        ids["refusal"] = refusals
    write_table({name: [cells[i] for i in kept] for name, cells in (ids | columns).items()}, path)
    counts = Counter(label for i in kept if (label := labels[i]) is not None)
    return Ingested(
        path=str(path),
        fingerprint=fingerprint,
        rows=len(kept),
        source=data.source,
        source_rows=len(row_ids),
        encoding=", ".join(sorted(table.encodings)),
        repaired=repaired,
        labels=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        broken_rows=len(table.broken),
        broken=tuple(f"{b.place}: {b.reason}" for b in table.broken[:20]),
        seconds=round(time.perf_counter() - started, 3),
    )


def _named(data: Data, roles: Sequence[str]) -> dict[str, str]:
    return {role: data.columns.get(role, role) for role in roles}


def _replace(table: Table, wanted: Mapping[str, Mapping[str, str]], roles: Sequence[str], where: str) -> None:
    """Puts other cells in place of some, in place."""
    for role, cells in wanted.items():
        if role not in table.columns:
            place = f"{where}{ARROW}replace{ARROW}{role}"
            raise UserError(Complaint(place, "not a column that is read", repr(role), nearest(role, roles)))
        table.columns[role] = [None if cell is None else cells.get(cell.strip(), cell) for cell in table.columns[role]]


def _pair(table: Table, problem: Problem, where: str) -> None:
    """Makes pairs of sentences from documents, in place; a pair has the slices and the place of its document."""
    if set(problem.required_roles) != {"text", "second", "label"}:
        rule = "makes rows of pair-classification and masked-lm-next-sentence"
        raise UserError(Complaint(f"{where}{ARROW}pairs", rule, repr(problem.name)))
    made = next_sentence_pairs(table.columns["text"])
    numbers = [pair[0] for pair in made]
    columns: dict[str, list[str | None]] = {
        "text": [pair[1] for pair in made],
        "second": [pair[2] for pair in made],
        "label": [pair[3] for pair in made],
    }
    others = {name: [cells[n] for n in numbers] for name, cells in table.columns.items() if name != "text"}
    table.columns = columns | others
    table.source_rows = [table.source_rows[n] for n in numbers]


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
