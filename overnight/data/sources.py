"""Reads a source into columns of text: files by name, glob or package, a folder a class, a Hugging Face dataset.

    table = read_source(data, [{"text": "body", "label": "topic"}], where="configs/topics.yaml: data")

Nothing is guessed about the meaning of a cell: "NA" and "null" are texts, only an empty cell is absent.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overnight.config import ARROW, Data
from overnight.data import encodings, files
from overnight.errors import Complaint, UserError, nearest
from overnight.references import resolve_package_path

MAX_BROKEN = 0.01
"""Largest share of rows that may be unreadable; more means that the file is not what the config says."""

PARSERS = {"conll": files.parse_conll, "squad": files.parse_squad, "po": files.parse_po}

_HUB = re.compile(r"hf://(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")
_GLOB = re.compile(r"[*?\[]")


@dataclass
class Table:
    """The wanted columns of a source, all of one length; cells are text or None."""

    columns: dict[str, list[str | None]]
    """Role, optional role or slice → cells."""
    source_rows: list[int] = field(default_factory=list)
    """Position of each row in the source, counted from 0; broken rows count too."""
    encodings: set[str] = field(default_factory=set)
    """Encodings the files were decoded with; empty for Parquet and hub datasets."""
    broken: list[files.Broken] = field(default_factory=list)
    """Rows that could not be read."""
    read: int = 0
    """Rows met so far, readable or not."""


@dataclass(frozen=True)
class Wanted:
    """The columns to look for, and how to complain about those that are missing."""

    required: Sequence[Mapping[str, str]]
    """Sets of columns, of which one must be there."""
    optional: Mapping[str, str]
    slices: Sequence[str]
    where: str

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


def read_source(
    data: Data,
    required: Sequence[Mapping[str, str]],
    optional: Mapping[str, str] | None = None,
    *,
    where: str = "data",
) -> Table:
    """Reads every row of `data.source`, keeping only the columns asked for.

    Args:
        data: the section of the config.
        required: role → column that must be there; of several such sets, one.
        optional: role → column that is read where it is there.
        where: the config's place, for complaints.

    Raises:
        UserError: for whatever is wrong with the source or its columns.
    """
    wanted = Wanted(required, optional or {}, data.slices, where)
    names = dict.fromkeys([*(role for roles in required for role in roles), *wanted.optional, *data.slices])
    table = Table({name: [] for name in names})
    place = f"{where}{ARROW}source"
    if data.source.startswith("hf://"):
        _read_hub(data, wanted, table, place)
    else:
        paths = _paths(data.source, place)
        if paths[0].is_dir():
            _read_folder(paths[0], data, wanted, table, place)
        else:
            for path in paths:
                _read_file(path, data, wanted, table, place)
    _refuse_broken(table, data.source, place)
    if not table.source_rows:
        raise UserError(Complaint(place, "has a header but no rows", repr(data.source)))
    return table


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


def _read_file(path: Path, data: Data, wanted: Wanted, table: Table, place: str) -> None:
    suffix = path.suffix.lower()
    own = {**dict.fromkeys(files.CONLL, "conll"), **dict.fromkeys(files.PO, "po")}
    kind = own.get(suffix, "auto") if data.format == "auto" else data.format
    if kind == "auto" and suffix not in files.KINDS:
        kinds = ", ".join((*files.KINDS, *own))
        rule = f"must be a file that ends in {kinds}, or a folder with a sub-folder a class"
        near = "data.format: lines (a text a line)" if suffix == ".txt" else None
        raise UserError(Complaint(place, rule, repr(str(path)), near))
    if suffix in files.PARQUET and kind == "auto":
        available, batches = files.open_parquet(path, place)
        found = wanted.resolve(available, path.name)
        for columns in batches(list(dict.fromkeys(found.values()))):
            _extend(table, found, columns, count=len(next(iter(columns.values()))))
        return
    text, used = encodings.decode(encodings.read_bytes(path, place), data.encoding, path, place)
    table.encodings.add(used)
    if kind == "lines":
        parsed = files.parse_lines(text, path.stem)
    elif kind in PARSERS:
        try:
            parsed = PARSERS[kind](text)
        except ValueError as error:
            raise UserError(Complaint(place, f"cannot be read as {kind} ({error})", repr(str(path)))) from None
    else:
        parsed = files.parse_json_lines(text) if suffix in files.JSON_LINES else files.parse_csv(text, suffix)
    # a file in which no line could be read has no columns to speak of: its broken lines say more
    found = wanted.resolve(parsed.names, path.name) if parsed.names or not parsed.broken else {}
    start = table.read
    for name in table.columns:
        if name in found:
            index = parsed.names.index(found[name])
            table.columns[name] += [files.as_text(row[index]) for row in parsed.rows]
        else:
            table.columns[name] += [None] * len(parsed.rows)
    table.source_rows += [start + position for position in parsed.positions]
    table.broken += [files.Broken(f"{path.name} line {line}", why) for line, why in parsed.broken]
    table.read += len(parsed.rows) + len(parsed.broken)


def _extend(table: Table, found: Mapping[str, str], columns: Mapping[str, list[Any]], count: int) -> None:
    for name, cells in table.columns.items():
        cells += [files.as_text(v) for v in columns[found[name]]] if name in found else [None] * count
    table.source_rows += range(table.read, table.read + count)
    table.read += count


def _read_folder(folder: Path, data: Data, wanted: Wanted, table: Table, place: str) -> None:
    """`<folder>/<label>/*.txt`: columns `text`, `label` and `file` (path below the folder)."""
    texts = sorted(p for p in folder.glob("*/*.txt") if not p.name.startswith(".") and p.is_file())
    if not texts:
        inside = sorted(p.suffix.lower() for p in folder.iterdir() if p.suffix.lower() in files.KINDS)
        near = f"{data.source.rstrip('/')}/*{inside[0]}" if inside else None
        raise UserError(Complaint(place, "a folder must hold a sub-folder a class with .txt files", data.source, near))
    found = wanted.resolve(["text", "label", "file"], f"the folder {folder.name}")
    columns: dict[str, list[Any]] = {"text": [], "label": [], "file": []}
    for path in texts:
        name = str(path.relative_to(folder))
        try:
            text, used = encodings.decode(encodings.read_bytes(path, place), data.encoding, path, place)
        except UserError as error:
            table.broken.append(files.Broken(name, error.complaints[0].rule))
            continue
        table.encodings.add(used)
        for column, cell in zip(columns, (text, path.parent.name, name), strict=True):
            columns[column].append(cell)
    _extend(table, found, columns, count=len(columns["text"]))
    table.read += len(table.broken)


def parse_hub(source: str) -> tuple[str, str | None, str | None]:
    """Name, config and revision of `hf://name[:config][@revision]`; a ValueError when it does not read like that."""
    match = _HUB.fullmatch(source)
    if match is None:
        raise ValueError("must read hf://name[:config][@revision]")
    return match["name"], match["config"], match["revision"]


def _read_hub(data: Data, wanted: Wanted, table: Table, place: str) -> None:
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
        for batch in narrow.iter(batch_size=10_000):
            columns = batch.to_pydict()
            for column, feature in classes.items():
                columns[column] = [_class_names(cell, feature) for cell in columns[column]]
            _extend(table, found, columns, count=batch.num_rows)


def _inner(feature: Any) -> Any:
    """What a list of a hub dataset holds; a feature that is no list as it is."""
    return getattr(feature, "feature", feature)


def _class_names(cell: Any, feature: Any) -> Any:
    """Codes of classes, alone or in a list, as their names; -1 stands for "not labelled"."""
    if isinstance(cell, list):
        return [_class_names(one, feature) for one in cell]
    return None if cell is None or cell < 0 else feature.int2str(cell)


def _refuse_broken(table: Table, source: str, place: str) -> None:
    if len(table.broken) > MAX_BROKEN * table.read:
        first = "; ".join(f"{b.place} ({b.reason})" for b in table.broken[:5])
        share = f"{len(table.broken):,} of {table.read:,}"
        raise UserError(Complaint(place, f"{share} rows cannot be read, at most 1 % may be: {first}", repr(source)))
