"""The decision, the trials and the expectations as Prefect artifacts show them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from overnight.report.words import headline, interval, metric_lines, number, point, trial_counts

if TYPE_CHECKING:
    from overnight.report.record import Expected, NightRecord, Trial

SAID = {"promote": "Promote", "keep": "Keep the champion", "wait": "Wait for a person"}


def decision_markdown(decision: Mapping[str, Any]) -> str:
    """`Decision.record()` as a heading and a table of all rules."""
    title = SAID[decision["outcome"]]
    if decision["mode"] == "dry-run" and decision["would"] == "promote":
        title = "Dry run: would promote"
    lines = [f"# {title}", "", "| | rule | what it saw |", "|---|---|---|"]
    for reason in decision["reasons"]:
        lines.append(f"| {'✓' if reason['passed'] else '✗'} | {cell(reason['rule'])} | {cell(reason['text'])} |")
    return "\n".join(lines) + "\n"


def night_markdown(record: NightRecord) -> str:
    """The whole report in a few lines, for a page of Prefect and the description of the run in MLflow."""
    said = headline(record)
    lines = [f"# {cell(said.title)}", "", *(f"- {cell(why)}" for why in said.why)]
    metrics = metric_lines(record)
    if metrics:
        lines += ["", "| metric | candidate | champion |", "|---|---|---|"]
        lines += [
            f"| {cell(m.name)} | {point(m.candidate)} {interval(m.candidate)} | {point(m.champion)} |" for m in metrics
        ]
    search = record.get("search")
    if search:
        lines += ["", f"Search: {cell(trial_counts(search))}"]
    data = record.get("data")
    if data and "rows_refused" in data:
        lines += ["", f"Data: {data['rows']:,} rows, {data['rows_refused']:,} refused"]
    lines += ["", *(f"Next: {step['text']}: `{step['command']}`" for step in record.get("next", []))]
    return "\n".join(lines) + "\n"


def trials_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One flat row a trial, for a table artifact; every row has the same keys."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.get("params", {})))
    return [
        {
            "trial": trial["number"],
            "state": trial["state"],
            "value": None if trial.get("value") is None else round(trial["value"] or 0.0, 4),
            **{name: number(trial.get("params", {}).get(name, "")) for name in names},
            "evaluations": len(trial.get("evaluations", {})),
            "seconds": round(trial["seconds"], 1) if "seconds" in trial else None,
            "samples/s": round(trial["samples_per_second"], 1) if "samples_per_second" in trial else None,
        }
        for trial in trials
    ]


def validation_rows(results: Sequence[Expected]) -> list[dict[str, Any]]:
    """One row an expectation, for a table artifact."""
    return [
        {
            "expectation": result["expectation"],
            "result": "passed" if result["passed"] else {"block": "failed"}.get(result["severity"], "warning"),
            "seen": result.get("text", ""),
        }
        for result in results
    ]


def cell(text: str) -> str:
    """Text that cannot leave its cell: labels and names are other people's words."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))
    return escaped.replace("<", "&lt;").replace(">", "&gt;")
