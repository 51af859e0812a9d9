"""The rows that the benchmarks train on: the shipped configs' data, as the night reads, judges and splits them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd

from overnight import problems
from overnight.config import Config, load_config
from overnight.data.split import split_rows
from overnight.intake import judge_rows, read_rows
from overnight.training import data
from overnight.training.models import load_tokenizer

PROBLEM = problems.get("sequence-classification")
CONFIGS = {"short": "configs/sentiment.yaml", "long": "configs/topics.yaml"}
MAX_LENGTH = {"short": 128, "long": 512}


def config(kind: str) -> Config:
    return load_config(CONFIGS[kind])


def sides(kind: str, root: Path) -> dict[str, Path]:
    """train, validation, test → Parquet file below `root`, made once."""
    folder = root / kind
    done = folder / "sides.json"
    if not done.exists():
        settings = config(kind)
        rows = read_rows(settings.data, settings.problem, folder, kind)
        clean = judge_rows(
            rows, settings.validation, settings.data.slices, settings.problem, settings.model, None, folder, folder
        )
        done.write_text(json.dumps(dataclasses.asdict(split_rows(clean.path, settings.split, folder / "rows"))))
    return {side: Path(path) for side, path in json.loads(done.read_text())["paths"].items()}


def frame(path: Path, rows: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Rows of one side; `rows` of them, drawn by `seed`."""
    whole = pd.read_parquet(path)
    return whole if rows is None or rows >= len(whole) else whole.sample(rows, random_state=seed)


def for_trainer(rows: pd.DataFrame, tokenizer: Any, labels: list[str], max_length: int) -> Any:
    """The rows as Trainer reads them: a `datasets.Dataset` of token ids and label codes."""
    import datasets

    datasets.disable_progress_bars()
    codes = {label: code for code, label in enumerate(labels)}
    table = datasets.Dataset.from_dict({"text": rows.text.tolist(), "labels": [codes[x] for x in rows.label]})
    encoded = table.map(lambda batch: tokenizer(batch["text"], truncation=True, max_length=max_length), batched=True)
    return encoded.remove_columns("text")


def tokenized(rows: pd.DataFrame, base: str, facts: dict[str, Any], max_length: int, folder: Path) -> Any:
    """The rows as the engine reads them."""
    batch = {role: rows[role].tolist() for role in ("text", "label")}
    return data.write(folder, [PROBLEM.encode(load_tokenizer(base), batch, facts, max_length)], {})
