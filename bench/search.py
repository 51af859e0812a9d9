"""The search: how long until it has what `Trainer.hyperparameter_search` finds, on the same rows, space and cores.

    python -m bench.search [--pairs 5] [--trials 16] [--ours 32] [--rows 400] [--frozen 3]

The peer runs Optuna with its own defaults (TPE, median pruner), one trial after another on all cores. Ours is the
search of a night without its orchestration: study, placement and training processes. Both report two evaluations a
trial, choose by macro F1 on the same validation rows, and are compared by macro F1 of their choice on the same test
rows. Ours goes on to more trials than the peer, and is asked when its choice had reached the peer's score. Scoring the
test rows is outside of the clock. Pair i uses seed i.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import queue
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from bench import texts
from bench.results import apart, ratio, record

BATCH = 16
EVALUATIONS = 2
RATES = (5e-5, 6e-4)
SMOOTHING = (0.0, 0.1)
VALIDATION_ROWS, TEST_ROWS = 250, 800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--ours", type=int, default=32, help="trials of our side")
    parser.add_argument("--rows", type=int, default=400, help="training rows")
    parser.add_argument("--frozen", type=int, default=3, help="layers that our side does not train, as shipped")
    parser.add_argument("--side", choices=("trainer", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = _trainer if arguments.side == "trainer" else _ours
        print(json.dumps(side(json.loads(arguments.job))))
        return
    found: dict[str, list[dict[str, Any]]] = {"trainer": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder:
        from overnight.training.models import resolve_base

        shared = {name: str(path) for name, path in texts.sides("short", Path(folder)).items()}
        shared |= {"base": resolve_base(texts.config("short").model.base), "folder": folder}
        for seed in range(arguments.pairs):
            job = shared | {"seed": seed, "rows": arguments.rows, "trials": arguments.trials}
            job |= {"frozen": arguments.frozen, "ours": arguments.ours}
            for side in list(found)[:: 1 if seed % 2 == 0 else -1]:
                found[side].append(apart("search", "--side", side, "--job", json.dumps(job)))
                print(seed, side, found[side][-1], file=sys.stderr)
            report(found, arguments)  # after each pair: they take long


def report(found: dict[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> None:
    """The table: whole searches, and the time until the peer's scores were reached."""
    table = []
    ours, theirs = found["ours"], [one["seconds"] for one in found["trainer"]]
    early = [choice(one["found"], one["ended"][arguments.trials - 1]) for one in ours]
    for name, trials, seconds, scores in (
        ("`Trainer.hyperparameter_search`", arguments.trials, theirs, [one["test"] for one in found["trainer"]]),
        ("overnight", arguments.trials, [one["ended"][arguments.trials - 1] for one in ours], early),
        ("overnight", arguments.ours, [one["seconds"] for one in ours], [one["test"] for one in ours]),
    ):
        spread = f" ± {stdev(scores):.3f}" if len(scores) > 1 else ""
        faster = "" if seconds is theirs else ratio(theirs, seconds)
        table.append([name, str(trials), f"{median(seconds):.0f}", faster, f"{mean(scores):.3f}{spread}"])
    notes = [
        f"{len(ours)} pairs, {arguments.rows} tweets to train on, one epoch, "
        f"batch size {BATCH}; learning rate {RATES[0]:g} to {RATES[1]:g}, label smoothing up to {SMOOTHING[1]:g}; "
        f"ours with {arguments.frozen} of 6 layers frozen, the peer with none."
    ]
    for kind, which in (("test", "test score"), ("validation", "validation score")):
        reached = [(peer, until(one, kind, peer[kind])) for peer, one in zip(*found.values(), strict=True)]
        times = [(peer["seconds"], seconds) for peer, seconds in reached if seconds is not None]
        text = f"The peer's {which} was reached in {len(times)} of {len(reached)} pairs"
        if times:
            whole, partly = zip(*times, strict=True)
            text += f", {ratio(whole, partly)} faster there (after {median(partly):.0f} s)"
        notes.append(f"{text}.")
    header = ["search", "trials", "seconds", "times faster", "macro F1 on test rows"]
    record("search", "Search", header, table, " ".join(notes))


