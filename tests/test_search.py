"""The study and its trials, with real training processes on a tiny model."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from overnight import problems
from overnight.config import Domain, Search, with_parameters
from overnight.errors import NightFailed
from overnight.processes import cores
from overnight.search.places import Place
from overnight.search.study import Study, open_storage
from overnight.search.trial import BEST, METRICS, PARAMS, Job, LineReader, run_trial, trial_folder, write_params
from overnight.settings import Training
from overnight.training import data
from overnight.training.models import load_tokenizer

ONE = Place(cores()[:1])
SPACE = {"learning_rate": Domain(low=1e-4, high=1e-2, log=True), "batch_size": Domain(choices=(8, 16))}


@pytest.fixture(scope="module")
def job(tmp_path_factory, tiny_model, tiny_rows) -> Job:
    folder = tmp_path_factory.mktemp("tokens")
    problem = problems.get("sequence-classification")
    columns = tiny_rows.to_dict("list")
    facts = problem.facts(columns)
    tokenizer = load_tokenizer(str(tiny_model))
    for side, part in (("train", slice(0, 300)), ("validation", slice(300, 400))):
        batch = {name: values[part] for name, values in columns.items()}
        data.write(folder / side, [problem.encode(tokenizer, batch, facts, 32)], {})
    train, validation = str(folder / "train"), str(folder / "validation")
    return Job("sequence-classification", str(tiny_model), None, train, validation, facts, "macro_f1")


def study_of(tmp_path, name="night-1", model="m", **options) -> Study:
    search = Search(**{"trials": 4, "space": SPACE, **options})
    return Study(str(tmp_path / "studies.journal"), name, model, search, 4, "maximize")


def prepared(tmp_path, job, number, training):
    folder = trial_folder(tmp_path / "night-1", number)
    write_params(folder, "night-1", number, {}, training, job)
    return folder


def test_a_trial_trains_and_leaves_its_files(tmp_path, job):
    """A real training process: parameters first, a line an evaluation, the best checkpoint, the result last."""
    seen = []
    folder = prepared(tmp_path, job, 0, Training(epochs=4, learning_rate=3e-3, batch_size=8))
    result = run_trial(
        folder, report=lambda n, value: seen.append((n, value)), deadline=None, place=ONE, on_metrics=lambda line: None
    )
    assert result["state"] == "finished" and result["value"] > 0.7, "far above the third that guessing gets"
    assert [n for n, _ in seen] == list(range(8)) and max(value for _, value in seen) == pytest.approx(result["value"])
    assert (folder / BEST / "model.safetensors").exists() and (folder / PARAMS).exists()
    kinds = [json.loads(line)["kind"] for line in (folder / METRICS).read_text().splitlines()]
    assert kinds.count("evaluation") == 8 and "log" in kinds
    again = run_trial(folder, report=lambda *_: pytest.fail("trained twice"), deadline=None, place=ONE)
    assert again == result, "a trial whose result is there is never trained again"


def test_pruning_fires(tmp_path, job):
    """The median pruner stops a trial that does worse than the others, and its training process really ends early."""
    study = study_of(tmp_path, trials=4, space={"learning_rate": Domain(low=1e-6, high=1e-2, log=True)})
    states = {}
    for rate in (5e-3, 6e-3, 4e-3, 1e-6):
        study._study.enqueue_trial({"learning_rate": rate})
        ask = study.ask()
        folder = prepared(tmp_path, job, ask.number, Training(epochs=60 if rate == 1e-6 else 6, learning_rate=rate))
        result = run_trial(
            folder, report=lambda n, v, number=ask.number: study.report(number, n, v), deadline=None, place=ONE
        )
        study.tell(ask.number, result["state"], result["value"], result)
        states[rate] = result
    assert [states[rate]["state"] for rate in (5e-3, 6e-3, 1e-6)] == ["finished", "finished", "pruned"]
    assert states[1e-6]["steps"] < 10 * states[5e-3]["steps"]
    assert study.counts["pruned"] >= 1 and study.best().params["learning_rate"] != 1e-6
    assert study.remaining == 0


def test_a_short_budget_still_leaves_a_model(tmp_path, job):
    """With the time used up before the first step, the trial evaluates once and keeps that checkpoint."""
    folder = prepared(tmp_path, job, 0, Training(epochs=500))
    result = run_trial(folder, report=lambda *_: False, deadline=time.monotonic(), place=ONE)
    assert result["state"] == "finished" and result["stopped"] == "budget" and 0 <= result["value"] <= 1
    assert (folder / BEST / "model.safetensors").exists()


def test_a_failing_trial_is_a_result_not_an_exception(tmp_path, job):
    """One broken trial costs one trial: its error is kept, the study goes on."""
    study = study_of(tmp_path)
    ask = study.ask()
    folder = prepared(tmp_path, job, ask.number, Training(learning_rate=1e30, max_grad_norm=0, warmup=0))
    result = run_trial(folder, report=lambda *_: False, deadline=None, place=ONE)
    assert result["state"] == "failed" and "learning rate" in result["error"]
    study.tell(ask.number, result["state"], None, result)
    assert study.counts == {"finished": 0, "pruned": 0, "failed": 1} and study.remaining == 3
    with pytest.raises(NightFailed, match="no trial finished"):
        study.best()


def test_a_killed_night_continues_its_study(tmp_path):
    """Finished trials count, the running one is handed out again under its number, and none is added."""
    study = study_of(tmp_path, trials=3)
    first, second = study.ask(), study.ask()
    study.report(second.number, 0, 0.4)
    study.tell(first.number, "finished", 0.5)
    again = study_of(tmp_path, trials=3)  # as the next process does
    again.continue_running()
    assert again.remaining == 2
    assert again.ask() == second
    assert again.remaining == 1
    again.report(second.number, 0, 0.4)  # the evaluation after the snapshot is made again
    again.tell(second.number, "finished", 0.6)
    third = again.ask()
    assert third.number == 2 and third.params not in (first.params, second.params)
    again.tell(third.number, "pruned")
    assert again.remaining == 0 and again.best() == second


def test_best_parameters_of_earlier_nights_come_first(tmp_path):
    """A new night tries last night's best; values outside today's space and other models' nights are left out."""
    old = study_of(tmp_path, name="night-1")
    ask = old.ask()
    old.tell(ask.number, "finished", 0.9)
    other = study_of(tmp_path, name="other-1", model="other")
    other.tell(other.ask().number, "finished", 0.99)
    tonight = study_of(tmp_path, name="night-2")
    assert tonight.ask().params == ask.params
    assert tonight.ask().params != ask.params, "the sampler does not draw last night's first point again"
    narrow = {"learning_rate": Domain(low=1.0, high=2.0)}
    assert study_of(tmp_path, name="night-3", space=narrow).ask().params["learning_rate"] >= 1.0


