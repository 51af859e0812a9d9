"""The search: one task for the study, one task run for each of its trials."""

from __future__ import annotations

import queue
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from overnight.config import Search, with_parameters
from overnight.errors import Complaint, NightFailed
from overnight.home import Home
from overnight.processes import accept_children, cores, end_children, run_child
from overnight.progress import emit
from overnight.report import trials_rows
from overnight.search.crossing import cross_validate
from overnight.search.places import Place, Places, look_around, this_machine
from overnight.search.study import Direction, Study
from overnight.search.trial import BEST, Job, compute_features, run_trial, trial_folder, write_params
from overnight.settings import Training
from overnight.tracking.night import night_run
from overnight.tracking.runs import Syncer
from tasks.artifacts import progress, table

FEATURES = "features"
HOPELESS = 3  # failures in a row, with nothing finished, after which the rest would fail too


@task(name="trial", task_run_name="trial {number}", cache_policy=NO_CACHE)
def trial(
    number: int,
    night_folder: Path,
    storage: str,
    model: str,
    search: Search,
    evaluations: int,
    direction: Direction,
    deadline: float | None,
    place: Place,
) -> dict[str, Any]:
    """One fine-tuning run in a process of its own; not retried, since the study tries something better instead."""
    study = Study(storage, night_folder.name, model, search, evaluations, direction)
    result = run_trial(
        trial_folder(night_folder, number),
        report=lambda evaluation, value: study.report(number, evaluation, value),
        deadline=deadline,
        place=place,
        on_metrics=lambda line: emit(trial=number, **line),
    )
    study.tell(number, result["state"], result.get("value"), result)
    return result


@task(name="search", cache_policy=NO_CACHE)
def search(
    home: Home,
    night_folder: Path,
    model: str,
    search: Search,
    training: Training,
    job: Job,
    direction: Direction,
    folds: int | None = None,
) -> dict[str, Any]:
    """Runs trials until their number or the time is used up; leaves one checkpoint, the best trial's.

    Args:
        folds: of a cross-validation with the best parameters, which comes afterwards.

    Raises:
        NightFailed: when no trial finished.
    """
    evaluations = evaluations_of(search, training)
    study = Study(home.study_storage, night_folder.name, model, search, evaluations, direction)
    study.continue_running()
    study.fail_abandoned()
    accept_children()
    begun = time.monotonic()
    deadline = begun + 60 * search.minutes if search.minutes else None
    looked = run_child(look_around, night_folder / "machine", 1)
    places = Places(this_machine(looked), search.parallel, trials=search.wanted, devices=training.devices)
    emit(trials=search.wanted, deadline=deadline)
    emit(places=str(places))
    if study.remaining > 0:
        job = _with_features(job, search, training, night_folder / FEATURES)
    beforehand = time.monotonic() - begun
    shown = progress("search", f"{search.wanted} trials")
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: dict[Any, tuple[int, Place]] = {}
    seconds: list[float] = []
    failures: list[str] = []
    with Syncer(home, lambda: night_run(home, model, night_folder.name), say=lambda text: emit(warning=text)) as syncer:
        try:
            while True:
                while _goes_on(study, deadline, seconds, failures) and (place := places.take()):
                    ask = study.ask()
                    settings = with_parameters(training, ask.params)
                    folder = trial_folder(night_folder, ask.number)
                    write_params(folder, night_folder.name, ask.number, ask.params, settings, job)
                    syncer.watch(folder)
                    emit(trial=ask.number, state="running", params=ask.params)
                    future = trial.submit(
                        ask.number,
                        night_folder,
                        home.study_storage,
                        model,
                        search,
                        evaluations,
                        direction,
                        deadline,
                        place,
                    )
                    running[future] = ask.number, place
                    future.add_done_callback(done.put)
                # here, so that the next trial does not wait for what is shown
                _keep_best(study, night_folder)
                _show(study, shown)
                if not running:
                    break
                future = done.get()
                number, place = running.pop(future)
                places.give_back(place)
                result = future.result()
                if places.learn(result):
                    emit(places=str(places))
                if result["state"] == "finished":
                    seconds.append(result["seconds"])
                    failures = []
                elif result["state"] == "failed":
                    failures.append(result["error"])
                emit(trial=number, **{k: result[k] for k in ("state", "value", "seconds", "error") if k in result})
        except BaseException:
            end_children()  # else the threads of the trials would keep an interrupted night waiting
            raise
    shutil.rmtree(night_folder / FEATURES, ignore_errors=True)
    if not study.counts["finished"]:
        raise NightFailed(Complaint("search", "no trial finished", failures[-1] if failures else f"{study.counts}"))
    best = study.best()
    best_training = with_parameters(training, best.params)
    crossed = cross_validate(night_folder / "folds", job, best_training, folds) if folds else None
    rows = study.rows()
    table("trials", trials_rows(cast(Any, rows)), f"{len(rows)} trials; the best is number {best.number}")
    return {
        "study": night_folder.name,
        "wanted": search.wanted,
        "minutes": search.minutes,
        "best": best.number,
        "params": best.params,
        "trials": rows,
        "counts": study.counts,
        "importances": study.importances(),
        "folds": crossed,
        "seconds": round(time.monotonic() - begun, 2),
        "preparation_seconds": round(beforehand, 2),
        "places": str(places),
        "checkpoint": str(trial_folder(night_folder, best.number) / BEST),
    }


def _show(study: Study, shown: Callable[[float, str], None]) -> None:
    """How far the search is, on its artifact."""
    counts = study.counts
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "none"
    best = f"; best is trial {study.best().number}" if counts["finished"] else ""
    shown(100 * sum(counts.values()) / study.search.wanted, f"{said} of {study.search.wanted} trials{best}")


def evaluations_of(search: Search, training: Training) -> int:
    """Evaluations that the longest trial of the space makes."""
    longest = {
        name: max(search.space[name].extremes) if name in search.space else getattr(training, name)
        for name in ("epochs", "evaluations_per_epoch")
    }
    return max(1, round(longest["epochs"] * longest["evaluations_per_epoch"]))


def _with_features(job: Job, search: Search, training: Training, folder: Path) -> Job:
    """The job, with what its frozen layers make of the rows, when that is the same in all trials."""
    if not training.freeze_layers or "freeze_layers" in search.space:
        return job
    shutil.rmtree(folder, ignore_errors=True)
    run_child(compute_features, folder, len(cores()), job=asdict(job), training=asdict(training))
    return replace(job, features=str(folder))


def _goes_on(study: Study, deadline: float | None, seconds: list[float], failures: list[str]) -> bool:
    if study.remaining <= 0:
        return False
    if len(failures) >= HOPELESS and not study.counts["finished"]:
        return False
    if deadline is None or not study.counts["finished"]:
        return True
    # what is left must be worth a start: a trial cut off in its first quarter only costs the checkpoint's time
    left = deadline - time.monotonic()
    return left > 0.25 * (sum(seconds) / len(seconds) if seconds else 0.0) and left > 0


def _keep_best(study: Study, night_folder: Path) -> None:
    """Deletes the checkpoints of all ended trials but the best one."""
    best = study.best().number if study.counts["finished"] else None
    for row in study.rows():
        if row["number"] != best and row["state"] in ("finished", "pruned", "failed"):
            shutil.rmtree(trial_folder(night_folder, row["number"]) / BEST, ignore_errors=True)
            shutil.rmtree(trial_folder(night_folder, row["number"]) / "snapshot", ignore_errors=True)
