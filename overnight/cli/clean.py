"""`overnight clean`: the disk back from nights that nobody needs any more."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overnight import problems
from overnight.cli import app
from overnight.cli.output import AsJson, print_json, print_table
from overnight.errors import Complaint, UserError, nearest
from overnight.home import Home

if TYPE_CHECKING:
    from overnight.config import Retention


@app.command()
def clean(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model; absent: all of this home.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without this, only say what would go.")] = False,
    nights: Annotated[
        int | None, typer.Option("--nights", min=1, metavar="N", help="Nights to keep; absent: the config's.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG", help="YAML file to read; absent: each model's last night's."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Free what only old nights need: folders, rows, runs, versions. Champions, also earlier ones, stay."""
    from overnight.cleaning import clean as clean_home
    from overnight.unused import disk_usage

    home = Home.from_environment()
    keeps = _keeps(home, name, nights, config)
    before = disk_usage([home.root])
    done = clean_home(home, keeps, apply=apply, forget_flow_runs=_forget_flow_runs(home)) if keeps else {}
    after = disk_usage([home.root])
    notes = [note for cleaned in done.values() for note in cleaned.notes]
    items = [(model, item) for model, cleaned in done.items() for item in cleaned.items]
    if as_json:
        rows = [{"model": model or None, **item.__dict__} for model, item in items]
        kept = {model: keep.nights for model, keep in keeps.items()}
        print_json({"applied": apply, "nights": kept, "items": rows, "notes": notes, "before": before, "after": after})
        return
    columns = ("model", "what goes" if not apply else "what went", "how many", "on disk")
    lines = [(model, item.what, item.count, _size(item.bytes)) for model, item in items if item.count]
    print_table("Clean", columns, lines, "nothing to clean")
    for note in notes:
        typer.echo(note)
    if apply:
        typer.echo(f"home: {_size(before)} before, {_size(after)} now, {_size(before - after)} freed")
    elif lines:
        typer.echo("nothing was removed; --apply does it")


def _keeps(home: Home, name: str | None, nights: int | None, config: Path | None) -> dict[str, Retention]:
    """Model → what stays of it."""
    from overnight.cleaning import last_retention
    from overnight.config import load_config
    from overnight.nights import night_records
    from overnight.tracking import registry, store

    facts = load_config(config, problems=problems.roles()) if config else None
    if facts and name not in (None, facts.name):
        raise UserError(Complaint(str(config), f"is the config of {facts.name}", repr(name), facts.name))
    name = facts.name if facts else name
    known = {str(record["model"]) for record in night_records(home)}
    known |= {folder.name for folder in (home.root / "scored").glob("*")}  # of a service, which runs no nights
    if name is not None and name not in known:  # a home that was lost, on a shared server
        if not home.embedded_tracking or (home.mlflow / "mlflow.db").exists():
            store.prepare(home)
            known |= set(registry.names(home))
        if name not in known:
            raise UserError(Complaint("models", "no such model", repr(name), nearest(name, known)))
    wanted = [name] if name else sorted(known)
    keeps = {one: facts.retention if facts else last_retention(home, one) for one in wanted}
    return {one: keep.model_copy(update={"nights": nights}) if nights else keep for one, keep in keeps.items()}


def _forget_flow_runs(home: Home) -> Callable[[list[str]], Any] | None:
    """Prefect's client, imported when there is something to forget; None when no server answers."""
    from overnight.services import known_server

    api = known_server(home)
    if api is None:
        return None

    def forget(ids: list[str]) -> None:
        os.environ["PREFECT_API_URL"] = api
        from tasks.history import delete_flow_runs

        delete_flow_runs(ids)

    return forget


def _size(count: int | None) -> str:
    if count is None:
        return ""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
