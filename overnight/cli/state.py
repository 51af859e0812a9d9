"""`overnight ui`, `doctor`, `config`: the state under the home, its pages, its health."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from overnight.cli import app
from overnight.cli.output import AsJson, print_json, print_table
from overnight.errors import Complaint, UserError
from overnight.home import Home, write_text

config_app = typer.Typer(
    help="The configuration file: its schema, and a starter for your own data.", no_args_is_help=True
)
app.add_typer(config_app, name="config")


@app.command()
def ui(
    optuna: Annotated[bool, typer.Option("--optuna", help="Serve optuna-dashboard on the studies too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Serve the MLflow and Prefect pages on the state under the home; ctrl-c ends them."""
    from overnight.dashboard import dashboard_server
    from overnight.services import mlflow_server, prefect_server
    from overnight.tracking import store

    home = Home.from_environment()
    with ExitStack() as servers:
        links = {"optuna": servers.enter_context(dashboard_server(home))} if optuna else {}
        store.prepare(home)
        links["prefect"] = servers.enter_context(prefect_server(home)).removesuffix("/api")
        links["mlflow"] = servers.enter_context(mlflow_server(home))
        if as_json:
            print_json(links)
        else:
            names = {"mlflow": "MLflow", "prefect": "Prefect", "optuna": "Optuna"}
            lines = [f"{name:<8} {links[key]}" for key, name in names.items() if key in links]
            typer.echo("\n".join([*lines, "ctrl-c ends them"]))
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            typer.echo("ended", err=True)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, reachable and stale; heal what is safe to heal."""
    from overnight.doctor import examine

    findings = examine(Home.from_environment())
    if as_json:
        print_json([finding.__dict__ for finding in findings])
    else:
        print_table("Doctor", ("", "what", "found"), [(f.mark, f.what, f.found) for f in findings])
    if any(f.state == "broken" for f in findings):
        raise typer.Exit(4)


@config_app.command("schema")
def schema() -> None:
    """Print the JSON schema of a config file, for editors."""
    from overnight.config import json_schema

    print_json(json_schema())


@config_app.command("init")
def init(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; absent: standard output.")] = None,
) -> None:
    """Print a commented starter config for one's own data."""
    from importlib.resources import files

    text = files("overnight").joinpath("starter.yaml").read_text(encoding="utf-8")
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise UserError(Complaint(str(out), "exists already; choose another name or remove it"))
    try:
        write_text(out, text)
    except OSError as error:
        raise UserError(Complaint(str(out), "cannot be written", error.strerror)) from None
    typer.echo(f"{out}: edit name, data → source and data → columns, then `overnight validate {out}`")