def test_importances(tmp_path):
    """What the metric follows comes first; few trials, one parameter or equal values say nothing, without a warning."""

    def told(name, trials, value, space=SPACE):
        study = study_of(tmp_path, name=name, trials=trials, space=space, pruner="none", sampler="random")
        for _ in range(trials):
            ask = study.ask()
            study.tell(ask.number, "finished", value(ask.params))
        return study.importances()

    found = told("follows", 12, lambda params: params["learning_rate"])
    assert list(found) == ["learning_rate", "batch_size"] and sum(found.values()) == pytest.approx(1, abs=1e-3)
    assert found["learning_rate"] > 0.7
    assert told("few", 4, lambda params: params["learning_rate"]) == {}
    assert told("alike", 6, lambda params: 0.5) == {}
    one = {"learning_rate": SPACE["learning_rate"]}
    assert told("one", 6, lambda params: params["learning_rate"], one) == {}


def test_trials_of_abandoned_nights_are_closed(tmp_path):
    """A trial that no process will continue does not stay RUNNING for ever; other models' trials are not touched."""
    study_of(tmp_path, name="night-1").ask()
    other = study_of(tmp_path, name="other-1", model="other")
    other.ask()
    study_of(tmp_path, name="night-2").fail_abandoned()
    assert study_of(tmp_path, name="night-1").counts["failed"] == 1
    assert other.counts["failed"] == 0


