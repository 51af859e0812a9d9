"""From a source to `rows.parquet`: read, repaired, normalised, sampled, with an id for each row and one for all.

    ingested = ingest(config.data, home.data / config.name, problem, where="configs/sentiment.yaml: data")

The result depends on the rows alone, not on their order: the file is sorted by `row_id`, so that a source that answers
in another order gives the same bytes to every later stage but the column `source_row`.

Rows are read, repaired and written in pieces; of all of them no more is held than two digests, a label's number and a
place each. Documents of which pairs of sentences are made are held whole.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from overnight.config import ARROW, Data
from overnight.data.digests import hexes, packed
from overnight.data.normalise import (
    canonical_row,
    digest,
    normalise,
    repair,
    row_digest,
    whole_numbers,
    without_fraction,
)
from overnight.data.pairs import next_sentence_pairs
from overnight.data.sample import sample_rows
from overnight.data.sources import Table, read_pieces, read_source
from overnight.data.spool import Spool
from overnight.data.store import BATCH, TableFile, table_of
from overnight.errors import Complaint, UserError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

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
    roles = (*problem.required_roles, *problem.optional_roles)
    rows = _Rows(problem, roles)
    spool = Spool(folder)
    for table in _tables(data, problem, where):
        _replace(table, data.replace, roles, where)
        if data.pairs:
            _pair(table, problem, where)
        reading, columns = table.reading, table.columns
        refusals = problem.prepare(columns, lambda text: normalise(repair(text) if data.repair else text))
        rows.repaired += _clean(table, data.repair, problem.text_roles)
        rows.add(table, refusals)
        spool.add(table_of({"refusal": refusals or [None] * len(table.source_rows), **columns}))
    known = rows.finish()
    if problem.labelled:
        _refuse_few_labels(known, data.source, where)
    row_ids, text_ids, source_rows = rows.row_ids, rows.text_ids, rows.source_rows
    kept = sample_rows(row_ids, text_ids, rows.labels, known, data.sample)
    kept = kept[np.lexsort((source_rows[kept], row_ids[kept]))]

    hashed = hashlib.sha256()
    for start in range(0, len(kept), BATCH):
        text = "\n".join(hexes(row_ids[kept[start : start + BATCH]]))
        hashed.update(("\n" + text if start else text).encode())
    fingerprint = hashed.hexdigest()
    path = folder / fingerprint[:16] / "rows.parquet"
    with TableFile(path) as file:
        start = 0
        for cells in spool.read(kept):
            own = kept[start : start + len(cells)]
            start += len(cells)
            ids = {"row_id": [*hexes(row_ids[own])], "text_id": [*hexes(text_ids[own])]}
            whole = table_of(ids | {"source_row": source_rows[own]})
            for name in (cells := rows.finished(cells)).column_names:
                whole = whole.append_column(name, cells[name])
            file.add(whole)
    counts = dict(zip(known, np.bincount(rows.labels[kept], minlength=len(known)).tolist(), strict=True))
    return Ingested(
        path=str(path),
        fingerprint=fingerprint,
        rows=len(kept),
        source=data.source,
        source_rows=len(row_ids),
        encoding=", ".join(sorted(reading.encodings)),
        repaired=rows.repaired,
        labels={name: n for name, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if name and n},
        broken_rows=reading.broken_rows,
        broken=tuple(f"{b.place}: {b.reason}" for b in reading.broken),
        seconds=round(time.perf_counter() - started, 3),
    )


def _tables(data: Data, problem: Problem, where: str) -> Iterable[Table]:
    forms = [("text",)] if data.pairs else (problem.required_roles, *problem.sources)
    wanted = [_named(data, form) for form in forms], _named(data, problem.optional_roles)
    # a sentence is paired with one of any other document
    return [read_source(data, *wanted, where=where)] if data.pairs else read_pieces(data, *wanted, where=where)


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


def _refuse_few_labels(names: Sequence[str], source: str, where: str) -> None:
    known = sorted(set(names) - {ABSENT})
    if len(known) < 2:
        got = f"only {known[0]!r}" if known else "none"
        raise UserError(Complaint(f"{where}{ARROW}source", f"needs at least two labels in {source}", got))


ABSENT = ""
"""Stands for no label; no label is empty."""


class _Rows:
    """What has to be known of all rows at once: some bytes of each."""

    def __init__(self, problem: Problem, roles: Sequence[str]):
        self._problem, self._roles = problem, roles
        self._whole = problem.labelled
        """Whether all labels so far are whole numbers; what they are in the end decides about all row ids."""
        self._names: dict[str, int] = {}
        self._parts: dict[str, list[np.ndarray]] = {"rows": [], "plain": [], "texts": [], "sources": [], "labels": []}
        self.repaired = 0
        self.refused = False

    def add(self, table: Table, refusals: Sequence[str | None]) -> None:
        columns, target, parts = table.columns, self._problem.target, self._parts
        self.refused = self.refused or any(refusals)
        texts = zip(*(columns[role] for role in self._problem.text_roles), strict=True)
        parts["texts"].append(packed(digest(canonical_row(row)) for row in texts))
        parts["rows"].append(self._row_ids(columns))
        parts["sources"].append(np.array(table.source_rows, np.int64))
        labels = columns[target] if self._problem.labelled else [None] * len(table.source_rows)
        numbers = (self._names.setdefault(label or ABSENT, len(self._names)) for label in labels)
        parts["labels"].append(np.fromiter(numbers, np.int32, len(labels)))
        if self._whole and whole_numbers(set(labels)):
            plain = [*map(without_fraction, labels)]
            same = plain == labels
            parts["plain"].append(parts["rows"][-1] if same else self._row_ids(columns | {target: plain}))
        else:
            self._whole = False

    def _row_ids(self, columns: Mapping[str, Sequence[str | None]]) -> np.ndarray:
        cells = zip(*(columns[role] for role in self._roles), strict=True)
        return packed(map(row_digest, cells))

    def finish(self) -> list[str]:
        """Makes arrays of what was added; returns the labels that their numbers stand for."""
        parts = self._parts
        self.row_ids = np.concatenate(parts.pop("plain" if self._whole else "rows"))
        self.text_ids = np.concatenate(parts.pop("texts"))
        self.source_rows = np.concatenate(parts.pop("sources"))
        self.labels = np.concatenate(parts.pop("labels"))
        parts.clear()
        known = list(self._names)
        if self._whole:
            plain = [str(without_fraction(name)) for name in known]
            known = list(dict.fromkeys(plain))
            self.labels = np.array([known.index(name) for name in plain], np.int32)[self.labels]
        return known

    def finished(self, cells: pa.Table) -> pa.Table:
        """Rows of the spool as they are written."""
        import pyarrow as pa

        if not self.refused:
            cells = cells.drop_columns("refusal")
        if self._whole:
            target = self._problem.target
            plain = pa.array(map(without_fraction, cells[target].to_pylist()), pa.string())
            cells = cells.set_column(cells.column_names.index(target), target, plain)
        return cells
