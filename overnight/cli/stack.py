"""`overnight init-stack`, `backup`, `restore`: a shared installation's passwords; all state in a folder, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from overnight.cli import app
from overnight.cli.output import AsJson, print_json
from overnight.home import Home, Stores

HomeOnly = Annotated[bool, typer.Option("--home-only", help="The home alone, without what lies behind shared servers.")]


@app.command("init-stack")
def init_stack(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")] = Path("docker/.env"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file, and with it all passwords.")] = False,
) -> None:
    """Write random passwords for docker/compose.yaml, readable by you alone; none is shown."""
    from overnight.stack import write_passwords

    write_passwords(out, force)
    typer.echo(f"{out}: written; keep a copy where you keep passwords")


@app.command()
def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    home_only: HomeOnly = False,
    as_json: AsJson = False,
) -> None:
    """Copy all state into a folder: home, databases, artifacts. Servers may run, nights may not."""
    from overnight.backup import back_up

    home = Home.from_environment()
    _tell("backed up", back_up(home, Stores.from_environment(), folder, home_only), folder, as_json)


@app.command()
def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that `overnight backup` wrote.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the state that is there.")] = False,
    home_only: HomeOnly = False,
    as_json: AsJson = False,
) -> None:
    """Put a backup back, after its checksums were verified. Nothing may run on the state that it replaces."""
    from overnight.restore import put_back

    home = Home.from_environment()
    _tell("restored", put_back(home, Stores.from_environment(), folder, force, home_only), folder, as_json)


def _tell(what: str, manifest: dict[str, Any], folder: Path, as_json: bool) -> None:
    size = sum(facts["bytes"] for facts in manifest["files"].values())
    facts = {"folder": str(folder), "files": len(manifest["files"]), "bytes": size, "made": manifest["made"]}
    facts |= {"databases": manifest["databases"], "artifacts": manifest["artifacts"]}
    if as_json:
        print_json(facts)
        return
    parts = ["the home", *[f"the database {name}" for name in manifest["databases"]]]
    parts += ["the artifacts"] if manifest["artifacts"] else []
    typer.echo(f"{folder}: {what} {', '.join(parts)}; {facts['files']:,} files, {size / 2**20:.1f} MiB")
