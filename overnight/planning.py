"""What a night would do, before it does it: rows, trials, minutes, disk."""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from overnight import problems
from overnight.config import Config
from overnight.errors import Complaint, NightFailed
from overnight.home import Home
from overnight.newbase import NEW, make, settings_of
from overnight.nights import DECIDED, night_records
from overnight.processes import run_child
from overnight.search.places import Places, look_around, this_machine

MEASURE_SECONDS = 8.0
MEASURE_ROWS = 2000


def plan_night(home: Home, config: Config, where: str, folder: Path) -> dict[str, Any]:
    """Reads the source, and measures the speed of training where no earlier night has.

    Args:
        where: the config's place, for complaints.
        folder: a temporary one; nothing is written elsewhere.

    Returns:
        Facts, and under "lines" the same for people.
    """
    from overnight.intake import read_rows

    rows = read_rows(config.data, config.problem, folder / "data", where)
    train = round(rows.rows * (1 - config.split.test - config.split.validation))
    last = _last_speed(home, config)
    machine = this_machine(run_child(look_around, folder / "machine", 1))
    places = Places(machine, config.search.parallel, trials=config.search.wanted, devices=config.training.devices)
    share = places.all[0].threads
    measured = run_child(measure_speed, folder / "speed", share, config=config, rows=rows.path, known=last)
    speed = float(measured["speed"])
    trial = train * measured["samples_a_row"] * config.training.epochs / speed
    search = config.search.wanted * trial / len(places.all)
    if config.search.minutes:
        search = min(search, 60 * config.search.minutes)
    weights = _weights(config)
    facts = {
        "rows": rows.rows,
        "train": train,
        "trials": config.search.wanted,
        "samples_per_second": round(speed, 1),
        "speed_from": "the last night" if last else f"{MEASURE_SECONDS:.0f} s of training just now",
        "trial_minutes": round(trial / 60, 2),
        "search_minutes": round(search / 60, 2),
        "registered_mb": round(weights / 1e6),
        "peak_mb": round(_peak_bytes(weights) / 1e6),
    }
    facts["lines"] = {
        "source": f"{rows.source} ({rows.encoding or 'no encoding'})",
        "rows": f"{rows.rows:,} of {rows.source_rows:,}; about {train:,} to train on, before refusals",
        **({"labels": ", ".join(f"{label} {count:,}" for label, count in rows.labels.items())} if rows.labels else {}),
        "speed": f"{speed:.0f} samples/s (from {facts['speed_from']})",
        "trials": f"{config.search.wanted}, each at most {trial / 60:.1f} min; bad ones are pruned",
        "search": f"at most {search / 60:.1f} min; {places}",
        "disk": f"{facts['registered_mb']:,} MB for the version, up to {facts['peak_mb']:,} MB while searching",
        "gate": f"{config.promotion.mode}, floor {config.promotion.floor:g}, gain {config.promotion.min_gain:g}",
    }
    return facts


def check_disk(home: Home, config: Config) -> None:
    """A night that would fill the disk is not begun.

    Raises:
        NightFailed: with what it needs and what there is.
    """
    needed, free = _peak_bytes(_weights(config)), shutil.disk_usage(home.folder()).free
    if free < needed:
        raise NightFailed(
            Complaint(
                str(home.root), f"the night needs about {needed / 1e6:,.0f} MB of disk", f"{free / 1e6:,.0f} MB free"
            )
        )


def _peak_bytes(weights: int) -> int:
    # the best checkpoint and a newer one, a snapshot (weights and two moments), the version; databases and tokens
    return 6 * weights + 50_000_000


def measure_speed(folder: Path, *, config: Config, rows: str, known: float | None = None) -> dict[str, float]:
    """`speed`: samples a second of a few seconds of training, unless known; `samples_a_row`: windows, of long texts.

    Runs in a child process.
    """
    from overnight.data.store import read_columns
    from overnight.intake import facts_of
    from overnight.training import data
    from overnight.training.fit import fit
    from overnight.training.models import ModelReference, load_tokenizer, resolve_base

    problem = problems.get(config.problem)
    columns = read_columns(rows, problem.required_roles)
    whole = [i for i in range(len(columns[problem.target])) if all(columns[name][i] for name in columns)]
    batch = {name: [values[i] for i in whole[:MEASURE_ROWS]] for name, values in columns.items()}
    facts = facts_of(problem, batch, config.model)
    if config.model.base == NEW:
        roles = list(problem.text_roles)
        make(folder, base=str(folder / "base"), train=rows, roles=roles, settings=settings_of(config.model))
        base = ModelReference(str(folder / "base"))
    else:
        base = ModelReference(resolve_base(config.model.base), config.model.revision)
    tokenizer = load_tokenizer(base.base, base.revision)
    tokens = data.write(folder / "tokens", [problem.encode(tokenizer, batch, facts, config.model.max_length)], {})
    samples_a_row = len(tokens) / len(batch[problem.target])
    if known:
        return {"speed": known, "samples_a_row": samples_a_row}
    begun: list[float] = []
    speeds: list[float] = []

    def stop() -> str | None:
        begun.append(time.monotonic())
        return "prune" if begun[-1] - begun[0] > MEASURE_SECONDS else None

    metric = config.evaluation.metric or problem.default_metric
    result = fit(
        problem, base, facts, tokens, tokens, config.training, folder=folder, metric=metric,
        on_log=lambda line: speeds.append(line["samples_per_second"]), should_stop=stop, log_every_seconds=2.0,
    )  # fmt: skip
    # the first span holds the warming up of memory and kernels
    speed = statistics.median(speeds[1:] or speeds or [result["samples_per_second"]])
    return {"speed": speed, "samples_a_row": samples_a_row}


def _last_speed(home: Home, config: Config) -> float | None:
    for record in reversed(night_records(home, config.name)):
        same = record.get("config", {}).get("base") == config.model.base
        speeds = [
            t["samples_per_second"] for t in record.get("search", {}).get("trials", []) if t.get("samples_per_second")
        ]
        if same and speeds and record["state"] in DECIDED:
            return float(statistics.median(speeds))
    return None


def _weights(config: Config) -> int:
    """Bytes of the base model's weights; 0 where only the hub knows."""
    from overnight.training.models import resolve_base

    if config.model.base == NEW:
        wanted = config.model.new
        return 4 * (wanted.vocabulary * wanted.width + 12 * wanted.layers * wanted.width**2)
    folder = Path(resolve_base(config.model.base))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder.is_dir() else 0
