"""The table as a whole, judged by Great Expectations: one suite built from the config, one Data Docs page.

Where a built-in expectation fits a column as it is, it is used; what needs a look at other rows (duplicates,
contradictions) or at a library (damage, tokens, language) is a helper column of zeros and ones whose mean is judged.
What it is shown of a text is its length, so that it needs no text in memory; an entry of `validation.also` brings the
columns that it names.
Great Expectations is asked for counts only, never for values, so that no text can reach its results or pages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import numpy as np
import pandas as pd
import pyarrow as pa
from great_expectations.data_context.data_context.context_factory import project_manager
from great_expectations.data_context.types.base import ProgressBarsConfig
from great_expectations.exceptions import DataContextRequiredError
from great_expectations.expectations.metadata_types import FailureSeverity
from great_expectations.render.renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView

from overnight.config import FurtherExpectation, Validation
from overnight.data.store import read_rows
from overnight.errors import Complaint, NightFailed, UserError, nearest
from overnight.expectations.rows import LANGUAGE_SAMPLE, TOKEN_SAMPLE, Measured, Table, known_labels, pieces
from overnight.home import write_text

SHOWN = 5
UNSEEN = ["row_id", "text_id", "refusal"]  # nothing asks for them, and Great Expectations hashes every column
HELPER = "measured: "  # starts the name of a helper column; shown in the Data Docs
_ONE_AT_A_TIME = threading.Lock()  # Great Expectations keeps "the" context of a process


@dataclass
class Check:
    """One entry of the record, made of one Great Expectations expectation or, a column each, of several."""

    name: str
    severity: str
    limit: float | int | None
    say: Callable[[Any], str]
    """Observed value → sentence."""
    expectations: list[gxe.Expectation]
    """Empty: there was nothing to look at; passes."""
    mask: np.ndarray | None = None
    """The rows that fail."""
    helpers: dict[str, Any] = field(default_factory=dict)
    """What is judged in helper columns: the name behind `measured: ` → values of all rows, or the one of all."""
    observed: Any = field(default=None, init=False)
    passed: bool = field(default=True, init=False)


def checks(
    validation: Validation,
    table: Table,
    refused: pd.DataFrame,
    measured: Measured,
    columns: Sequence[str],
    text_roles: Sequence[str],
    target: str | None,
    label: str | None,
    max_length: int,
    previous: Mapping[str, Any] | None,
) -> list[Check]:
    """The suite of a config: every expectation that is not `off`. An empty table has rows and columns to judge only.

    Raises:
        UserError: when an entry of `validation.also` names no expectation or column, or has wrong arguments.
    """
    expect = validation.expect
    bad = refused.any(axis=1).to_numpy()

    def failing(*reasons: str) -> np.ndarray:
        return refused[[r for r in reasons if r in refused]].any(axis=1).to_numpy()

    def at_most(name: str, column: np.ndarray, limit: float, what: str, severity: str) -> Check:
        judged = gxe.ExpectColumnMeanToBeBetween(column=HELPER + name, max_value=limit)
        say = lambda observed: f"{percent(observed)} of rows {what}, limit {percent(limit)}"  # noqa: E731
        return Check(name, severity, limit, say, [judged], column == 1, {name: column})

    few, many = expect.row_count.min, expect.row_count.max
    size = f"at least {few:,}" + (f" and at most {many:,}" if many else "")
    lost = [c for c in columns if c not in table.columns]
    found = [
        Check(
            "row_count",
            expect.row_count.severity,
            few if many is None or len(table) < few else many,
            lambda observed: f"{observed:,} rows came in, expected {size}",
            [gxe.ExpectTableRowCountToBeBetween(min_value=few, max_value=many)],
        ),
        Check(
            "columns",
            expect.columns.severity,
            None,
            lambda observed: f"missing: {', '.join(lost)}" if lost else f"present: {', '.join(columns)}",
            [gxe.ExpectTableColumnsToMatchSet(column_set=list(columns), exact_match=False)],
        ),
    ]
    if not len(table):
        return [c for c in found if c.severity != "off"]

    limit = expect.not_null.max_share
    found.append(
        Check(
            "not_null",
            expect.not_null.severity,
            limit,
            lambda observed: f"{percent(observed)} of rows lack a text or a label, limit {percent(limit)}",
            [
                gxe.ExpectColumnValuesToNotBeNull(column=c, mostly=mostly(limit))
                for c in dict.fromkeys((*text_roles, *([target] if target else [])))
            ],
            failing("null_text", "null_label"),
        )
    )
    if label:
        known = known_labels(expect, previous)
        kept = np.where(bad | (table.labels < 0), np.nan, table.labels)
        found += _labels(validation, known, label, failing("unknown_label"), kept)
        found.append(_label_share(validation, measured, previous))
    bounds = expect.characters
    found += [
        Check(
            "characters",
            bounds.severity,
            bounds.max_share,
            lambda observed: (
                f"{percent(observed)} of texts have fewer than {bounds.min:,} or more than {bounds.max:,} characters, "
                f"limit {percent(bounds.max_share)}"
            ),
            [
                gxe.ExpectColumnValuesToBeBetween(
                    column=f"{HELPER}characters of {role}",
                    min_value=bounds.min,
                    max_value=bounds.max,
                    mostly=mostly(bounds.max_share),
                )
                for role in text_roles
            ],
            failing("too_short", "too_long"),
            {f"characters of {role}": count for role, count in table.characters.items()},
        ),
        at_most(
            "duplicates",
            failing("duplicate"),
            expect.duplicates.max_share,
            "repeat an earlier row",
            expect.duplicates.severity,
        ),
        at_most(
            "encoding_damage",
            failing("encoding_damage"),
            expect.encoding_damage.max_share,
            "carry damaged characters",
            expect.encoding_damage.severity,
        ),
    ]
    if label:
        found.append(
            at_most(
                "contradictions",
                failing("contradiction"),
                expect.contradictions.max_share,
                "have a text that occurs with another label too",
                expect.contradictions.severity,
            )
        )
    if not np.isnan(measured.cut).all():
        what = f"have more than {max_length} tokens and are cut{_sampled(measured.cut, TOKEN_SAMPLE)}"
        found.append(at_most("tokens", measured.cut, expect.tokens.max_share_cut, what, expect.tokens.severity))
    if not np.isnan(measured.foreign).all():
        codes = ", ".join(expect.language.expected or ())
        what = f"are not in {codes}{_sampled(measured.foreign, LANGUAGE_SAMPLE)}"
        share = round(1 - expect.language.min_share, 9)
        found.append(at_most("language", measured.foreign, share, what, expect.language.severity))
    found.append(at_most("refused", bad, validation.max_refused, "were refused", "block"))
    seen = [c for c in table.columns if c not in UNSEEN]
    found += [_further(entry, i, seen) for i, entry in enumerate(validation.also) if entry.severity != "off"]
    return [c for c in found if c.severity != "off"]


def judge(
    found: list[Check],
    docs_folder: Path,
    *,
    rows: Table,
    validation: Validation,
    text_roles: Sequence[str],
    target: str | None,
) -> list[dict[str, Any]]:
    """Runs the suite on the table with its helper columns and writes the Data Docs page; see `Validated.results`.

    Raises:
        NightFailed: when an expectation could not be evaluated.
    """
    frame = _frame(found, rows, validation, text_roles, target)
    for number, check in enumerate(found):
        for expectation in check.expectations:
            expectation.meta = {"check": number}
            expectation.severity = FailureSeverity.CRITICAL if check.severity == "block" else FailureSeverity.WARNING
    with _ONE_AT_A_TIME, _context() as context:
        asset = context.data_sources.add_pandas("rows").add_dataframe_asset("rows")
        tonight = asset.add_batch_definition_whole_dataframe("tonight")
        every = [e for check in found for e in check.expectations]
        suite = context.suites.add(gx.ExpectationSuite(name="overnight", expectations=every))
        definition = gx.ValidationDefinition(name="overnight", data=tonight, suite=suite)
        outcome = context.validation_definitions.add(definition).run(
            batch_parameters={"dataframe": frame},
            result_format={"result_format": "BASIC", "exclude_unexpected_values": True},
        )
        for result in outcome.results:
            check = found[result.expectation_config.meta["check"]]
            _refuse_exceptions(check, result.exception_info)
            result.result = {k: plain(v) for k, v in result.result.items() if plain(v) is not None}
            check.passed = check.passed and bool(result.success)
            check.observed = max(
                filter(lambda v: v is not None, (check.observed, _observed(result.result))), default=None
            )
        records = [_record(check, rows, validation.show_examples, text_roles) for check in found]
        for result in outcome.results:
            record = records[result.expectation_config.meta["check"]]
            result.expectation_config.description = escape(_describe(record), quote=False)
        page = ValidationResultsPageRenderer().render(outcome)
    page.sections = page.sections[1:]  # their overview calls a table with one failed warning "Failed"
    view = DefaultJinjaPageView(custom_views_directory=str(Path(__file__).parent))
    docs_folder.mkdir(parents=True, exist_ok=True)
    refused = any(not r["passed"] and r["severity"] == "block" for r in records)
    html = view.render(page, template="data_docs.j2", refused=refused, checks=records, gx_version=gx.__version__)
    write_text(docs_folder / "index.html", html)
    return records


def _frame(
    found: list[Check], rows: Table, validation: Validation, text_roles: Sequence[str], target: str | None
) -> pd.DataFrame:
    """What Great Expectations sees: the helper columns, labels as categories, and the columns that `validation.also`
    speaks of; of the others, of all texts that is, no more than where they have no cell."""
    asked = str([entry.arguments for entry in validation.also if entry.severity != "off"])
    told = dict.fromkeys((*text_roles, *([target] if target else [])))
    whole = [name for name in rows.columns if name in asked and name not in UNSEEN]
    columns: dict[str, Any] = {name: np.zeros(len(rows), np.int8) for name in rows.columns if name not in UNSEEN}
    for name in set(told) & columns.keys():
        there = ~np.isnan(rows.characters[name]) if name in rows.characters else rows.targeted
        columns[name] = np.where(there, 1, np.nan).astype(np.float32)
    if rows.label_names and target:
        columns[target] = pd.Categorical.from_codes(
            rows.labels.astype(np.int32, copy=False), pd.Index(rows.label_names)
        )
    if whole:
        texts = [name for name in told if name in whole]
        columns |= pa.concat_tables(pieces(rows.path, texts, whole)).to_pandas()
    helpers = {HELPER + name: values for check in found for name, values in check.helpers.items()}
    return pd.DataFrame(columns | helpers, index=range(len(rows)))


def percent(share: float | None) -> str:
    """`8.1 %`."""
    return "none" if share is None else f"{round(100 * share, 1):g} %"


def plain(value: Any) -> float | int | bool | None:
    """A number as Python's own; None for everything else, because it might be a piece of text."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, (bool, int, float)) and value == value else None


