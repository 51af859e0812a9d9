"""On a GPU: steps of a BERT of the base size, against transformers' Trainer and the GPU's rate of matrix products.

    python -m bench.gpu FOLDER --prepare                # here: tokenizes the tweets of the quick start
    python -m bench.gpu FOLDER [--pairs 5] [--batch 512] # there: torch, transformers, accelerate, scikit-learn, pandas
    python -m bench.gpu FOLDER --score [--batch 32]

The base is of BERT's size with random weights, since speed does not depend on them; `--score` fine-tunes the small
model of the quick start instead and compares what both sides make of it. The first steps, in which things are compiled
and allocated, are not timed: what they take has a column of its own.

- trainer, best effort: bf16, rows grouped by length, fused AdamW, four dataloader workers, pinned memory
- overnight: the engine; compiled (`training.compile`); with the lower half of the layers frozen
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch

from bench.results import ratio, record
from bench.work import matrix_rate, operations

PEER = "trainer, best effort"
OURS: Mapping[str, dict[str, Any]] = {
    "overnight": {"compile": "off"},
    "overnight, compiled": {"compile": "on"},
    "overnight, compiled, 6 of 12 frozen": {"compile": "on", "freeze_layers": 6},
}
SCORED = {side: OURS[side] for side in ("overnight", "overnight, compiled")}
WARM = 20
"""Steps that are not timed."""
RATE = {"speed": 1e-4, "score": 3e-4}
Found = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    if arguments.prepare:
        prepare(arguments.folder)
    elif not torch.cuda.is_available():
        parser.error("PyTorch sees no GPU here")
    elif arguments.score:
        score(arguments.folder, arguments.pairs, arguments.batch or 32)
    else:
        speed(arguments.folder, arguments.pairs, arguments.batch or 512, arguments.steps)


def prepare(folder: Path) -> None:
    """Writes tokenized rows, labels, and the small model in half precision: what the other machine has not."""
    from transformers import AutoModel, AutoTokenizer

    from bench import texts
    from overnight.training.models import resolve_base

    base = resolve_base(texts.config("short").model.base)
    with tempfile.TemporaryDirectory() as place:
        paths = texts.sides("short", Path(place))
        frames = {side: texts.frame(paths[side]) for side in ("train", "test")}
    facts = {"labels": sorted(frames["train"].label.unique())}
    for side, rows in frames.items():
        texts.tokenized(rows, base, facts, texts.MAX_LENGTH["short"], folder / side)
    (folder / "facts.json").write_text(json.dumps(facts))
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "small")
    AutoModel.from_pretrained(base, dtype=torch.float16).save_pretrained(folder / "small")


def speed(folder: Path, pairs: int, batch: int, steps: int) -> None:
    """Steps of all sides in turn; a table row a side."""
    from transformers import BertConfig, BertForSequenceClassification

    from overnight.training.models import quiet

    rows, facts = load(folder, 8 * batch)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place, "base")
        model = BertForSequenceClassification(BertConfig(num_labels=len(facts["labels"])))
        each = operations(model, rows.lengths)
        with quiet():
            model.save_pretrained(base)
        job = Job(str(base), str(folder / "small"), batch, steps, RATE["speed"])
        rates = [matrix_rate("bf16")]
        found: dict[str, list[Found]] = {side: [] for side in (PEER, *OURS)}
        for seed in range(pairs):
            in_turn(found, seed, OURS, job, rows, facts)
            rates.append(matrix_rate("bf16"))
            print(f"{rates[-1] / 1e12:.0f} TFLOP/s of matrix products", flush=True)
            report_speed(found, job, float(rows.lengths.mean()), each, median(rates))


def report_speed(found: Mapping[str, list[Found]], job: Job, tokens: float, each: float, rate: float) -> None:
    """A table row a side, after each pair, since machines with GPUs are dear; `each`: operations a token."""
    table = []
    for side, runs in found.items():
        speeds = [one["samples"] for one in runs]
        # what a frozen layer does not do is no work: the share would tell nothing
        share = "" if "frozen" in side else f"{median(speeds) * tokens * each / rate:.0%}"
        against = "" if side == PEER else ratio(speeds, [one["samples"] for one in found[PEER]])
        first, memory = max(one["first"] for one in runs), max(one["memory"] for one in runs)
        speed = f"{median(speeds) * tokens:,.0f}"
        table.append([side, speed, share, against, f"{first:.0f} s", f"{memory:,.0f}"])
    notes = (
        f"{len(runs)} pairs, {job.steps - WARM} steps timed, {job.batch:,} tweets a step, {tokens:.1f} tokens each; "
        f"BERT of the base size, random weights, bf16. Matrix products of 8,192: {rate / 1e12:.0f} TFLOP/s."
    )
    header = ["side", "real tokens/s", "share of the matrix rate", "times trainer", f"first {WARM} steps", "peak MB"]
    record(f"gpu {job.batch}", f"Steps on a GPU, {job.batch:,} texts each", header, table, notes)


def score(folder: Path, pairs: int, batch: int) -> None:
    """Fine-tunes the small model with all sides in turn; a table row a side."""
    from overnight.training import data

    rows, facts = load(folder)
    job = Job(str(folder / "small"), str(folder / "small"), batch, 3 * -(-len(rows) // batch), RATE["score"])
    found: dict[str, list[Found]] = {side: [] for side in (PEER, *SCORED)}
    for seed in range(pairs):
        in_turn(found, seed, SCORED, job, rows, facts, data.open(folder / "test"))
        report_score(found, job, len(rows))


def report_score(found: Mapping[str, list[Found]], job: Job, rows: int) -> None:
    """A table row a side."""
    table = []
    for side, runs in found.items():
        scores, speeds = [one["score"] for one in runs], [one["samples"] for one in runs]
        against = "" if side == PEER else ratio(speeds, [one["samples"] for one in found[PEER]])
        spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
        table.append([side, f"{median(speeds):,.0f}", against, f"{mean(scores):.3f}{spread}"])
    notes = (
        f"{len(runs)} pairs, {rows:,} tweets, {job.batch} a step, {job.steps} steps of the quick start's model, bf16."
    )
    record("gpu score", "Score on a GPU", ["side", "samples/s", "times trainer", "macro F1"], table, notes)


def load(folder: Path, count: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The rows, or `count` of them, again and again if need be; and the facts."""
    from overnight.training import data

    rows = data.open(folder / "train")
    some = data.Part(rows, np.resize(np.arange(len(rows)), count or len(rows)))
    return some, json.loads((folder / "facts.json").read_text())


