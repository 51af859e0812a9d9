"""Candidate and champion on data of elsewhere, which neither was trained on: what is learnt may not carry over."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from overnight.data.ingest import ingest
from overnight.data.store import read_columns, write_table
from overnight.errors import OvernightError
from overnight.evaluation import Metric, evaluate
from overnight.processes import run_child
from overnight.scoring import PREDICTIONS, score_models

if TYPE_CHECKING:
    from overnight.config import Elsewhere
    from overnight.problems.base import Facts, Problem


class Carried(TypedDict):
    """One set of data: the metric of both models on it, or why there is none."""

    name: str
    rows: int
    left_out: int
    """Rows without a text or a target, or with a label that the candidate does not know."""
    candidate: Metric | None
    champion: Metric | None
    error: str | None


def judge_elsewhere(
    sets: Sequence[Elsewhere],
    problem: Problem,
    facts: Facts,
    models: Mapping[str, str],
    folder: Path,
    threads: int,
    options: Mapping[str, Any],
) -> list[Carried]:
    """Judges each set; one that cannot be read costs the others nothing, and the night neither.

    Args:
        facts: of the candidate.
        models: `candidate`, and `champion` if there is one → finished model folder.
        folder: for rows and predictions.
        options: `metric`, `confidence` and `resamples` of `evaluate`.
    """
    found: list[Carried] = []
    for number, one in enumerate(sets):
        told: Carried = {"name": one.name, "rows": 0, "left_out": 0, "candidate": None, "champion": None, "error": None}
        found.append(told)
        place = folder / str(number)
        where = f"evaluation → also_on → {number} → data"
        try:
            rows = ingest(one.data, place, problem, where=where)
            columns, told["left_out"] = _usable(read_columns(rows.path, problem.required_roles), problem, facts)
            told["rows"] = len(columns[problem.target])
            if not told["rows"]:
                told["error"] = "no row can be judged"
                continue
            write_table(columns, place / "usable.parquet")
            asked = {"rows": str(place / "usable.parquet"), "text_roles": list(problem.text_roles), "timed": False}
            run_child(score_models, place, threads, models=models, **asked)
        except OvernightError as error:
            told["error"] = str(error)
            continue
        predictions = json.loads((place / PREDICTIONS).read_text())
        targets = [problem.truth(cell) for cell in columns[problem.target]]
        for name, answers in predictions.items():
            judged = evaluate(problem, facts, targets, answers, **options)
            told["candidate" if name == "candidate" else "champion"] = judged["metrics"][options["metric"]]
    return found


def _usable(columns: Mapping[str, Sequence[Any]], problem: Problem, facts: Facts) -> tuple[dict[str, list[Any]], int]:
    """The rows that a judgement can be made of, and how many cannot."""
    known = set(facts["labels"]) if problem.labelled else None
    rows = list(zip(*columns.values(), strict=True))
    place = list(columns).index(problem.target)
    kept = [row for row in rows if None not in row and (known is None or row[place] in known)]
    return {name: [row[i] for row in kept] for i, name in enumerate(columns)}, len(rows) - len(kept)
