"""From the source to tokenized rows: ingest, validate, split, tokenize."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from overnight import problems
from overnight.config import Data, Model, Split, Validation
from overnight.data.ingest import Ingested
from overnight.data.split import Splitted, split_rows
from overnight.data.tokenization import Tokenized
from overnight.data.tokenization import tokenize as tokenize_rows
from overnight.errors import OvernightError
from overnight.expectations import Validated
from overnight.intake import judge_rows, read_rows
from overnight.report import validation_rows
from overnight.training.models import load_tokenizer, resolve_base
from tasks.artifacts import markdown, table


def _may_pass(task: Any, run: Any, state: Any) -> bool:
    """Retry what may pass by itself, such as a hub that is down; a user's mistake does not."""
    try:
        state.result()
    except OvernightError:
        return False
    except Exception:
        return True
    return False


@task(name="ingest", cache_policy=NO_CACHE, retries=2, retry_delay_seconds=[10, 60], retry_condition_fn=_may_pass)
def ingest(data: Data, problem: str, folder: Path, where: str) -> Ingested:
    """Reads the source; retried, since a hub or a mounted folder may be away for a moment."""
    rows = read_rows(data, problem, folder, where)
    lines = [
        f"**{rows.rows:,} rows** of {rows.source_rows:,} in `{rows.source}` ({rows.encoding or 'no encoding'})",
        "",
    ]
    lines += [f"- `{label}`: {count:,}" for label, count in rows.labels.items()]
    lines += ["", f"{rows.repaired:,} texts repaired, {rows.broken_rows:,} broken rows left out", ""]
    markdown("ingest", "\n".join([*lines, f"fingerprint `{rows.fingerprint}`"]), "What was read")
    return rows


@task(name="validate", cache_policy=NO_CACHE)
def validate(
    rows: Ingested,
    validation: Validation,
    slices: tuple[str, ...],
    problem: str,
    model: Model,
    previous: Mapping[str, Any] | None,
    folder: Path,
    docs_folder: Path,
) -> Validated:
    """Judges the rows; refusing the night is the flow's to do, after the table is on the page."""
    found = judge_rows(rows, validation, slices, problem, model, previous, folder, docs_folder)
    table(
        "validation",
        validation_rows(cast(Any, found.results)),
        f"{found.rows_clean:,} of {found.rows_in:,} rows accepted",
    )
    return found


@task(name="split", cache_policy=NO_CACHE)
def split(clean: Validated, shares: Split, problem: str, folder: Path) -> Splitted:
    """Puts each row on its side."""
    kind = problems.get(problem)
    target = kind.target if kind.labelled else None
    sides = split_rows(clean.path, shares, folder, text_roles=kind.split_roles or kind.text_roles, target=target)
    counts = [{"side": side, "rows": rows, **sides.labels.get(side, {})} for side, rows in sides.rows.items()]
    table("split", counts, "Rows a side; withheld rows are near-duplicates of a more protected side")
    return sides


@task(name="tokenize", cache_policy=NO_CACHE)
def tokenize(sides: Splitted, problem: str, model: Model, facts: dict[str, Any], folder: Path) -> dict[str, Tokenized]:
    """Tokenizes what the trials read; the library's cache knows texts that were tokenized before."""
    kind = problems.get(problem)
    tokenizer = load_tokenizer(resolve_base(model.base), model.revision)
    done = {
        side: tokenize_rows(sides.paths[side], kind, tokenizer, facts, model.max_length, folder)
        for side in ("train", "validation")
    }
    shown = [{"side": side, "rows": t.rows, "tokens": t.tokens, "cached": t.cached} for side, t in done.items()]
    table("tokens", shown, f"Cut at {model.max_length} tokens")
    return done
