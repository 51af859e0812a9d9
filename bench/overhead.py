"""Overhead: what a night costs beside the work of its stages, and a trial beside its training.

    python -m bench.overhead [--nights 5] [--trials 3] [--rows 1500]

Whole nights of `configs/sentiment.yaml` with fewer rows, one after another in one home: `overnight run --force`, from
its start to its end; in turns with a Prefect server that the night starts and ends, and with one that is there already,
as `overnight up` and `overnight ui` keep it. The first night of a home, which also makes the databases, is told apart.
A night's overhead is its wall time less the time of its stages; where no server is waited for, the stages include the
imports of what they use. A trial's is the search's wall time, one trial at a time, less its training and what is
computed once for all, shared out over its trials.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from bench import texts
from bench.results import record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nights", type=int, default=5)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1500)
    arguments = parser.parse_args()
    alone: list[dict[str, float]] = []
    kept: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as home:
        first = night(Path(home), arguments.rows, arguments.trials)
        for number in range(arguments.nights):
            alone.append(night(Path(home), arguments.rows, arguments.trials))
            with servers(Path(home)):
                kept.append(night(Path(home), arguments.rows, arguments.trials))
            print(number, alone[-1], kept[-1], file=sys.stderr)
    table = [["the first night of a home above its stages", f"{first['overhead']:.1f}", ""]]
    for key, name, nights in (
        ("wall", "a night, whole", alone),
        ("overhead", "a night above its stages", alone),
        ("wall", "a night, whole, with servers kept running", kept),
        ("overhead", "a night above its stages, with servers kept running", kept),
        ("trial", "a trial above its training", alone + kept),
    ):
        values = sorted(one[key] for one in nights)
        table.append([name, f"{median(values):.1f}", f"{values[0]:.1f} to {values[-1]:.1f}"])
    notes = f"{arguments.nights} pairs of nights of {arguments.rows:,} tweets with {arguments.trials} trials, in turns."
    record("overhead", "Overhead", ["what", "seconds, median", "range"], table, notes)


@contextmanager
def servers(home: Path) -> Iterator[None]:
    """`overnight ui` on the home, while the block runs."""
    command = [str(Path(sys.executable).with_name("overnight")), "ui", "--json"]
    process = subprocess.Popen(
        command, env=os.environ | {"OVERNIGHT_HOME": str(home)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout and process.stdout.readline(), "the pages did not start"
        yield
    finally:
        process.terminate()
        process.wait()


def night(home: Path, rows: int, trials: int) -> dict[str, float]:
    """Seconds of one night, by what they went into."""
    settings = [f"data.sample={rows}", f"search.trials={trials}", "search.parallel=1", "search.pruner=none"]
    command = [str(Path(sys.executable).with_name("overnight")), "run", texts.CONFIGS["short"], "--force"]
    command += [argument for setting in settings for argument in ("--set", setting)]
    before = set(home.glob("nights/*/night.json"))
    began = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"OVERNIGHT_HOME": str(home)}, capture_output=True, text=True)
    wall = time.perf_counter() - began
    found = set(home.glob("nights/*/night.json")) - before
    if done.returncode or not found:
        raise SystemExit(done.stderr)
    facts = json.loads(found.pop().read_text())
    search = facts["search"]
    training = sum(trial["seconds"] for trial in search["trials"])
    stages = sum(facts["stages"].values())
    beforehand = search["preparation_seconds"]
    return {
        "wall": wall,
        "stages": stages,
        "overhead": wall - stages,
        "trial": (search["seconds"] - beforehand - training) / len(search["trials"]),
    }


if __name__ == "__main__":
    main()
