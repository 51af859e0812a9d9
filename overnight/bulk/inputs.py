"""Rows of a file of any size, in chunks of whole rows; what cannot be read is a row too, with the reason.

source = look(Path("tweets.csv"), "auto", {"text": "body"})
for chunk in source.chunks(skip=0, rows=512, characters=65_536): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.data import encodings, files
from overnight.data.normalise import normalise, repair, whole_signs
from overnight.data.sources import Wanted
from overnight.errors import Complaint, UserError

if TYPE_CHECKING:
    import pyarrow as pa

Record = tuple[dict[str, Any], str]
"""The cells of a row, and "" or why it could not be read."""


@dataclass
class Chunk:
    """Some rows, in the order of the input."""

    rows: list[dict[str, Any]] | pa.Table
    texts: list[dict[str, str] | None]
    """Of each row: role → text as the model sees it; None where there is nothing to score."""
    errors: list[str]
    """Of each row: why there is nothing to score, or ""."""

    def __len__(self) -> int:
        return len(self.texts)

    def records(self) -> list[dict[str, Any]]:
        """The cells of each row by column; those of a broken row are absent."""
        return self.rows if isinstance(self.rows, list) else self.rows.to_pylist()


@dataclass(frozen=True)
class Input:
    """A file whose rows have been counted; no row of it is held.

    Args:
        schema: the columns, with the types that a Parquet file of them has.
        roles: role → column.
        records: reads a text file once, row by row; None for Parquet.
        exact: texts stay as they are.
    """

    path: Path
    rows: int
    schema: pa.Schema
    roles: Mapping[str, str]
    records: Callable[[], Iterator[Record]] | None
    exact: bool = False

    def chunks(self, skip: int, rows: int, characters: int) -> Iterator[Chunk]:
        """Chunks of at most `rows` rows; when their texts exceed `characters`, it is by the last one alone.

        Whoever skips whole chunks is given the same ones as who reads from the beginning.
        """
        read = self._tables(skip, rows) if self.records is None else self._lists(skip, rows)
        for table, cells in read:
            texts: list[dict[str, str] | None] = []
            errors: list[str] = []
            start = size = 0
            for place, row in enumerate(cells):
                if size > characters:
                    yield Chunk(table[start:place], texts, errors)
                    texts, errors = [], []
                    start, size = place, 0
                text, error = self._text(*row)
                texts.append(text)
                errors.append(error)
                size += sum(map(len, text.values())) if text else 0
            yield Chunk(table[start:], texts, errors)

    def _lists(self, skip: int, rows: int) -> Iterator[tuple[list[dict[str, Any]], list[Record]]]:
        assert self.records is not None
        for _, group in groupby(enumerate(self.records()), lambda numbered: numbered[0] // rows):
            records = [record for number, record in group if number >= skip]
            if records:
                yield [cells for cells, _ in records], records

    def _tables(self, skip: int, rows: int) -> Iterator[tuple[pa.Table, list[Record]]]:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        columns = list(dict.fromkeys(self.roles.values()))
        with ParquetFile(self.path) as file:
            for group in range(file.num_row_groups):  # one at a time: of several, Arrow reads ahead without a bound
                count = file.metadata.row_group(group).num_rows
                if skip >= count:
                    skip -= count
                    continue
                for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                    table = pa.Table.from_batches([batch])[skip:]
                    skip = max(0, skip - len(batch))
                    if len(table):
                        yield table, [(cells, "") for cells in table.select(columns).to_pylist()]

    def _text(self, cells: Mapping[str, Any], reason: str) -> tuple[dict[str, str] | None, str]:
        """What the model sees of a row: texts repaired and normalised as those it was trained on, unless `exact`."""
        if reason:
            return None, reason
        found: dict[str, str] = {}
        for role, column in self.roles.items():
            text = files.as_text(cells.get(column))
            seen = text and normalise(repair(text))
            if not text or not seen:
                return None, f"no {role}"
            found[role] = whole_signs(text) if self.exact else seen
        return found, ""


def look(path: Path, encoding: str, roles: Mapping[str, str], exact: bool = False) -> Input:
    """Reads a file once, to see what it holds.

    Args:
        encoding: of a text file, or `auto`.
        roles: role → column that must be there.
        exact: the model sees the texts as they are, since its answers point into them.

    Raises:
        UserError: it cannot be read, is of no known kind, has no rows or lacks a column.
    """
    suffix, place = path.suffix.lower(), str(path)
    if suffix not in files.KINDS:
        raise UserError(Complaint(place, f"must be a file that ends in {', '.join(files.KINDS)}"))
    if not path.is_file():
        raise UserError(Complaint(place, "no such file"))
    wanted = Wanted([roles], {}, (), place)
    if suffix in files.PARQUET:
        from pyarrow.parquet import ParquetFile

        names, _ = files.open_parquet(path, place)
        wanted.resolve(names, path.name)
        with ParquetFile(path) as file:
            source = Input(path, file.metadata.num_rows, file.schema_arrow, roles, None, exact)
    else:
        codec = encodings.check_text(path, encoding, place)
        if suffix in files.JSON_LINES:
            count, schema = _count_json(path, codec)
            source = Input(path, count, schema, roles, lambda: _json_records(path, codec), exact)
        else:
            count, schema = _count_csv(path, codec)
            source = Input(path, count, schema, roles, lambda: _csv_records(path, codec, schema.names), exact)
        wanted.resolve(schema.names, path.name)
    if not source.rows:
        raise UserError(Complaint(place, "holds no rows"))
    return source


def _csv_records(path: Path, codec: str, names: Sequence[str]) -> Iterator[Record]:
    records = files.csv_records(encodings.read_lines(path, codec, ""), path.suffix.lower())
    next(records)
    for line, fields, reason in records:
        yield ({}, f"line {line}: {reason}") if reason else (dict(zip(names, fields, strict=True)), "")


def _count_csv(path: Path, codec: str) -> tuple[int, pa.Schema]:
    import pyarrow as pa

    records = files.csv_records(encodings.read_lines(path, codec, ""), path.suffix.lower())
    line, header, reason = next(records)
    if reason:
        raise UserError(Complaint(str(path), f"its header cannot be read (line {line}: {reason})"))
    names: dict[str, None] = {}
    for name in map(str.strip, header):
        number = 1
        unique = name
        while unique in names:  # cells are kept by name
            number += 1
            unique = f"{name}.{number}"
        names[unique] = None
    return sum(1 for _ in records), pa.schema([(name, pa.string()) for name in names])


def _json_records(path: Path, codec: str) -> Iterator[Record]:
    for line, cells, reason in files.json_records(encodings.read_lines(path, codec, "\n")):
        yield cells, f"line {line}: {reason}" if reason else ""


def _count_json(path: Path, codec: str) -> tuple[int, pa.Schema]:
    """The columns are all keys that occur; one whose values are all of one kind keeps that, others become text."""
    import pyarrow as pa

    kinds: dict[str, set[type]] = {}
    count = 0
    for _, cells, _ in files.json_records(encodings.read_lines(path, codec, "\n")):
        count += 1
        for name, value in cells.items():
            if value is not None:
                long = type(value) is int and abs(value) >= 2**63
                kinds.setdefault(name, set()).add(str if long else type(value))
            else:
                kinds.setdefault(name, set())
    types = {frozenset({bool}): pa.bool_(), frozenset({int}): pa.int64()}
    types |= dict.fromkeys((frozenset({float}), frozenset({int, float})), pa.float64())
    return count, pa.schema([(name, types.get(frozenset(kind), pa.string())) for name, kind in kinds.items()])