def choice(found: list[dict[str, Any]], at: float) -> float:
    """Test score of what the search would have chosen by then; 0 when no trial had finished."""
    there = [trial for trial in found if trial["at"] <= at]
    return float(max(there, key=lambda trial: trial["validation"])["test"]) if there else 0.0


def until(ours: dict[str, Any], kind: str, score: float) -> float | None:
    """Seconds until the best trial so far (by validation) had this score; None when it never had."""
    best = -1.0
    for trial in sorted(ours["found"], key=lambda trial: trial["at"]):
        if trial["validation"] > best:
            best = trial["validation"]
            if trial[kind] >= score:
                return float(trial["at"])
    return None


def _rows(job: dict[str, Any]) -> tuple[Any, Any, Any, dict[str, Any]]:
    train = texts.frame(Path(job["train"]), job["rows"], job["seed"])
    validation = texts.frame(Path(job["validation"]), VALIDATION_ROWS)
    test = texts.frame(Path(job["test"]), TEST_ROWS)
    return train, validation, test, {"labels": sorted(texts.frame(Path(job["train"])).label.unique())}


def _ours(job: dict[str, Any]) -> dict[str, Any]:
    from overnight.config import Domain, Search, with_parameters
    from overnight.processes import cores, run_child, warm_up
    from overnight.search.places import Place, Places, look_around, this_machine
    from overnight.search.study import Study
    from overnight.search.trial import BEST, Job, compute_features, run_trial, trial_folder, write_params
    from overnight.settings import Training
    from overnight.training.predict import predict

    train, validation, test, facts = _rows(job)
    length = texts.MAX_LENGTH["short"]
    warm_up()  # as the peer's imports, outside of the clock
    with tempfile.TemporaryDirectory(dir=job["folder"]) as place:
        night = Path(place)
        run_child(look_around, night / "warm", 1)
        began = time.perf_counter()
        for name, part in (("train", train), ("validation", validation)):
            texts.tokenized(part, job["base"], facts, length, night / name)
        shared = Job(
            texts.PROBLEM.name, job["base"], None, str(night / "train"), str(night / "validation"), facts, "macro_f1"
        )
        search = Search(
            trials=job["ours"],
            space={
                "learning_rate": Domain(low=RATES[0], high=RATES[1], log=True),
                "label_smoothing": Domain(low=SMOOTHING[0], high=SMOOTHING[1]),
            },
            seed=job["seed"],
        )
        training = Training(
            epochs=1, batch_size=BATCH, warmup=0.1, freeze_layers=job["frozen"], evaluations_per_epoch=EVALUATIONS,
            seed=job["seed"],
        )  # fmt: skip
        study = Study(str(night / "studies.journal"), "night", "bench", search, EVALUATIONS, "maximize")
        places = Places(this_machine(run_child(look_around, night / "machine", 1)), "auto", trials=job["ours"])
        if job["frozen"]:
            arguments = {"job": dataclasses.asdict(shared), "training": dataclasses.asdict(training)}
            run_child(compute_features, night / "features", len(cores()), **arguments)
            shared = dataclasses.replace(shared, features=str(night / "features"))
        ended: queue.SimpleQueue[tuple[int, Place, dict[str, Any]]] = queue.SimpleQueue()
        found: list[dict[str, Any]] = []
        times: list[float] = []
        running = 0

        def work(number: int, place: Place) -> None:
            # a study of its own, as a night's trials have: reading and telling from several threads is not safe
            own = Study(str(night / "studies.journal"), "night", "bench", search, EVALUATIONS, "maximize")
            result = run_trial(
                trial_folder(night, number), report=lambda n, v: own.report(number, n, v), deadline=None, place=place
            )
            own.tell(number, result["state"], result.get("value"), result)
            ended.put((number, place, result))

        while True:
            while study.remaining > 0 and (free := places.take()):
                ask = study.ask()
                settings = with_parameters(training, ask.params)
                write_params(trial_folder(night, ask.number), "night", ask.number, ask.params, settings, shared)
                threading.Thread(target=work, args=(ask.number, free)).start()
                running += 1
            if not running:
                break
            number, free, result = ended.get()
            running -= 1
            places.give_back(free)
            times.append(time.perf_counter() - began)
            if result["state"] == "finished":
                found.append({"number": number, "at": times[-1], "validation": result["value"]})
        seconds = time.perf_counter() - began
        rows = texts.tokenized(test, job["base"], facts, length, night / "test")
        for trial in found:
            if trial["validation"] < max(t["validation"] for t in found if t["at"] <= trial["at"]):
                continue  # never the choice
            outputs = predict(texts.PROBLEM, trial_folder(night, trial["number"]) / BEST, rows, facts)
            metrics = texts.PROBLEM.metrics(test.label.tolist(), texts.PROBLEM.decode(outputs, facts), facts)
            trial["test"] = metrics["macro_f1"]
        best = max(found, key=lambda trial: trial["validation"])
    return {"seconds": seconds, "validation": best["validation"], "test": best["test"], "found": found, "ended": times}


