"""`overnight notify`: who is told how a night ended, and whether that works."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from overnight.cli import app
from overnight.cli.output import AsJson, ConfigFile, Overrides, print_json, print_table


@app.command()
def notify(
    config: ConfigFile,
    overrides: Overrides = None,
    test: Annotated[bool, typer.Option("--test", help="Send a test message to each address.")] = False,
    as_json: AsJson = False,
) -> None:
    """List who is told how a night ended; with --test, send each a message and say which arrived."""
    from overnight import problems
    from overnight.config import load_config
    from overnight.notify import send

    facts = load_config(config, overrides or (), problems=problems.roles())
    names = list(dict.fromkeys(address.to_env for address in facts.notify))
    if test:
        body = f"A test message of `overnight notify {config} --test`: what a night has to say arrives here."
        found = send(names, f"{facts.name}: a test", body)
        states = {name: found[name] or "arrived" for name in names}
    else:
        states = {name: "set" if os.environ.get(name, "").strip() else "the variable is not set" for name in names}
    rows = [(address.to_env, ", ".join(address.on), states[address.to_env]) for address in facts.notify]
    if as_json:
        print_json([dict(zip(("to_env", "on", "state"), row, strict=True)) for row in rows])
    else:
        print_table(f"Notifications of {facts.name}", ("variable", "told when", "state"), rows, "nobody is told")
    if test and any(found.values()):
        raise typer.Exit(4)
