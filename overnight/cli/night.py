"""`overnight run`, `plan`, `validate`, `report`: a night before, while and after it runs."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from overnight import problems
from overnight.cli import app
from overnight.cli.live import shown
from overnight.cli.output import AsJson, ConfigFile, Overrides, print_json, print_table
from overnight.config import Config, load_config
from overnight.errors import DataRefused, UserError
from overnight.home import Home


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Retrain although nothing has changed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run one night: from raw text to a decided model version."""
    from overnight.nights import one_night_at_a_time
    from overnight.notify import announce_skipped, announce_untold, mistakes_told

    with mistakes_told(config):
        home, facts = Home.from_environment(), _load(config, overrides)
        why = _nothing_to_do(home, facts, config)
    if why and not force:
        record: dict[str, Any] = {"model": facts.name, "state": "skipped", "why": why}
        # where another process holds the model, its night's end will be told
        with shown(as_json), suppress(UserError), one_night_at_a_time(home, facts.name):
            announce_untold(home, facts)
            announce_skipped(facts, record)
    else:
        record = _night(home, config, overrides, force, quiet=as_json)
    _show(home, record, as_json)


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Say what a night would do: rows, trials, minutes, disk. Nothing is kept."""
    from overnight.planning import plan_night

    with tempfile.TemporaryDirectory(prefix="overnight-plan-") as folder, shown(as_json):
        home = Home.from_environment()
        facts = plan_night(home, _on_its_base(home, config, overrides), f"{config}: data", Path(folder))
    if as_json:
        print_json(facts)
    else:
        print_table(f"A night of {config}", ("what", "how much"), [(k, v) for k, v in facts["lines"].items()])


@app.command()
def validate(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check the config and the data only: expectations, quarantine, Data Docs."""
    from overnight.intake import judge_rows, read_rows
    from overnight.nights import last_accepted

    home = Home.from_environment()
    facts = _on_its_base(home, config, overrides)
    with shown(as_json):
        rows = read_rows(facts.data, facts.problem, home.folder("data", facts.name), f"{config}: data")
        folder = home.folder("validations", facts.name)
        found = judge_rows(
            rows,
            facts.validation,
            facts.data.slices,
            facts.problem,
            facts.model,
            last_accepted(home, facts.name),
            folder,
            folder / "data_docs",
        )
    if as_json:
        print_json({"ingested": asdict(rows), "validated": asdict(found)})
    else:
        marks = {True: "passed", False: "FAILED"}
        results = [(r["expectation"], r["severity"], marks[r["passed"]], r["text"]) for r in found.results]
        print_table(f"{config}: {rows.rows:,} rows", ("expectation", "severity", "result", "what was seen"), results)
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in found.reasons.items()) or "none"
        typer.echo(f"\nrefused rows: {found.rows_refused:,} ({reasons})\n  {found.quarantine}")
        typer.echo(f"Data Docs: {found.docs}")
    if not found.accepted:
        raise DataRefused(*found.why)


@app.command()
def report(
    night: Annotated[str | None, typer.Argument(metavar="[NIGHT]", help="Id of the night; absent: the last.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the morning report of the last night, or of a named one."""
    from overnight.nights import find_night

    home = Home.from_environment()
    _show(home, find_night(home, night), as_json)


def _load(path: str, overrides: list[str] | None) -> Config:
    return load_config(path, overrides or (), problems=problems.roles())


def _on_its_base(home: Home, path: str, overrides: list[str] | None) -> Config:
    """The config, with the folder of the version where its base is a registered model."""
    from overnight.tracking.bases import on_its_base

    return on_its_base(home, _load(path, overrides))[0]


def _nothing_to_do(home: Home, config: Config, path: str) -> str | None:
    """Asked before a server is started: wrong data, a full disk and an unchanged night should cost seconds."""
    from overnight.intake import read_rows
    from overnight.newbase import NEW
    from overnight.nights import unchanged
    from overnight.planning import check_disk
    from overnight.tracking import registry, store
    from overnight.tracking.bases import on_its_base
    from overnight.training.models import resolve_base

    config, _ = on_its_base(home, config)
    if config.model.base != NEW:
        resolve_base(config.model.base)
    check_disk(home, config)
    rows = read_rows(config.data, config.problem, home.folder("data", config.name), f"{path}: data")

    def champion() -> registry.Version | None:
        if home.embedded_tracking and not (home.mlflow / "mlflow.db").exists():
            return None
        store.prepare(home)
        return registry.champion(home, config.name)

    return unchanged(home, config, rows.fingerprint, champion)


def _night(home: Home, path: str, overrides: list[str] | None, force: bool, quiet: bool) -> dict[str, Any]:
    from overnight.services import prefect_server

    def meanwhile() -> None:
        for package in ("flows.retrain", "great_expectations", "transformers"):
            import_module(package)

    # the server starts while this process imports what the night will need: both take their time
    with shown(quiet), prefect_server(home, meanwhile=meanwhile):
        from flows.retrain import run_night

        return run_night(path, overrides or [], force)


def _show(home: Home, record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(record)
        return
    from rich.console import Console

    from overnight.report import terminal

    Console().print(terminal(cast(Any, record)), highlight=False)
    page = home.nights / str(record.get("id")) / "report.html"
    if page.exists():
        typer.echo(f"report: {page}")
