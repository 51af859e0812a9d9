"""`overnight serve`: a registered model over HTTP, always the version behind its alias."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from overnight.cli import app
from overnight.errors import Complaint, UserError
from overnight.home import Home
from overnight.serving.options import Options

LIMITS = "Limits"


@app.command()
def serve(
    model: Annotated[
        str, typer.Argument(metavar="NAME[@ALIAS]", help="Name of the registered model; absent alias: champion.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 8000,
    follow: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Between two looks at where the alias points.")
    ] = Options.follow_seconds,
    shadow: Annotated[
        float, typer.Option(min=0, max=1, metavar="SHARE", help="Share of the texts that the candidate is asked too.")
    ] = Options.shadow,
    log_scores: Annotated[
        bool,
        typer.Option(
            "--log-scores",
            envvar="OVERNIGHT_LOG_SCORES",
            help="Write a line a text under scored/ in the home, without the text.",
        ),
    ] = False,
    log_texts: Annotated[bool, typer.Option("--log-texts", help="Write these lines with the texts.")] = False,
    max_batch: Annotated[
        int, typer.Option(min=1, help="Texts that the model is given at once.", rich_help_panel=LIMITS)
    ] = Options.max_batch,
    max_rows: Annotated[
        int, typer.Option(min=1, help="Texts of a request.", rich_help_panel=LIMITS)
    ] = Options.max_rows,
    max_bytes: Annotated[
        int, typer.Option(min=1, help="Bytes of a request.", rich_help_panel=LIMITS)
    ] = Options.max_bytes,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Texts that wait; beyond, requests get 429.", rich_help_panel=LIMITS)
    ] = Options.max_queue,
) -> None:
    """Serve a model over HTTP; it follows its alias without a failed request."""
    from overnight.serving.server import run

    if max_queue < max_rows:
        raise UserError(Complaint("--max-queue", f"must be at least --max-rows, {max_rows}", str(max_queue)))
    name, _, alias = model.partition("@")
    options = Options(
        name=name,
        alias=alias or Options.alias,
        follow_seconds=follow,
        shadow=shadow,
        log_scores=log_scores or log_texts,
        log_texts=log_texts,
        max_bytes=max_bytes,
        max_rows=max_rows,
        max_queue=max_queue,
        max_batch=max_batch,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("overnight.serving")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def told(address: str) -> None:
        typer.echo(f"{name}@{options.alias} on {address}, described on {address}/docs; ctrl-c ends it", err=True)

    run(Home.from_environment(), options, host, port, told)