def in_turn(
    found: dict[str, list[Found]], seed: int, ours: Mapping[str, Any], job: Job, rows: Any, facts: Any, test: Any = None
) -> None:
    """One run of each side, the order turned around each time."""
    for side in list(found) if seed % 2 == 0 else reversed(list(found)):
        torch.cuda.reset_peak_memory_stats()
        clock = Clock(job)
        with tempfile.TemporaryDirectory() as place:
            settings = (Path(place), seed, clock)
            done = (
                run_trainer(job, rows, facts, test, *settings)
                if side == PEER
                else run_ours(ours[side], job, rows, facts, test, *settings)
            )
        found[side].append(clock.found() | done)
        print(seed, side, found[side][-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Job:
    """What all sides do."""

    base: str
    tokenizer: str
    batch: int
    steps: int
    rate: float


class Clock:
    """Times the steps after the first `WARM`; waits for the GPU at the two ends only."""

    def __init__(self, job: Job):
        self.job, self.began = job, time.perf_counter()
        self.warm = self.end = 0.0

    def tick(self, step: int) -> None:
        """After each step, counted from 1."""
        if step in (WARM, self.job.steps):
            torch.cuda.synchronize()
            now = time.perf_counter()
            self.warm, self.end = (now, self.end) if step == WARM else (self.warm, now)

    def found(self) -> Found:
        samples = (self.job.steps - WARM) * self.job.batch
        return {
            "samples": samples / (self.end - self.warm),
            "first": self.warm - self.began,
            "memory": torch.cuda.max_memory_allocated() / 2**20,
        }


def run_ours(
    settings: Mapping[str, Any], job: Job, rows: Any, facts: Any, test: Any, folder: Path, seed: int, clock: Clock
) -> Found:
    from overnight import problems
    from overnight.settings import Training
    from overnight.training.fit import Run
    from overnight.training.models import ModelReference
    from overnight.training.predict import forward

    problem = problems.get("sequence-classification")
    epochs = job.steps / -(-len(rows) // job.batch)
    same = {"batch_size": job.batch, "learning_rate": job.rate, "warmup": 0.1, "epochs": epochs, "seed": seed}
    reference, training = ModelReference(job.base), Training(**same, **settings)
    run = Run(problem, reference, facts, rows, rows, training, folder, "macro_f1", ignore, ignore, None)
    assert run.plan.steps == job.steps and run.compiled == (settings["compile"] == "on")
    for step in range(job.steps):
        run.step()
        clock.tick(step + 1)
    if test is None:
        return {}
    outputs = forward(problem, run.packed, test, precision=run.accelerator.autocast)
    predictions = problem.decode(outputs, facts)
    return {"score": problem.metrics(problem.targets(test, facts), predictions, facts)["macro_f1"]}


def ignore(record: dict[str, Any]) -> None:
    """Nobody reads along."""


def run_trainer(job: Job, rows: Any, facts: Any, test: Any, folder: Path, seed: int, clock: Clock) -> Found:
    from sklearn.metrics import f1_score
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from overnight.training.models import quiet

    class Watch(TrainerCallback):
        def on_step_end(self, arguments: Any, state: Any, control: Any, **named: Any) -> None:
            clock.tick(state.global_step)

    def plain(side: Any) -> list[dict[str, Any]]:
        pairs = ((side[i]["input_ids"].tolist(), int(side[i]["labels"])) for i in range(len(side)))
        return [{"input_ids": ids, "labels": label} for ids, label in pairs]

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=job.steps,
        per_device_train_batch_size=job.batch,
        per_device_eval_batch_size=256,
        learning_rate=job.rate,
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=seed,
        bf16=True,
        train_sampling_strategy="group_by_length",
        dataloader_num_workers=4,
        dataloader_persistent_workers=True,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    labels = len(facts["labels"])
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(job.base, num_labels=labels, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.tokenizer)
    # a list has all that Trainer asks of a dataset
    trainer = Trainer(model, arguments, train_dataset=plain(rows), processing_class=tokenizer, callbacks=[Watch()])  # type: ignore[arg-type]
    trainer.train()
    if test is None:
        return {}
    found = trainer.predict(plain(test))  # type: ignore[arg-type]  # in an order of its own: grouped by length too
    return {"score": float(f1_score(found.label_ids, np.argmax(found.predictions, axis=-1), average="macro"))}


if __name__ == "__main__":
    main()
