"""Plots of the search that move: Vega-Lite specifications, and Vega itself, which the page carries packed.

A browser without scripts, or one that cannot unpack, shows the still picture and the table of the trials instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from overnight.report.curves import Point
from overnight.report.words import best_trial, number, parameters

if TYPE_CHECKING:
    from overnight.report.record import Searched, Trial

MOST_AXES = 12

# Vega draws SVG, so the page's own colours work in it, light or dark
CONFIG: dict[str, Any] = {
    "background": "transparent",
    "aria": False,  # hundreds of marks would be read out; the table below says the same
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 11,
        "titleFontSize": 11,
    },
    "legend": {"labelColor": "var(--ink)", "labelFontSize": 11, "symbolStrokeColor": "var(--muted)", "title": None},
}
PICKED = "indexof(picked, datum.trial) >= 0"
STATES = {"finished": [1, 0], "pruned": [6, 3], "failed": [2, 3], "running": [1, 5], "waiting": [1, 5]}


def vega() -> bytes:
    """Vega, Vega-Lite and Vega-Embed as one script, gzipped; `make vega` bundles it anew."""
    return files("overnight.report").joinpath("vega.js.gz").read_bytes()


def plots(
    search: Searched, points: Sequence[Point], metric: str, x: str, candidate: int | None = None
) -> dict[str, dict[str, Any]]:
    """Name → specification of each plot that there are numbers for; `x` names the axis of the points."""
    trials = search.get("trials", [])
    best = best_trial(search, candidate)
    facts = {t["number"]: _about(t) for t in trials}
    found = {}
    if points:
        found["curves"] = _curves(facts, points, x, best)
    if len(trials) > 1 and any(trial.get("params") for trial in trials):
        found["parallel"] = _parallel(facts, trials, metric, best, search.get("importances") or {})
    return found


def _about(trial: Trial) -> dict[str, Any]:
    value = _value(trial)
    return {
        "trial": trial["number"],
        "state": trial["state"],
        "value": None if value is None else round(value, 4),
        "parameters": parameters(trial.get("params", {})),
    }


def _value(trial: Trial) -> float | None:
    value = trial.get("value")
    return value if value is not None and math.isfinite(value) else None


def _curves(
    facts: Mapping[int, Mapping[str, Any]], points: Sequence[Point], x: str, best: Trial | None
) -> dict[str, Any]:
    names = list(dict.fromkeys(point.series for point in points))
    last = best["number"] if best else None
    rows = [
        {**facts.get(p.trial, {"trial": p.trial}), "series": p.series, "x": round(p.x, 4), "y": round(p.y, 5)}
        for p in sorted(points, key=lambda p: (p.trial == last, p.trial, p.series, p.x))  # the best on top
    ]
    shown = [{"field": "x", "title": x}, {"field": "y", "title": "value", "format": ".4f"}]
    place: dict[str, Any] = {
        "x": {"field": "x", "type": "quantitative", "title": x, "axis": {"grid": False}},
        "y": {"field": "y", "type": "quantitative", "title": None, "scale": {"zero": False}},
    }
    if x == "evaluation":
        place["x"]["axis"]["tickMinStep"] = 1
    return _spec(
        "The curves of all trials; the same numbers stand in the table of the trials.",
        best,
        height=270,
        params=[{"name": "series", "value": names[0], "bind": {"input": "select", "options": names, "name": "Show"}}],
        data={"values": rows},
        transform=[{"filter": "datum.series == series"}],
        layer=[
            {"mark": "line", "encoding": {**place, **_look(_states(facts), legend=True)}},
            {
                "mark": {"type": "point", "filled": True, "size": 30},
                "encoding": {**place, **_look(), "tooltip": [*_tooltip(), *shown]},
            },
            {  # what a finger can hit
                "mark": {"type": "line", "strokeWidth": 14, "opacity": 0},
                "encoding": {**place, "detail": {"field": "trial"}, "tooltip": _tooltip()},
            },
        ],
    )


def _parallel(
    facts: Mapping[int, Mapping[str, Any]],
    trials: Sequence[Trial],
    metric: str,
    best: Trial | None,
    importances: Mapping[str, float],
) -> dict[str, Any]:
    names = list(dict.fromkeys(name for trial in trials for name in trial.get("params", {})))
    names = sorted(names, key=lambda name: -importances.get(name, 0.0))[:MOST_AXES]
    axes = [(name, {t["number"]: t["params"][name] for t in trials if name in t.get("params", {})}) for name in names]
    axes.append((metric, {t["number"]: value for t in trials if (value := _value(t)) is not None}))
    last = best["number"] if best else None
    rows: list[dict[str, Any]] = []
    ticks: list[dict[str, Any]] = []
    for place, (axis, values) in enumerate(axes):
        scale = _scale(list(values.values()))
        ticks += [{"axis": axis, "at": at, "text": text} for at, text in scale.ticks]
        for trial, value in values.items():
            shown = number(value)
            rows.append({**facts[trial], "axis": axis, "place": place, "at": scale.at(value), "shown": shown})
    rows.sort(key=lambda row: row["trial"] == last)
    x: dict[str, Any] = {"field": "axis", "type": "ordinal", "sort": [axis for axis, _ in axes], "title": None}
    x |= {"scale": {"type": "point", "padding": 0.35}}
    head = {"orient": "top", "labelAngle": 0, "domain": False, "ticks": False, "labelColor": "var(--ink)"}
    y_of = {"type": "quantitative", "axis": None, "scale": {"domain": [-0.05, 1.05]}}
    place_of = {"x": {**x, "axis": {**head, "labelPadding": 10, "labelLimit": 110}}, "y": {"field": "at", **y_of}}
    lines = {**place_of, "order": {"field": "place"}}
    text = {"type": "text", "align": "right", "dx": -7, "fontSize": 10.5}
    return {
        **_spec(
            "Parallel coordinates: each line is a trial, each axis a parameter, the last axis the metric; the same "
            "numbers stand in the table of the trials.",
            best,
            height=300,
            data={"values": rows},
            layer=[
                {
                    "data": {"values": [{"axis": axis} for axis, _ in axes]},
                    "mark": {"type": "rule", "color": "var(--line)", "strokeWidth": 2},
                    "encoding": {"x": place_of["x"], "y": {"datum": 0, **y_of}, "y2": {"datum": 1}},
                },
                {"mark": "line", "encoding": {**lines, **_look(_states(facts))}},
                {
                    "mark": {"type": "line", "strokeWidth": 12, "opacity": 0},
                    "encoding": {**lines, "detail": {"field": "trial"}, "tooltip": _tooltip()},
                },
                {
                    "params": [
                        {
                            "name": "brush",
                            "select": {
                                "type": "interval",
                                "encodings": ["x", "y"],
                                "mark": {"fill": "var(--accent)", "stroke": "var(--accent)", "fillOpacity": 0.1},
                            },
                        }
                    ],
                    "mark": {"type": "point", "filled": True, "size": 30},
                    "encoding": {
                        **place_of,
                        **_look(),
                        "tooltip": [*_tooltip(), {"field": "axis"}, {"field": "shown", "title": "here"}],
                    },
                },
                {
                    "data": {"values": ticks},
                    "mark": {**text, "stroke": "var(--card)", "strokeWidth": 3, "strokeJoin": "round"},
                    "encoding": {**place_of, "text": {"field": "text"}},
                },
                {
                    "data": {"values": ticks},
                    "mark": {**text, "color": "var(--muted)"},
                    "encoding": {**place_of, "text": {"field": "text"}},
                },
            ],
        ),
        "usermeta": {"axes": len(axes)},
    }


def _spec(
    description: str, best: Trial | None, *, params: Sequence[dict[str, Any]] = (), **parts: Any
) -> dict[str, Any]:
    known = [{"name": "picked", "value": []}, {"name": "best", "value": best["number"] if best else None}, *params]
    return {
        "description": description,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "config": CONFIG,
        "params": known,
        **parts,
    }


def _look(dashes: Sequence[str] = (), legend: bool = False) -> dict[str, Any]:
    """What is picked stands out, else the best trial does; `dashes` are the states that lines are told apart by."""
    colour = [{"test": PICKED, "value": "var(--ask)"}, {"test": "datum.trial == best", "value": "var(--accent)"}]
    strong = f"{PICKED} || (!length(picked) && datum.trial == best)"
    opacity = [{"test": strong, "value": 1}, {"test": "length(picked) > 0", "value": 0.18}]
    width = [{"test": strong, "value": 2.6}]
    look: dict[str, Any] = {
        "color": {"condition": colour, "value": "var(--muted)"},
        "opacity": {"condition": opacity, "value": 0.6},
        "detail": {"field": "trial"},
    }
    if dashes:
        scale = {"domain": dashes, "range": [STATES[state] for state in dashes]}
        shown = {"orient": "bottom"} if legend and len(dashes) > 1 else None
        look["strokeDash"] = {"field": "state", "type": "nominal", "scale": scale, "legend": shown}
        look["strokeWidth"] = {"condition": width, "value": 1.3}
    return look


def _states(facts: Mapping[int, Mapping[str, Any]]) -> list[str]:
    there = {about["state"] for about in facts.values()}
    return [state for state in STATES if state in there]


def _tooltip() -> list[dict[str, Any]]:
    return [{"field": name} for name in ("trial", "state", "parameters")] + [{"field": "value", "title": "best value"}]


class _Scale(NamedTuple):
    """Where a value stands on its axis, from 0 (below) to 1."""

    low: float
    high: float
    logarithmic: bool
    choices: tuple[str, ...]
    ticks: list[tuple[float, str]]

    def at(self, value: Any) -> float:
        if self.choices:
            return _share(self.choices.index(str(value)), 0, len(self.choices) - 1)
        if self.logarithmic:
            return _share(math.log(value), math.log(self.low), math.log(self.high))
        return _share(value, self.low, self.high)


def _scale(values: Sequence[Any]) -> _Scale:
    """Numbers from the least to the greatest, logarithmically where they span two powers of ten; else as choices."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values) and values:
        low, high = min(values), max(values)
        ends = [(0.0, number(low)), (1.0, number(high))] if low < high else [(0.5, number(low))]
        return _Scale(low, high, low > 0 and high / low >= 10, (), ends)
    choices = tuple(dict.fromkeys(sorted(map(str, values))))
    ticks = [(_share(i, 0, len(choices) - 1), text[:14]) for i, text in enumerate(choices)]
    return _Scale(0, 0, False, choices, ticks)


def _share(value: float, low: float, high: float) -> float:
    return round((value - low) / (high - low), 4) if high > low else 0.5
