"""The rows that come out: in parts beside the output, put together at the end.

What is added to a row are the model's answers; in CSV and TSV every cell is text, in JSONL and Parquet a number is one.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from overnight.bulk.inputs import Chunk
from overnight.data import files

if TYPE_CHECKING:
    import pyarrow as pa

_SURROGATE = re.compile("[\ud800-\udfff]")


class Part(Protocol):
    """A file of some rows, without a header."""

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]]) -> None: ...

    def close(self) -> None:
        """Returns when the rows are on the disk."""


def open_part(path: Path, schema: pa.Schema, added: pa.Schema) -> Part:
    """A new part of the kind that its name says.

    Args:
        schema: of the input.
        added: of what comes behind it.
    """
    if path.suffix in files.PARQUET:
        return _ParquetPart(path, schema, added)
    return _TextPart(path, schema.names, added.names)


class _TextPart:
    def __init__(self, path: Path, names: Sequence[str], added: Sequence[str]):
        self._names, self._added = names, added
        self._json = path.suffix in files.JSON_LINES
        # in JSON the escape of half a surrogate pair, which no UTF-8 file can hold, is its own JSON escape
        errors = "backslashreplace" if self._json else "replace"
        self._file = open(path, "w", encoding="utf-8", newline="", errors=errors)
        delimiter = _delimiter(path)
        self._plain = csv.writer(self._file, delimiter=delimiter, lineterminator="\n")
        self._quoted = csv.writer(self._file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]]) -> None:
        answers = zip(*added.values(), strict=True)
        for cells, answer in zip(chunk.records(), answers, strict=True):
            if self._json:
                self._file.write(_to_json(cells | dict(zip(added, answer, strict=True))) + "\n")
            else:
                row = [files.as_text(cell) or "" for cell in (*(cells.get(name) for name in self._names), *answer)]
                # a lone carriage return is not quoted by itself, and would end the line for whoever reads it
                (self._quoted if any("\r" in cell for cell in row) else self._plain).writerow(row)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class _ParquetPart:
    def __init__(self, path: Path, schema: pa.Schema, added: pa.Schema):
        from pyarrow.parquet import ParquetWriter

        self._schema, self._added = schema, added
        self._file = open(path, "wb")
        self._writer = ParquetWriter(self._file, _together(schema, added), compression="zstd")

    def write(self, chunk: Chunk, added: Mapping[str, Sequence[Any]]) -> None:
        import pyarrow as pa

        rows = chunk.rows
        if isinstance(rows, list):
            columns = [[_cell(cells.get(field.name), field.type) for cells in rows] for field in self._schema]
            rows = pa.Table.from_arrays(
                [pa.array(c, field.type) for c, field in zip(columns, self._schema, strict=True)], schema=self._schema
            )
        answers = [pa.array(values, field.type) for values, field in zip(added.values(), self._added, strict=True)]
        columns = [*rows.columns, *answers]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=_together(self._schema, self._added)))

    def close(self) -> None:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def assemble(parts: Sequence[Path], target: Path, schema: pa.Schema, added: pa.Schema) -> None:
    """Writes all rows of the parts to one file of the same kind, on the disk when this returns; holds a part."""
    with open(target, "wb") as file:
        if target.suffix in files.PARQUET:
            from pyarrow.parquet import ParquetFile, ParquetWriter

            with ParquetWriter(file, _together(schema, added), compression="zstd") as writer:
                for part in parts:
                    with ParquetFile(part) as rows:
                        writer.write_table(rows.read())
        else:
            if target.suffix not in files.JSON_LINES:
                header = io.StringIO()
                csv.writer(header, delimiter=_delimiter(target), lineterminator="\n").writerow(
                    [*schema.names, *added.names]
                )
                file.write(header.getvalue().encode())
            for part in parts:
                with open(part, "rb") as rows:
                    shutil.copyfileobj(rows, file, 2**20)
        file.flush()
        os.fsync(file.fileno())


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix == ".tsv" else ","


def _together(schema: pa.Schema, added: pa.Schema) -> pa.Schema:
    import pyarrow as pa

    return pa.schema([*schema, *added])


def _to_json(cells: Mapping[str, Any]) -> str:
    try:
        return json.dumps(cells, ensure_ascii=False, allow_nan=False, default=files.as_text)
    except ValueError:  # JSON has no word for what is not a number
        cells = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in cells.items()}
        return json.dumps(cells, ensure_ascii=False, default=files.as_text)


def _cell(value: Any, kind: pa.DataType) -> Any:
    import pyarrow as pa

    if value is None or not pa.types.is_string(kind):
        return float(value) if value is not None and pa.types.is_floating(kind) else value
    text = files.as_text(value)
    return text and _SURROGATE.sub("\ufffd", text)
