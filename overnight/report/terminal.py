"""The report as one screen: the decision first, then why, the numbers, the search, the data, the cost, what next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from overnight.report.words import (
    Line,
    best_trial,
    duration,
    evaluation,
    headline,
    interval,
    metric_lines,
    moment,
    overhead,
    parameters,
    point,
    sure,
    took,
    trial_counts,
    version,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from overnight.evaluation import Metric
    from overnight.report.record import NightRecord, Rows

STYLES = {"good": "bold green", "calm": "bold cyan", "ask": "bold yellow", "bad": "bold red"}
MOST_CLASSES = 6
MOST_STAGES = 6
LONGEST_NAME = 13


def terminal(record: NightRecord) -> RenderableType:
    """The report for rich to print; without colour where the output is no terminal."""
    from rich.console import Group
    from rich.text import Text

    told = headline(record)
    facts = [record.get("model", ""), record.get("id", "")]
    facts += [moment(record["started"])] if "started" in record else []
    seconds = took(record)
    facts += [duration(seconds)] if seconds is not None else []
    parts: list[RenderableType] = [
        Text.assemble((told.word.upper(), STYLES[told.tone]), "  ", (told.title, "bold")),
        Text(" · ".join(filter(None, facts)), style="dim"),
    ]
    for section in (_why(record), _numbers(record), _rest(record)):
        if section is not None:
            parts += [Text(), section]
    return Group(*parts)


def _grid() -> Table:
    from rich.table import Table

    return Table.grid(padding=(0, 2, 0, 0))


def _why(record: NightRecord) -> RenderableType | None:
    from rich.text import Text

    decision = record.get("decision")
    grid = _grid()
    if not decision:
        for line in headline(record).why:
            grid.add_row(Text(line))
        return grid if grid.row_count else None
    for reason in decision["reasons"]:
        sign = Text("✓", style="green") if reason["passed"] else Text("✗", style="bold red")
        grid.add_row(sign, Text(reason["rule"]), Text(reason["text"], style="" if reason["passed"] else "bold"))
    return grid


def _numbers(record: NightRecord) -> RenderableType | None:
    from rich.table import Table
    from rich.text import Text

    lines = metric_lines(record)
    if not lines:
        return None
    compared = record.get("champion") is not None
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("test rows", no_wrap=True)
    if compared:
        table.add_column(version(record, "champion").lower(), no_wrap=True)
    table.add_column(version(record, "candidate").lower(), no_wrap=True)
    if compared:
        table.add_column("difference", no_wrap=True)
    for line in _chosen(lines):
        cells = [_value(line.champion)] if compared else []
        cells.append(_value(line.candidate))
        if compared:
            style = {"up": "green", "down": "red", "": ""}[sure(line.difference)]
            cells.append(Text(f"{point(line.difference, True)} {interval(line.difference, True)}".strip(), style=style))
        name = line.name.replace("f1/", "f1 ")
        name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
        table.add_row(Text(name), *cells)
    ours, theirs = evaluation(record, "candidate"), evaluation(record, "champion")
    if ours and ours["latency"]:
        cells = [Text(f"{theirs['latency']['single']['p50']:.1f} ms" if theirs and theirs["latency"] else "–")]
        cells = (cells if compared else []) + [Text(f"{ours['latency']['single']['p50']:.1f} ms")]
        table.add_row(Text("a text takes"), *cells)
    return table


def _chosen(lines: list[Line]) -> list[Line]:
    """The gate's metric, accuracy, and the classes: all, or those that changed most."""
    summary = [line for line in lines if not line.name.startswith("f1/")]
    classes = [line for line in lines if line.name.startswith("f1/") and line not in summary]
    if len(classes) > MOST_CLASSES:
        classes.sort(key=lambda line: -abs((line.difference["value"] if line.difference else None) or 0.0))
    return [*summary[:1], *(line for line in summary[1:] if line.name == "accuracy"), *classes[:MOST_CLASSES]]


def _value(metric: Metric | None) -> RenderableType:
    from rich.text import Text

    return Text.assemble(point(metric), " ", (interval(metric), "dim"))


def _rest(record: NightRecord) -> RenderableType | None:
    from rich.text import Text

    grid = _grid()
    live = (record.get("monitor") or {}).get("text")
    watched = [("live", str(live))] if live else []
    for name, text in (*_search(record), *_data(record.get("data") or {}), *watched, *_cost(record)):
        grid.add_row(Text(name, style="dim"), Text(text))
    for i, step in enumerate(record.get("next") or ()):
        told = Text(step.get("text", ""))
        if step.get("command"):
            told.append("  " if told else "").append(step["command"], style="bold")
        grid.add_row(Text("" if i else "next", style="dim"), told)
    return grid if grid.row_count else None


def _search(record: NightRecord) -> Iterator[tuple[str, str]]:
    search = record.get("search")
    if not search:
        return
    text = trial_counts(search)
    best = best_trial(search, (record.get("candidate") or {}).get("trial"))
    if best:
        text += f"; best is trial {best['number']} with {best.get('value') or 0.0:.3f} on the validation rows"
    yield "search", text
    if best and best.get("params"):
        yield "", parameters(best["params"])


def _data(data: Rows) -> Iterator[tuple[str, str]]:
    if "rows" not in data:
        return
    text = f"{data['rows']:,} rows"
    if "rows_refused" in data:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in data.get("reasons", {}).items() if count)
        text += f", {data['rows_refused']:,} refused" + (f" ({reasons})" if reasons else "")
    yield "data", text
    if data.get("split"):
        yield "", ", ".join(f"{side} {rows:,}" for side, rows in data["split"].items())
    for result in data.get("results", ()):
        if not result["passed"]:
            sign = "✗" if result["severity"] == "block" else "!"
            yield "", f"{sign} {result['expectation']}: {result.get('text', '')}"


def _cost(record: NightRecord) -> Iterator[tuple[str, str]]:
    stages = record.get("stages") or {}
    longest = sorted(stages, key=lambda name: -stages[name])[:MOST_STAGES]
    parts = [f"{name} {duration(stages[name])}" for name in stages if name in longest]
    share = overhead(record)
    if share is not None:
        parts.append(f"overhead {duration(record['overhead'])} ({100 * share:.0f} %)")
    if parts:
        yield "cost", " · ".join(parts)
