"""One fine-tuning run: the loop, its callbacks, its snapshots.

result = fit(problem, ModelReference("pkg://…"), facts, train, validation, Training(), folder=…, metric="macro_f1")
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from accelerate.utils import set_seed
from accelerate.utils.memory import clear_device_cache

from overnight.errors import Complaint, NightFailed, OvernightError, UserError
from overnight.training.adapters import train_little
from overnight.training.batches import Plan
from overnight.training.compiled import compile_layers, wanted
from overnight.training.device import (
    OutOfMemory,
    device_busy,
    device_memory_share,
    is_out_of_memory,
    keep_freed_memory,
    make_accelerator,
    peak_memory_mb,
)
from overnight.training.dropout import use_cheap_dropout
from overnight.training.files import forget, forget_snapshot, load_snapshot, read_best, save_best, save_snapshot
from overnight.training.frozen import Features
from overnight.training.layers import freeze, narrow_norms
from overnight.training.models import load_tokenizer, start_at
from overnight.training.optimizers import make_optimizer, schedule, set_rates
from overnight.training.packing import Packed
from overnight.training.predict import forward, inputs, prepare
from overnight.training.team import Team

if TYPE_CHECKING:
    from overnight.problems.base import Facts, Problem
    from overnight.settings import Training
    from overnight.training.data import TokenizedRows
    from overnight.training.models import ModelReference

Record = dict[str, Any]
STOPS = (None, "prune", "budget")


class TrainingDiverged(OvernightError):
    """The loss is no longer a number."""


def fit(
    problem: Problem,
    model_ref: ModelReference,
    facts: Facts,
    train: TokenizedRows,
    validation: TokenizedRows,
    training: Training,
    *,
    folder: Path,
    metric: str,
    on_log: Callable[[Record], None] = lambda record: None,
    on_evaluation: Callable[[Record], None] = lambda record: None,
    should_stop: Callable[[], str | None] = lambda: None,
    features: Path | None = None,
    log_every_seconds: float = 2.0,
) -> Record:
    """Fine-tunes one model and leaves the best of its evaluations in `folder/best`.

    A killed run, called again with the same arguments, continues from `folder/snapshot`; in float32 on a CPU it ends
    with the same weights as one that was never killed.

    Args:
        folder: the run's own; gets `best/` (weights and configuration) and, while it runs, `snapshot/`.
        metric: the metric of the problem by which evaluations are compared.
        on_log: is given step, steps, epoch, loss (mean since the last log), learning_rate, samples_per_second,
            tokens_per_second (without padding, but with what `token_dropout` leaves out), every `log_every_seconds` and
            at evaluations.
        on_evaluation: is given step, steps, epoch, evaluation (0, 1, …), validation_loss, metrics, value.
        features: folder in which `frozen.compute` left the hidden states of `train` and `validation`, if it did.
        should_stop: asked before every step; `prune` ends the run at once, `budget` after one last evaluation.

    Returns:
        value, metrics and best_step of what `best/` holds (None, {} and None when a run was pruned before its first
        evaluation), steps done, seconds, samples_per_second, tokens_per_second, stopped (None, `prune`, `budget` or
        `patience`), micro_batch_halvings, peak_memory_mb, device_busy and device_memory_share (0 to 1, None without a
        GPU), devices, packing, precision, parameters, trainable_parameters.

    Raises:
        UserError: unknown model or metric, more layers frozen than there are, tokens dropped that the head reads.
        TrainingDiverged: the loss became infinite or not a number.
        NightFailed: the metric cannot be told of the validation rows.
        OutOfMemory: not even one row fits into memory.
    """
    problem.check_metric(metric, facts)
    run = Run(problem, model_ref, facts, train, validation, training, folder, metric, on_log, on_evaluation, features)
    return run.loop(should_stop, log_every_seconds)


class Run:
    """State of one run. What a snapshot has to hold of it, beyond tensors, is `self.state`."""

    def __init__(
        self,
        problem: Problem,
        model_ref: ModelReference,
        facts: Facts,
        train: TokenizedRows,
        validation: TokenizedRows,
        training: Training,
        folder: Path,
        metric: str,
        on_log: Callable[[Record], None],
        on_evaluation: Callable[[Record], None],
        features: Path | None,
    ):
        self.problem, self.facts, self.train, self.validation = problem, facts, train, validation
        self.training, self.folder, self.metric = training, folder, metric
        self.on_log, self.on_evaluation = on_log, on_evaluation
        set_seed(training.seed)
        self.accelerator, self.precision = make_accelerator(training.precision)
        self.device, self.team = self.accelerator.device, Team(self.accelerator)
        self.model = problem.load_model(model_ref.base, facts, training, model_ref.revision)
        weights = problem.class_weights(train, facts) if training.class_weights == "balanced" else None
        self.class_weights = None if weights is None else torch.from_numpy(weights).to(self.device)
        if weights is None and (prior := problem.prior(train, facts)) is not None:
            start_at(self.model, prior)  # with balanced weights all classes are equally common
        freeze(self.model, training.freeze_layers, training.freeze_embeddings)
        frozen = training.freeze_layers if training.method == "full" else train_little(self.model, training)
        if training.gradient_checkpointing:
            # renamed within transformers 5; the old name goes with 6
            enable = getattr(self.model, "activation_checkpointing_enable", None)
            (enable or self.model.gradient_checkpointing_enable)({"use_reentrant": False})
        self.packed = Packed(self.model, frozen)
        if training.token_dropout and self.packed.way != "first":
            rule = "can be used only where the head reads the first token of a text alone"
            raise UserError(Complaint("training → token_dropout", rule, type(self.model).__name__))
        if self.device.type == "cpu":
            keep_freed_memory()
            use_cheap_dropout(self.model)
        elif self.precision == "bf16":
            narrow_norms(self.model)
        self.model.to(self.device)
        self.packed.train()
        if self.team.size > 1:
            set_seed(training.seed + self.team.rank)  # dropout of its own for each share
        usable = features if self.packed.takes_features else None
        self.train_features = Features.open(usable, "train", train)
        self.validation_features = Features.open(usable, "validation", validation)
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, training)
        self.targets = problem.targets(validation, facts)
        self.tokenizer = load_tokenizer(model_ref.base, model_ref.revision) if problem.generates else None
        padded = self.packed.way == "padded"
        self.plan = Plan(train.lengths, training.batch_size, training.epochs, training.seed, by_length=padded)
        tokens = int(train.lengths.sum() * training.epochs)
        self.compiled = wanted(training, self.model, tokens) and compile_layers(self.packed, self.accelerator.autocast)
        evaluations = max(1, round(training.epochs * training.evaluations_per_epoch))
        self.evaluate_at = {max(1, round(self.plan.steps * (k + 1) / evaluations)) for k in range(evaluations)}
        self.identity = {
            "base": model_ref.base,
            "revision": model_ref.revision,
            "training": dataclasses.asdict(training),
            "metric": metric,
            "rows": [len(train), int(train.lengths.sum()), len(validation)],
            "way": self.packed.way,
        }
        self.best = folder / "best"
        folder.mkdir(parents=True, exist_ok=True)
        found = load_snapshot(folder, self.model, self.optimizer, self.identity)
        if found is None and self.team.leads:
            forget(self.best)  # left by a run that was killed before its first snapshot
        self.state: Record = found or {
            "run": self.identity,
            "step": 0,
            "evaluations": 0,
            "best_value": None,
            "not_better": 0,
            "evaluated_at": None,
            "halvings": 0,
            "seconds": 0.0,
            "training_seconds": 0.0,
            "samples": 0,
            "tokens": 0,
        }
        if found and not self.team.leads:
            set_seed(training.seed + self.team.rank + self.state["step"])
        self.loss_sum = torch.zeros((), device=self.device)
        self.loss_steps = 0
        self.counted: int | None = None
        self.busy: list[float] = []
        self.bad_step = torch.full((), -1, device=self.device)

    def loop(self, should_stop: Callable[[], str | None], log_every_seconds: float) -> Record:
        """Steps until the end, or until someone stops it."""
        state, steps, patience = self.state, self.plan.steps, self.training.patience
        stopped: str | None = None
        earlier, began = state["seconds"], time.monotonic()
        before = last_log = last_snapshot = began
        while state["step"] < steps:
            now, last = time.monotonic(), state["step"] + 1 == steps
            wish = STOPS.index(should_stop() if self.team.leads else None)
            due_to_save = not last and now - last_snapshot >= self.training.checkpoint_minutes * 60
            word, save, log = self.team.agree([wish, due_to_save, now - last_log >= log_every_seconds])
            stopped = STOPS[word]
            if stopped is not None:
                break
            self.step()
            due = state["step"] in self.evaluate_at
            loss = self.mean_loss() if due or save or log else None
            state["training_seconds"] += time.monotonic() - before
            if loss is not None:
                self.log(loss)
                last_log = time.monotonic()
            if due:
                self.evaluate()
            if save:
                state["seconds"] = earlier + time.monotonic() - began
                if self.team.leads:
                    save_snapshot(self.folder, self.model, self.optimizer, state)
                last_snapshot = time.monotonic()
            if patience and state["not_better"] >= patience:
                stopped = "patience"
                break
            before = time.monotonic()
        if stopped == "budget" and state["evaluated_at"] != state["step"]:
            self.mean_loss()
            self.evaluate()
        state["seconds"] = earlier + time.monotonic() - began
        if not self.team.leads:
            return {}  # the folder is the leader's to read too: reading ends what a kill left half done
        forget_snapshot(self.folder)
        return self.result(stopped)

    def step(self) -> None:
        """One optimizer step; when memory runs out, again from its start with micro-batches of half the rows."""
        state, training = self.state, self.training
        rows = self.plan.rows(state["step"])
        own = self.team.share(rows)
        factor = schedule(state["step"], self.plan.steps, training)
        self.counted = None
        while True:
            parts = training.accumulation * 2 ** state["halvings"]
            try:
                loss = self.gradients(np.array_split(own, min(parts, len(own))) if len(own) else [])
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            # outside of the handler, whose traceback would keep the activations alive
            self.optimizer.zero_grad(set_to_none=True)
            clear_device_cache(garbage_collection=True)
            if parts >= len(own):
                tokens = int(self.train.lengths[own].max())
                rule = f"one row of {tokens} tokens does not fit into memory; a micro-batch cannot be smaller"
                raise OutOfMemory(Complaint("training", rule))
            state["halvings"] += 1
        self.add_up(loss)
        if training.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.trainable, training.max_grad_norm)
        set_rates(self.optimizer, factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # no read-out here: on a GPU that would wait for every step
        self.bad_step = torch.where((self.bad_step < 0) & ~loss.isfinite(), state["step"] + 1, self.bad_step)
        self.loss_sum += loss
        self.loss_steps += 1
        state["step"] += 1
        state["samples"] += len(rows)
        state["tokens"] += int(self.train.lengths[rows].sum())

    def gradients(self, parts: list[np.ndarray]) -> torch.Tensor:
        """Adds up the gradients of a step's micro-batches; returns their share of the step's mean loss."""
        drop = self.training.token_dropout
        batches = [prepare(self.problem, self.model, self.train, part, self.train_features, drop) for part in parts]
        if self.counted is None:  # asked of the others once a step, however often memory runs out here
            self.counted = max(1, self.team.total(sum(self.problem.counted(batch) for batch, _ in batches)))
        loss = torch.zeros((), device=self.device)
        for batch, packing in batches:
            with self.accelerator.autocast():
                if self.problem.by_token and self.packed.tells_words:
                    outputs = self.packed.flat(inputs(self.problem, batch), packing)
                    batch = batch | {"labels": packing.labels(batch["labels"])}
                else:
                    outputs = self.packed(inputs(self.problem, batch), packing)
            part = self.problem.loss(outputs, batch, self.training, self.class_weights) / self.counted
            self.accelerator.backward(part)
            loss += part.detach()
        return loss

    def add_up(self, loss: torch.Tensor) -> None:
        """Makes the gradients and the loss of this process's rows those of the whole step."""
        if self.team.size > 1:
            for parameter in self.trainable:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.team.add_up([loss, *(parameter.grad for parameter in self.trainable if parameter.grad is not None)])

    def mean_loss(self) -> float:
        """Mean loss of the steps since the last call, 0 when there were none; waits for the device.

        Raises:
            TrainingDiverged: when one of them was not finite.
        """
        bad = int(self.bad_step)
        if bad >= 0:
            self.raise_diverged(bad)
        mean = float(self.loss_sum) / max(1, self.loss_steps)
        self.loss_sum.zero_()
        self.loss_steps = 0
        return mean

    def raise_diverged(self, step: int) -> NoReturn:
        rate = self.training.learning_rate * schedule(step - 1, self.plan.steps, self.training)
        raise TrainingDiverged(
            Complaint("training", f"the loss is not finite any more at step {step}, at a learning rate of {rate:.3g}")
        )

    def progress(self) -> Record:
        step, steps = self.state["step"], self.plan.steps
        return {"step": step, "steps": steps, "epoch": self.training.epochs * step / steps}

    def speed(self) -> Record:
        seconds = max(self.state["training_seconds"], 1e-9)
        return {f"{unit}_per_second": self.state[unit] / seconds for unit in ("samples", "tokens")}

    def log(self, loss: float) -> None:
        busy = device_busy(self.device)
        if busy is not None:
            self.busy.append(busy)
        if not self.team.leads:
            return
        rate = self.training.learning_rate * schedule(self.state["step"] - 1, self.plan.steps, self.training)
        self.on_log(self.progress() | {"loss": loss, "learning_rate": rate} | self.speed())

    def evaluate(self) -> None:
        """Measures the model on the validation rows, and keeps it when it is the best so far."""
        state, problem = self.state, self.problem
        plain = dataclasses.replace(self.training, label_smoothing=0.0)
        losses: list[torch.Tensor] = []
        counts: list[int] = []

        def add(outputs: Any, batch: dict[str, torch.Tensor]) -> None:
            losses.append(problem.loss(outputs, batch, plain, None))
            counts.append(problem.counted(batch))

        outputs = forward(
            problem,
            self.packed,
            self.validation,
            features=self.validation_features,
            precision=self.accelerator.autocast,
            each=add,
            facts=self.facts,
            team=self.team,
        )
        sums = self.team.gather((float(sum(losses)), sum(counts)))
        loss = sum(of for of, _ in sums) / max(1, sum(count for _, count in sums))
        if not math.isfinite(loss):
            self.raise_diverged(max(1, state["step"]))
        facts = problem.tuned(outputs, self.targets, self.facts, self.validation, self.metric)  # as the night will
        predictions = problem.decode(outputs, facts, self.validation, self.tokenizer)
        metrics = problem.metrics(self.targets, predictions, facts)
        if self.metric not in metrics:
            raise NightFailed(Complaint("evaluation → metric", "is undefined on the validation rows", self.metric))
        value = metrics[self.metric]
        record = self.progress() | {
            "evaluation": state["evaluations"],
            "validation_loss": loss,
            "metrics": metrics,
            "value": value,
        }
        if problem.better(self.metric, value, than=state["best_value"]):
            state |= {"best_value": value, "not_better": 0}
            if self.team.leads:
                save_best(self.model, self.best, record)
        else:
            state["not_better"] += 1
        state |= {"evaluations": state["evaluations"] + 1, "evaluated_at": state["step"]}
        if self.team.leads:
            self.on_evaluation(record)

    def result(self, stopped: str | None) -> Record:
        # the record beside the weights, not the state: it tells what is kept even after a kill between the two
        kept = read_best(self.best) or {"value": None, "metrics": {}, "step": None}
        return {
            "value": kept["value"],
            "metrics": kept["metrics"],
            "best_step": kept["step"],
            "steps": self.state["step"],
            "seconds": self.state["seconds"],
            **self.speed(),
            "stopped": stopped,
            "micro_batch_halvings": self.state["halvings"],
            "peak_memory_mb": peak_memory_mb(self.device),
            "device_busy": sum(self.busy) / len(self.busy) if self.busy else None,
            "device_memory_share": device_memory_share(self.device),
            "devices": self.team.size,
            "packing": self.packed.way,
            "precision": self.precision,
            "compiled": self.compiled,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "trainable_parameters": sum(p.numel() for p in self.trainable),
        }
