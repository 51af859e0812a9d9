"""Reads a source into columns of text: files by name, glob or package, a folder a class, a Hugging Face dataset.

    for table in read_pieces(data, [{"text": "body", "label": "topic"}], where="configs/topics.yaml: data"): ...

Rows come in pieces, so a source may be larger than memory; a SQuAD, CoNLL or .po file is parsed as a whole. Nothing is
guessed about the meaning of a cell: "NA" and "null" are texts, only an empty cell is absent.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from overnight.config import ARROW, Data
from overnight.data import encodings, files
from overnight.data.store import BATCH
from overnight.errors import Complaint, UserError, nearest
from overnight.references import resolve_package_path

MAX_BROKEN = 0.01
"""Largest share of rows that may be unreadable; more means that the file is not what the config says."""

SHOWN = 20
"""Broken rows that are named."""

PARSERS = {"conll": files.parse_conll, "squad": files.parse_squad, "po": files.parse_po}

_HUB = re.compile(r"hf://(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
_GLOB = re.compile(r"[*?\[]")


@dataclass
class Reading:
    """What is learnt of a source while it is read."""

    encodings: set[str] = field(default_factory=set)
    """Encodings the files were decoded with; empty for Parquet and hub datasets."""
    broken: list[files.Broken] = field(default_factory=list)
    """The first of the rows that could not be read."""
    broken_rows: int = 0
    rows: int = 0
    """Rows met so far, readable or not."""

    def leave_out(self, place: str, reason: str) -> None:
        self.broken_rows += 1
        if len(self.broken) < SHOWN:
            self.broken.append(files.Broken(place, reason))


@dataclass
class Table:
    """Rows of a source: the wanted columns, all of one length; cells are text or None."""

    columns: dict[str, list[str | None]]
    """Role, optional role or slice → cells."""
    source_rows: list[int]
    """Position of each row in the source, counted from 0; broken rows count too."""
    reading: Reading
    """Shared by all pieces of a source; complete after the last."""


@dataclass(frozen=True)
class Wanted:
    """The columns to look for, and how to complain about those that are missing."""

    required: Sequence[Mapping[str, str]]
    """Sets of columns, of which one must be there."""
    optional: Mapping[str, str]
    slices: Sequence[str]
    where: str

    def every(self) -> set[str]:
        """All columns that may be looked for."""
        return {*(c for columns in (*self.required, self.optional) for c in columns.values()), *self.slices}

    def resolve(self, available: Sequence[str], name: str) -> dict[str, str]:
        """Role or slice → column of the source; raises a UserError that names every column missing."""
        complaints = []
        found = {}
        # the first of those sets of which the fewest columns are missing
        required = min(self.required, key=lambda columns: sum(column not in available for column in columns.values()))
        for place, key, column in [
            *((f"columns{ARROW}{role}", role, column) for role, column in required.items()),
            *(("slices", column, column) for column in self.slices),
        ]:
            if column in available:
                found[key] = column
                continue
            near = nearest(column, available)
            has = "" if near else f" (which has {', '.join(available)})"
            complaints.append(
                Complaint(f"{self.where}{ARROW}{place}", f"no such column in {name}{has}", repr(column), near)
            )
        if complaints:
            raise UserError(*complaints)
        return found | {role: column for role, column in self.optional.items() if column in available}


Cells = tuple[Mapping[str, Sequence[Any]], Sequence[int]]
"""Found columns by role or slice, and the positions of their rows."""


def read_pieces(
    data: Data,
    required: Sequence[Mapping[str, str]],
    optional: Mapping[str, str] | None = None,
    *,
    where: str = "data",
) -> Iterator[Table]:
    """Every row of `data.source`, in tables of at least one, keeping only the columns asked for.

    Args:
        data: the section of the config.
        required: role → column that must be there; of several such sets, one.
        optional: role → column that is read where it is there.
        where: the config's place, for complaints.

    Raises:
        UserError: for whatever is wrong with the source or its columns; that too many rows are broken, or that there
            are none, is known after the last table.
    """
    wanted = Wanted(required, optional or {}, data.slices, where)
    names = dict.fromkeys([*(role for roles in required for role in roles), *wanted.optional, *data.slices])
    place = f"{where}{ARROW}source"
    reading = Reading()
    some = False
    for columns, positions in _read(data, wanted, reading, place):
        if positions:
            some = True
            absent = [None] * len(positions)
            cells = {name: [*map(files.as_text, columns.get(name, absent))] for name in names}
            yield Table(cells, list(positions), reading)
    if reading.broken_rows > MAX_BROKEN * reading.rows:
        first = "; ".join(f"{b.place} ({b.reason})" for b in reading.broken[:5])
        share = f"{reading.broken_rows:,} of {reading.rows:,}"
        rule = f"{share} rows cannot be read, at most 1 % may be: {first}"
        raise UserError(Complaint(place, rule, repr(data.source)))
    if not some:
        raise UserError(Complaint(place, "has a header but no rows", repr(data.source)))


def read_source(
    data: Data,
    required: Sequence[Mapping[str, str]],
    optional: Mapping[str, str] | None = None,
    *,
    where: str = "data",
) -> Table:
    """All rows of `data.source` at once; arguments and errors as `read_pieces`."""
    pieces = read_pieces(data, required, optional, where=where)
    whole = next(pieces)
    for piece in pieces:
        for name, cells in piece.columns.items():
            whole.columns[name] += cells
        whole.source_rows += piece.source_rows
    return whole


def _read(data: Data, wanted: Wanted, reading: Reading, place: str) -> Iterator[Cells]:
    if data.source.startswith("hf://"):
        yield from _read_hub(data, wanted, reading, place)
        return
    paths = _paths(data.source, place)
    if paths[0].is_dir():
        yield from _read_folder(paths[0], data, wanted, reading, place)
        return
    for path in paths:
        yield from _read_file(path, data, wanted, reading, place)


def _paths(source: str, place: str) -> list[Path]:
    """The files (of one kind, sorted) or the one folder behind a source."""
    if source.startswith("pkg://"):
        # the folder above the first wildcard must be there, and the rest is a glob as any other
        parts = source.removeprefix("pkg://").split("/")
        plain = next((i for i, part in enumerate(parts) if _GLOB.search(part)), len(parts))
        folder = resolve_package_path("pkg://" + "/".join(parts[:plain]), place)
        if plain == len(parts):
            return [folder]
        source = str(folder.joinpath(*parts[plain:]))
    path = Path(source).expanduser()
    if not path.exists() and _GLOB.search(source):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        paths = [p for p in found if p.is_file()]
        if not paths:
            raise UserError(Complaint(place, "no file matches", repr(source)))
        kinds = sorted({p.suffix.lower() for p in paths})
        if len(kinds) > 1:
            raise UserError(Complaint(place, f"must match files of one kind ({', '.join(kinds)} found)", repr(source)))
        return paths
    if not path.exists():
        near = None
        if path.parent.is_dir():
            name = nearest(path.name, [p.name for p in sorted(path.parent.iterdir())])
            near = None if name is None else source[: len(source) - len(path.name)] + name
        raise UserError(Complaint(place, "no such file or folder", repr(source), near))
    return [path]


def _read_file(path: Path, data: Data, wanted: Wanted, reading: Reading, place: str) -> Iterator[Cells]:
    suffix = path.suffix.lower()
    own = {**dict.fromkeys(files.CONLL, "conll"), **dict.fromkeys(files.PO, "po")}
    kind = own.get(suffix, "auto") if data.format == "auto" else data.format
    if kind == "auto" and suffix not in files.KINDS:
        kinds = ", ".join((*files.KINDS, *own))
        rule = f"must be a file that ends in {kinds}, or a folder with a sub-folder a class"
        near = "data.format: lines (a text a line)" if suffix == ".txt" else None
        raise UserError(Complaint(place, rule, repr(str(path)), near))
    if kind in PARSERS:
        yield from _read_parsed(path, kind, data.encoding, wanted, reading, place)
    elif suffix in files.PARQUET and kind == "auto":
        available, batches = files.open_parquet(path, place)
        found = wanted.resolve(available, path.name)
        for columns in batches(list(dict.fromkeys(found.values()))):
            yield _counted({name: columns[column] for name, column in found.items()}, reading)
    else:
        codec = encodings.check_text(path, data.encoding, place)
        reading.encodings.add(encodings.name_of(codec))
        records_of = _lines if kind == "lines" else _json_lines if suffix in files.JSON_LINES else _csv
        records = records_of(path, codec, wanted)
        while part := list(islice(records, BATCH)):
            start = reading.rows
            reading.rows += len(part)
            for line, _, reason in part:
                if reason:
                    reading.leave_out(f"{path.name} line {line}", reason)
            whole = [(start + number, cells) for number, (_, cells, reason) in enumerate(part) if not reason]
            names = whole[0][1] if whole else ()
            yield {name: [cells[name] for _, cells in whole] for name in names}, [number for number, _ in whole]


Record = tuple[int, dict[str, Any], str]
"""Line number, cells by role or slice, and "" or why it is broken."""


def _csv(path: Path, codec: str, wanted: Wanted) -> Iterator[Record]:
    records = files.csv_records(encodings.read_lines(path, codec, ""), path.suffix.lower())
    line, fields, reason = next(records, (1, [], ""))
    if reason:  # nothing is read below a broken header, and it has no columns to speak of
        yield line, {}, reason
        return
    names = [name.strip() for name in fields]
    found = {role: names.index(column) for role, column in wanted.resolve(names, path.name).items()}
    for line, fields, reason in records:
        yield line, {} if reason else {role: fields[index] for role, index in found.items()}, reason


def _json_lines(path: Path, codec: str, wanted: Wanted) -> Iterator[Record]:
    """A key that a line lacks is absent there; the columns are all keys that occur."""
    names: dict[str, None] = {}
    broken = False
    for _, cells, reason in files.json_records(encodings.read_lines(path, codec, "\n")):
        names |= dict.fromkeys(cells)
        broken = broken or bool(reason)
        if wanted.every() <= names.keys():
            break
    # a file in which no line could be read has no columns to speak of: its broken lines say more
    found = wanted.resolve(list(names), path.name) if names or not broken else {}
    for line, cells, reason in files.json_records(encodings.read_lines(path, codec, "\n")):
        yield line, {role: cells.get(column) for role, column in found.items()}, reason


def _lines(path: Path, codec: str, wanted: Wanted) -> Iterator[Record]:
    """A `text` a line, all of the `label` that the file's name says; blank lines are none."""
    found = wanted.resolve(["text", "label"], path.name)
    for number, line in enumerate(encodings.read_lines(path, codec, "\n"), start=1):
        if line.strip():
            cells = {"text": line.removesuffix("\n"), "label": path.stem}
            yield number, {role: cells[column] for role, column in found.items()}, ""


