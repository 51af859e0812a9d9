"""Candidate and champion on the same rows, in one process: predictions and latency."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.errors import Complaint, NightFailed
from overnight.golden import check_golden, write_golden
from overnight.home import Home
from overnight.processes import run_child

if TYPE_CHECKING:
    from overnight.training.predict import Scorer

PREDICTIONS = "predictions.json"
LATENCY_ROWS = 200


def score_models(
    folder: Path,
    *,
    models: dict[str, str],
    rows: str,
    text_roles: list[str],
    candidate: str | None = None,
    validation: str | None = None,
    metric: str | None = None,
    timed: bool = True,
) -> dict[str, Any]:
    """Scores every row with every model; runs in a child process.

    Args:
        folder: gets `predictions.json`: model → predictions in row order.
        models: name → finished model folder.
        rows: Parquet file with the text columns.
        text_roles: columns that hold the texts.
        candidate: name of the model whose folder also gets a golden set.
        validation: tokenized rows by which the candidate is tuned first, where its problem has something to tune.
        metric: what it is tuned for; absent: the problem's default.
        timed: whether latency is measured.

    Returns:
        {"latency": {model: …}}: measured in turns on the same rows, so that a noisy machine hits both alike.
    """
    import pyarrow.parquet as parquet

    from overnight.evaluation import latencies
    from overnight.training.predict import Scorer

    texts = parquet.read_table(rows, columns=text_roles).to_pylist()
    scorers = {name: Scorer(path) for name, path in models.items()}
    if candidate is not None and validation is not None:
        _tune(scorers[candidate], Path(models[candidate]), validation, metric)
    predictions = {name: scorer.predict_texts(texts) for name, scorer in scorers.items()}
    (folder / PREDICTIONS).write_text(json.dumps(predictions))
    if candidate is not None:
        write_golden(Path(models[candidate]), scorers[candidate])
    if not timed:
        return {}
    measured = latencies({name: s.predict_texts for name, s in scorers.items()}, texts[:LATENCY_ROWS], repeats=15)
    return {"latency": measured}


def _tune(scorer: Scorer, folder: Path, validation: str, metric: str | None) -> None:
    from overnight.training import data
    from overnight.training.card import write_card
    from overnight.training.predict import forward

    problem, facts = scorer.problem, scorer.card.facts
    if problem.tunes:
        rows = data.open(validation)
        outputs = forward(problem, scorer.model, rows, facts=facts)
        facts = problem.tuned(outputs, problem.targets(rows, facts), facts, rows, metric or problem.default_metric)
        scorer.card = replace(scorer.card, facts=facts)
        write_card(folder, scorer.card)


SMOKE_TEXT = "A short text, to see that the model answers."


def smoke(folder: Path, *, model: str) -> dict[str, Any]:
    """Loads a model folder and asks it something; runs in a child process, before a version becomes champion.

    Raises:
        NightFailed: the model does not load, or fails `examine`.
    """
    from overnight.training.predict import Scorer

    return examine(Scorer(model), Path(model))


def examine(scorer: Scorer, folder: Path) -> dict[str, int]:
    """The smoke test of a loaded model: a short, an empty and a very long text, then its golden texts.

    Raises:
        NightFailed: an answer is none (`Problem.broken`), or the golden texts are answered otherwise than on the night
            the model was made.
    """
    row = dict.fromkeys(scorer.problem.text_roles, SMOKE_TEXT)
    answers = scorer.predict_texts([row, dict.fromkeys(row, ""), dict.fromkeys(row, SMOKE_TEXT * 500)])
    for answer in answers:
        broken = scorer.problem.broken(answer)
        if broken:
            raise NightFailed(Complaint("smoke test", broken, str(answer)[:500]))
    return {"answers": len(answers), "golden": check_golden(folder, scorer)}


def smoke_in_child(home: Home, model: Path) -> None:
    """The smoke test of a model folder, in a process of its own, so that a bad model cannot take this one along.

    Raises:
        NightFailed: as `smoke`, or the process died.
    """
    # of its own: another model may be tested at the same time; after a failure it stays, with the log that tells of it
    folder = Path(tempfile.mkdtemp(dir=home.folder("smoke")))
    run_child(smoke, folder, 1, model=str(model))
    shutil.rmtree(folder)
