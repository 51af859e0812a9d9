"""Train, validation and test rows: a row's side depends on its own text alone, and near-duplicates never straddle.

A row's side is a hash of its canonical text, compared with the shares of the config. Nothing is stored, so growth,
reordering or duplication of the data cannot move a row. What that leaves open are rows that differ by a word and hash
to different sides: the one on the less protected side (train < validation < test) is *withheld*, used by nobody
tonight. A row can so drop out of training, but never crosses to another side; while its near-duplicate is in the data
it stays out.

Tried and dropped: hashing the smallest word 5-gram instead of the whole text sends most near-duplicates to the same
side by itself (0.7 % instead of 2.0 % of the sentiment texts withheld), but texts that share a footer or a template
would all go to one side.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from overnight.config import ARROW, Split
from overnight.data.normalise import canonical_row, digest, uniform
from overnight.data.store import write_table
from overnight.errors import Complaint, DataRefused

SIDES = ("train", "validation", "test")
"""The sides that are used, from the least to the most protected."""
WITHHELD = "withheld"
UNLABELLED = ""

PERMUTATIONS = 160
MISSED = 2e-5
"""Largest chance that a pair exactly as similar as asked for is not looked at; for closer pairs it is far smaller."""
SEED = 17


@dataclass(frozen=True)
class Splitted:
    """Where the rows of each side are; JSON-able by `dataclasses.asdict`."""

    paths: dict[str, str]
    """train, validation, test, withheld → Parquet file."""
    rows: dict[str, int]
    """Side → rows."""
    labels: dict[str, dict[str, int]]
    """Side → label → rows."""
    near_duplicates: int
    """Pairs of near-duplicate texts that would have straddled two sides."""
    seconds: float


def side_of(text_id: str, split: Split) -> str:
    """The side of a text: a function of nothing but its id and the shares. The test rows do not depend on the other."""
    place = uniform(text_id, b"split")
    if place < split.test:
        return "test"
    return "validation" if place < split.test + split.validation else "train"


def assign_sides(
    rows: Mapping[str, Sequence[str | None]], split: Split, text_roles: Sequence[str] = ("text",)
) -> tuple[list[str], int]:
    """The side of each row (`train`, `validation`, `test`, `withheld`), and the number of straddling pairs of texts."""
    texts = [canonical_row(cells) for cells in zip(*(rows[role] for role in text_roles), strict=True)]
    sides = {text: side_of(digest(text), split) for text in dict.fromkeys(texts)}
    withheld, pairs = _straddling(sides, split.near_duplicate)
    return [WITHHELD if text in withheld else sides[text] for text in texts], pairs


def split_rows(
    path: str | Path,
    split: Split,
    folder: Path,
    *,
    text_roles: Sequence[str] = ("text",),
    target: str | None = "label",
    where: str = "split",
) -> Splitted:
    """Reads the rows of a Parquet file and writes `<folder>/{train,validation,test,withheld}.parquet`.

    Args:
        target: the column of labels; None where rows have no labels to count.

    Raises:
        DataRefused: when a side has no rows, or the training rows lack a label that the others have.
        NightFailed: when the folder cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    started = time.perf_counter()
    table = parquet.read_table(path)
    rows = {name: table.column(name).to_pylist() for name in (*text_roles, *([target] if target else ()))}
    sides, pairs = assign_sides(rows, split, text_roles)
    labels: dict[str, Counter[str]] = {side: Counter() for side in (*SIDES, WITHHELD)}
    for side, label in zip(sides, rows[target] if target else [UNLABELLED] * len(sides), strict=True):
        labels[side][label] += 1
    _refuse(labels, where)
    paths = {side: folder / f"{side}.parquet" for side in labels}
    for side, target_path in paths.items():
        write_table(table.filter(pa.array([at == side for at in sides])), target_path)
    return Splitted(
        paths={side: str(p) for side, p in paths.items()},
        rows={side: counts.total() for side, counts in labels.items()},
        labels={side: dict(sorted(counts.items())) if target else {} for side, counts in labels.items()},
        near_duplicates=pairs,
        seconds=round(time.perf_counter() - started, 3),
    )


def _refuse(labels: dict[str, Counter[str]], where: str) -> None:
    complaints = [
        Complaint(f"{where}{ARROW}{side}", "no rows fell on this side: there are too few, or the share is too small")
        for side in SIDES
        if not labels[side]
    ]
    everywhere = set().union(*labels.values())
    complaints += [
        Complaint(f"{where}{ARROW}train", f"no row to train on has the label {label!r}")
        for label in sorted(everywhere - set(labels["train"]))
        if labels["train"]
    ]
    if complaints:
        raise DataRefused(*complaints)


# -- near-duplicates -------------------------------------------------------------------------------------------------


def shingles(text: str) -> set[str]:
    """Words and pairs of neighbouring words of a canonical text.

    Pairs make the order count; the single words keep short texts comparable. In a text of 20 words, one changed word
    leaves a similarity of 0.86, in one of 10 words 0.73, in one of 5 words 0.5: short texts must be nearly equal.
    """
    words = text.split()
    return {*words, *map(" ".join, zip(words, words[1:], strict=False))}


def similarity(one: set[str], other: set[str]) -> float:
    """Jaccard similarity: shared shingles over all shingles."""
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def bands(threshold: float, permutations: int = PERMUTATIONS) -> tuple[int, int]:
    """Number and length of MinHash bands: the longest that miss a pair of the threshold's similarity rarely enough.

    A pair of similarity s agrees in none of b bands of r hashes with probability (1 - s^r)^b (Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, 3.4). Longer bands mean fewer pairs to look at.
    """
    fits = [r for r in range(1, permutations // 2 + 1) if (1 - threshold**r) ** (permutations // r) <= MISSED]
    rows = max(fits, default=1)
    return permutations // rows, rows


@lru_cache(500_000)
def _hash(shingle: str) -> int:
    return int.from_bytes(hashlib.blake2b(shingle.encode("utf-8", "surrogatepass"), digest_size=4).digest(), "big")


def _straddling(sides: dict[str, str], threshold: float) -> tuple[set[str], int]:
    """The texts that have a near-duplicate on a more protected side, and the number of such pairs.

    MinHash finds the candidates, the exact similarity decides. Side after side, the most protected first, the texts are
    looked up among those before them and then added, so pairs within a side are never compared.
    """
    from datasketch import MinHash, MinHashLSH

    lsh = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
    protected: dict[str, set[str]] = {}
    withheld: set[str] = set()
    pairs = 0
    for side in reversed(SIDES):
        # sorted, so that neither the order of the rows nor the process decides anything
        own = {text: shingles(text) for text in sorted(sides) if sides[text] == side}
        sketches = MinHash.generator(own.values(), num_perm=PERMUTATIONS, seed=SEED, hashfunc=_hash)
        known: list[tuple[str, MinHash]] = []
        for text, sketch in zip(own, sketches, strict=True):
            if protected:
                near = [other for other in lsh.query(sketch) if similarity(own[text], protected[other]) >= threshold]
                pairs += len(near)
                if near:
                    withheld.add(text)
            if side != SIDES[0]:
                known.append((text, sketch))
        for text, sketch in known:
            lsh.insert(text, sketch, check_duplication=False)
        protected |= own
    return withheld, pairs
