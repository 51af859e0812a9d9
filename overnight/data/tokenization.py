"""Rows as token ids on disk: made once for the same rows, tokenizer and settings, and read by every trial.

    tokenized = tokenize(splitted.paths["train"], problem, model_reference, facts, 128, home.data / "tokenized")

The cache key is our own: it covers the rows in their order, the *content* of the tokenizer's files and all that
`Problem.encode` is given, so neither another path nor a library's idea of a hash makes it miss or, worse, hit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from overnight.data.store import BATCH, read_tables
from overnight.errors import Complaint, NightFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from overnight.problems.base import Facts, Problem
    from overnight.training.data import TokenizedRows

VERSION = "2"
"""Part of every key: to be raised when the meaning of what is stored changes."""


@dataclass(frozen=True)
class Tokenized:
    """Where the token ids of some rows are; JSON-able by `dataclasses.asdict`."""

    folder: str
    cached: bool
    """Whether they were there already."""
    rows: int
    """Rows, or windows where a long text is read in several."""
    tokens: int
    longest: int
    seconds: float


def tokenize(
    parquet: str | Path,
    problem: Problem,
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    max_length: int,
    root: Path,
) -> Tokenized:
    """Encodes the rows of a Parquet file, in their order, into a folder of `overnight.training.data` below `root`.

    Rows are read, encoded and written in batches, so memory does not grow with them. One process at a time makes a
    folder; others wait for it. What is incomplete or damaged is made again.

    Raises:
        DataRefused: for a row that the problem cannot encode.
        NightFailed: when the folder cannot be written or the disk is full.
    """
    started = time.perf_counter()
    key = cache_key(parquet, problem, tokenizer, facts, max_length)
    folder = root / key[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{folder.name}.lock"):
            rows = _intact(folder)
            cached = rows is not None
            if rows is None:
                rows = _write(folder, parquet, problem, tokenizer, facts, max_length, key)
    except OSError as error:
        raise NightFailed(Complaint(str(folder), "cannot be written", error.strerror or str(error))) from None
    return Tokenized(
        folder=str(folder),
        cached=cached,
        rows=len(rows),
        tokens=int(rows.lengths.sum()),
        longest=int(rows.lengths.max()),
        seconds=round(time.perf_counter() - started, 3),
    )


def token_lengths(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of each text with the special ones, not cut off."""
    lengths: list[int] = []
    for start in range(0, len(texts), BATCH):
        encoded = tokenizer(
            list(texts[start : start + BATCH]),
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        lengths += map(len, encoded["input_ids"])
    return lengths


def cache_key(
    parquet: str | Path, problem: Problem, tokenizer: PreTrainedTokenizerBase, facts: Facts, max_length: int
) -> str:
    """SHA-256 over all that decides the token ids of the rows."""
    settings = {
        "version": VERSION,
        "problem": problem.name,
        "facts": facts,
        "max_length": max_length,
        "tokenizer": tokenizer_digest(tokenizer),
    }
    hashed = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for table in read_tables(parquet, ["row_id"]):
        hashed.update("\n".join([*table["row_id"].to_pylist(), ""]).encode())
    return hashed.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what a tokenizer does: its vocabulary, normalisation and special tokens, wherever it was loaded from.

    The state that a call leaves in a fast tokenizer (padding, truncation) is not part of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # padding and truncation stand in front of it; to read the JSON would take longer than to tokenize 5,000 texts
        written = backend.to_str()
        content = written[max(0, written.find('"added_tokens"')) :]
    else:
        content = {"vocabulary": tokenizer.get_vocab(), "settings": repr(sorted(tokenizer.init_kwargs.items()))}
    about = {
        "class": type(tokenizer).__name__,
        "special": tokenizer.special_tokens_map,
        "inputs": tokenizer.model_input_names,
        "truncation_side": tokenizer.truncation_side,
    }
    return hashlib.sha256(json.dumps([content, about], sort_keys=True, default=str).encode()).hexdigest()


def _write(
    folder: Path,
    parquet: str | Path,
    problem: Problem,
    tokenizer: PreTrainedTokenizerBase,
    facts: Facts,
    max_length: int,
    key: str,
) -> TokenizedRows:
    from pyarrow.parquet import read_schema

    from overnight.training import data

    shutil.rmtree(folder, ignore_errors=True)
    known = read_schema(parquet).names
    roles = [role for role in (*problem.required_roles, *problem.optional_roles) if role in known]
    batches = (table.to_pydict() for table in read_tables(parquet, roles))
    encoded = _numbered(problem.encode(tokenizer, batch, facts, max_length) for batch in batches)
    return data.write(folder, encoded, {"key": key, "problem": problem.name, "max_length": max_length})


def _numbered(batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, list[Any]]]:
    """Batches in which `row`, where features have it, counts the rows of the file and not of the batch."""
    before = 0
    for batch in batches:
        if "row" in batch:
            batch["row"] = [before + row for row in batch["row"]]
            before = batch["row"][-1] + 1
        yield batch


def _intact(folder: Path) -> TokenizedRows | None:
    """The rows of a finished folder whose files are as long as they say; None when it must be made again."""
    from overnight.training import data

    try:
        rows = data.open(folder)
        last = rows[rows.meta["rows"] - 1]
    except (OSError, ValueError, KeyError, IndexError):  # an array that is shorter than its header says is a ValueError
        return None
    whole = len(rows) == rows.meta["rows"] and len(last["input_ids"]) == rows.lengths[-1]
    return rows if whole else None
