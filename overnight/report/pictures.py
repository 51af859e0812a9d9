"""Pictures of a night: PNG for Prefect and MLflow, SVG for the page, in whose colours (light or dark) they appear.

Figures are made without pyplot, so that nothing global remembers them.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

from overnight.report.words import best_trial, metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from overnight.evaluation import Evaluation
    from overnight.evaluation.labels import Confusion
    from overnight.report.record import NightRecord, Searched

# colours of the page in light mode; in an SVG each becomes the page's own variable
COLOURS = {"ink": "#17202b", "muted": "#5c6773", "line": "#d9dee5", "accent": "#3f51b5", "card": "#ffffff"}
MOST_CLASSES = 25
FEWEST_ROWS = 5
"""A bin of scores with fewer rows says nothing and is not drawn."""


def confusion_matrix(matrix: Confusion, title: str = "") -> Figure:
    """Counts of target (rows) and prediction (columns), each row shaded by its share."""
    rows, columns, counts = matrix["rows"], matrix["columns"], matrix["counts"]
    side = min(1.4 + 0.75 * len(columns), 14)
    figure, axes = _figure(side + 0.8, side, title)
    shares = [[n / max(sum(row), 1) for n in row] for row in counts]
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            axes.fill([j, j + 1, j + 1, j], [i, i, i + 1, i + 1], color=COLOURS["accent"], alpha=shares[i][j], lw=0)
            colour = COLOURS["card"] if shares[i][j] > 0.55 else COLOURS["ink"]
            if len(columns) <= MOST_CLASSES:
                axes.text(j + 0.5, i + 0.5, f"{count:,}", ha="center", va="center", color=colour, fontsize=9)
    axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel="predicted", ylabel="target", aspect="equal")
    axes.set_xticks([j + 0.5 for j in range(len(columns))], [_cut(c) for c in columns], rotation=45, ha="right")
    axes.set_yticks([i + 0.5 for i in range(len(rows))], [_cut(r) for r in rows])
    axes.tick_params(length=0)
    return _plain(figure, axes)


def reliability(candidate: Evaluation, champion: Evaluation | None = None, title: str = "") -> Figure:
    """Share of right predictions against the score; on the diagonal a score is a probability."""
    figure, axes = _figure(4.2, 3.4, title)
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], lw=1, ls=(0, (3, 3)))
    for name, found, colour in (("champion", champion, COLOURS["muted"]), ("candidate", candidate, COLOURS["accent"])):
        bins = (found["calibration"] or {"bins": []})["bins"] if found else []
        bins = [b for b in bins if b["rows"] >= FEWEST_ROWS]
        if bins:
            x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
            most = max(b["rows"] for b in bins)
            axes.plot(x, y, color=colour, lw=1.6, label=name)
            axes.scatter(x, y, s=[12 + 90 * b["rows"] / most for b in bins], color=colour, lw=0, alpha=0.85)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.03), xlabel="score of the predicted label", ylabel="share that is right")
    axes.legend(frameon=False, loc="upper left", fontsize=9, labelcolor=COLOURS["ink"])
    return _plain(figure, axes)


def search_curves(search: Searched, name: str, candidate: int | None = None, title: str = "") -> Figure:
    """The metric on the validation rows at each evaluation of each trial; pruned ones end in a cross."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(4.8, 3.2, title)
    best = best_trial(search, candidate)
    for trial in search.get("trials", ()):
        curve = sorted((int(step) + 1, value) for step, value in trial.get("evaluations", {}).items())
        if not curve:
            continue
        x, y = [step for step, _ in curve], [value for _, value in curve]
        chosen = best is not None and trial["number"] == best["number"]
        colour = COLOURS["accent"] if chosen else COLOURS["muted"]
        axes.plot(x, y, color=colour, lw=2.4 if chosen else 1.1, alpha=1 if chosen else 0.65, zorder=3 if chosen else 2)
        end = {"pruned": "x", "failed": "x"}.get(trial["state"], "o")
        size = 34 if chosen else 16
        axes.scatter(x[-1:], y[-1:], s=size, marker=end, color=colour, lw=1.3 if end == "x" else 0, zorder=4)
        if chosen:
            axes.annotate(
                f"trial {trial['number']}: {y[-1]:.3f}", (x[-1], y[-1]), (0, 8), textcoords="offset points",
                ha="right", color=COLOURS["ink"], fontsize=9,
            )  # fmt: skip
    axes.set(xlabel="evaluation", ylabel=f"{name} on the validation rows")
    axes.margins(x=0.04, y=0.12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _plain(figure, axes)


def drawn(record: NightRecord) -> dict[str, Figure]:
    """Name → figure of every picture the night has numbers for."""
    candidate: Any = record.get("candidate") or {}
    champion: Any = record.get("champion") or {}
    evaluation: Evaluation | None = candidate.get("evaluation")
    found: dict[str, Figure] = {}
    if evaluation:
        if evaluation["confusion"]:
            found["confusion_matrix"] = confusion_matrix(evaluation["confusion"], "Confusion matrix of the test rows")
        if evaluation["calibration"]:
            found["reliability"] = reliability(evaluation, champion.get("evaluation"), "Reliability")
    search = record.get("search")
    if search and any(trial.get("evaluations") for trial in search.get("trials", ())):
        found["search_curves"] = search_curves(search, metric(record), candidate.get("trial"), "Search")
    return found


def confusion_matrix_png(matrix: Confusion) -> bytes:
    """The confusion matrix alone."""
    return png(confusion_matrix(matrix))


def png(figure: Figure) -> bytes:
    """The figure on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130, facecolor="white")
    return file.getvalue()


def svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element for the page: its colours are the page's variables, its text stays text.

    Args:
        name: unique on the page; keeps the ids of two pictures apart.
        description: what the picture shows, for those who do not see it.
    """
    import matplotlib

    for axes in figure.axes:
        axes.set_title("")  # the page has its own caption
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[^"]*_\d+"', "", text)  # matplotlib's names of groups, the same in every picture
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for colour, value in COLOURS.items():
        text = text.replace(value, f"var(--{colour})")
    return text.replace("<svg", f'<svg class="picture" role="img" aria-label="{escape(description)}"', 1)


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """An empty figure of inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, color=COLOURS["ink"], fontsize=10, parse_math=False)
    return figure, axes


def _plain(figure: Figure, axes: Axes) -> Figure:
    """Quiet axes in the colours of the page; names of labels are taken literally, not as formulas."""
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    for edge in ("left", "bottom"):
        axes.spines[edge].set_color(COLOURS["line"])
    axes.tick_params(colors=COLOURS["muted"], labelsize=9)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set(color=COLOURS["muted"], fontsize=9)
    for tick in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        tick.set_parse_math(False)
    return figure


def _cut(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