def _read_parsed(path: Path, kind: str, encoding: str, wanted: Wanted, reading: Reading, place: str) -> Iterator[Cells]:
    """The rows of a file that is parsed as a whole."""
    text, used = encodings.decode(encodings.read_bytes(path, place), encoding, path, place)
    reading.encodings.add(used)
    try:
        parsed = PARSERS[kind](text)
    except ValueError as error:
        raise UserError(Complaint(place, f"cannot be read as {kind} ({error})", repr(str(path)))) from None
    found = wanted.resolve(parsed.names, path.name)
    for line, reason in parsed.broken:
        reading.leave_out(f"{path.name} line {line}", reason)
    start = reading.rows
    reading.rows += len(parsed.rows) + len(parsed.broken)
    for begin in range(0, len(parsed.rows), BATCH):
        part = slice(begin, begin + BATCH)
        places = {name: parsed.names.index(column) for name, column in found.items()}
        cells = {name: [row[place] for row in parsed.rows[part]] for name, place in places.items()}
        yield cells, [start + position for position in parsed.positions[part]]


def _counted(columns: Mapping[str, Sequence[Any]], reading: Reading) -> Cells:
    """Columns without broken rows among them, with the positions of their rows."""
    start = reading.rows
    reading.rows += len(next(iter(columns.values())))
    return columns, range(start, reading.rows)