def test_half_a_line_is_passed_over(tmp_path):
    """A line that a kill cut in two costs that line only."""
    path = tmp_path / "metrics.jsonl"
    reader = LineReader(path)
    assert reader.new_lines() == []
    path.write_text('{"a": 1}\n{"b": ')
    assert reader.new_lines() == [{"a": 1}]
    path.write_text('{"a": 1}\n{"b": {"a": 2}\n{"c": 3}\n')
    assert reader.new_lines() == [{"c": 3}]


def test_a_continued_trial_resumes_from_its_snapshot(tmp_path, job):
    """Killed in the middle, the same folder goes on from the last snapshot instead of from the start."""
    training = Training(epochs=40, learning_rate=1e-3, checkpoint_minutes=1e-6)
    folder = prepared(tmp_path, job, 0, training)

    class Killed(Exception):
        pass

    def kill_later(number, value):
        if number == 3:
            raise Killed

    with pytest.raises(Killed):
        run_trial(folder, report=kill_later, deadline=None, place=ONE)
    assert not (folder / "result.json").exists()
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    lines = len((folder / METRICS).read_text().splitlines())
    steps = []
    run_trial(
        folder,
        report=lambda *_: False,
        deadline=time.monotonic() + 2,
        place=ONE,
        on_metrics=lambda line: steps.append(line["step"]),
    )
    assert len(steps) > lines and min(steps[lines:]) > 1, "training began at the first step again"


def trained(tmp_path, job, number, **settings):
    """Weights and evaluation values of a whole trial."""
    training = Training(**{"epochs": 1, "batch_size": 16, "learning_rate": 2e-3, "precision": "float32", **settings})
    folder = prepared(tmp_path, job, number, training)
    values = []
    result = run_trial(folder, report=lambda _, value: values.append(value), deadline=None, place=Place(cores()))
    assert result["state"] == "finished", result
    return load_file(folder / BEST / "model.safetensors"), values, result


def test_the_same_seed_gives_the_same_weights(tmp_path, job):
    """Training and evaluation are deterministic on a machine, with dropout, bit for bit; another seed differs."""
    first, again, other = (trained(tmp_path, job, n, seed=seed) for n, seed in enumerate((5, 5, 6)))
    assert first[1] == again[1] and all(torch.equal(first[0][name], again[0][name]) for name in first[0])
    assert not all(torch.equal(first[0][name], other[0][name]) for name in first[0])


@pytest.mark.parametrize("settings", [{}, {"accumulation": 2}, {"freeze_layers": 1}], ids=str)
def test_two_devices_train_what_one_does(tmp_path, job, settings):
    """Two processes joined by gloo, on shares of the same steps, end where one process ends: rounding is all."""
    alone, values, one = trained(tmp_path, job, 0, dropout=0.0, batch_size=15, **settings)
    together, same, two = trained(tmp_path, job, 1, dropout=0.0, batch_size=15, devices=2, **settings)
    assert (one["devices"], two["devices"]) == (1, 2) and one["steps"] == two["steps"] == 20
    assert same == pytest.approx(values, abs=0.02)
    for name, weights in alone.items():
        assert torch.allclose(together[name], weights, rtol=1e-3, atol=1e-4), name


def test_an_error_on_one_device_ends_the_trial(tmp_path, job):
    """No process waits for ever for one that has failed, and the error is told as usual."""
    folder = prepared(tmp_path, job, 0, Training(learning_rate=1e30, max_grad_norm=0, warmup=0, devices=2))
    result = run_trial(folder, report=lambda *_: False, deadline=None, place=ONE)
    assert result["state"] == "failed" and "learning rate" in result["error"]


def test_with_parameters():
    """A trial's settings are the config's with what it drew."""
    assert asdict(with_parameters(Training(epochs=2), {"learning_rate": 0.5})) == {
        **asdict(Training(epochs=2)),
        "learning_rate": 0.5,
    }


@pytest.mark.parametrize(
    "storage",
    ["postgresql://me:secret@127.0.0.1:1/optuna", "sqlite:////nowhere/at/all.db", "oracle://me:secret@x/y", "no://"],
)
def test_a_database_that_is_away(storage):
    """It is told as what it is, without the password of its address."""
    with pytest.raises(
        NightFailed, match="OVERNIGHT_STUDY_STORAGE: the database of the studies cannot be used"
    ) as told:
        open_storage(storage)
    assert "secret" not in str(told.value)
