"""What is wrong with single rows, and what is measured on all of them, each thing computed once.

Rows are read in pieces; of each no more is held than some digests and numbers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from ftfy.badness import badness
from pyarrow.parquet import read_schema

from overnight.config import Expectations
from overnight.data.digests import Groups, packed
from overnight.data.store import TableFile, read_rows, read_tables
from overnight.errors import Complaint, UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_SAMPLE = 5_000
LANGUAGE_SAMPLE = 1_000
DAMAGED = re.compile("[\x00\x80-\x9f\ufffd]")  # NUL, C1 controls, the character that stands for lost ones
IDS = ("row_id", "text_id", "source_row")


@dataclass(frozen=True)
class Table:
    """What is known of each row: some bytes, and never a text."""

    path: Path
    columns: list[str]
    row_ids: np.ndarray
    """Packed digests, as are the text ids."""
    text_ids: np.ndarray
    source_rows: np.ndarray
    characters: dict[str, np.ndarray]
    """Text role → characters; NaN where there is no text."""
    damaged: np.ndarray
    """Whether one of the texts is."""
    targeted: np.ndarray
    """Whether there is a target, where the problem has one besides its texts."""
    labels: np.ndarray
    """Place of the label in `label_names`; -1 for none, and where the target is no label."""
    label_names: list[str]
    said: np.ndarray
    """Place in `said_names` of what the problem says against the row; -1 for nothing."""
    said_names: list[str]

    def __len__(self) -> int:
        return len(self.row_ids)


@dataclass(frozen=True)
class Measured:
    """Measures of the accepted rows, aligned with the table; NaN where a row was refused or not in the sample."""

    cut: np.ndarray
    """1.0 where the input is longer than the model takes."""
    foreign: np.ndarray
    """1.0 where the language is not one of those expected."""
    facts: dict[str, Any]
    """The `facts` of `Validated`."""


def read(path: Path, columns: Sequence[str], text_roles: Sequence[str], target: str | None, label: str | None) -> Table:
    """The ingested table; blank texts and labels are missing ones. `label` is the target where that is one of a set.

    Raises:
        UserError: when a column of the problem is missing.
    """
    there = read_schema(path).names
    missing = [c for c in (*IDS, *columns) if c not in there]
    if missing:
        raise UserError(*(Complaint(str(path), "no such column", repr(c), nearest(c, there)) for c in missing))
    told = [*text_roles, *([target] if target else [])]
    wanted = [*IDS, *dict.fromkeys(told), *(["refusal"] if "refusal" in there else [])]
    labels: dict[str, int] = {}
    said: dict[str, int] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for piece in pieces(path, told, wanted):
        found = {
            "row_ids": packed(piece["row_id"].to_pylist()),
            "text_ids": packed(piece["text_id"].to_pylist()),
            "source_rows": piece["source_row"].to_numpy(),
            "damaged": np.any([_damaged(piece[role]) for role in text_roles], axis=0),
            "targeted": np.ones(len(piece), bool),
            "labels": _numbered(piece[label], labels) if label else np.full(len(piece), -1, np.int32),
            "said": _numbered(piece["refusal"], said) if "refusal" in there else np.full(len(piece), -1, np.int32),
        }
        if target and target not in text_roles:
            found["targeted"] = piece[target].is_valid().to_numpy()
        found |= {f"characters of {role}": _characters(piece[role]) for role in text_roles}
        for name, values in found.items():
            parts.setdefault(name, []).append(values)
    whole = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    characters = {role: whole.pop(f"characters of {role}") for role in text_roles}
    return Table(Path(path), there, characters=characters, label_names=list(labels), said_names=list(said), **whole)


def pieces(path: Path, told: Sequence[str], columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The rows of the file, some at a time; in the columns `told`, those of texts and targets, no cell is blank."""
    for piece in read_tables(path, columns):
        piece = piece.replace_schema_metadata(None)
        for name in dict.fromkeys(told):
            cells = piece[name]
            if pa.types.is_null(cells.type):
                cells = cells.cast(pa.string())  # a column of nothing has no string type of its own
            blank = pc.equal(pc.utf8_trim_whitespace(cells), "")
            piece = piece.set_column(piece.column_names.index(name), name, pc.if_else(blank, None, cells))
        yield piece


def _numbered(cells: pa.ChunkedArray, names: dict[str, int]) -> np.ndarray:
    """The place of each cell among the names, which grow; -1 for none."""
    found = (-1 if cell is None else names.setdefault(cell, len(names)) for cell in cells.to_pylist())
    return np.fromiter(found, np.int32, len(cells))


