"""Cross-validation of the best parameters: how much a score depends on which rows were learnt from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from overnight.processes import cores, run_child
from overnight.search.trial import Job
from overnight.settings import Training


def cross_validate(folder: Path, job: Job, training: Training, count: int) -> dict[str, Any]:
    """Trains once a fold of the training rows, in a process of its own, and judges each by the rows it did not see.

    Returns:
        `folds` (the metric after the last step of each), their `mean` and their standard deviation (`sd`).
    """
    found = run_child(_folds, folder, len(cores()), job=asdict(job), training=asdict(training), count=count)
    return {"metric": job.metric, **found}


def _folds(folder: Path, *, job: dict[str, Any], training: dict[str, Any], count: int) -> dict[str, Any]:
    """In the child."""
    from overnight import problems
    from overnight.training import data
    from overnight.training.files import forget
    from overnight.training.fit import fit
    from overnight.training.models import ModelReference, resolve_base

    shared, settings = Job(**job), Training(**training)
    problem, reference = problems.get(shared.problem), ModelReference(resolve_base(shared.base), shared.revision)

    def value(learnt: data.Part, judged: data.Part, place: Path) -> float:
        """The metric after the last step, not the best: to choose by the rows that judge would flatter it."""
        values: list[float] = []
        told: dict[str, Any] = {"metric": shared.metric, "on_evaluation": lambda line: values.append(line["value"])}
        fit(problem, reference, shared.facts, learnt, judged, settings, folder=place, **told)
        forget(place)
        return values[-1]

    parts = data.folds(data.open(shared.train), count, settings.seed)
    values = [value(*sides, folder / str(number)) for number, sides in enumerate(parts)]
    return {"folds": values, "mean": fmean(values), "sd": stdev(values)}
