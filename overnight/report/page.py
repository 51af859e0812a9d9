"""The report as one page that needs nothing else: no request, light and dark, readable on a phone, also unscripted."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.home import write_text
from overnight.report import words
from overnight.report.curves import Point, evaluated, read_curves
from overnight.report.markdown import trials_rows
from overnight.report.pictures import FEWEST_ROWS, drawn, png, svg
from overnight.report.plots import plots, vega

if TYPE_CHECKING:
    from overnight.evaluation import Evaluation
    from overnight.report.record import NightRecord, Rows

TEMPLATE = "night.html.j2"
MOST_SHARES = {"label_shares": 15, "languages": 3}
ALT = {
    "reliability": "Share of right predictions against the score of the predicted label; on the dashed diagonal scores "
    "are probabilities.",
    "search_curves": "The metric on the validation rows at each evaluation of each trial; the best one is highlighted.",
}


def html(record: NightRecord, points: Sequence[Point] = ()) -> str:
    """The whole page; labels, names and errors of other people are escaped.

    Args:
        points: the trials' curves over their epochs (`read_curves`); absent: what the record knows of them.
    """
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
    return environment.get_template(TEMPLATE).render(view(record, points))


def view(record: NightRecord, points: Sequence[Point] = ()) -> dict[str, Any]:
    """What the template shows, worked out."""
    search, data = record.get("search") or {}, record.get("data") or {}
    candidate, champion = words.evaluation(record, "candidate"), words.evaluation(record, "champion")
    decision = record.get("decision")
    lines = words.metric_lines(record)
    chosen = (record.get("candidate") or {}).get("trial")
    best = words.best_trial(search, chosen)
    pictures = {name: svg(figure, name, ALT[name]) for name, figure in drawn(record).items() if name in ALT}
    metric = words.metric(record)
    curves, axis = (points, "epoch") if points else (evaluated(search, metric), "evaluation")
    moving = plots(search, curves, metric, axis, chosen)
    return {
        "record": record,
        "headline": words.headline(record),
        "reasons": decision["reasons"] if decision else [],
        "facts": _facts(record),
        "versions": (words.version(record, "champion"), words.version(record, "candidate")),
        "compared": champion is not None,
        "metric": metric,
        "candidate": candidate,
        "champion": champion,
        "summary": [line for line in lines if not line.name.startswith("f1/")],
        "classes": [line for line in lines if line.name.startswith("f1/")],
        "whisker": _whisker(lines),
        "comparison": record.get("comparison"),
        "confusion": _confusion(candidate),
        "slices": _slices(candidate, champion),
        "elsewhere": record.get("elsewhere") or [],
        "samples": record.get("samples") or [],
        "folds": search.get("folds"),
        "pictures": pictures,
        "fewest": FEWEST_ROWS,
        "trials": trials_rows(search.get("trials", [])),
        "trial_counts": words.trial_counts(search),
        "finished": sum(trial["state"] == "finished" for trial in search.get("trials", ())),
        "best": best,
        "best_parameters": best.get("params", {}) if best else {},
        "importances": _shares(search.get("importances") or {}, most=True),
        "plots": moving,
        "still": {"curves": pictures["search_curves"]} if "search_curves" in pictures else {},
        "scripts": _scripts(moving) if moving else None,
        "errors": [(t["number"], t["error"]) for t in search.get("trials", []) if t.get("error")],
        "data": data,
        "refused": _shares(dict(Counter(data.get("reasons", {})).most_common()), most=True),
        "changes": _changes(data),
        "private": not record.get("samples") and not any(one.get("examples") for one in data.get("results", ())),
        "sides": _shares(data.get("split") or {}),
        "watched": _watched(record.get("monitor") or {}),
        "stages": _shares(record.get("stages") or {}, most=True),
        "took": words.took(record),
        "overhead": words.overhead(record),
        "next": record.get("next") or [],
        "lineage": {name: fact for name, fact in (record.get("lineage") or {}).items() if fact is not None},
    }


def _scripts(moving: dict[str, Any]) -> dict[str, Any]:
    """What makes the plots move, and the hashes by which the page lets these two scripts run and no other."""
    packed, loader = vega(), files("overnight.report").joinpath("plots.js").read_text(encoding="utf-8")
    digests = [hashlib.sha256(script).digest() for script in (loader.encode(), gzip.decompress(packed))]
    return {
        "hashes": [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests],
        "loader": loader,
        "vega": base64.b64encode(packed).decode(),
        "plots": json.dumps(moving, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }


def _facts(record: NightRecord) -> list[tuple[str, str]]:
    found = []
    if "started" in record:
        found.append(("Started", words.moment(record["started"])))
    scheduled = record.get("scheduled")
    if scheduled:
        found.insert(0, ("Scheduled", scheduled if isinstance(scheduled, str) else words.moment(scheduled)))
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
    matrix = evaluation["confusion"] if evaluation else None
    if matrix is None:
        return None
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


def _changes(data: Rows) -> dict[str, Any]:
    """Shares of labels and languages and lengths of texts, tonight and in the last accepted night."""
    now, before = data.get("facts") or {}, data.get("previous") or {}
    shares, sizes, kinds = [], [], []
    for kind, most in MOST_SHARES.items():
        ours, theirs = now.get(kind) or {}, before.get(kind) or {}
        if ours:
            kinds.append({"label_shares": "labels"}.get(kind, kind))
            names = sorted({*ours, *theirs}, key=lambda name: -max(ours.get(name, 0.0), theirs.get(name, 0.0)))
            shares += [{"name": n, "before": theirs.get(n, 0.0), "now": ours.get(n, 0.0)} for n in names[:most]]
    for kind, name in (("chars", "characters"), ("tokens", "tokens")):
        theirs = before.get(kind) or {}
        for quantile, size in (now.get(kind) or {}).items():
            sizes.append({"name": f"{quantile} {name}", "before": theirs.get(quantile), "now": size})
    return {"shares": shares, "sizes": sizes, "kinds": kinds, "compared": bool(before)}


def _shares(amounts: dict[str, Any], most: bool = False) -> list[dict[str, Any]]:
    """Each amount with its share of the sum (or of the largest), in percent."""
    whole = (max if most else sum)(amounts.values(), default=0) if most else sum(amounts.values())
    return [{"name": n, "amount": a, "share": round(100 * a / whole, 2) if whole else 0} for n, a in amounts.items()]


def _watched(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the monitor said last, and what it saw in its last window."""
    if not found.get("text"):
        return None
    windows = found.get("windows") or [{}]
    facts = [f"version {found['version']}" if found.get("version") else "", str(found.get("source") or "")]
    facts += [f"looked at {words.moment(found['time'])}"] if found.get("time") else []
    return {
        "text": found["text"],
        "facts": ", ".join(filter(None, facts)),
        "findings": [{"name": name, **one} for name, one in (windows[-1].get("findings") or {}).items()],
    }


def write_report(record: NightRecord, folder: Path) -> Path:
    """Writes `report.html` and the pictures beside it; returns the page. The trials' folders give the curves."""
    page = folder / "report.html"
    write_text(page, html(record, read_curves(folder, words.metric(record))))
    for name, figure in drawn(record).items():
        (folder / f"{name}.png").write_bytes(png(figure))
    return page
