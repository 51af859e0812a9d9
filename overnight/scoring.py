"""Candidate and champion on the same rows, in one process: predictions and latency."""

from __future__ import annotations

import json
import shutil
import tempfile
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
    folder: Path, *, models: dict[str, str], rows: str, text_roles: list[str], candidate: str | None = None
) -> dict[str, Any]:
    """Scores every row with every model; runs in a child process.

    Args:
        folder: gets `predictions.json`: model → predictions in row order.
        models: name → finished model folder.
        rows: Parquet file with the text columns.
        text_roles: columns that hold the texts.
        candidate: name of the model whose folder also gets a golden set.

    Returns:
        {"latency": {model: …}}: measured in turns on the same rows, so that a noisy machine hits both alike.
    """
    import pyarrow.parquet as parquet

    from overnight.evaluation import latencies
    from overnight.training.predict import Scorer

    texts = parquet.read_table(rows, columns=text_roles).to_pylist()
    scorers = {name: Scorer(path) for name, path in models.items()}
    predictions = {name: scorer.predict_texts(texts) for name, scorer in scorers.items()}
    (folder / PREDICTIONS).write_text(json.dumps(predictions))
    if candidate is not None:
        write_golden(Path(models[candidate]), scorers[candidate])
    measured = latencies({name: s.predict_texts for name, s in scorers.items()}, texts[:LATENCY_ROWS], repeats=15)
    return {"latency": measured}


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
        NightFailed: an answer is not one finite probability a label that sum to 1, or the golden texts are answered
            otherwise than on the night the model was made.
    """
    import math

    row = dict.fromkeys(scorer.problem.text_roles, SMOKE_TEXT)
    answers = scorer.predict_texts([row, dict.fromkeys(row, ""), dict.fromkeys(row, SMOKE_TEXT * 500)])
    for answer in answers:
        numbers = list(answer["scores"].values())
        if not all(map(math.isfinite, numbers)) or abs(sum(numbers) - 1) > 1e-3:
            raise NightFailed(Complaint("smoke test", "the scores of a text must be probabilities", str(numbers)))
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
