"""Overhead: what a night costs beside the work of its stages, and a trial beside its training.

    python -m bench.overhead [--nights 5] [--trials 3] [--rows 1500]

Whole nights of `configs/sentiment.yaml` with fewer rows, each in a home of its own: `overnight run`, from its start to
its end, with the servers that it starts and ends. A night's overhead is its wall time less the time of its stages; a
trial's is the search's wall time, one trial at a time, less its training and what is computed once for all, shared out
over its trials.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
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
    nights = []
    for number in range(arguments.nights):
        nights.append(night(arguments.rows, arguments.trials))
        print(number, nights[-1], file=sys.stderr)
    table = []
    for key, name in (
        ("wall", "a night, whole"),
        ("stages", "its stages"),
        ("overhead", "a night above its stages"),
        ("trial", "a trial above its training"),
    ):
        values = sorted(one[key] for one in nights)
        table.append([name, f"{median(values):.1f}", f"{values[0]:.1f} to {values[-1]:.1f}"])
    notes = f"{arguments.nights} nights of {arguments.rows:,} tweets with {arguments.trials} trials, one after another."
    record("overhead", "Overhead", ["what", "seconds, median", "range"], table, notes)


def night(rows: int, trials: int) -> dict[str, float]:
    """Seconds of one night, by what they went into."""
    with tempfile.TemporaryDirectory() as home:
        settings = [f"data.sample={rows}", f"search.trials={trials}", "search.parallel=1", "search.pruner=none"]
        command = [str(Path(sys.executable).with_name("overnight")), "run", texts.CONFIGS["short"]]
        command += [argument for setting in settings for argument in ("--set", setting)]
        began = time.perf_counter()
        # a model that misses its floor is refused, which is an end like another
        done = subprocess.run(command, env=os.environ | {"OVERNIGHT_HOME": home}, capture_output=True, text=True)
        wall = time.perf_counter() - began
        found = list(Path(home).glob("nights/*/night.json"))
        if not found:
            raise SystemExit(done.stderr)
        facts = json.loads(found[0].read_text())
    search = facts["search"]
    training = sum(trial["seconds"] for trial in search["trials"])
    stages = sum(facts["stages"].values())
    beforehand = search.get("features_seconds", 0.0)
    return {
        "wall": wall,
        "stages": stages,
        "overhead": wall - stages,
        "trial": (search["seconds"] - beforehand - training) / len(search["trials"]),
    }


if __name__ == "__main__":
    main()
