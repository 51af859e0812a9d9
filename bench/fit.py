"""One fine-tuning run: the engine against transformers' Trainer, on short texts (tweets) and long ones (news).

    python -m bench.fit [--pairs 5] [--short 640] [--long 40]

Every side trains the same rows with the same batch size, steps, learning rates and number of threads, in a process of
its own, one after another; pair i uses seed i. Reported are samples and real tokens (without padding) a second of
training alone, and macro F1 on the same test rows.

- trainer: the defaults of the text-classification example (dynamic padding, float32)
- trainer, best effort: bf16 where the machine has it, rows grouped by length, fused AdamW, a dataloader worker
- overnight: the engine, everything trained
- overnight, N of 6 frozen: the engine with the lower layers frozen; the fewer layers are trained, the higher their
  learning rate
- overnight, N of 6 frozen, tokens dropped: what is trained does not see all tokens in each step either

Each side is judged by the weights that it ends with.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from bench import texts
from bench.results import apart, ratio, record

TEST_ROWS = {"short": 811, "long": 100}
BATCH = {"short": 16, "long": 8}
EPOCHS = 3.0
RATE = {"short": 1.5e-4, "long": 3e-4}
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "short": {
        "full": {"learning_rate": RATE["short"]},
        "frozen3": {"freeze_layers": 3, "learning_rate": 3e-4},
        "frozen4": {"freeze_layers": 4, "learning_rate": 5e-4},
        "dropped4": {"freeze_layers": 4, "learning_rate": 5e-4, "token_dropout": 0.3},
    },
    "long": {
        "full": {"learning_rate": RATE["long"]},
        "frozen3": {"freeze_layers": 3, "learning_rate": 5e-4},
        "dropped3": {"freeze_layers": 3, "learning_rate": 5e-4, "token_dropout": 0.5},
    },
}
"""Side → what the engine is told; of short texts every token counts, of long ones few do."""
NAMES = {
    "trainer": "trainer",
    "best": "trainer, best effort",
    "full": "overnight",
    "frozen3": "overnight, 3 of 6 frozen",
    "dropped3": "overnight, 3 of 6 frozen, half of the tokens dropped",
    "frozen4": "overnight, 4 of 6 frozen",
    "dropped4": "overnight, 4 of 6 frozen, 0.3 of the tokens dropped",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--short", type=int, default=640, help="training rows of short texts; 0 leaves them out")
    parser.add_argument("--long", type=int, default=40, help="training rows of long texts; 0 leaves them out")
    parser.add_argument("--side", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, json.loads(arguments.job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        for kind, rows in (("short", arguments.short), ("long", arguments.long)):
            if rows:
                compare(kind, rows, arguments.pairs, Path(folder))


def compare(kind: str, rows: int, pairs: int, folder: Path) -> None:
    """Runs all sides in turn, `pairs` times; writes the table after each round, since they take long."""
    from overnight.training.models import resolve_base

    paths = texts.sides(kind, folder)
    base = resolve_base(texts.config(kind).model.base)
    sides = ("trainer", "best", *OURS[kind])
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for seed in range(pairs):
        job = {"base": base, "kind": kind, "rows": rows, "seed": seed, "folder": str(folder)}
        job |= {side: str(path) for side, path in paths.items()}
        for side in sides if seed % 2 == 0 else reversed(sides):
            found[side].append(apart("fit", "--side", side, "--job", json.dumps(job)))
            print(kind, seed, side, found[side][-1], file=sys.stderr)
        report(kind, rows, found)


def report(kind: str, rows: int, found: dict[str, list[dict[str, Any]]]) -> None:
    """A table row a side."""
    speeds = {side: [one["samples_per_second"] for one in runs] for side, runs in found.items()}
    table = []
    for side in found:
        scores = [one["macro_f1"] for one in found[side]]
        spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
        tokens = median(one["tokens_per_second"] for one in found[side])
        against = [ratio(speeds[side], speeds[peer]) if side in OURS[kind] else "" for peer in ("trainer", "best")]
        speed = f"{median(speeds[side]):.1f}"
        table.append([NAMES[side], speed, f"{tokens:,.0f}", *against, f"{mean(scores):.3f}{spread}"])
    notes = (
        f"{len(scores)} pairs, {rows:,} rows, batch size {BATCH[kind]}, {EPOCHS:g} epochs; macro F1 of "
        f"{TEST_ROWS[kind]} test rows: mean ± standard deviation over the seeds. Where layers are frozen, the time "
        "includes the hidden states at the freeze line, which a search computes once; dropped tokens count as read."
    )
    header = ["side", "samples/s", "real tokens/s", "times trainer", "times best effort", "macro F1"]
    record(f"fit {kind}", f"One fine-tuning run, {kind} texts", header, table, notes)


def run_side(side: str, job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: trains, scores the test rows; speed and macro F1."""
    train = texts.frame(Path(job["train"]), job["rows"], job["seed"])
    test = texts.frame(Path(job["test"]), TEST_ROWS[job["kind"]])
    facts = {"labels": sorted(texts.frame(Path(job["train"])).label.unique())}
    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        run = _ours if side in OURS[job["kind"]] else _trainer
        return run(side, job, train, test, facts, Path(folder))