def _read_folder(folder: Path, data: Data, wanted: Wanted, reading: Reading, place: str) -> Iterator[Cells]:
    """`<folder>/<label>/*.txt`: columns `text`, `label` and `file` (path below the folder)."""
    texts = sorted(p for p in folder.glob("*/*.txt") if not p.name.startswith(".") and p.is_file())
    if not texts:
        inside = sorted(p.suffix.lower() for p in folder.iterdir() if p.suffix.lower() in files.KINDS)
        near = f"{data.source.rstrip('/')}/*{inside[0]}" if inside else None
        raise UserError(Complaint(place, "a folder must hold a sub-folder a class with .txt files", data.source, near))
    found = wanted.resolve(["text", "label", "file"], f"the folder {folder.name}")
    for begin in range(0, len(texts), BATCH):
        columns: dict[str, list[Any]] = {"text": [], "label": [], "file": []}
        for path in texts[begin : begin + BATCH]:
            name = str(path.relative_to(folder))
            try:
                text, used = encodings.decode(encodings.read_bytes(path, place), data.encoding, path, place)
            except UserError as error:
                reading.leave_out(name, error.complaints[0].rule)
                continue
            reading.encodings.add(used)
            for column, cell in zip(columns, (text, path.parent.name, name), strict=True):
                columns[column].append(cell)
        yield _counted({name: columns[column] for name, column in found.items()}, reading)
    reading.rows += reading.broken_rows


