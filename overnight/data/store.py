"""Parquet files that are whole or absent, written and read in pieces."""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.errors import Complaint, NightFailed

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 4096
"""Rows of a row group, so that readers stream."""


class TableFile:
    """A Parquet file that is written piece by piece; it is there, whole, when the `with` ends without an error.

    Raises:
        NightFailed: when the folder cannot be written or the disk is full.
    """

    def __init__(self, path: Path):
        self._path = path
        self._temporary = ""
        self._file: Any = None
        self._writer: Any = None
        self._held: list[pa.Table] = []

    def __enter__(self) -> TableFile:
        return self

    def add(self, table: pa.Table) -> None:
        """Appends rows; all pieces have the columns of the first one, which may be empty."""
        self._held.append(table)
        if self._writer is None or sum(map(len, self._held)) >= BATCH:
            self._write(BATCH)

    def _write(self, least: int) -> None:
        """Writes what is held as row groups, keeping back the rows of one that would have fewer than `least`."""
        import pyarrow as pa
        from pyarrow import parquet

        try:
            if self._writer is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                handle, self._temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
                self._file = os.fdopen(handle, "wb")
                self._writer = parquet.ParquetWriter(self._file, self._held[0].schema, compression="zstd")
            table = pa.concat_tables(self._held)
            ready = len(table) - len(table) % least
            if ready:
                self._writer.write_table(table[:ready], row_group_size=BATCH)
            self._held = [table[ready:]]
        except OSError as error:
            raise self._failed(error) from None

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None:
                self._write(1)
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)
                self._temporary = ""
        except OSError as error:
            raise self._failed(error) from None
        finally:
            if self._writer is not None:
                with suppress(OSError):
                    self._writer.close()
            if self._file is not None:
                self._file.close()
            if self._temporary:
                Path(self._temporary).unlink(missing_ok=True)

    def _failed(self, error: OSError) -> NightFailed:
        return NightFailed(Complaint(str(self._path), "cannot be written", error.strerror or str(error)))


def table_of(columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Columns of text (null where None), but for `source_row`, an int64, as a table."""
    import pyarrow as pa

    kinds = {name: pa.int64() if name == "source_row" else pa.string() for name in columns}
    return pa.table({name: pa.array(cells, kinds[name]) for name, cells in columns.items()})


def write_table(columns: Mapping[str, Sequence[Any]], path: Path) -> None:
    """Writes a Parquet file whole or not at all, with columns as `table_of` makes them.

    Raises:
        NightFailed: when the folder cannot be written or the disk is full.
    """
    with TableFile(path) as file:
        file.add(table_of(columns))


def read_tables(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a Parquet file, at most `BATCH` at a time; of these columns, or of all; without rows, no row once."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        if not file.metadata.num_rows:
            none = file.schema_arrow.empty_table()
            yield none if columns is None else none.select(list(columns))
        for group in range(file.num_row_groups):  # one at a time: of several, Arrow reads ahead without a bound
            for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns and list(columns)):
                yield pa.Table.from_batches([batch])


def read_columns(path: str | Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a Parquet file as lists."""
    from pyarrow import parquet

    table = parquet.read_table(path, columns=list(columns))
    return {name: table[name].to_pylist() for name in columns}


def read_cells(path: str | Path, column: str) -> Iterator[Any]:
    """The cells of a column, one after the other; nothing is read before the first is asked for."""
    for table in read_tables(path, [column]):
        yield from table[column].to_pylist()


def read_rows(path: str | Path, places: Collection[int], columns: Sequence[str]) -> dict[int, tuple[Any, ...]]:
    """Place → cells of some rows of a Parquet file, of which no more than their row groups is read."""
    from pyarrow.parquet import ParquetFile

    wanted = sorted(places)
    found: dict[int, tuple[Any, ...]] = {}
    with ParquetFile(path) as file:
        start = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            if own := wanted[bisect_left(wanted, start) : bisect_left(wanted, stop)]:
                table = file.read_row_group(group, list(columns)).take([place - start for place in own])
                cells = [table[name].to_pylist() for name in columns]
                found.update(zip(own, zip(*cells, strict=True), strict=True))
            start = stop
    return found
