"""What the commands share: options, printing facts as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the model, as configs/sentiment.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as training.epochs=1; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the ledger.")]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the registered model.")]


def print_json(facts: Any) -> None:
    """Facts on standard output, for programs."""
    sys.stdout.write(json.dumps(facts, indent=2, default=str, ensure_ascii=False) + "\n")
    sys.stdout.flush()  # who reads a pipe should not have to wait for the end of `overnight ui`


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], empty: str = "nothing yet") -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not rows:
        console.print(f"{title}: {empty}", highlight=False)
        return
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[Text("" if cell is None else str(cell)) for cell in row])
    console.print(table)


def when(seconds: float | None) -> str:
    """A time in the reader's own zone."""
    from datetime import datetime

    return "" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
