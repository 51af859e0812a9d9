"""Efficiency: the share of the machine's matrix-product rate that training turns into work on real tokens.

    python -m bench.efficiency [--pairs 5] [--short 480] [--long 64]

Work is counted as is usual, whatever the engine leaves out: 6 operations a parameter of the encoder's layers and token,
and 12 a layer, unit of width and pair of tokens of one text for attention, forward and backward; padding counts for
nothing. The rate of large square matrix products is measured in the same process, before and after each run, in the
number format of the training. Everything is trained; the peer in the fit benchmark is left out here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench import texts
from bench.results import apart, record
from bench.work import matrix_rate, operations

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--short", type=int, default=480, help="training rows of short texts")
    parser.add_argument("--long", type=int, default=64, help="training rows of long texts")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run(json.loads(arguments.job))))
        return
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, rows in (("short", arguments.short), ("long", arguments.long)):
            found = []
            for seed in range(arguments.pairs):
                job = {"kind": kind, "rows": rows, "seed": seed, "folder": folder}
                found.append(apart("efficiency", "--job", json.dumps(job)))
                print(kind, found[-1], file=sys.stderr)
            shares = sorted(one["work"] / one["rate"] for one in found)
            table.append(
                [
                    kind,
                    found[0]["precision"],
                    f"{median(one['tokens'] for one in found):,.0f}",
                    f"{median(one['work'] for one in found) / 1e9:,.0f}",
                    f"{median(one['rate'] for one in found) / 1e9:,.0f}",
                    f"{median(shares):.0%} [{shares[0]:.0%}, {shares[-1]:.0%}]",
                ]
            )
    header = ["texts", "number format", "real tokens/s", "GFLOP/s of work", "GFLOP/s of matrix products", "share"]
    record(
        "efficiency", "Efficiency", header, table, f"{arguments.pairs} runs, batch size {BATCH}, everything trained."
    )


def run(job: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: real tokens a second, the work they are, and the rate of matrix products."""
    from overnight.settings import Training
    from overnight.training.fit import fit
    from overnight.training.models import ModelReference, resolve_base

    kind = job["kind"]
    base = resolve_base(texts.config(kind).model.base)
    train = texts.frame(texts.sides(kind, Path(job["folder"]))["train"], job["rows"], job["seed"])
    facts = {"labels": sorted(train.label.unique())}
    training = Training(epochs=1, batch_size=BATCH, evaluations_per_epoch=1, seed=job["seed"])
    model = texts.PROBLEM.load_model(base, facts, training)
    with tempfile.TemporaryDirectory(dir=job["folder"]) as place:
        rows = [
            texts.tokenized(part, base, facts, texts.MAX_LENGTH[kind], Path(place, name))
            for name, part in (("train", train), ("validation", train[:16]))
        ]
        before = matrix_rate(training.precision)
        result = fit(texts.PROBLEM, ModelReference(base), facts, *rows, training, folder=Path(place), metric="macro_f1")
        after = matrix_rate(training.precision)
    tokens = result["tokens_per_second"]
    return {
        "tokens": tokens,
        "work": operations(model, rows[0].lengths) * tokens,
        "rate": (before + after) / 2,
        "precision": result["precision"],
    }


if __name__ == "__main__":
    main()
