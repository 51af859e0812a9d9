"""`overnight monitor`: drift and live quality of the champion."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from overnight.cli import app
from overnight.cli.output import AsJson, ModelName, print_json, print_table, when
from overnight.errors import Complaint, NightFailed, OvernightError, UserError
from overnight.home import Home, read_json
from overnight.services import prefect_server, server_process

if TYPE_CHECKING:
    from overnight.config.operations import Monitor
    from overnight.monitor.judge import File
    from overnight.monitor.traffic import Cursor
    from overnight.tracking.registry import Version


@app.command()
def monitor(
    name: ModelName,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="CSV, TSV, JSONL or Parquet with new texts; absent: logged scores."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="ROLE=COLUMN", help="Where a column has another name, as text=body."),
    ] = None,
    encoding: Annotated[str, typer.Option("--encoding", help="Of a text file; absent: what is detected.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remember nothing, and raise no alarm.")] = False,
    watch: Annotated[
        float | None, typer.Option("--watch", metavar="SECONDS", min=1, help="Repeat for ever, on logged scores.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether what the champion scores still looks like its training rows, and how good it is on labelled ones."""
    from overnight.cli.score import pairs
    from overnight.monitor.judge import File

    if watch and file:
        raise UserError(Complaint("--watch", "watches logged scores; leave FILE out", str(file)))
    labelled = None if file is None else File(file, pairs("--column", columns), encoding)
    home = Home.from_environment()

    def look() -> dict[str, Any]:
        result = _once(home, name, labelled, not dry_run, quiet=as_json)
        if as_json:
            print_json(result)
        else:
            _show(result)
        return result

    if watch is None:
        look()
    else:
        _watch(look, home.root / "scored" / name, watch)


def _watch(look: Callable[[], dict[str, Any]], folder: Path, seconds: float) -> None:
    """Looks whenever there are new lines; what hinders a look hinders none of the next ones, and is told once."""
    from overnight.monitor.traffic import end

    began, told = False, ""
    settled: list[Cursor | None] | None = None
    try:
        while True:
            now = [end(folder)]
            if now != settled:
                try:
                    result = look()
                    unheard = str(result["told"]).startswith("nobody")  # told again until somebody listens
                    began, settled, told = True, None if unheard else now, ""
                except OvernightError as error:
                    if isinstance(error, UserError) and not began:  # a name that is none will not become one
                        raise
                    if str(error) != told:
                        typer.echo(str(error), err=True)
                    began, told = True, str(error)
            time.sleep(seconds)
    except KeyboardInterrupt:
        typer.echo("ended", err=True)  # as it is meant to


def _once(home: Home, name: str, labelled: File | None, keep: bool, quiet: bool) -> dict[str, Any]:
    from overnight.monitor.run import monitor as judge
    from overnight.monitor.state import alarmed, save
    from overnight.tracking import ledger, registry, store

    store.prepare(home)
    version = registry.champion(home, name)
    if version is None:
        registry.versions(home, name)  # an unknown name is the user's mistake
        raise UserError(Complaint(name, "has no champion yet, so there is nothing to compare with"))
    settings, path = _settings(home, version)
    folder = registry.download(home, version)
    progress: Callable[[dict[str, Any]], None] = (lambda record: None) if quiet else _tell
    since = max((entry.time for entry in ledger.read(home, name) if entry.action in ledger.MOVES), default=0.0)
    result = judge(home, version, folder, settings, labelled, since=since, keep=keep, progress=progress)
    result["settings"] = path
    result["told"] = None
    if result["fired"] and not keep:
        result["told"] = "nobody: --dry-run"
    elif result["fired"]:
        why = _raise_alarm(home, name, result)
        if why is None:
            alarmed(home, name, version.number, result["time"])
            result["told"] = "Prefect: event overnight.drift"
        else:
            command = f"overnight run {version.tags.get('overnight.config', 'CONFIG')} --force"
            result["told"] = f"nobody: {why}; to retrain: {command}"
    if keep:
        save(home, result)
    return result


def _settings(home: Home, version: Version) -> tuple[Monitor, str]:
    """The `monitor:` section of the model's config: as the file says now, else as it was in the champion's night."""
    from pydantic import ValidationError

    from overnight import problems
    from overnight.config import load_config
    from overnight.config.operations import Monitor

    path = version.tags.get("overnight.config", "")
    if path and Path(path).is_file():
        return load_config(path, problems=problems.roles()).monitor, path
    then = home.nights / version.tags.get("overnight.night", "") / "config.json"
    found = read_json(then)
    if found:
        try:
            return Monitor.model_validate(found.get("monitor") or {}), str(then)
        except ValidationError:  # of another version of overnight
            pass
    return Monitor(), "the defaults"


def _raise_alarm(home: Home, name: str, result: dict[str, Any]) -> str | None:
    """Sends the event to the Prefect server that is configured or runs already; why nobody was told, or None."""
    if home.prefect_api is None and server_process(home.prefect / "server.json") is None:
        return "no Prefect server runs"
    try:
        with prefect_server(home):
            from flows.drift import tell_drift

            facts = {key: result[key] for key in ("version", "source", "rule", "recent", "text")}
            heard = tell_drift(name, facts)
    except NightFailed as error:
        return str(error)
    return None if heard else f"no deployment of {name} listens (overnight deploy)"


def _tell(record: dict[str, Any]) -> None:
    typer.echo(f"{record['source']}: {record['rows']:,} rows judged", err=True)


def _show(result: dict[str, Any]) -> None:
    names = list(dict.fromkeys(name for record in result["windows"] for name in record["findings"]))
    rows = [
        (
            f"{when(r['since'])} – {when(r['until'])}" if r["since"] else f"{r['source']} {n}",
            f"{r['rows']:,}",
            "DRIFTED" if r["drifted"] else "",
            *(_cell(r["findings"].get(name)) for name in names),
        )
        for n, r in enumerate(result["windows"], start=1)
    ]
    title = f"{result['model']} version {result['version']} on {result['source']}"
    print_table(title, ("window", "rows", "", *names), rows, "no new window")
    for r in result["windows"]:
        if r["quality"]:
            q = r["quality"]
            typer.echo(
                f"{q['metric']} {q['value']:.3f} [{q['low']:.3f}, {q['high']:.3f}] on {q['rows']:,} labelled rows"
            )
    if result["waiting"]:
        typer.echo(f"{result['waiting']:,} rows wait for their window to fill")
    if result["unjudged"]:
        typer.echo(f"{result['unjudged']:,} rows were not judged: there was nothing to compare them with")
    if result["missing"]:
        typer.echo(f"! {result['missing']}")
    typer.echo(result["text"])
    if result["told"]:
        typer.echo(f"told {result['told']}")


def _cell(finding: dict[str, Any] | None) -> str:
    if finding is None:
        return ""
    mark = "!" if finding["drifted"] else ""
    return f"{mark}{finding['effect']:.3f} ({finding['text']})"