def _trainer(job: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    import optuna
    import torch
    from sklearn.metrics import f1_score
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

    from overnight.training.models import quiet

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train, validation, test, facts = _rows(job)
    codes = {label: code for code, label in enumerate(facts["labels"])}
    began = time.perf_counter()
    outside = 0.0
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    encode = partial(
        texts.for_trainer, tokenizer=tokenizer, labels=facts["labels"], max_length=texts.MAX_LENGTH["short"]
    )

    def model_init(trial: Any) -> Any:
        with quiet():
            return AutoModelForSequenceClassification.from_pretrained(job["base"], num_labels=len(codes))

    def macro_f1(predictions: Any, labels: Any) -> float:
        return float(f1_score(labels, np.argmax(predictions, axis=-1), average="macro"))

    def space(trial: optuna.Trial) -> dict[str, float]:
        return {
            "learning_rate": trial.suggest_float("learning_rate", *RATES, log=True),
            "label_smoothing_factor": trial.suggest_float("label_smoothing_factor", *SMOOTHING),
        }

    with tempfile.TemporaryDirectory(dir=job["folder"]) as folder:
        steps = -(-len(train) // BATCH)
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            warmup_steps=0.1,
            weight_decay=0.01,
            seed=job["seed"],
            save_strategy="no",
            eval_strategy="steps",
            eval_steps=steps // EVALUATIONS,
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(
            args=arguments,
            model_init=model_init,
            train_dataset=encode(train),
            eval_dataset=encode(validation),
            processing_class=tokenizer,
            compute_metrics=lambda found: {"macro_f1": macro_f1(found.predictions, found.label_ids)},
        )
        rows = encode(test)
        whole: list[float] = []
        chosen: dict[str, float] = {}

        def objective(metrics: dict[str, float]) -> float:
            nonlocal outside
            begun = time.perf_counter()
            if trainer.state.global_step >= steps:
                whole.append(metrics["eval_macro_f1"])
                if whole[-1] == max(whole):
                    found = trainer.predict(rows)
                    chosen.update(validation=whole[-1], test=macro_f1(found[0], found[1]))
            outside += time.perf_counter() - begun
            return metrics["eval_macro_f1"]

        best = trainer.hyperparameter_search(
            space, objective, n_trials=job["trials"], direction="maximize", backend="optuna",
            sampler=optuna.samplers.TPESampler(seed=job["seed"]),
        )  # fmt: skip
        seconds = time.perf_counter() - began - outside
    assert abs(chosen["validation"] - best.objective) < 1e-9, "the best run is the one that was scored"
    return {"seconds": seconds, **chosen}


if __name__ == "__main__":
    main()
