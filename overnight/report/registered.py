"""What MLflow's pages say of a version and of the registered model, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.report.markdown import cell
from overnight.report.words import best_trial, interval, metric_lines, parameters, point

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
    name, number, champion = record["model"], record["candidate"].get("version"), record.get("champion")
    against = f"against version {champion['version']}" if champion else "with no champion before"
    rules = [
        (f"{'✓' if reason['passed'] else '✗'} {cell(reason['rule'])}", cell(reason["text"]))
        for reason in record["decision"]["reasons"]
    ]
    numbers = [
        (cell(metric.name), *(f"{point(of)} {interval(of)}" for of in (metric.candidate, metric.champion)))
        for metric in metric_lines(record)[:8]
    ]
    versions = ("metric", f"version {number}", f"version {champion['version']}" if champion else "no champion")
    best = best_trial(record.get("search", {}), record["candidate"].get("trial"))
    return "\n".join(
        [
            f"{SAID[outcome]} by night {record['id']}, {against}.",
            *_table(("rule", "what it saw"), rules),
            f"On {record['candidate']['evaluation']['rows']:,} test rows:",
            *_table(versions, numbers),
            f"Trial {best['number']}: {cell(parameters(best['params']))}" if best and best.get("params") else "",
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
    )


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """With room between the columns, where MLflow's pages leave none."""
    drawn = [f"| {' | &emsp;'.join(cells)} |" for cells in (heads, *rows)]
    return ["", drawn[0], "|---" * len(heads) + "|", *drawn[1:], ""]


def model_markdown(name: str, description: str) -> str:
    """What holds for every version: which is in production, how to load it, serve it, go back."""
    return f"""{description}

The alias `champion` is the version in production, `candidate` the newest one that a night registered. Each version
says why it was promoted or kept; `overnight history {name}` says who moved the alias when.

```
mlflow.pyfunc.load_model('models:/{name}@champion')    # in Python, then .predict(frame)
overnight serve {name}                                 # over HTTP, follows the alias
mlflow models serve -m models:/{name}@champion --env-manager local
overnight rollback {name} --reason TEXT                # back to the champion before
```
""".strip()
