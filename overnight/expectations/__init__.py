"""Validation: which rows are refused, and whether what came in is fit to train on.

    validated = validate_rows(path, config.validation, columns=("text", "label"), max_length=128, tokenizer=tokenizer,
                              previous=None, folder=night / "data", docs_folder=night / "data-docs")
    if not validated.accepted: ...

Two questions, answered one after the other. Row by row (`rows.py`): bad rows go to `quarantine.parquet`, each with its
reasons. As a whole (`suite.py`): Great Expectations judges a suite built from the `validation:` section of the config.
Texts appear neither in the record nor in the Data Docs, unless `validation.show_examples` asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.config import Validation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Validated:
    """What the validation found; `dataclasses.asdict` makes it JSON."""

    path: str
    """Parquet file of the rows that were accepted, in the order they came."""
    quarantine: str
    """Parquet file of the refused rows, with the column `reasons` (`duplicate;contradiction`)."""
    rows_in: int
    rows_clean: int
    rows_refused: int
    reasons: dict[str, int]
    """Reason → rows; a row may have several."""
    results: list[dict[str, Any]]
    """One entry an expectation: `expectation`, `severity` (block, warn), `passed`, `observed` and `limit` (numbers, or
    None), `rows` (the first source rows that fail, at most 5), `text` (one sentence), `examples` (if asked for)."""
    accepted: bool
    """Whether no blocking expectation failed."""
    why: list[str]
    """Empty, or for each blocking expectation that failed which it is and which rows."""
    docs: str
    """The Data Docs page."""
    facts: dict[str, Any]
    """Of the accepted rows: `labels`, `label_shares`, `chars` and `tokens` (quantiles), `languages` (shares). Kept when
    the night is accepted, they are the `previous` of the next."""


def validate_rows(
    path: str | Path,
    validation: Validation,
    *,
    columns: Sequence[str] = ("text", "label"),
    slices: Sequence[str] = (),
    text_roles: Sequence[str] = ("text",),
    target: str | None = "label",
    labelled: bool = True,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None,
    previous: Mapping[str, Any] | None,
    folder: Path,
    docs_folder: Path,
) -> Validated:
    """Sorts out the bad rows and judges the table.

    Args:
        path: Parquet file of the ingested rows: row_id, text_id, source_row, the problem's columns, the slices.
        columns: the columns the problem needs.
        slices: the columns the evaluation wants besides; missing ones are for `expect.columns` to judge.
        text_roles: those of `columns` that hold text; several make one input (a pair), read together.
        target: the column of what is to be predicted; None for a problem without one.
        labelled: whether the target is one label of a set.
        max_length: tokens after which an input is cut.
        tokenizer: counts tokens; None: the expectation `tokens` is left out.
        previous: `Validated.facts` of the last accepted night.
        folder: where `clean.parquet` and `quarantine.parquet` go.
        docs_folder: where the Data Docs page goes.

    Raises:
        UserError: when the table lacks a column of the problem, or an entry of `validation.also` cannot be read.
        NightFailed: when Great Expectations itself breaks.
    """
    from overnight.expectations import rows, suite

    label = target if labelled else None
    table = rows.read(Path(path), columns, text_roles, target, label)
    refused = rows.refusals(table, validation.expect, label, previous)
    bad = refused.any(axis=1).to_numpy()
    measured = rows.measure(table, ~bad, validation.expect, text_roles, label, max_length, tokenizer)
    checks = suite.checks(
        validation, table, refused, measured, [*columns, *slices], text_roles, target, label, max_length, previous
    )
    folder.mkdir(parents=True, exist_ok=True)
    clean, quarantine = rows.write(table, refused, [*text_roles, *([target] if target else [])], folder)
    results = suite.judge(checks, docs_folder, rows=table, validation=validation, text_roles=text_roles, target=target)
    failed = [r for r in results if not r["passed"] and r["severity"] == "block"]
    count = int(bad.sum())
    return Validated(
        path=str(clean),
        quarantine=str(quarantine),
        rows_in=len(table),
        rows_clean=len(table) - count,
        rows_refused=count,
        reasons={str(reason): int(count) for reason, count in refused.sum().items() if count},
        results=results,
        accepted=not failed,
        why=[_why(result) for result in failed],
        docs=str(docs_folder / "index.html"),
        facts=measured.facts,
    )


def _why(result: dict[str, Any]) -> str:
    shown = f" (first source rows: {', '.join(map(str, result['rows']))})" if result["rows"] else ""
    return f"{result['expectation']}: {result['text']}{shown}"
