"""What is wrong with single rows, and what is measured on all of them: plain pandas, each thing computed once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from ftfy.badness import badness

from overnight.config import Expectations
from overnight.errors import Complaint, UserError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKEN_SAMPLE = 5_000
LANGUAGE_SAMPLE = 1_000
DAMAGED = re.compile("[\x00\x80-\x9f\ufffd]")  # NUL, C1 controls, the character that stands for lost ones


@dataclass(frozen=True)
class Measured:
    """Measures of the accepted rows, aligned with the table; NaN where a row was refused or not in the sample."""

    cut: pd.Series
    """1.0 where the input is longer than the model takes."""
    foreign: pd.Series
    """1.0 where the language is not one of those expected."""
    facts: dict[str, Any]
    """The `facts` of `Validated`."""


def read(path: Path, columns: Sequence[str], text_roles: Sequence[str], target: str | None) -> pd.DataFrame:
    """The ingested table; blank texts and labels become missing ones.

    Raises:
        UserError: when a column of the problem is missing.
    """
    table = pd.read_parquet(path)
    missing = [c for c in ("row_id", "text_id", "source_row", *columns) if c not in table]
    if missing:
        raise UserError(*(Complaint(str(path), "no such column", repr(c), nearest(c, table.columns)) for c in missing))
    for role in (*text_roles, *([target] if target else [])):
        if table[role].isna().all():
            table[role] = table[role].astype(object)  # a column of nothing has no string type of its own
        else:
            blank = table[role].str.strip() == ""
            if blank.any():
                table[role] = table[role].mask(blank.astype(bool))
    return table


def refusals(
    table: pd.DataFrame,
    expect: Expectations,
    text_roles: Sequence[str],
    target: str | None,
    label: str | None,
    previous: Mapping[str, Any] | None,
) -> pd.DataFrame:
    """A column of booleans for each reason; a row is refused where any is true.

    `label` is the target where that is one label of a set.
    """
    texts = table[list(text_roles)]
    reasons = {"null_text": texts.isna().any(axis=1)}
    whole = ~reasons["null_text"]
    said = table["refusal"] if "refusal" in table else pd.Series(None, index=table.index, dtype=object)
    reasons |= {reason: said == reason for reason in sorted(said.dropna().unique())}
    if target and target not in text_roles:  # what the problem has refused has no target of its own to lack
        reasons["null_label"] = table[target].isna() & said.isna()
    if label:
        known = known_labels(table, expect, label, previous)
        if expect.labels.severity != "off" and known is not None:
            reasons["unknown_label"] = table[label].notna() & ~table[label].isin(known)
    if expect.characters.severity != "off":
        lengths = texts.apply(lambda role: role.str.len()) if len(table) else texts
        reasons["too_short"] = (lengths < expect.characters.min).any(axis=1)
        reasons["too_long"] = (lengths > expect.characters.max).any(axis=1)
    if expect.duplicates.severity != "off":
        reasons["duplicate"] = whole & table.row_id.duplicated()
    if label and expect.contradictions.severity != "off":
        pairs = table.loc[whole & table[label].notna(), ["text_id", label]].drop_duplicates()
        reasons["contradiction"] = whole & table.text_id.isin(pairs.text_id[pairs.text_id.duplicated()])
    if expect.encoding_damage.severity != "off":
        reasons["encoding_damage"] = texts.apply(lambda role: role.map(damaged, na_action="ignore") == True).any(axis=1)  # noqa: E712
    return pd.DataFrame({name: mask.astype(bool) for name, mask in reasons.items()}, index=table.index)


def known_labels(
    table: pd.DataFrame, expect: Expectations, target: str, previous: Mapping[str, Any] | None
) -> list[str] | None:
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
    table: pd.DataFrame,
    kept: pd.Series,
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
    cut = pd.Series(np.nan, index=table.index)
    foreign = cut.copy()
    clean = table[kept]
    facts: dict[str, Any] = {}
    if label:
        shares = clean[label].value_counts(normalize=True).sort_index()
        facts |= {"labels": list(shares.index), "label_shares": {k: float(v) for k, v in shares.items()}}
    if clean.empty:
        return Measured(cut, foreign, facts)
    facts["chars"] = _quantiles(sum(clean[role].str.len() for role in text_roles))
    if tokenizer is not None and expect.tokens.severity != "off":
        sample = clean.loc[clean.row_id.sort_values().index[:TOKEN_SAMPLE]]
        encoded = tokenizer(
            *(sample[role].tolist() for role in text_roles),
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens = pd.Series([len(ids) for ids in encoded["input_ids"]], index=sample.index)
        cut.loc[sample.index] = (tokens > max_length).astype(float)
        facts["tokens"] = _quantiles(tokens)
    if expect.language.severity != "off" and expect.language.expected:
        sample = clean.loc[clean.row_id.sort_values().index[:LANGUAGE_SAMPLE]]
        found = _languages(sample[text_roles[0]].tolist())
        foreign.loc[sample.index] = np.array([code not in expect.language.expected for code in found], dtype=float)
        facts["languages"] = {code: n / len(found) for code, n in Counter(found).most_common(10)}
    return Measured(cut, foreign, facts)


def write(table: pd.DataFrame, refused: pd.DataFrame, folder: Path) -> tuple[Path, Path]:
    """Accepted and refused rows, the latter with their reasons, as two Parquet files in `folder`."""
    bad = refused.any(axis=1)
    names = np.array(refused.columns)
    table = table.drop(columns="refusal", errors="ignore")  # it is among the reasons
    quarantine = table[bad].assign(reasons=[";".join(names[row]) for row in refused[bad].to_numpy()])
    paths = folder / "clean.parquet", folder / "quarantine.parquet"
    for frame, path in zip((table[~bad], quarantine), paths, strict=True):
        half = path.with_suffix(".part")
        frame.to_parquet(half, index=False)
        half.replace(path)
    return paths


def _quantiles(lengths: Any) -> dict[str, int]:
    at = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {name: int(np.quantile(lengths, q)) for name, q in at.items()}


def _languages(texts: list[str]) -> list[str]:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)  # the module's own one is shared and can be restricted
    return [str(identifier.classify(text)[0]) for text in texts]