def mostly(share: float) -> float:
    """The share that must pass, where at most `share` may fail."""
    return round(1 - share, 9)


def _labels(
    validation: Validation, known: list[str] | None, target: str, mask: np.ndarray, kept: np.ndarray
) -> list[Check]:
    rule = validation.expect.labels
    result = [
        Check(
            "label_count",
            rule.severity,
            rule.min,
            lambda observed: f"{observed or 0} different labels among the accepted rows, expected at least {rule.min}",
            [gxe.ExpectColumnUniqueValueCountToBeBetween(column=HELPER + "label_count", min_value=rule.min)],
            helpers={"label_count": kept},
        )
    ]
    if known is None:
        text = "no labels are given and no earlier night was accepted: those found are taken as known"
        return [Check("labels", rule.severity, rule.max_share, lambda observed: text, []), *result]
    return [
        Check(
            "labels",
            rule.severity,
            rule.max_share,
            lambda observed: (
                f"{percent(observed)} of labels are not one of the {len(known)} known, limit {percent(rule.max_share)}"
            ),
            [gxe.ExpectColumnValuesToBeInSet(column=target, value_set=known, mostly=mostly(rule.max_share))],
            mask,
        ),
        *result,
    ]


def _label_share(validation: Validation, measured: Measured, previous: Mapping[str, Any] | None) -> Check:
    rule = validation.expect.label_share
    before, now = (previous or {}).get("label_shares"), measured.facts.get("label_shares") or {}
    if not before or not now:
        text = "no earlier accepted night to compare with"
        return Check("label_share", rule.severity, rule.max_change, lambda observed: text, [])
    changes = {label: now.get(label, 0.0) - before.get(label, 0.0) for label in sorted({*before, *now})}
    label = max(changes, key=lambda name: abs(changes[name]))
    return Check(
        "label_share",
        rule.severity,
        rule.max_change,
        lambda observed: (
            f"the share of {label!r} went from {percent(before.get(label, 0.0))} to {percent(now.get(label, 0.0))}, "
            f"limit {100 * rule.max_change:g} points either way"
        ),
        [gxe.ExpectColumnMaxToBeBetween(column=HELPER + "label_share", max_value=rule.max_change)],
        helpers={"label_share": round(abs(changes[label]), 9)},
    )


