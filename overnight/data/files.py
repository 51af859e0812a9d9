"""What is inside a file: its encoding, its rows, and those of them that are broken."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overnight.errors import Complaint, UserError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
KINDS = (".csv", ".tsv", *JSON_LINES, *PARQUET)

_BYTE_ORDER_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    # before UTF-16, whose mark this one begins with
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_SIGNATURES = {
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ": "an xz archive",
    b"(\xb5/\xfd": "a zstd archive",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "a SQLite database",
    b"PAR1": "a Parquet file",
}


@dataclass(frozen=True)
class Broken:
    """A row that could not be read: where it stands, and why."""

    place: str
    reason: str


@dataclass
class Parsed:
    """The rows of one text file: cells in the order of `names`."""

    names: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Position of each row among all rows of the file, broken ones included, from 0."""
    broken: list[tuple[int, str]] = field(default_factory=list)
    """Line number (from 1) and reason of each broken row."""

    def add(self, row: list[Any]) -> None:
        self.positions.append(len(self.rows) + len(self.broken))
        self.rows.append(row)


def read_bytes(path: Path, place: str) -> bytes:
    """The bytes of a text file.

    Raises:
        UserError: when it cannot be opened, is empty, or is no text (a picture, an archive, NUL bytes).
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(Complaint(place, f"cannot be read ({error.strerror})", repr(str(path)))) from None
    if not raw.strip():
        raise UserError(Complaint(place, "the file is empty", repr(str(path))))
    for signature, kind in _SIGNATURES.items():
        if raw.startswith(signature):
            raise UserError(Complaint(place, f"must be a text file, this is {kind}", repr(str(path))))
    if _mark(raw) not in ("utf-16", "utf-32") and b"\0" in raw:
        raise UserError(Complaint(place, "must be a text file, this one holds binary data", repr(str(path))))
    return raw


def _mark(raw: bytes) -> str | None:
    return next((name for mark, name in _BYTE_ORDER_MARKS.items() if raw.startswith(mark)), None)


def decode(raw: bytes, encoding: str, path: Path, place: str) -> tuple[str, str]:
    """The text and the name of the encoding that was used.

    `auto` takes what a byte-order mark says, then UTF-8 where it fits strictly. Legacy bytes are told apart by
    charset-normalizer only as far as that is reliable: an encoding of another script (Cyrillic, Greek, Chinese, …) is
    taken when the result reads like a language. Between the many Latin ones its answer changes with the size of the
    sample, so they are all read as windows-1252, which is what browsers do, and which every byte string fits.

    Raises:
        UserError: when the encoding named in the config is unknown or does not fit.
    """
    if encoding != "auto":
        try:
            return raw.decode(encoding).removeprefix("\ufeff"), encoding
        except LookupError:
            raise UserError(Complaint(place, "no such encoding", repr(encoding))) from None
        except UnicodeError as error:
            where = f" at byte {error.start:,}" if isinstance(error, UnicodeDecodeError) else ""
            raise UserError(Complaint(place, f"{path.name} is not {encoding}{where}; try encoding: auto")) from None
    mark = _mark(raw)
    try:
        return raw.decode(mark or "utf-8").removeprefix("\ufeff"), mark or "utf-8"
    except UnicodeDecodeError:
        pass
    import ftfy.bad_codecs  # noqa: F401  (registers sloppy-windows-1252: the five bytes without a sign map to C1)

    other = _other_script(raw)
    return (raw.decode(other), other) if other else (raw.decode("sloppy-windows-1252"), "windows-1252")


def _other_script(raw: bytes) -> str | None:
    """The detected encoding, when most letters outside ASCII are then of another script than Latin."""
    import unicodedata

    from charset_normalizer import from_bytes

    # only the lines that tell encodings apart, and not all of a large file
    telling = b"\n".join(line for line in raw.split(b"\n") if not line.isascii())[:65_536]
    best = from_bytes(telling).best()
    if best is None or best.coherence == 0:
        return None
    letters = [c for c in str(best) if not c.isascii() and c.isalpha()]
    foreign = sum(not unicodedata.name(c, "").startswith("LATIN") for c in letters)
    if foreign <= len(letters) / 2:
        return None
    try:
        raw.decode(best.encoding)
    except UnicodeDecodeError:
        return None
    return str(best.encoding)


def parse_csv(text: str, suffix: str = ".csv") -> Parsed:
    """Rows of a CSV or TSV text; a record with a wrong number of fields or an unfinished quote is broken.

    After a broken record, reading goes on with the line below the one it began on: an unfinished quote costs one
    line and not all that follow. A field longer than 131,072 characters counts as an unfinished quote.
    """
    lines = list(io.StringIO(text, newline=""))
    first = next(line for line in lines if line.strip())
    delimiter = "\t" if suffix == ".tsv" else _delimiter(first)
    position = 0

    def feed() -> Iterator[str]:
        nonlocal position
        while position < len(lines):
            position += 1
            yield lines[position - 1]

    parsed: Parsed | None = None
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    while True:
        start = position
        try:
            fields = next(reader)
            reason = ""
        except StopIteration:
            break
        except csv.Error as error:
            fields, reason = [], str(error)
        if not reason and not fields:
            continue
        if parsed is None:
            parsed = Parsed([name.strip() for name in fields])
            if reason:
                parsed.broken.append((start + 1, reason))
                break
        elif not reason and len(fields) == len(parsed.names):
            parsed.add(fields)
        else:
            reason = reason or f"{len(fields)} fields instead of {len(parsed.names)}"
            parsed.broken.append((start + 1, reason))
            position = start + 1
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    return parsed or Parsed([])


def _delimiter(header: str) -> str:
    """What separates the columns of a .csv: the comma, unless the header has none and one of the others."""
    return next((d for d in (",", ";", "\t", "|") if d in header), ",")


def parse_json_lines(text: str) -> Parsed:
    """Rows of a JSONL text, one object a line; a key that a line lacks is absent there."""
    parsed = Parsed([])
    names: dict[str, None] = {}
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            parsed.broken.append((number, reason))
            continue
        if not isinstance(row, dict):
            parsed.broken.append((number, f"a {type(row).__name__} instead of an object"))
            continue
        names.update(dict.fromkeys(row))
        parsed.add([row])
    parsed.names = list(names)
    parsed.rows = [[row.get(name) for name in names] for (row,) in parsed.rows]
    return parsed


def open_parquet(path: Path, place: str) -> tuple[list[str], Callable[[list[str]], Iterator[dict[str, list[Any]]]]]:
    """Column names of a Parquet file, and a reader of batches of the columns asked for.

    Raises:
        UserError: when it is no Parquet file, or a damaged one.
    """
    import pyarrow as pa
    from pyarrow import parquet

    def refused(error: Exception) -> UserError:
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        return UserError(Complaint(place, f"cannot be read as Parquet ({reason})", repr(str(path))))

    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
    except (OSError, pa.ArrowException) as error:
        raise refused(error) from None

    def batches(columns: list[str]) -> Iterator[dict[str, list[Any]]]:
        try:
            for batch in file.iter_batches(columns=columns):
                yield batch.to_pydict()
        except (OSError, pa.ArrowException) as error:
            raise refused(error) from None

    return names, batches


def as_text(cell: Any) -> str | None:
    """A cell as text; None for what is absent (null, not a number, an empty text)."""
    if isinstance(cell, str):
        return cell or None
    if cell is None or isinstance(cell, float) and math.isnan(cell):
        return None
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, bytes):
        return cell.decode("utf-8", "replace") or None
    if isinstance(cell, list | dict):
        return json.dumps(cell, ensure_ascii=False, default=str)
    return str(cell)
