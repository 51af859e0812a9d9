"""The report as one page that needs nothing else: no script, no request, light and dark, readable on a phone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.home import write_text
from overnight.report import words
from overnight.report.markdown import trials_rows
from overnight.report.pictures import FEWEST_ROWS, drawn, png, svg

if TYPE_CHECKING:
    from overnight.evaluation import Evaluation
    from overnight.report.record import NightRecord

TEMPLATE = "night.html.j2"
ALT = {
    "reliability": "Share of right predictions against the score of the predicted label; on the dashed diagonal scores "
    "are probabilities.",
    "search_curves": "The metric on the validation rows at each evaluation of each trial; the best one is highlighted.",
}


def html(record: NightRecord) -> str:
    """The whole page; labels, names and errors of other people are escaped, and no text of the data is shown."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("overnight.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": words.duration, "moment": words.moment, "number": words.number}
    environment.globals |= {"point": words.point, "interval": words.interval, "sure": words.sure}
    return environment.get_template(TEMPLATE).render(view(record))


def view(record: NightRecord) -> dict[str, Any]:
    """What the template shows, worked out."""
    search, data = record.get("search") or {}, record.get("data") or {}
    candidate, champion = words.evaluation(record, "candidate"), words.evaluation(record, "champion")
    decision = record.get("decision")
    lines = words.metric_lines(record)
    best = words.best_trial(search, (record.get("candidate") or {}).get("trial"))
    return {
        "record": record,
        "headline": words.headline(record),
        "reasons": decision["reasons"] if decision else [],
        "facts": _facts(record),
        "versions": (words.version(record, "champion"), words.version(record, "candidate")),
        "compared": champion is not None,
        "metric": candidate["metric"] if candidate else "",
        "candidate": candidate,
        "champion": champion,
        "summary": [line for line in lines if not line.name.startswith("f1/")],
        "classes": [line for line in lines if line.name.startswith("f1/")],
        "whisker": _whisker(lines),
        "comparison": record.get("comparison"),
        "confusion": _confusion(candidate),
        "slices": _slices(candidate, champion),
        "pictures": {name: svg(figure, name, ALT[name]) for name, figure in drawn(record).items() if name in ALT},
        "fewest": FEWEST_ROWS,
        "trials": trials_rows(search.get("trials", [])),
        "trial_counts": words.trial_counts(search),
        "best": best,
        "best_parameters": best.get("params", {}) if best else {},
        "errors": [(t["number"], t["error"]) for t in search.get("trials", []) if t.get("error")],
        "data": data,
        "sides": _shares(data.get("split") or {}),
        "stages": _shares(record.get("stages") or {}, most=True),
        "took": words.took(record),
        "next": record.get("next") or [],
        "lineage": record.get("lineage") or {},
    }


def _facts(record: NightRecord) -> list[tuple[str, str]]:
    found = []
    if "started" in record:
        found.append(("Started", words.moment(record["started"])))
    if (seconds := words.took(record)) is not None:
        found.append(("Took", words.duration(seconds)))
    data, search = record.get("data") or {}, record.get("search") or {}
    if "rows" in data:
        found.append(("Rows", f"{data['rows']:,}"))
    if search.get("trials"):
        found.append(("Trials", f"{len(search['trials'])}"))
    return found


def _whisker(lines: list[words.Line]) -> Any:
    """A function that places a difference on a scale which all lines share, 0 in the middle, in percent."""
    bounds = [abs(line.difference[k] or 0.0) for line in lines if line.difference for k in ("low", "high")]
    largest = max(bounds, default=0.0) * 1.08 or 1.0

    def place(metric: Any) -> dict[str, float] | None:
        if metric is None or metric["value"] is None:
            return None
        low, at, high = (50 + 50 * metric[key] / largest for key in ("low", "value", "high"))
        return {"left": round(low, 2), "width": round(high - low, 2), "at": round(at, 2)}

    return place


def _confusion(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    matrix = evaluation["confusion"]
    rows = [
        {"label": label, "cells": [{"count": n, "share": round(n / max(sum(counts), 1), 3)} for n in counts]}
        for label, counts in zip(matrix["rows"], matrix["counts"], strict=True)
    ]
    return {"columns": matrix["columns"], "rows": rows}


def _slices(candidate: Evaluation | None, champion: Evaluation | None) -> dict[str, list[dict[str, Any]]]:
    """Column → its lines, the champion's value beside the candidate's."""
    before = {(s["column"], s["value"]): s["metric"] for s in champion["slices"]} if champion else {}
    found: dict[str, list[dict[str, Any]]] = {}
    for line in candidate["slices"] if candidate else ():
        theirs = before.get((line["column"], line["value"]))
        found.setdefault(line["column"], []).append({**line, "champion": theirs})
    return found


def _shares(amounts: dict[str, Any], most: bool = False) -> list[dict[str, Any]]:
    """Each amount with its share of the sum (or of the largest), in percent."""
    whole = (max if most else sum)(amounts.values(), default=0) if most else sum(amounts.values())
    return [{"name": n, "amount": a, "share": round(100 * a / whole, 2) if whole else 0} for n, a in amounts.items()]


def write_report(record: NightRecord, folder: Path) -> Path:
    """Writes `report.html` and the pictures beside it; returns the page."""
    page = folder / "report.html"
    write_text(page, html(record))
    for name, figure in drawn(record).items():
        (folder / f"{name}.png").write_bytes(png(figure))
    return page