def _further(entry: FurtherExpectation, number: int, columns: Sequence[str]) -> Check:
    place = f"validation → also → {number}"
    known = {
        c.expectation_type: c
        for n in dir(gxe)
        if n.startswith("Expect") and hasattr(c := getattr(gxe, n), "expectation_type")
    }
    name = entry.expect
    if name not in known:
        raise UserError(Complaint(f"{place} → expect", "not an expectation", repr(name), nearest(name, known)))
    column = entry.arguments.get("column")
    if column is not None and column not in columns:
        where = f"{place} → arguments → column"
        raise UserError(Complaint(where, "no such column", repr(column), nearest(str(column), columns)))
    try:
        expectation = known[name](**entry.arguments)
    except (TypeError, ValueError) as error:  # pydantic's are ValueErrors
        said = (
            "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            if hasattr(error, "errors")
            else str(error)
        )
        raise UserError(Complaint(f"{place} → arguments", f"not what {name} takes ({said})")) from None
    of = f" of {column}" if column else ""
    say = lambda observed: f"{name}{of}" + ("" if observed is None else f", observed {observed:g}")  # noqa: E731
    return Check(name, entry.severity, None, say, [expectation])


def _sampled(column: np.ndarray, size: int) -> str:
    return f" (of {size:,} sampled rows)" if np.count_nonzero(~np.isnan(column)) == size else ""


