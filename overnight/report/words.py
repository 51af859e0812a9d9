"""What the terminal and the page say alike: the headline, the lines of numbers, durations."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from overnight.evaluation import Evaluation, Metric
    from overnight.report.record import NightRecord, Searched, Trial

Tone = Literal["good", "calm", "ask", "bad"]
SUMMARY = ("accuracy", "macro_f1", "macro_precision", "macro_recall", "weighted_f1")


class Headline(NamedTuple):
    word: str
    title: str
    why: list[str]
    tone: Tone


class Line(NamedTuple):
    """One metric of champion and candidate, and their difference."""

    name: str
    champion: Metric | None
    candidate: Metric | None
    difference: Metric | None


def headline(record: NightRecord) -> Headline:
    """The decision in one sentence, and what led to it."""
    state = record.get("state", "running")
    decision: dict[str, Any] = record.get("decision") or {}
    ours, theirs = version(record, "candidate"), version(record, "champion")
    why = [line for line in (record.get("why") or "").splitlines() if line.strip()]
    failed = [r["text"] for r in decision.get("reasons", ()) if not r["passed"]]
    passed = [r["text"] for r in decision.get("reasons", ()) if r["passed"] and r["rule"] in ("chance", "floor")]
    match state:
        case "promoted":
            title = f"{ours} is the new champion" if theirs else f"{ours} is the first champion"
            return Headline("Promoted", title, why or passed[-1:], "good")
        case "kept" if decision.get("would") == "promote":
            return Headline("Dry run", f"{ours} would be promoted; nothing was changed", why or passed[-1:], "ask")
        case "kept":
            title = f"{theirs} stays the champion" if theirs else f"{ours} is not good enough to start with"
            return Headline("Kept", title, why or failed, "calm")
        case "waiting":
            return Headline("Waiting", f"{ours} passed every rule and waits for your word", why or passed[-1:], "ask")
        case "skipped":
            title = "Nothing has changed, so nothing was trained"
            return Headline("Skipped", title, why, "calm")
        case "refused":
            return Headline("Refused", "The data did not pass the validation; the champion stays", why, "bad")
        case "failed":
            return Headline("Failed", "The night could not finish; the champion stays", why, "bad")
        case "interrupted":
            return Headline("Interrupted", "The next run continues where this one was", why, "ask")
        case _:
            return Headline("Running", "The night is not over", why, "calm")


def version(record: NightRecord, which: Literal["candidate", "champion"]) -> str:
    """`Version 7`; the candidate of a night that registered none is `The candidate`; no champion: ""."""
    judged = record.get(which)
    number = judged.get("version") if judged else None
    if number is not None:
        return f"Version {number}"
    return "The candidate" if which == "candidate" else ("The champion" if judged else "")


def metric_lines(record: NightRecord) -> list[Line]:
    """The metric of the gate first, then the summary metrics, then F1 of each class."""
    candidate, champion = evaluation(record, "candidate"), evaluation(record, "champion")
    shown = candidate or champion
    if shown is None:
        return []
    plain = [name for name in shown["metrics"] if "/" not in name]
    names = [shown["metric"], *(n for n in (SUMMARY if "macro_f1" in plain else plain) if n in plain)]
    names += [f"f1/{label}" for label in shown["labels"] if f"f1/{label}" in shown["metrics"] and len(names) < 60]
    comparison = record.get("comparison")
    return [
        Line(
            name,
            champion["metrics"].get(name) if champion else None,
            candidate["metrics"].get(name) if candidate else None,
            comparison["differences"].get(name) if comparison else None,
        )
        for name in dict.fromkeys(names)
    ]


def evaluation(record: NightRecord, which: Literal["candidate", "champion"]) -> Evaluation | None:
    judged = record.get(which)
    return judged.get("evaluation") if judged else None


def metric(record: NightRecord) -> str:
    """The name of the metric that the night is about."""
    shown = evaluation(record, "candidate") or evaluation(record, "champion")
    return shown["metric"] if shown else record.get("metric") or "metric"


def best_trial(search: Searched, candidate: int | None = None) -> Trial | None:
    """The trial the candidate came from, else the first listed with a finished value as good as any."""
    finished = [t for t in search.get("trials", ()) if t.get("state") == "finished" and t.get("value") is not None]
    for trial in finished:
        if trial.get("number") == candidate:
            return trial
    return max(finished, key=lambda t: t.get("value") or 0.0, default=None)


def trial_counts(search: Searched) -> str:
    """`10 trials: 6 finished, 3 pruned, 1 failed`."""
    states = Counter(t["state"] for t in search.get("trials", ()))
    total = sum(states.values())
    parts = [f"{states[s]} {s}" for s in ("finished", "pruned", "failed", "running", "waiting") if states[s]]
    return f"{total} {'trial' if total == 1 else 'trials'}: {', '.join(parts)}" if total else "no trial"


def parameters(params: dict[str, Any]) -> str:
    """`learning_rate 4.2e-05, epochs 3`."""
    return ", ".join(f"{name} {number(value)}" for name, value in params.items())


def number(value: Any) -> str:
    """Three significant digits of a float; everything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def point(metric: Metric | None, signed: bool = False) -> str:
    if metric is None or metric["value"] is None:
        return "–"
    return f"{metric['value']:+.3f}" if signed else f"{metric['value']:.3f}"


def interval(metric: Metric | None, signed: bool = False) -> str:
    if metric is None or metric["low"] is None or metric["high"] is None:
        return ""
    sign = "+" if signed else ""
    return f"[{metric['low']:{sign}.3f}, {metric['high']:{sign}.3f}]"


def sure(metric: Metric | None) -> Literal["up", "down", ""]:
    """Whether a difference's whole interval lies on one side of 0."""
    if metric is None or metric["low"] is None or metric["high"] is None:
        return ""
    return "up" if metric["low"] > 0 else "down" if metric["high"] < 0 else ""


def duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `5 min 12 s`, `2 h 5 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def moment(timestamp: float) -> str:
    """Local date and time of Unix seconds."""
    return f"{datetime.fromtimestamp(timestamp).astimezone():%Y-%m-%d %H:%M %Z}"


def took(record: NightRecord) -> float | None:
    """Seconds from start to end; of a night that was continued after a break, the sum of its stages."""
    stages = record.get("stages") or {}
    if record.get("continued"):
        return sum(stages.values()) or None
    if "started" in record and "ended" in record:
        return record["ended"] - record["started"]
    return None


def overhead(record: NightRecord) -> float | None:
    """The share of the whole time that is no stage's own work; it counts from the start of the process."""
    extra = record.get("overhead")
    whole = (extra or 0.0) + sum((record.get("stages") or {}).values())
    return extra / whole if extra is not None and whole else None
