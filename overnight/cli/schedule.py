"""`overnight deploy`, `status`: nights that start by themselves, and how they stand."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from overnight import problems
from overnight.cli import app
from overnight.cli.output import AsJson, print_json, print_table, when
from overnight.config import Config, load_config
from overnight.errors import Complaint, UserError
from overnight.home import Home, write_text

Configs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG]...", help="Configs with a schedule; absent: all such of configs/*.yaml."),
]


@app.command()
def deploy(
    configs: Configs = None,
    pool: Annotated[
        str, typer.Option("--pool", metavar="NAME", help="Work pool whose worker runs the nights.")
    ] = "overnight",
    check: Annotated[bool, typer.Option("--check", help="Say what would change; change nothing.")] = False,
    file: Annotated[Path, typer.Option("--file", metavar="PATH", help="The file to write.")] = Path("prefect.yaml"),
    no_file: Annotated[bool, typer.Option("--no-file", help="Write no file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write prefect.yaml and make Prefect hold what it says: a deployment a schedule, triggers, the work pool."""
    from overnight.services import prefect_server

    home, chosen = Home.from_environment(), scheduled(configs)
    with prefect_server(home):
        from flows.deployments import Change, prefect_yaml
        from flows.deployments import deploy as apply

        text = None if no_file else prefect_yaml(chosen, pool)
        before = _written_before(file) if text else None
        changes = apply(home, chosen, Path.cwd(), complete=not configs, pool=pool, check=check)
        if text:
            kind = "unchanged" if text == before else "created" if before is None else "updated"
            if kind != "unchanged" and not check:
                write_text(file, text)
            changes.append(Change(kind, str(file)))
    if as_json:
        print_json([change.__dict__ for change in changes])
        return
    for change in changes:
        would = check and change.kind not in ("unchanged", "paused")
        typer.echo(f"would be {change}" if would else str(change))
    if not chosen:
        typer.echo("no config has a schedule; add one as `schedule: {cron: 0 2 * * *}`")


@app.command()
def status(as_json: AsJson = False) -> None:
    """Say who runs the nights, when the next ones are, how the last ones ended, what the home takes of the disk."""
    from overnight.status import look
    from overnight.upkeep import holder

    home = Home.from_environment()
    up = holder(home)
    facts = look(home, scheduled(up.get("configs") if up else None))
    if as_json:
        print_json(facts)
        return
    up, servers = facts["up"], facts["servers"]
    typer.echo(
        f"up      process {up['pid']} since {when(up['since'])}" if up else "up      not running: `overnight up`"
    )
    for name, server in servers.items():
        typer.echo(f"{name:<7} {server['link'] or 'not running; it is started when needed'}")
    used, free = (f"{facts['disk'][key] / 2**30:.1f} GiB" for key in ("used", "free"))
    typer.echo(f"home    {facts['home']}: {used}, {free} free\n")
    show_nights(facts["nights"])
    last = [(m["model"], _state(m), when(m["time"]), m["night"], _champion(m)) for m in facts["models"]]
    print_table("Last nights", ("model", "state", "when", "night", "champion"), last, "none yet")


def _written_before(file: Path) -> str | None:
    """What an earlier `overnight deploy` wrote; None: there is no such file.

    Raises:
        UserError: when somebody else wrote it.
    """
    from flows.deployments import NOTICE

    text = file.read_text(encoding="utf-8") if file.exists() else None
    if text is not None and text.partition("\n")[0] != NOTICE.partition("\n")[0]:
        rule = "was not written by `overnight deploy`, so it stays; name another with --file, or none with --no-file"
        raise UserError(Complaint(str(file), rule))
    return text


def scheduled(paths: list[str] | None, required: bool = False) -> dict[str, Config]:
    """The configs that have a schedule, by their paths as seen from the current folder.

    Args:
        paths: those named, which must have one; absent: all of configs/*.yaml.
        required: whether there must be one at all.

    Raises:
        UserError: with all mistakes of all files.
    """
    found: dict[str, Config] = {}
    complaints: list[Complaint] = []
    for path in paths or sorted(map(str, Path("configs").glob("*.y*ml"))):
        try:
            config = load_config(path, problems=problems.roles())
        except UserError as error:
            complaints += error.complaints
            continue
        twin = next((p for p, other in found.items() if other.name == config.name), None)
        if config.schedule is None and paths:
            complaints.append(Complaint(path, "has no schedule; add one as `schedule: {cron: 0 2 * * *}`"))
        elif config.schedule is not None and twin:
            complaints.append(Complaint(path, f"has the name of {twin}, and only one of them can be scheduled"))
        elif config.schedule is not None:
            inside = Path(path).absolute().is_relative_to(Path.cwd())
            found[os.path.relpath(path) if inside else str(Path(path).absolute())] = config
    if required and not found and not complaints:
        rule = "none has a schedule; add one as `schedule: {cron: 0 2 * * *}`, or name a config that has"
        complaints.append(Complaint("configs/*.yaml", rule))
    if complaints:
        raise UserError(*complaints)
    return found


def show_nights(nights: list[dict[str, str]]) -> None:
    """A table of the next nights, in the reader's zone and in the schedule's."""
    rows = [(n["model"], _clock(n["here"]), f"{_clock(n['at'])} {n['zone']}", n["cron"], n["config"]) for n in nights]
    print_table("Next nights", ("model", "here", "there", "cron", "config"), rows, "no config has a schedule")


def _clock(iso: str) -> str:
    return datetime.fromisoformat(iso).strftime("%a %Y-%m-%d %H:%M")


def _state(model: dict[str, Any]) -> str:
    if model["running"]:
        return "running"
    return "ended without a word" if model["state"] == "running" else str(model["state"])


def _champion(model: dict[str, Any]) -> str:
    if model["champion"] is None:
        return "none yet"
    days = (time.time() - model["since"]) / 86400
    return f"version {model['champion']}, {days:.0f} days" if days >= 1 else f"version {model['champion']}, since today"
