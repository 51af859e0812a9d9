"""Whole runs of the engine on a small real BERT: what they learn, keep, survive and refuse."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from overnight import problems
from overnight.errors import UserError
from overnight.settings import Training
from overnight.training import data
from overnight.training.card import Card, finish_model_folder
from overnight.training.device import OutOfMemory
from overnight.training.fit import TrainingDiverged, fit
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.packing import Packed
from overnight.training.predict import Scorer, forward, predict

PROBLEM = problems.get("sequence-classification")
SHORT = Training(epochs=1, batch_size=16, learning_rate=1e-3, dropout=0.0, evaluations_per_epoch=2, precision="float32")
"""An epoch of about nine steps with two evaluations."""


@pytest.fixture(scope="module")
def rows(tiny_model, tiny_rows, tmp_path_factory):
    """facts, 280 rows to train on (of 128 a short run takes), 120 to validate on."""
    tokenizer, facts = load_tokenizer(str(tiny_model)), PROBLEM.facts(tiny_rows)
    folder = tmp_path_factory.mktemp("rows")

    def write(name, part):
        return data.write(folder / name, [PROBLEM.encode(tokenizer, part.to_dict("list"), facts, 64)], {})

    parts = {"train": tiny_rows[:280], "few": tiny_rows[:128], "validation": tiny_rows[280:]}
    return {"facts": facts} | {name: write(name, part) for name, part in parts.items()}


@pytest.fixture
def run(rows, tiny_model, tmp_path):
    """Runs `fit` in a folder of that name and returns its result, with the records of its callbacks."""

    def call(name, training=SHORT, *, train="few", problem=PROBLEM, on_evaluation=None, **more):
        logs, evaluations = [], []

        def evaluated(record):
            evaluations.append(record)
            if on_evaluation:
                on_evaluation(record)

        result = fit(
            problem,
            ModelReference(str(more.pop("base", tiny_model))),
            rows["facts"],
            rows[train],
            rows["validation"],
            training,
            folder=tmp_path / name,
            metric=more.pop("metric", "macro_f1"),
            on_log=logs.append,
            on_evaluation=evaluated,
            **more,
        )
        return result | {"logs": logs, "evaluations": evaluations}

    call.folder = tmp_path
    call.weights = lambda name: load_file(tmp_path / name / "best" / "model.safetensors")
    return call


def same(one, two, **tolerance):
    assert one.keys() == two.keys()
    if not tolerance:
        return all(torch.equal(one[name], two[name]) for name in one)
    return all(torch.allclose(one[name], two[name], **tolerance) for name in one)


class Scripted(type(PROBLEM)):
    """Sequence classification whose metric is told: the n-th evaluation has the n-th value."""

    def __init__(self, *values):
        self.values = list(values)

    def metrics(self, targets, predictions, facts):
        return super().metrics(targets, predictions, facts) | {"macro_f1": self.values.pop(0)}


def stop_after(steps, word):
    asked = iter([None] * steps)
    return lambda: next(asked, word)


def test_learns_and_serves(run, rows, tiny_model, tiny_rows):
    """Texts it has not seen are labelled right; the finished folder scores raw texts as the engine did."""
    training = dataclasses.replace(SHORT, epochs=5, learning_rate=4e-3, warmup=0.2, evaluations_per_epoch=1)
    result = run("learns", training, train="train")
    assert result["value"] > 0.9
    assert result["value"] == result["metrics"]["macro_f1"] == max(e["value"] for e in result["evaluations"])
    best = run.folder / "learns" / "best"
    finish_model_folder(best, Card(PROBLEM.name, rows["facts"], 64, "macro_f1"), str(tiny_model))
    outputs = predict(PROBLEM, best, rows["validation"], rows["facts"])
    assert PROBLEM.metrics(
        PROBLEM.targets(rows["validation"], rows["facts"]), PROBLEM.decode(outputs, rows["facts"]), rows["facts"]
    ) == pytest.approx(result["metrics"])
    scorer = Scorer(best)
    scored = scorer.predict_texts([{"text": text} for text in tiny_rows.text[280:]])
    assert [s["label"] for s in scored] == [rows["facts"]["labels"][code] for code in np.argmax(outputs, axis=1)]
    assert scorer.predict_texts([]) == []


def test_records(run, capfd):
    """Callbacks get what the contract names, the result what the run was; nothing is printed."""
    result = run("records", log_every_seconds=0)
    steps = result["steps"]
    assert [log["step"] for log in result["logs"]] == list(range(1, steps + 1))
    assert set(result["logs"][0]) == {
        *("step", "steps", "epoch", "loss", "learning_rate", "samples_per_second", "tokens_per_second")
    }
    assert [(e["evaluation"], e["step"], e["epoch"]) for e in result["evaluations"]] == [
        (0, round(steps / 2), pytest.approx(0.5, abs=0.1)),
        (1, steps, 1.0),
    ]
    assert set(result["evaluations"][0]) == {
        *("step", "steps", "epoch", "evaluation", "validation_loss", "metrics", "value")
    }
    json.dumps(result)
    assert result["stopped"] is None and result["precision"] == "float32" and result["micro_batch_halvings"] == 0
    assert result["parameters"] == result["trainable_parameters"] > 10_000
    assert result["samples_per_second"] > 0 and result["tokens_per_second"] > result["samples_per_second"]
    assert result["peak_memory_mb"] > 1 and 0 < result["seconds"] < 60
    assert sorted(p.name for p in (run.folder / "records").iterdir()) == ["best"]
    assert capfd.readouterr() == ("", "")


class Known(type(PROBLEM)):
    """Sequence classification that knows what is common."""

    def prior(self, rows, facts):
        return np.array([-2.0, 0.5, 1.0], dtype=np.float32)


def test_a_new_head_begins_with_what_is_common(run, tiny_model, tmp_path):
    """Unless the classes are weighted to be equally common; one that has learned goes on from where it was."""
    still = dataclasses.replace(SHORT, learning_rate=1e-12, evaluations_per_epoch=1)
    run("new", still, problem=Known())
    assert torch.allclose(run.weights("new")["classifier.bias"], torch.tensor([-2.0, 0.5, 1.0]), atol=1e-5)
    run("balanced", dataclasses.replace(still, class_weights="balanced"), problem=Known())
    assert run.weights("balanced")["classifier.bias"].abs().max() < 1e-5
    model = BertForSequenceClassification.from_pretrained(str(tiny_model), num_labels=3)
    torch.nn.init.constant_(model.classifier.bias, 0.25)
    model.save_pretrained(tmp_path / "learned")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "learned")
    run("on", still, base=tmp_path / "learned", problem=Known())
    assert torch.allclose(run.weights("on")["classifier.bias"], torch.full((3,), 0.25), atol=1e-5)


def test_accumulation_is_a_big_batch(run):
    """Four micro-batches make the step that one batch makes, class weights and all."""
    training = dataclasses.replace(SHORT, class_weights="balanced")
    run("one", training)
    run("four", dataclasses.replace(training, accumulation=4))
    assert same(run.weights("one"), run.weights("four"), atol=2e-5)


def test_out_of_memory_halves_and_goes_on(run, monkeypatch):
    """When more than five rows do not fit, in training or evaluation, the run ends with the weights it would have."""
    run("plenty")
    allocate = BertForSequenceClassification.forward
    message = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried …"

    def forward_of_small_machine(self, input_ids, **more):
        if len(input_ids) > 5:
            raise RuntimeError(message)
        return allocate(self, input_ids, **more)

    monkeypatch.setattr(BertForSequenceClassification, "forward", forward_of_small_machine)
    result = run("scarce")
    assert 2 <= result["micro_batch_halvings"] <= 3
    assert same(run.weights("plenty"), run.weights("scarce"), atol=2e-5)


def test_not_even_one_row(run, monkeypatch):
    """When halving cannot help any more, the error says so; other errors are not taken for memory."""

    def never(self, input_ids, **more):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(BertForSequenceClassification, "forward", never)
    with pytest.raises(OutOfMemory, match=r"one row of \d+ tokens does not fit"):
        run("none")
    with pytest.raises(OutOfMemory, match=r"one row of \d+ tokens does not fit"):
        run("none-at-evaluation", should_stop=lambda: "budget")

    def other(self, input_ids, **more):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(BertForSequenceClassification, "forward", other)
    with pytest.raises(RuntimeError, match="shapes"):
        run("other")


def test_frozen_layers_stay_bit_equal(run, tiny_model):
    """Frozen weights are the base model's to the last bit, the rest has moved."""
    result = run("frozen", dataclasses.replace(SHORT, freeze_layers=1))
    base, tuned = load_file(tiny_model / "model.safetensors"), run.weights("frozen")
    for name, weight in base.items():
        low = name.startswith(("embeddings.", "encoder.layer.0."))
        assert torch.equal(weight, tuned[f"bert.{name}"]) == low, name
    assert result["trainable_parameters"] < result["parameters"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_run_continues_as_if_nothing_was(run, optimizer):
    """Killed twice, between snapshots and after one, a run with dropout ends with the same bits and records."""
    training = dataclasses.replace(SHORT, dropout=0.1, token_dropout=0.2, epochs=2, optimizer=optimizer)
    training = dataclasses.replace(training, checkpoint_minutes=1e-9)
    whole = run("whole", training)

    def dies(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # in its second evaluation, after the snapshot of the step before
        run("killed", training, on_evaluation=lambda record: dies(record) if record["evaluation"] == 1 else None)
    assert (run.folder / "killed" / "snapshot").exists()

    def dies_later(steps):
        asked = iter([None] * steps)
        return lambda: next(asked, "end") and dies(None)

    with pytest.raises(KeyboardInterrupt):  # right after a snapshot
        run("killed", training, should_stop=dies_later(3))
    rest = run("killed", training)
    assert rest["logs"][0]["step"] > whole["steps"] // 2
    assert same(run.weights("whole"), run.weights("killed"))
    for key in ("value", "metrics", "best_step", "steps", "stopped"):
        assert rest[key] == whole[key], key
    assert rest["evaluations"] == whole["evaluations"][-len(rest["evaluations"]) :]
    assert not (run.folder / "killed" / "snapshot").exists()


def test_a_snapshot_of_other_settings_is_not_continued(run):
    """The folder of another run starts anew, and nothing of its best model is left over."""
    saving = dataclasses.replace(SHORT, checkpoint_minutes=1e-9)

    def dies(record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("reused", saving, on_evaluation=dies)
    result = run("reused", dataclasses.replace(saving, seed=5), should_stop=stop_after(1, "prune"))
    assert result["steps"] == 1 and result["value"] is None
    assert list((run.folder / "reused").iterdir()) == []


def test_seeds(run):
    """Equal seeds give equal bits, other seeds other weights."""
    training = dataclasses.replace(SHORT, epochs=0.5, dropout=0.1)
    run("a", training)
    run("b", training)
    run("c", dataclasses.replace(training, seed=18))
    assert same(run.weights("a"), run.weights("b"))
    assert not same(run.weights("a"), run.weights("c"))


@pytest.mark.parametrize(
    "change",
    [
        {"label_smoothing": 0.3},
        {"class_weights": "balanced"},
        {"layer_decay": 0.5},
        {"weight_decay": 5.0},
        {"max_grad_norm": 1e-3, "optimizer": "sgd"},
        {"schedule": "constant"},
        {"warmup": 0.9},
        {"dropout": 0.5},
    ],
    ids=lambda change: "+".join(change),
)
def test_every_setting_counts(run, change):
    """Settings reach the loop: each of them leads to other weights."""
    short = dataclasses.replace(SHORT, epochs=0.3)
    if "optimizer" in change:
        short = dataclasses.replace(short, optimizer=change["optimizer"])
    run("default", short)
    run("changed", dataclasses.replace(short, **change))
    assert not same(run.weights("default"), run.weights("changed"))


def test_gradient_checkpointing_changes_nothing(run):
    """Recomputed activations, dropout included, lead to the same weights."""
    training = dataclasses.replace(SHORT, epochs=0.5, dropout=0.1)
    run("kept", training)
    run("recomputed", dataclasses.replace(training, gradient_checkpointing=True))
    assert same(run.weights("kept"), run.weights("recomputed"), atol=1e-6)


def test_bf16(run):
    """Autocast to bf16 gives a run near the one in float32, with weights in float32."""
    exact, coarse = run("exact"), run("coarse", dataclasses.replace(SHORT, precision="bf16"))
    assert coarse["precision"] == "bf16"
    losses = [r["evaluations"][-1]["validation_loss"] for r in (exact, coarse)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    assert {weight.dtype for weight in run.weights("coarse").values()} == {torch.float32}


def test_best_is_restored(run):
    """What is kept are the weights of the best evaluation, not of the last."""
    training = dataclasses.replace(SHORT, evaluations_per_epoch=4)
    result = run("all", training, problem=Scripted(0.2, 0.9, 0.5, 0.9))
    best = result["evaluations"][1]
    assert (result["value"], result["best_step"], result["metrics"]) == (0.9, best["step"], best["metrics"])
    run("until", training, problem=Scripted(0.2, 0.9), should_stop=stop_after(best["step"], "budget"))
    assert same(run.weights("all"), run.weights("until"))


def test_lower_can_be_better(run):
    """A metric that is an error keeps the smallest."""
    problem = Scripted(0.5, 0.2, 0.4, 0.3)
    problem.lower_is_better = frozenset({"macro_f1"})
    assert run("error", dataclasses.replace(SHORT, evaluations_per_epoch=4), problem=problem)["value"] == 0.2


def test_patience(run):
    """Two evaluations without improvement end the run; an improvement starts the count again."""
    training = dataclasses.replace(SHORT, epochs=2, evaluations_per_epoch=4, patience=2)
    result = run("patient", training, problem=Scripted(0.5, 0.4, 0.6, 0.6, 0.1, 0.9, 0.9, 0.9))
    assert result["stopped"] == "patience"
    assert len(result["evaluations"]) == 5 and result["value"] == 0.6
    assert run("endless", dataclasses.replace(training, patience=0), problem=Scripted(*[0.5] * 8))["stopped"] is None


def test_prune_and_budget(run):
    """Pruned: at once, nothing measured. Out of budget: measured once more, and there is a model, even at step 0."""
    pruned = run("pruned", should_stop=stop_after(2, "prune"))
    assert (pruned["stopped"], pruned["steps"], pruned["value"], pruned["evaluations"]) == ("prune", 2, None, [])
    for steps in (0, 3):
        result = run(f"budget{steps}", should_stop=stop_after(steps, "budget"))
        assert (result["stopped"], result["steps"], len(result["evaluations"])) == ("budget", steps, 1)
        assert result["best_step"] == steps and run.weights(f"budget{steps}")
    first = round(result["evaluations"][0]["steps"] / 2)
    at_evaluation = run("budget-at-evaluation", should_stop=stop_after(first, "budget"))
    assert [e["step"] for e in at_evaluation["evaluations"]] == [first], "not measured twice"


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_divergence(run):
    """A loss that is no number ends the run, with the step and the rate that did it."""
    training = dataclasses.replace(SHORT, optimizer="sgd", learning_rate=1e30, max_grad_norm=0, warmup=0)
    with pytest.raises(TrainingDiverged, match=r"not finite any more at step 2, at a learning rate of [\d.]+e\+"):
        run("diverged", training)


def test_wrong_input(run, rows, tiny_model):
    """Mistakes of the config are the user's errors, before anything is trained."""
    with pytest.raises(UserError, match="metric: not a metric of sequence-classification.*did you mean macro_f1"):
        run("metric", metric="macro-f1")
    with pytest.raises(UserError, match="freeze_layers: the model has 2 layers, got 3"):
        run("layers", dataclasses.replace(SHORT, freeze_layers=3))
    with pytest.raises(UserError, match="not a finished model folder"):
        Scorer(tiny_model)


def test_logits_come_in_the_order_of_the_rows(rows, tiny_model):
    """Sorting by length inside is not seen outside, and padding changes no logits."""
    model = PROBLEM.load_model(str(tiny_model), rows["facts"], SHORT)
    packed = Packed(model)
    together = forward(PROBLEM, packed, rows["few"])
    alone = [values for i in range(10) for values in forward(PROBLEM, packed, [rows["few"][i]])]
    np.testing.assert_allclose(together[:10], alone, atol=1e-5)
    assert model.training is False
