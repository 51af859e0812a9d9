"""Parquet files that are whole or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.errors import Complaint, NightFailed

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 4096
"""Rows of a row group, so that readers stream."""


def write_table(columns: Mapping[str, Sequence[Any]] | pa.Table, path: Path) -> None:
    """Writes a Parquet file whole or not at all; columns are text (null where None) but `source_row`, an int64.

    Raises:
        NightFailed: when the folder cannot be written or the disk is full.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if not isinstance(columns, pa.Table):
        kinds = {name: pa.int64() if name == "source_row" else pa.string() for name in columns}
        columns = pa.table({name: pa.array(cells, kinds[name]) for name, cells in columns.items()})
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            parquet.write_table(columns, file, compression="zstd", row_group_size=BATCH)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise NightFailed(Complaint(str(path), "cannot be written", error.strerror or str(error))) from None
        raise


def read_columns(path: str | Path, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of a Parquet file as lists."""
    from pyarrow import parquet

    table = parquet.read_table(path, columns=list(columns))
    return {name: table[name].to_pylist() for name in columns}
