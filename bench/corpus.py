"""Large corpora: how long the stages from a file to token ids take, and how much memory, by the number of rows.

    python -m bench.corpus [--sizes 100000 1000000]

Each stage runs once in a process of its own; its time is without imports and its memory is the most the process ever
had, imports and all. Rows are phrases of the tweets put together anew: the tweets themselves, repeated, would be
near-duplicates of one another, of which nothing is left to train on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import texts
from bench.results import apart, record

STAGES = ("ingest", "validate", "split", "tokenize")
COPIES, NEARLY = 0.01, 0.02
"""Shares of rows that repeat another one, and that differ from one by a word."""
PHRASE = 3
"""Words."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000])
    parser.add_argument("--stage", choices=("make", *STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        print(json.dumps(run_stage(arguments.stage, arguments.rows, arguments.folder)))
        return
    table = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            for stage in ("make", *STAGES):
                one = apart("corpus", "--stage", stage, "--rows", str(size), "--folder", folder)
                print(size, stage, one, file=sys.stderr)
                if stage != "make":
                    speed, memory = size / one["seconds"], f"{one['peak_mb']:,.0f} MB"
                    table.append([f"{size:,}", stage, f"{one['seconds']:,.1f} s", f"{speed:,.0f}", memory, one["told"]])
    header = ["rows", "stage", "time", "rows/s", "peak memory", "outcome"]
    record("corpus", "Large corpora", header, table, "Once each.")


def run_stage(stage: str, rows: int, folder: Path) -> dict[str, Any]:
    """In a process of its own: seconds, most memory, and what came out."""
    work = {"make": make, "ingest": ingest, "validate": validate, "split": split, "tokenize": tokenize}[stage]
    seconds, told = work(rows, folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mb": peak, "told": told}


def make(rows: int, folder: Path) -> tuple[float, str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    began = time.perf_counter()
    made = corpus(rows)
    schema = pa.schema([("text", pa.string()), ("label", pa.string())])
    with pq.ParquetWriter(folder / "corpus.parquet", schema) as writer:
        for start in range(0, rows, 50_000):
            some = [next(made) for _ in range(min(50_000, rows - start))]
            writer.write_table(pa.table([[text for text, _ in some], [label for _, label in some]], schema=schema))
    return time.perf_counter() - began, ""


def corpus(rows: int) -> Iterator[tuple[str, str]]:
    """Texts and labels: 2 to 8 phrases and the row's number, copies, and copies with another number at the end."""
    from overnight.data.sources import read_source

    tweets = read_source(texts.config("short").data, [{"text": "text"}]).columns["text"]
    words = [tweet.split() for tweet in tweets if tweet]
    phrases = [" ".join(own[at : at + PHRASE]) for own in words for at in range(0, len(own), PHRASE)]
    draw = random.Random(1)
    held = [("the first row", "0")]
    for number in range(rows):
        chance = draw.random()
        text, label = draw.choice(held)
        if chance >= COPIES:
            if chance >= COPIES + NEARLY:
                text, label = " ".join(draw.choices(phrases, k=draw.randint(2, 8))), str(draw.randrange(3))
            text = f"{text} {number}"
        if len(held) < 10_000:
            held.append((text, label))
        elif chance > 0.9:
            held[draw.randrange(len(held))] = text, label
        yield text, label


def ingest(rows: int, folder: Path) -> tuple[float, str]:
    from overnight.config import Data
    from overnight.intake import read_rows

    began = time.perf_counter()
    made = read_rows(Data(source=str(folder / "corpus.parquet")), texts.PROBLEM.name, folder / "rows", "bench")
    seconds = time.perf_counter() - began
    (folder / "ingest.json").write_text(json.dumps(dataclasses.asdict(made)))
    return seconds, f"{made.rows:,} rows"


def validate(rows: int, folder: Path) -> tuple[float, str]:
    from overnight.config import Validation
    from overnight.data.ingest import Ingested
    from overnight.expectations import validate_rows
    from overnight.training.models import load_tokenizer

    made = Ingested(**json.loads((folder / "ingest.json").read_text()))
    model = texts.config("short").model
    tokenizer = load_tokenizer(model.base)
    began = time.perf_counter()
    places = {"folder": folder / "clean", "docs_folder": folder / "docs"}
    found = validate_rows(
        made.path, Validation(), max_length=model.max_length, tokenizer=tokenizer, previous=None, **places
    )
    seconds = time.perf_counter() - began
    assert found.accepted, found.why
    return seconds, f"{found.rows_refused:,} refused"


def split(rows: int, folder: Path) -> tuple[float, str]:
    from overnight.config import Split
    from overnight.data.split import split_rows

    began = time.perf_counter()
    made = split_rows(folder / "clean" / "clean.parquet", Split(), folder / "sides")
    return time.perf_counter() - began, f"{made.rows['withheld']:,} withheld"


def tokenize(rows: int, folder: Path) -> tuple[float, str]:
    from overnight.data.store import read_cells
    from overnight.data.tokenization import tokenize as tokenize_rows
    from overnight.training.models import load_tokenizer

    model = texts.config("short").model
    tokenizer = load_tokenizer(model.base)
    began = time.perf_counter()
    tokens = 0
    facts = texts.PROBLEM.facts({"label": read_cells(folder / "sides" / "train.parquet", "label")})
    for side in ("train", "validation"):
        path = folder / "sides" / f"{side}.parquet"
        tokens += tokenize_rows(path, texts.PROBLEM, tokenizer, facts, model.max_length, folder / "tokens").tokens
    return time.perf_counter() - began, f"{tokens:,} tokens"


if __name__ == "__main__":
    main()