def parse_hub(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and revision of `hf://name[:config][@revision]`; a ValueError when it does not read like that."""
    match = _HUB.fullmatch(source)
    if match is None:
        raise ValueError("must read hf://name[:config][@revision]")
    return match["name"], match["config"], match["revision"]


def _read_hub(data: Data, wanted: Wanted, reading: Reading, place: str) -> Iterator[Cells]:
    try:
        name, config, revision = parse_hub(data.source)
    except ValueError as error:
        raise UserError(Complaint(place, str(error), repr(data.source))) from None
    import datasets
    from datasets.exceptions import DatasetsError

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name, config, revision=revision, split=data.split)
    except (OSError, ValueError, DatasetsError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        rule = f"the dataset cannot be loaded: {reason.rstrip('.')}"
        raise UserError(Complaint(place, rule, repr(data.source))) from None
    splits = loaded.values() if isinstance(loaded, dict) else [loaded]
    for split in splits:
        found = wanted.resolve(split.column_names, name)
        classes = {
            column: feature
            for column in set(found.values())
            if isinstance(feature := _inner(split.features[column]), datasets.ClassLabel)
        }
        narrow = split.select_columns(sorted(set(found.values()))).with_format("arrow")
        for batch in narrow.iter(batch_size=BATCH):
            columns = batch.to_pydict()
            for column, feature in classes.items():
                columns[column] = [_class_names(cell, feature) for cell in columns[column]]
            yield _counted({name: columns[column] for name, column in found.items()}, reading)


def _inner(feature: Any) -> Any:
    """What a list of a hub dataset holds; a feature that is no list as it is."""
    return getattr(feature, "feature", feature)


def _class_names(cell: Any, feature: Any) -> Any:
    """Codes of classes, alone or in a list, as their names; -1 stands for "not labelled"."""
    if isinstance(cell, list):
        return [_class_names(one, feature) for one in cell]
    return None if cell is None or cell < 0 else feature.int2str(cell)
