"""The gate: whether the candidate replaces the champion. A pure function of what was measured.

Every rule is asked and reported, also after one has failed, and only a candidate that passes all of them is
promoted. Where a number is missing or not finite, its rule fails: the gate never promotes what it cannot see.

| rule         | passes when |
|--------------|-------------|
| `numbers`    | all scores of the candidate are finite numbers |
| `floor`      | the metric on the test rows reaches `floor` |
| `gain`       | the metric gains something, and at least `min_gain`, over the champion |
| `chance`     | the lower bound of the gain's interval (paired bootstrap on the same rows) is above 0 |
| `class_drop` | no class's F1 falls by more than `max_class_drop` with its whole interval below 0 |
| `latency`    | a text takes at most `max_latency_ratio` times as long as with the champion |

The first night has no champion: `numbers` and `floor` alone decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from overnight.config import Promotion
    from overnight.evaluation import Comparison, Evaluation, Metric

Outcome = Literal["promote", "keep", "wait"]
ROUNDING = 1e-12  # so that a gain of 0.82 − 0.80 reaches a min_gain of 0.02


@dataclass(frozen=True)
class Reason:
    """What one rule said: in words, and the number it saw beside the one it asked for."""

    rule: str
    passed: bool
    text: str
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Decision:
    outcome: Outcome
    """What happens: `promote`, `keep` the champion, or `wait` for a person (mode `manual`)."""
    would: Literal["promote", "keep"]
    """What the rules say, whatever the mode."""
    mode: str
    reasons: tuple[Reason, ...]

    @property
    def failed(self) -> list[Reason]:
        return [reason for reason in self.reasons if not reason.passed]

    def record(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self) | {"reasons": [asdict(reason) for reason in self.reasons]}


def decide(
    promotion: Promotion,
    candidate: Evaluation,
    champion: Evaluation | None = None,
    comparison: Comparison | None = None,
    *,
    lower_is_better: bool = False,
) -> Decision:
    """Decides about the candidate.

    Args:
        promotion: the numbers and the mode of the config.
        candidate: its evaluation, with latency when there is a champion.
        champion: None on the first night.
        comparison: of the two on the same rows; a champion without one is kept.
        lower_is_better: direction of the metric; `floor` is then its highest value, and 0, the default, sets none.
    """
    reasons = [_numbers(candidate), _floor(promotion, candidate, lower_is_better)]
    if champion is not None:
        if comparison is None:
            reasons.append(Reason("chance", False, "there is a champion, and no comparison with it"))
        else:
            reasons += _against_champion(promotion, comparison)
        reasons.append(_latency(promotion, candidate, champion))
    would: Literal["promote", "keep"] = "promote" if all(reason.passed for reason in reasons) else "keep"
    if promotion.mode == "auto" or would == "keep":
        outcome: Outcome = would
    else:
        outcome = "wait" if promotion.mode == "manual" else "keep"
    return Decision(outcome, would, promotion.mode, tuple(reasons))


def _numbers(candidate: Evaluation) -> Reason:
    broken, rows = candidate["broken_predictions"], candidate["rows"]
    text = f"{broken} of {rows:,} predictions hold scores that are no numbers" if broken else "all scores are numbers"
    return Reason("numbers", broken == 0, text, broken, 0)


def _floor(promotion: Promotion, candidate: Evaluation, lower_is_better: bool) -> Reason:
    metric, floor = candidate["metric"], promotion.floor
    value = candidate["metrics"][metric]["value"]
    if value is None or not math.isfinite(value):
        return Reason("floor", False, f"{metric} is not a number", None, floor)
    if lower_is_better:
        passed = floor == 0 or value <= floor
        asked = "no ceiling is set" if floor == 0 else f"{'at most' if passed else 'above'} the ceiling {floor:.3f}"
    else:
        passed = value >= floor
        asked = f"{'reaches' if passed else 'is below'} the floor {floor:.3f}"
    return Reason("floor", passed, f"{metric} {value:.3f} {asked}", value, floor)


def _against_champion(promotion: Promotion, comparison: Comparison) -> list[Reason]:
    metric, rows, found = comparison["metric"], comparison["rows"], _finite(comparison["gain"])
    if found is None:
        text = f"gain in {metric} is not a number"
        gain = Reason("gain", False, text, None, promotion.min_gain)
        return [gain, Reason("chance", False, text, None, 0.0), _class_drop(promotion, comparison)]
    value, low, high = found
    if comparison["changed"] == 0:
        verdict = f"a tie, the same predictions on all {rows:,} rows"
    elif low > 0:
        verdict = "better than chance explains"
    elif high < 0:
        verdict = "worse than chance explains"
    else:
        verdict = "chance may explain it"
    asked = f"asked: at least {promotion.min_gain:+.3f}" if promotion.min_gain else "asked: any gain"
    text = f"gain {value:+.3f} {metric} over the champion ({asked})"
    if comparison["unknown_rows"]:
        names = _some(comparison["unknown_labels"])
        text += f"; the champion does not know {names} and gets those {comparison['unknown_rows']:,} rows wrong"
    enough = value > 0 and value >= promotion.min_gain - ROUNDING
    interval = f"{100 * comparison['confidence']:g} % interval {_interval(found)}"
    return [
        Reason("gain", enough, text, value, promotion.min_gain),
        Reason("chance", low > 0, f"gain {value:+.3f} {metric}, {interval}: {verdict}", low, 0.0),
        _class_drop(promotion, comparison),
    ]


def _class_drop(promotion: Promotion, comparison: Comparison) -> Reason:
    """Refuses a class that lost more than the limit, unless its interval reaches 0, so that chance may explain it.

    The point alone would let the noise of a small class stop good candidates; the interval alone would, on many
    rows, stop a candidate over a loss that nobody would notice.
    """
    limit = promotion.max_class_drop
    found = {label: _finite(metric) for label, metric in comparison["classes"].items()}
    classes = {label: triple for label, triple in found.items() if triple is not None}
    if len(classes) < len(found):
        broken = [label for label, triple in found.items() if triple is None]
        return Reason("class_drop", False, f"F1 of {_some(broken)} is not a number", None, limit)
    lost = sorted((label for label, triple in classes.items() if triple[0] < 0), key=lambda label: classes[label])
    large = [label for label in lost if classes[label][0] < -limit - ROUNDING]
    certain = [label for label in large if classes[label][2] < 0]
    if certain:
        text = f"lost more than the {limit:.3f} allowed: {_drops(classes, certain)}"
    elif large:
        text = f"lost more than {limit:.3f}, but chance may explain it: {_drops(classes, large)}"
    elif lost:
        text = f"largest loss of a class within the {limit:.3f} allowed: {_drops(classes, lost[:1])}"
    else:
        text = "no class lost anything"
    return Reason("class_drop", not certain, text, -classes[lost[0]][0] if lost else 0.0, limit)


def _latency(promotion: Promotion, candidate: Evaluation, champion: Evaluation) -> Reason:
    limit = promotion.max_latency_ratio
    if candidate["latency"] is None or champion["latency"] is None:
        return Reason("latency", False, "latency was not measured", None, limit)
    ours, theirs = candidate["latency"]["single"]["p50"], champion["latency"]["single"]["p50"]
    if not (math.isfinite(ours) and math.isfinite(theirs) and theirs > 0):
        return Reason("latency", False, "latency is not a number", None, limit)
    ratio = ours / theirs
    text = f"{ours:.1f} ms a text, {ratio:.2f} times the champion's {theirs:.1f} ms (allowed: {limit:.2f})"
    return Reason("latency", ratio <= limit, text, ratio, limit)


Triple = tuple[float, float, float]


def _finite(metric: Metric) -> Triple | None:
    """Value, lower and upper bound; None unless all three are finite numbers."""
    value, low, high = metric["value"], metric["low"], metric["high"]
    if value is None or low is None or high is None or not all(map(math.isfinite, (value, low, high))):
        return None
    return value, low, high


def _drops(classes: dict[str, Triple], labels: Sequence[str]) -> str:
    shown = "; ".join(f"{x} {classes[x][0]:+.3f} F1, interval {_interval(classes[x])}" for x in labels[:3])
    return shown + (f" and {len(labels) - 3} more" if len(labels) > 3 else "")


def _interval(triple: Triple) -> str:
    return f"[{triple[1]:+.3f}, {triple[2]:+.3f}]"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