def ignore(record: dict[str, Any]) -> None:
    """Nobody reads along."""


def _ours(side: str, job: dict[str, Any], train: Any, test: Any, facts: dict[str, Any], folder: Path) -> dict[str, Any]:
    import overnight.warm  # noqa: F401  # no side's imports are timed
    from overnight.settings import Training
    from overnight.training.fit import Run
    from overnight.training.frozen import compute
    from overnight.training.models import ModelReference
    from overnight.training.predict import predict

    rows = {
        name: texts.tokenized(part, job["base"], facts, texts.MAX_LENGTH[job["kind"]], folder / name)
        for name, part in (("train", train), ("test", test), ("validation", test[:16]))
    }
    kind = job["kind"]
    training = Training(epochs=EPOCHS, batch_size=BATCH[kind], warmup=0.1, seed=job["seed"], **OURS[kind][side])
    reference = ModelReference(job["base"])
    sides = {name: rows[name] for name in ("train", "validation")}
    features = folder / "features"
    began = time.perf_counter()
    compute(texts.PROBLEM, reference, facts, training, sides, features)
    beforehand = time.perf_counter() - began if training.freeze_layers else 0.0
    run = Run(texts.PROBLEM, reference, facts, *sides.values(), training, folder, "macro_f1", ignore, ignore, features)
    run.evaluate_at = {run.plan.steps}  # a night would keep the best of several evaluations
    result = run.loop(lambda: None, 60.0)
    samples = len(train) * training.epochs
    speed = samples / (samples / result["samples_per_second"] + beforehand)
    outputs = predict(texts.PROBLEM, folder / "best", rows["test"], facts)
    metrics = texts.PROBLEM.metrics(test.label.tolist(), texts.PROBLEM.decode(outputs, facts), facts)
    return {
        "samples_per_second": speed,
        "tokens_per_second": speed * float(rows["train"].lengths.mean()),
        "precision": result["precision"],
        "macro_f1": metrics["macro_f1"],
    }


def _trainer(
    side: str, job: dict[str, Any], train: Any, test: Any, facts: dict[str, Any], folder: Path
) -> dict[str, Any]:
    import numpy as np
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    from overnight.training.device import choose_precision
    from overnight.training.models import quiet

    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    codes = {label: code for code, label in enumerate(facts["labels"])}

    length = texts.MAX_LENGTH[job["kind"]]
    encode = partial(texts.for_trainer, tokenizer=tokenizer, labels=facts["labels"], max_length=length)

    bf16 = choose_precision("auto", torch.device("cuda" if torch.cuda.is_available() else "cpu")) == "bf16"
    options: dict[str, Any] = {}
    if side == "best":
        options = {"bf16": bf16, "train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH[job["kind"]],
        per_device_eval_batch_size=64,
        learning_rate=RATE[job["kind"]],
        warmup_steps=0.1,
        weight_decay=0.01,
        seed=job["seed"],
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )
    with quiet():
        model = AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=len(codes))
    trainer = Trainer(model=model, args=arguments, train_dataset=encode(train), processing_class=tokenizer)
    done = trainer.train()
    found = trainer.predict(encode(test))  # in an order of its own, where rows are grouped by length
    from sklearn.metrics import f1_score

    speed = done.metrics["train_samples_per_second"]
    tokens = sum(len(row) for row in trainer.train_dataset["input_ids"]) / len(train)
    score = f1_score(found.label_ids, np.argmax(found.predictions, axis=-1), average="macro")
    return {
        "samples_per_second": speed,
        "tokens_per_second": speed * tokens,
        "precision": "bf16" if options.get("bf16") else "float32",
        "macro_f1": float(score),
    }


if __name__ == "__main__":
    main()