def _observed(result: dict[str, Any]) -> Any:
    """The number judged: a share for expectations of single values, else what Great Expectations calls observed."""
    for key in ("unexpected_percent_nonmissing", "unexpected_percent"):
        if key in result:
            return result[key] / 100
    return result.get("observed_value")


def _refuse_exceptions(check: Check, info: Mapping[str, Any]) -> None:
    raised = [i for i in (info, *info.values()) if isinstance(i, Mapping) and i.get("raised_exception")]
    if raised:
        # the message may quote a value, the last line of the traceback starts with the exception's name
        last = str(raised[0].get("exception_traceback") or "").strip().rpartition("\n")[2]
        kind = last.partition(":")[0].strip() or "an exception"
        raise NightFailed(Complaint(f"validation → {check.name}", "Great Expectations could not evaluate it", kind))


def _record(check: Check, rows: Table, show: bool, text_roles: Sequence[str]) -> dict[str, Any]:
    failed = np.flatnonzero(check.mask) if check.mask is not None else np.zeros(0, int)
    first = failed[np.argsort(rows.source_rows[failed], kind="stable")[:SHOWN]].tolist()
    record = {
        "expectation": check.name,
        "severity": check.severity,
        "passed": check.passed,
        "observed": check.observed,
        "limit": check.limit,
        "rows": rows.source_rows[first].tolist(),
        "text": check.say(check.observed),
    }
    if show:
        texts = read_rows(rows.path, first, text_roles)
        record["examples"] = [" | ".join(map(str, texts[place])) for place in first]
    return record


def _describe(record: dict[str, Any]) -> str:
    text = f"{record['expectation']} ({record['severity']}): {record['text']}"
    if record["rows"]:
        text += f"; first source rows {', '.join(map(str, record['rows']))}"
    return text + "".join(f"\n“{example}”" for example in record.get("examples", ()))


@contextmanager
def _context() -> Any:
    """A quiet context in memory; whatever context the process had before is back afterwards."""
    try:
        before = project_manager.get_current_project()
    except DataContextRequiredError:
        before = None
    try:
        context = gx.get_context(mode="ephemeral")
        context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
        yield context
    finally:
        project_manager.set_project(before)
