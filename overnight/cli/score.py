"""`overnight score`: a file of texts, of any size, scored by a registered version."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from overnight.cli import app
from overnight.cli.live import PLAIN_SECONDS
from overnight.cli.output import AsJson, print_json
from overnight.errors import Complaint, UserError, nearest
from overnight.home import Home

if TYPE_CHECKING:
    from overnight.bulk.work import Progress
    from overnight.tracking.registry import Version


@app.command()
def score(
    model: Annotated[
        str, typer.Argument(metavar="NAME[@VERSION]", help="Model; VERSION is a number or an alias, absent: champion.")
    ],
    source: Annotated[Path, typer.Argument(metavar="IN", help="CSV, TSV, JSONL or Parquet file with the texts.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File to write; its ending says in which format.")],
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="ROLE=COLUMN", help="Where a column has another name, as text=body."),
    ] = None,
    scores: Annotated[bool, typer.Option("--scores", help="Add the score of every label.")] = False,
    prefix: Annotated[str, typer.Option("--prefix", help="In front of the names of the added columns.")] = "",
    encoding: Annotated[str, typer.Option("--encoding", help="Of a text file; absent: what is detected.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace OUT when it exists.")] = False,
    log_scores: Annotated[
        bool, typer.Option("--log-scores", help="Write a line a text under scored/ in the home, without the text.")
    ] = False,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="The same, with the text.")] = False,
    as_json: AsJson = False,
) -> None:
    """Score a file of any size: its rows, in its order, with labels and scores. A killed run continues."""
    from overnight.bulk.run import Options, check_target, score_file
    from overnight.tracking import registry, store

    roles = pairs("--column", columns)
    check_target(target, force)
    home = Home.from_environment()
    store.prepare(home)
    version = _version(home, model)
    options = Options(roles, scores, prefix, encoding)
    with _progress(quiet=as_json) as progress:
        folder = registry.download(home, version)
        log = log_scores or log_texts
        facts = score_file(
            home,
            version,
            folder,
            source,
            target,
            options,
            force=force,
            log=log,
            log_texts=log_texts,
            progress=progress,
        )
    if as_json:
        print_json(facts)
        return
    for error in facts["first_errors"]:
        typer.echo(f"  {error}", err=True)
    errors = f"{facts['errors']:,} of them with an error (column {prefix}error)" if facts["errors"] else "no errors"
    resumed = f", {facts['resumed']:,} of them by an earlier run" if facts["resumed"] else ""
    typer.echo(
        f"{target}: {facts['rows']:,} rows, {errors}; scored by {version.name} version {version.number}"
        f" in {facts['seconds']:.0f} s{resumed}"
    )


def pairs(option: str, given: list[str] | None) -> dict[str, str]:
    """ROLE=COLUMN, any number of times, as a dict.

    Raises:
        UserError: for each that does not read so.
    """
    parts = [pair.partition("=") for pair in given or ()]
    wrong = [Complaint(option, "must read ROLE=COLUMN", repr("".join(p))) for p in parts if not (p[0] and p[2])]
    if wrong:
        raise UserError(*wrong)
    return {role: column for role, _, column in parts}


def _version(home: Home, wanted: str) -> Version:
    """The version that NAME, NAME@alias or NAME@number means.

    Raises:
        UserError: there is none; says what there is.
    """
    from overnight.tracking import registry

    name, _, which = wanted.partition("@")
    if which.isdecimal():
        return registry.version_of(home, name, int(which))
    found = registry.by_alias(home, name, which or registry.CHAMPION)
    if found is None:
        known = sorted({alias for version in registry.versions(home, name) for alias in version.aliases})
        rule = f"no version has this alias ({', '.join(known) or 'none has any'})"
        raise UserError(Complaint(name, rule, repr(which or registry.CHAMPION), nearest(which, known)))
    return found


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    """Shows how far it is, on standard error: a bar in a terminal, plain lines elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(file=sys.stderr)
    begun: list[tuple[float, int]] = []  # time and rows at the first call, which come from an earlier run
    told = 0.0

    def speed(done: int) -> float:
        if not begun:
            begun.append((time.monotonic(), done))
        return (done - begun[0][1]) / max(time.monotonic() - begun[0][0], 1e-9)

    def line(done: int, rows: int, errors: int) -> None:
        nonlocal told
        rate = speed(done)
        if done == rows or time.monotonic() - told > PLAIN_SECONDS:
            told = time.monotonic()
            left = f", {(rows - done) / rate:.0f} s left" if 0 < rate and done < rows else ""
            print(f"{done:,} of {rows:,} rows, {errors:,} errors, {rate:.0f} rows/s{left}", file=sys.stderr)

    if quiet:
        yield lambda done, rows, errors: None
    elif console.is_terminal:
        what = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"), TimeRemainingColumn())
        with Bar(*what, console=console, transient=True) as bar:
            task = bar.add_task("", total=None, more="reading")

            def moved(done: int, rows: int, errors: int) -> None:
                bar.update(task, completed=done, total=rows, more=f"{speed(done):.0f} rows/s · {errors:,} errors")

            yield moved
    else:
        yield line
