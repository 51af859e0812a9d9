"""One trial: a training process that writes into its folder, and the parent that reads along.

    params.json     what is trained; written first
    metrics.jsonl   one line a log (kind "log") and one an evaluation (kind "evaluation")
    stop            written by the parent: "prune" or "budget"
    best/           the best checkpoint so far
    result.json     written last, so that its existence proves completion

Nothing here waits for a server: tracking and orchestration read the same files at their own pace.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from overnight.errors import NightFailed, OvernightError, UserError
from overnight.home import read_json, write_json
from overnight.processes import RESULT, Child, ending
from overnight.search.places import Place
from overnight.settings import Training

PARAMS, METRICS, STOP, BEST = "params.json", "metrics.jsonl", "stop", "best"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Job:
    """What every trial of a night shares; paths are strings, so that it travels as JSON."""

    problem: str
    base: str
    revision: str | None
    train: str
    """Folder of the tokenized training rows."""
    validation: str
    """Folder of the tokenized validation rows."""
    facts: dict[str, Any]
    """The problem's facts, such as the labels."""
    metric: str
    features: str | None = None
    """Folder of the hidden states at the freeze line, where they were computed beforehand."""


def trial_folder(night_folder: Path, number: int) -> Path:
    return night_folder / "trials" / f"{number:04d}"


def write_params(folder: Path, night: str, number: int, params: dict[str, Any], training: Training, job: Job) -> None:
    """Makes the trial's folder; a continued trial keeps what it has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STOP).unlink(missing_ok=True)
    if not (folder / PARAMS).exists():
        facts = {"number": number, "night": night, "study": night, "params": params, "started": time.time()}
        write_json(folder / PARAMS, {**facts, "training": asdict(training), "job": asdict(job)})


def run_trial(
    folder: Path,
    *,
    report: Callable[[int, float], bool],
    deadline: float | None,
    place: Place,
    on_metrics: Callable[[dict[str, Any]], None] = lambda line: None,
) -> dict[str, Any]:
    """Runs the trial of `folder` to its end.

    Args:
        folder: with `params.json`.
        report: takes evaluation number and value; True prunes the trial.
        deadline: monotonic time at which the trial evaluates once more and ends.
        place: the cores and GPUs that are its own.
        on_metrics: called with every line of metrics.jsonl.

    Returns:
        The trial's result, with "state": "finished", "pruned" or "failed" (then with "error").

    Raises:
        UserError: the settings cannot be trained with at all, such as an unknown base model.
    """
    finished = read_json(folder / RESULT)
    if finished is not None:  # a night that was killed between the trial's end and the study's knowing
        return dict(finished)
    reader = LineReader(folder / METRICS)
    child = Child(_train, folder, place.threads, place.cores, place.gpus)
    try:
        while True:
            ended = child.join(POLL_SECONDS)
            for line in reader.new_lines():
                on_metrics(line)
                if line["kind"] == "evaluation" and report(line["evaluation"], line["value"]):
                    (folder / STOP).write_text("prune")
            if ended:
                break
            if deadline is not None and time.monotonic() > deadline and not (folder / STOP).exists():
                (folder / STOP).write_text("budget")
        return child.outcome()
    except UserError:
        raise
    except OvernightError as error:
        if ending():  # killed with its night: to be continued, not failed
            raise
        result = {"state": "failed", "error": str(error)}
        write_json(folder / RESULT, result)
        return result
    except BaseException:
        child.kill()
        raise


class LineReader:
    """Reads the whole lines that were added to a JSONL file since the last look."""

    def __init__(self, path: Path):
        self._path, self._offset = path, 0

    def new_lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with open(self._path, "rb") as file:
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = []
        for line in whole.splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # half a line from a process killed while writing, completed by the next one's
                continue
        return lines


def compute_features(folder: Path, job: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """In a child: leaves the hidden states at the freeze line in its folder, for all trials of the night."""
    from overnight import problems
    from overnight.training import data
    from overnight.training.frozen import compute
    from overnight.training.models import ModelReference, resolve_base

    shared = Job(**job)
    sides = {"train": data.open(shared.train), "validation": data.open(shared.validation)}
    reference = ModelReference(resolve_base(shared.base), shared.revision)
    return compute(problems.get(shared.problem), reference, shared.facts, Training(**training), sides, folder)


def _train(folder: Path) -> dict[str, Any]:
    """In the child: trains what params.json says; the engine's result, with the trial's state."""
    from overnight import problems
    from overnight.search.launch import launch
    from overnight.training import data
    from overnight.training.fit import fit
    from overnight.training.models import ModelReference, resolve_base

    facts = read_json(folder / PARAMS)
    if facts is None:
        raise NightFailed(f"{folder / PARAMS}: missing")
    job, training = Job(**facts["job"]), Training(**facts["training"])
    stop = folder / STOP
    with open(folder / METRICS, "a", buffering=1, encoding="utf-8") as metrics:

        def write(kind: str, line: dict[str, Any]) -> None:
            metrics.write(json.dumps({"kind": kind, "time": time.time(), **line}) + "\n")

        train = partial(
            fit,
            problems.get(job.problem),
            ModelReference(resolve_base(job.base), job.revision),
            job.facts,
            data.open(job.train),
            data.open(job.validation),
            training,
            folder=folder,
            metric=job.metric,
            features=Path(job.features) if job.features else None,
            on_log=lambda line: write("log", line),
            on_evaluation=lambda line: write("evaluation", line),
            should_stop=lambda: stop.read_text() or None if stop.exists() else None,
        )
        result = launch(training.devices, folder, train)
    state = "pruned" if result["stopped"] == "prune" else "finished"
    return {"state": state, **result}
