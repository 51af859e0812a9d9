"""Rows that come in one order and are wanted in another, in memory that does not grow with them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from overnight.errors import Complaint, NightFailed

if TYPE_CHECKING:
    import pyarrow as pa

HELD = 2**27
"""Bytes of rows that are held; what is more lies in files."""


class Spool:
    """Tables put behind one another, and read back once as rows in an order that is known only at the end.

    Few rows are simply held. More are written to a file as they come; that is read once and dealt out to as many files
    as there must be for each to fit into memory, of which each holds the rows of one stretch of the order.

    Args:
        folder: where the files are; they have no names, and go with the process at the latest.

    Raises:
        NightFailed: when the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._held: list[pa.Table] = []
        self._holding = self._size = 0
        self._written: _Pieces | None = None

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self._holding += table.nbytes
        if self._holding > HELD:
            self._write()

    def _write(self) -> None:
        import pyarrow as pa

        self._written = self._written or _Pieces(self._folder)
        self._written.add(pa.concat_tables(self._held).combine_chunks())
        self._size += self._holding
        self._held, self._holding = [], 0

    def read(self, order: np.ndarray) -> Iterator[pa.Table]:
        """The rows of these numbers, in this order, in tables of any length; a number that is missing is left out."""
        import pyarrow as pa

        if self._written is None:
            yield pa.concat_tables(self._held).combine_chunks().take(pa.array(order))
            return
        if self._held:
            self._write()
        rows = self._written.rows
        stretch = max(1, int(rows * HELD / self._size))
        rank = np.full(rows, -1)
        rank[order] = np.arange(len(order))
        borders = np.arange(0, len(order) + stretch, stretch)
        dealt = [_Pieces(self._folder) for _ in borders[1:]]
        start = 0
        for table in self._written.read():
            own = rank[start : start + len(table)]
            start += len(table)
            kept = np.argsort(own, kind="stable")[np.count_nonzero(own < 0) :]
            moved = table.take(pa.array(kept)).append_column("", pa.array(own[kept]))
            cuts = np.searchsorted(own[kept], borders)
            for part, one, other in zip(dealt, cuts, cuts[1:], strict=False):
                part.add(moved[one:other])
        for part in dealt:
            table = pa.concat_tables(part.read())
            last = table.num_columns - 1
            yield table.take(np.argsort(table.column(last))).remove_column(last)


class _Pieces:
    """A file of tables that are read back one by one, once."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._file: Any = None
        self._writer: Any = None
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        from pyarrow import ipc

        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)
                options = ipc.IpcWriteOptions(compression="lz4")
                self._writer = ipc.new_file(self._file, table.schema, options=options)
            self._writer.write_table(table)
        except OSError as error:
            raise NightFailed(Complaint(str(self._folder), "cannot be written", error.strerror or str(error))) from None
        self.rows += len(table)

    def read(self) -> Iterator[pa.Table]:
        import pyarrow as pa
        from pyarrow import ipc

        self._writer.close()
        self._file.seek(0)
        with self._file, ipc.open_file(self._file) as file:
            for number in range(file.num_record_batches):
                yield pa.Table.from_batches([file.get_batch(number)])
