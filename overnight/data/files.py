"""The rows of a file, and those of them that are broken."""

from __future__ import annotations

import csv
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overnight.data.store import BATCH
from overnight.errors import Complaint, UserError

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
KINDS = (".csv", ".tsv", *JSON_LINES, *PARQUET)
CONLL = (".conll", ".iob", ".iob2", ".bio")
PO = (".po",)
"""Read as `data.format: conll` and `po` by themselves; bulk scoring has no use for them."""


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


def csv_records(lines: Iterable[str], suffix: str = ".csv") -> Iterator[tuple[int, list[str], str]]:
    """Line number (from 1), fields and "" of each record of a CSV or TSV, the header first; blank lines are none.

    A record with another number of fields than the header, or an unfinished quote, is broken: it comes with the reason.
    Reading then goes on with the line below the one it began on: an unfinished quote costs one line and not all that
    follow. A field longer than 131,072 characters counts as an unfinished quote. No more than one record is held.
    After a broken header nothing is read.
    """
    source = iter(lines)
    again: deque[str] = deque()
    taken: list[str] = []  # lines of the record that is being read

    def feed() -> Iterator[str]:
        while True:
            if again:
                taken.append(again.popleft())
            elif (line := next(source, None)) is not None:
                taken.append(line)
            else:
                return
            yield taken[-1]

    for line in source:
        again.append(line)
        if line.strip():
            break
    delimiter = "\t" if suffix == ".tsv" else _delimiter(again[-1] if again else "")
    reader = csv.reader(feed(), delimiter=delimiter, strict=True)
    width: int | None = None
    number = 1
    while True:
        taken.clear()
        fields, reason = [], ""
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = str(error)
        if fields and width is not None and len(fields) != width:
            fields, reason = [], f"{len(fields)} fields instead of {width}"
        if fields or reason:
            yield number, fields, reason
        if reason:
            if width is None:
                return
            again.extendleft(reversed(taken[1:]))
            del taken[1:]
            reader = csv.reader(feed(), delimiter=delimiter, strict=True)
        elif fields and width is None:
            width = len(fields)
        number += len(taken)


def _delimiter(header: str) -> str:
    """What separates the columns of a .csv: the comma, unless the header has none and one of the others."""
    return next((d for d in (",", ";", "\t", "|") if d in header), ",")


def json_records(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Line number (from 1), object and "" of each line of a JSONL; a broken line has a reason and no object."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, {}, error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            continue
        if isinstance(row, dict):
            yield number, row, ""
        else:
            yield number, {}, f"a {type(row).__name__} instead of an object"


def parse_conll(text: str) -> Parsed:
    """Sentences of a CoNLL text: a token a line, its tag in the last column, a blank line after each sentence.

    Columns are separated by tabs, or else by any white space. Lines of `-DOCSTART-` and comments before a sentence
    (`# …`, no tab, not tagged O) say nothing. Without a tag a token breaks its sentence.
    """
    parsed = Parsed(["tokens", "tags"])
    tokens: list[str] = []
    tags: list[str] = []
    wrong: tuple[int, str] | None = None
    for number, line in enumerate([*text.split("\n"), ""], start=1):  # not splitlines: tokens may hold its other ends
        if line.strip():
            cells = line.rstrip().split("\t") if "\t" in line else line.split()
            comment = line.startswith("# ") and "\t" not in line and not tokens and cells[-1] != "O"
            if comment or cells[0] == "-DOCSTART-":
                continue
            if len(cells) < 2:
                wrong = wrong or (number, "a token without a tag")
            tokens.append(cells[0])
            tags.append(cells[-1])
        elif tokens:
            if wrong:
                parsed.broken.append(wrong)
            else:
                parsed.add([tokens, tags])
            tokens, tags, wrong = [], [], None
    return parsed


def parse_squad(text: str) -> Parsed:
    """Questions of a SQuAD file (1.1 or 2.0): `id`, `title`, `question`, `context`, `answers` ([]: it has none).

    Raises:
        ValueError: when it is no JSON of that form.
    """
    parsed = Parsed(["id", "title", "question", "context", "answers"])
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    answers = [] if one.get("is_impossible") else one["answers"]
                    found = [{"text": a["text"], "start": a["answer_start"]} for a in answers]
                    parsed.add([one.get("id"), article.get("title"), one["question"], paragraph["context"], found])
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"no SQuAD file: {type(error).__name__} {error}") from None
    return parsed


def parse_po(text: str) -> Parsed:
    """Messages of a gettext catalogue that have a translation: `text`, `target`, `context`, and the `language` that its
    head names. Fuzzy, obsolete and plural ones are left out.

    Raises:
        ValueError: when it is no such catalogue.
    """
    import polib

    parsed = Parsed(["text", "target", "context", "language"])
    try:
        entries = polib.pofile(text + "\n")  # what ends in a line break is never taken for the name of a file
    except OSError as error:
        raise ValueError(str(error)) from None
    language = entries.metadata.get("Language")
    for entry in entries:
        if entry.translated() and not entry.msgid_plural and not entry.obsolete:
            parsed.add([entry.msgid, entry.msgstr, entry.msgctxt, language])
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
            for group in range(file.num_row_groups):  # one at a time: of several, Arrow reads ahead without a bound
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
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
