"""Tokenization: texts a second and peak memory, against `datasets.map`, and how both grow with the rows.

    python -m bench.tokenize [--pairs 5] [--rows 20000] [--sizes 10000 100000 1000000]

Both read the same Parquet file (the tweets, repeated as often as needed) and leave token ids on the disk, each in a
process of its own; the time is that of the work, without imports and without loading the tokenizer. The sizes after the
first table are measured once each, for the growth.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from bench import texts
from bench.results import apart, ratio, record

MAX_LENGTH = 128
SIDES = {
    "map": "`datasets.map`, as it comes",
    "batched": "`datasets.map`, batched",
    "processes": "`datasets.map`, batched, a process a core",
    "ours": "overnight",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side, arguments.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = corpus(arguments.rows, Path(folder))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for pair in range(arguments.pairs):
            for side in list(SIDES)[:: 1 if pair % 2 == 0 else -1]:
                found[side].append(start(side, file))
                print(pair, side, found[side][-1], file=sys.stderr)
        table = []
        for side, name in SIDES.items():
            speeds = [one["speed"] for one in found[side]]
            against = "" if side == "ours" else ratio([one["speed"] for one in found["ours"]], speeds)
            memory = median(one["peak_mb"] - one["start_mb"] for one in found[side])
            table.append([f"{arguments.rows:,}", name, f"{median(speeds):,.0f}", against, f"{memory:,.0f} MB"])
        for size in arguments.sizes:
            one = start("ours", corpus(size, Path(folder)))
            memory = one["peak_mb"] - one["start_mb"]
            table.append([f"{size:,}", SIDES["ours"], f"{one['speed']:,.0f}", "", f"{memory:,.0f} MB"])
    header = ["rows", "side", "texts/s", "overnight against it", "memory above the start"]
    record(
        "tokenize", "Tokenization", header, table, f"{arguments.pairs} pairs of the first size, cut at {MAX_LENGTH}."
    )


def corpus(rows: int, folder: Path) -> Path:
    """A Parquet file of that many rows, the tweets over and over, written in pieces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / f"{rows}.parquet"
    if path.exists():
        return path
    own = texts.frame(texts.sides("short", folder)["train"])[["row_id", "text", "label"]]
    table = pa.Table.from_pandas(own, preserve_index=False)
    with pq.ParquetWriter(path, table.schema) as writer:
        for done in range(0, rows, len(own)):
            writer.write_table(table.slice(0, min(len(own), rows - done)))
    return path


def start(side: str, file: Path) -> dict[str, float]:
    return apart("tokenize", "--side", side, "--file", str(file))


def run_side(side: str, file: Path) -> dict[str, float]:
    """In a process of its own: texts a second, memory before the work and at its peak (children too)."""
    import pyarrow.parquet as pq

    from overnight.training.models import load_tokenizer

    tokenizer = load_tokenizer(texts.config("short").model.base)
    rows = pq.ParquetFile(file).metadata.num_rows
    with tempfile.TemporaryDirectory() as folder:
        work = _ours if side == "ours" else _map
        before = work(side, file, tokenizer, Path(folder))
        started = _memory(reset=True)
        began = time.perf_counter()
        before()
        seconds = time.perf_counter() - began
    return {"speed": rows / seconds, "start_mb": started, "peak_mb": _memory()}


def _memory(reset: bool = False) -> float:
    """Most memory of this process since the last reset and of any one child, in MiB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")  # the imports' peak would hide the work's
    own = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return (int(own[1] if own else 0) + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


def _ours(side: str, file: Path, tokenizer: Any, folder: Path) -> Any:
    from overnight.data.tokenization import tokenize

    facts = {"labels": ["negative", "neutral", "positive"]}
    return lambda: tokenize(file, texts.PROBLEM, tokenizer, facts, MAX_LENGTH, folder)


def _map(side: str, file: Path, tokenizer: Any, folder: Path) -> Any:
    import os

    import datasets

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(folder))
    options = {"map": {}, "batched": {"batched": True}, "processes": {"batched": True, "num_proc": os.cpu_count()}}[
        side
    ]

    def encode(batch: dict[str, Any]) -> Any:
        return tokenizer(batch["text"], truncation=True, max_length=MAX_LENGTH)

    return lambda: rows.map(encode, **options)


if __name__ == "__main__":
    main()
