"""A file scored by a model version: parts, a manifest that says which are done, and the whole file at the end.

facts = score_file(home, version, folder, Path("in.csv"), Path("out.parquet"), Options(columns={"text": "body"}))

out.parquet.parts/manifest.json     what is being done, and the parts that are; rewritten after each part
out.parquet.parts/00000.parquet …   rows in the order of the input
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight import __version__, problems
from overnight.bulk.inputs import Input, look
from overnight.bulk.outputs import assemble
from overnight.bulk.work import BEHIND, MANIFEST, Progress, ScoreLines, Work
from overnight.data import files
from overnight.errors import Complaint, UserError, nearest
from overnight.home import Home, read_json

if TYPE_CHECKING:
    import pyarrow as pa

    from overnight.problems.base import Problem
    from overnight.tracking.registry import Version

LOCK = "lock"
HEAD = 2**20
"""Bytes at the beginning of the input by which, with size and time, it is recognised."""


@dataclass(frozen=True)
class Options:
    """What decides, with input and version, what the output holds."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Role → column of the input, where the names differ."""
    scores: bool = False
    """Whether the score of every label is added."""
    prefix: str = ""
    """In front of the names of the columns that are added."""
    encoding: str = "auto"
    """Of a text file."""


def score_file(
    home: Home,
    version: Version,
    folder: Path,
    source: Path,
    target: Path,
    options: Options,
    *,
    force: bool = False,
    log: bool = False,
    log_texts: bool = False,
    progress: Progress = lambda done, rows, errors: None,
) -> dict[str, Any]:
    """Scores every row of `source` into `target`, or goes on where a killed run of the same stopped.

    Args:
        folder: the version's model folder.
        target: CSV, TSV, JSONL or Parquet, by its name's ending.
        force: replace a target that exists.
        log: append a line a scored text to the home's scored/, for the monitor; `log_texts`: with the text.

    Returns:
        rows, errors, the first of them, rows that an earlier run had done, seconds.

    Raises:
        UserError: for whatever is wrong with source, target or options; nothing has been written then.
        NightFailed: the source changed meanwhile.
        OutOfMemory: not even one row fits.
    """
    began = time.monotonic()
    card = json.loads((folder / "overnight.json").read_text())
    check_target(target, force)
    problem = problems.get(card["problem"])
    found = look(source, options.encoding, _roles(problem, options.columns), exact=problem.points_into_text)
    added = _added(problem.columns(card["facts"], options.scores), options, found.schema, source)
    parts = target.with_name(f"{target.name}.parts")
    with _alone(parts):
        manifest = _manifest(parts, found, version, options)
        resumed = sum(part["rows"] for part in manifest["parts"])
        if resumed < found.rows:
            from overnight.training.predict import Scorer

            lines = ScoreLines(home, version, log_texts) if log or log_texts else None
            cells = partial(problem.cells, facts=card["facts"], scores=options.scores)
            Work(found, parts, target.suffix, manifest, added, version, cells).run(Scorer(folder), lines, progress)
        whole = parts / f"whole{target.suffix}"
        assemble([parts / part["file"] for part in manifest["parts"]], whole, found.schema, added)
        os.replace(whole, target)
        shutil.rmtree(parts)
    return {
        "out": str(target),
        "model": version.name,
        "version": version.number,
        "rows": found.rows,
        "errors": sum(part["errors"] for part in manifest["parts"]),
        "first_errors": manifest["first_errors"],
        "resumed": resumed,
        "seconds": round(time.monotonic() - began, 2),
    }


def check_target(target: Path, force: bool) -> None:
    """Raises UserError when nothing could, or nothing may, be written there."""
    if target.suffix not in files.KINDS:
        raise UserError(Complaint(str(target), f"must end in {', '.join(files.KINDS)}"))
    if not target.parent.is_dir():
        raise UserError(Complaint(str(target), "its folder does not exist"))
    if target.is_dir():
        raise UserError(Complaint(str(target), "is a folder"))
    if target.exists() and not force:
        raise UserError(Complaint(str(target), "exists already; --force replaces it"))


def _roles(problem: Problem, columns: Mapping[str, str]) -> dict[str, str]:
    roles = problem.text_roles
    unknown = [role for role in columns if role not in roles]
    if unknown:
        rule = f"not a text of {problem.name} ({', '.join(roles)})"
        raise UserError(*(Complaint("--column", rule, repr(role), nearest(role, roles)) for role in unknown))
    return {role: columns.get(role, role) for role in roles}


def _added(columns: Mapping[str, type], options: Options, schema: pa.Schema, source: Path) -> pa.Schema:
    """The columns behind those of the input, in their order."""
    import pyarrow as pa

    kinds = {str: pa.string(), float: pa.float64(), int: pa.int64()}
    every = {**columns, **dict(zip(BEHIND, (str, int, str), strict=True))}
    added = pa.schema([(options.prefix + name, kinds[kind]) for name, kind in every.items()])
    both = [name for name in added.names if name in schema.names]
    if both:
        rule = f"has columns of the names that are added ({', '.join(both)}); give these others, as --prefix predicted_"
        raise UserError(Complaint(str(source), rule))
    return added


@contextmanager
def _alone(parts: Path) -> Iterator[None]:
    """Holds the folder of the parts for this process; the kernel gives it back when the process dies."""
    try:
        if parts.is_dir() and any(parts.iterdir()) and not (parts / LOCK).exists():
            raise UserError(Complaint(str(parts), "is needed for the parts of the output, and holds something else"))
        parts.mkdir(exist_ok=True)
        lock = open(parts / LOCK, "w")
    except OSError as error:
        raise UserError(Complaint(str(parts), "cannot be written", error.strerror)) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(Complaint(str(parts), "another process is writing there")) from None
        yield


def _manifest(parts: Path, found: Input, version: Version, options: Options) -> dict[str, Any]:
    """What an earlier run of the same work has done, or the manifest of none; what belongs to neither is removed."""
    status = found.path.stat()
    with open(found.path, "rb") as file:
        head = hashlib.sha256(file.read(HEAD)).hexdigest()
    work = {
        "input": {"bytes": status.st_size, "modified": status.st_mtime_ns, "head": head},
        "model": [version.name, version.number, version.tags.get("overnight.weights_sha256")],
        "options": {**asdict(options), "columns": dict(found.roles)},
        "overnight": __version__,
    }
    manifest: dict[str, Any] | None = read_json(parts / MANIFEST)
    if manifest is None or manifest["work"] != work:
        manifest = {"work": work, "parts": [], "first_errors": []}
    kept = {LOCK, MANIFEST, *(part["file"] for part in manifest["parts"])}
    for path in parts.iterdir():
        if path.name not in kept:
            path.unlink()
    return manifest
