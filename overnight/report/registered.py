"""What MLflow's pages say of a version and of the registered model, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.report.markdown import cell
from overnight.report.words import interval, metric_lines, parameters, point

if TYPE_CHECKING:
    from overnight.report.record import NightRecord

SAID = {"promote": "Promoted", "keep": "Kept out of production", "wait": "Left to a person"}


def version_markdown(record: NightRecord, outcome: str, pages: Mapping[str, str], folder: Path) -> str:
    """Why this version was promoted or not, its numbers, where everything stands, how to use it.

    Args:
        record: the night's, decided.
        outcome: "promote", "keep" or "wait".
        pages: links to the night's `run`, `report` and `docs` in MLflow.
        folder: the night's, on the machine it ran on.
    """
    name, number = record["model"], (record.get("candidate") or {}).get("version")
    champion = record.get("champion")
    against = f"against version {champion['version']}" if champion else "with no champion before"
    lines = [f"**{SAID[outcome]}** by night `{record['id']}`, {against}"]
    lines += ["", "| | rule | what it saw |", "|---|---|---|"]
    for reason in record.get("decision", {}).get("reasons", []):
        lines.append(f"| {'✓' if reason['passed'] else '✗'} | {cell(reason['rule'])} | {cell(reason['text'])} |")
    lines += ["", f"| test rows | version {number} |" + (f" version {champion['version']} |" if champion else "")]
    lines.append("|---|---|" + ("---|" if champion else ""))
    for metric in metric_lines(record)[:8]:
        shown = [metric.candidate, metric.champion] if champion else [metric.candidate]
        cells = [cell(metric.name), *(f"{point(value)} {interval(value)}" for value in shown)]
        lines.append(f"| {' | '.join(cells)} |")
    best = [t for t in record.get("search", {}).get("trials", []) if t["number"] == record["candidate"].get("trial")]
    if best and best[0].get("params"):
        lines += ["", f"Trial {best[0]['number']}: {cell(parameters(best[0]['params']))}"]
    lines += [
        "",
        f"- [Morning report]({pages['report']}), `{folder / 'report.html'}`",
        f"- [Data Docs]({pages['docs']}), `{folder / 'data_docs' / 'index.html'}`",
        f"- [The night's run]({pages['run']}) with its trials",
        "",
        "```",
        f"mlflow.pyfunc.load_model('models:/{name}/{number}').predict(...)",
        f"overnight promote {name} {number} --reason TEXT",
        "```",
    ]
    return "\n".join(lines)


def model_markdown(name: str, description: str) -> str:
    """What holds for every version: which is in production, how to load it, serve it, go back."""
    return f"""{description}

The alias `champion` is the version in production, `candidate` the newest one that a night registered. Each version
says why it was promoted or kept; `overnight history {name}` says who moved the alias when.

```
mlflow.pyfunc.load_model('models:/{name}@champion')    # in Python: .predict(pandas.DataFrame(...))
overnight serve {name}                                 # over HTTP, follows the alias
mlflow models serve -m models:/{name}@champion --env-manager local
overnight rollback {name} --reason TEXT                # back to the champion before
```
""".strip()