def _characters(cells: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = pc.utf8_length(cells).cast(pa.float64()).to_numpy()
    return found


def _damaged(cells: pa.ChunkedArray) -> np.ndarray:
    found: np.ndarray = pc.fill_null(pc.match_substring(cells, "\x00"), False).to_numpy().copy()
    other = np.flatnonzero(~pc.fill_null(pc.string_is_ascii(cells), True).to_numpy())
    found[other] = [damaged(text) for text in cells.take(pa.array(other)).to_pylist()]
    return found


def refusals(table: Table, expect: Expectations, label: str | None, previous: Mapping[str, Any] | None) -> pd.DataFrame:
    """A column of booleans for each reason; a row is refused where any is true."""
    texts = table.characters.values()
    reasons = {"null_text": np.any([np.isnan(role) for role in texts], axis=0)}
    whole = ~reasons["null_text"]
    reasons |= {reason: table.said == table.said_names.index(reason) for reason in sorted(table.said_names)}
    # what the problem has refused has no target of its own to lack
    reasons["null_label"] = ~table.targeted & (table.said < 0)
    if label:
        known = known_labels(expect, previous)
        if expect.labels.severity != "off" and known is not None:
            strange = np.array([name not in known for name in table.label_names] + [False])
            reasons["unknown_label"] = strange[table.labels]
    if expect.characters.severity != "off":
        reasons["too_short"] = np.any([role < expect.characters.min for role in texts], axis=0)
        reasons["too_long"] = np.any([role > expect.characters.max for role in texts], axis=0)
    if expect.duplicates.severity != "off":
        reasons["duplicate"] = whole & ~Groups.of(table.row_ids).first()
    if label and expect.contradictions.severity != "off":
        reasons["contradiction"] = whole & _contradicted(table, whole)
    if expect.encoding_damage.severity != "off":
        reasons["encoding_damage"] = table.damaged
    return pd.DataFrame(reasons)


def _contradicted(table: Table, whole: np.ndarray) -> np.ndarray:
    """Whether the text of a row occurs with several labels in rows that have all their texts."""
    if not len(table):
        return whole
    groups = Groups.of(table.text_ids)
    labels = np.where(whole, table.labels, -1)[groups.order]
    highest = np.maximum.reduceat(labels, groups.starts)
    lowest = np.minimum.reduceat(np.where(labels < 0, len(table.label_names), labels), groups.starts)
    return groups.spread(highest > lowest)


def known_labels(expect: Expectations, previous: Mapping[str, Any] | None) -> list[str] | None:
    """The labels that may occur: the config's, else those of the last accepted night; None: whatever is found."""
    known = expect.labels.known or (previous or {}).get("labels")
    return list(known) if known else None


def damaged(text: str) -> bool:
    """Whether characters were lost or garbled.

    A long text may hold a sequence that looks like mojibake by chance, so there it takes one in 1,000 characters.
    """
    if text.isascii():
        return "\x00" in text
    return DAMAGED.search(text) is not None or badness(text) * 1000 > len(text)


def measure(
    table: Table,
    kept: np.ndarray,
    expect: Expectations,
    text_roles: Sequence[str],
    label: str | None,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Measured:
    """Lengths, languages and label shares of the accepted rows.

    Tokens and languages are measured on the rows with the smallest ids: a sample that is the same every time and
    changes little as data grows.
    """
    cut = np.full(len(table), np.nan)
    foreign = cut.copy()
    facts: dict[str, Any] = {}
    if label:
        numbers = table.labels[kept]
        counts = np.bincount(numbers[numbers >= 0], minlength=len(table.label_names)).tolist()
        shares = {name: count / sum(counts) for name, count in zip(table.label_names, counts, strict=True) if count}
        facts |= {"labels": sorted(shares), "label_shares": dict(sorted(shares.items()))}
    if not kept.any():
        return Measured(cut, foreign, facts)
    facts["chars"] = _quantiles(sum(role[kept] for role in table.characters.values()))
    order = table.row_ids.argsort(kind="stable")
    order = order[kept[order]][: max(TOKEN_SAMPLE, LANGUAGE_SAMPLE)]
    texts = read_rows(table.path, order.tolist(), text_roles)
    if tokenizer is not None and expect.tokens.severity != "off":
        sample = order[:TOKEN_SAMPLE]
        encoded = tokenizer(
            *map(list, zip(*(texts[place] for place in sample.tolist()), strict=True)),
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens = np.array([len(ids) for ids in encoded["input_ids"]])
        cut[sample] = tokens > max_length
        facts["tokens"] = _quantiles(tokens)
    if expect.language.severity != "off" and expect.language.expected:
        sample = order[:LANGUAGE_SAMPLE]
        found = _languages([texts[place][0] for place in sample.tolist()])
        foreign[sample] = [code not in expect.language.expected for code in found]
        facts["languages"] = {code: n / len(found) for code, n in Counter(found).most_common(10)}
    return Measured(cut, foreign, facts)


def write(table: Table, refused: pd.DataFrame, told: Sequence[str], folder: Path) -> tuple[Path, Path]:
    """Accepted and refused rows, the latter with their reasons, as two Parquet files in `folder`."""
    marks, names = refused.to_numpy(), list(refused.columns)
    paths = folder / "clean.parquet", folder / "quarantine.parquet"
    with TableFile(paths[0]) as clean, TableFile(paths[1]) as quarantine:
        start = 0
        for piece in pieces(table.path, told):
            own = marks[start : start + len(piece)]
            start += len(piece)
            bad = own.any(axis=1)
            if "refusal" in piece.column_names:
                piece = piece.drop_columns("refusal")  # it is among the reasons
            reasons = [";".join(compress(names, row)) for row in own[bad]]
            clean.add(piece.filter(pa.array(~bad)))
            quarantine.add(piece.filter(pa.array(bad)).append_column("reasons", pa.array(reasons, pa.string())))
    return paths


def _quantiles(lengths: Any) -> dict[str, int]:
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: int(np.quantile(lengths, q)) for name, q in at.items()}


def _languages(texts: list[str]) -> list[str]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)  # the module's own one is shared and can be restricted
    return [str(identifier.classify(text)[0]) for text in texts]
