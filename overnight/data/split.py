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

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from overnight.config import ARROW, Split
from overnight.data.digests import Groups, packed
from overnight.data.normalise import canonical_row, digest, uniform
from overnight.data.similar import Protected, Shingles
from overnight.data.store import TableFile, read_tables
from overnight.errors import Complaint, DataRefused

SIDES = ("train", "validation", "test")
"""The sides that are used, from the least to the most protected."""
WITHHELD = "withheld"
ALL_SIDES = (*SIDES, WITHHELD)
UNLABELLED = ""


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
    """Pairs of near-duplicate texts that would have straddled two sides; not all, where very many are alike."""
    seconds: float


def side_of(text_id: str, split: Split) -> str:
    """The side of a text: a function of nothing but its id and the shares. The test rows do not depend on the other."""
    place = uniform(text_id, b"split")
    if place < split.test:
        return "test"
    return "validation" if place < split.test + split.validation else "train"


def assign_sides(
    pieces: Iterable[Mapping[str, Sequence[str | None]]],
    split: Split,
    text_roles: Sequence[str] = ("text",),
    folder: Path | None = None,
) -> tuple[np.ndarray, int]:
    """The place of each row's side in `ALL_SIDES`, and the number of straddling pairs of texts.

    Args:
        pieces: role → cells of some rows at a time.
        folder: for files that are gone at the end; none: where the system has such files.
    """
    ids, parts = [packed(())], [np.zeros(0, np.int8)]
    trained, guarded = Shingles(folder), Shingles(folder)
    for rows in pieces:
        texts = [canonical_row(cells) for cells in zip(*(rows[role] for role in text_roles), strict=True)]
        found = [digest(text) for text in texts]
        own = [SIDES.index(side_of(one, split)) for one in found]
        trained.add([text for text, side in zip(texts, own, strict=True) if not side])
        guarded.add([text for text, side in zip(texts, own, strict=True) if side])
        ids.append(packed(found))
        parts.append(np.array(own, np.int8))
    sides = np.concatenate(parts)
    groups = Groups.of(np.concatenate(ids))
    first, above = groups.first(), sides > 0
    near = np.zeros(len(sides), bool)
    pairs = 0
    protected = Protected(guarded, first[above], sides[above], split.near_duplicate)
    for shingles, these in ((trained, ~above), (guarded, above)):
        looked_at = first[these] & (sides[these] < len(SIDES) - 1)
        near[these], more = protected.near(shingles, looked_at, sides[these])
        pairs += more
    sides[groups.spread(near[groups.order[groups.starts]])] = len(SIDES)
    return sides, pairs


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

    started = time.perf_counter()
    names: dict[str, int] = {}
    numbers = [np.zeros(0, np.int32)]

    def pieces() -> Iterator[dict[str, list[Any]]]:
        for table in read_tables(path, list(dict.fromkeys((*text_roles, *([target] if target else ()))))):
            rows = table.to_pydict()
            found = rows[target] if target else [UNLABELLED] * len(table)
            numbers.append(np.array([names.setdefault(label, len(names)) for label in found], np.int32))
            yield rows

    sides, pairs = assign_sides(pieces(), split, text_roles, Path(path).parent)
    label_of = np.concatenate(numbers)
    labels: dict[str, Counter[str]] = {}
    for number, side in enumerate(ALL_SIDES):
        counts = np.bincount(label_of[sides == number], minlength=len(names)).tolist()
        labels[side] = Counter({name: count for name, count in zip(names, counts, strict=True) if count})
    _refuse(labels, where)
    paths = {side: folder / f"{side}.parquet" for side in ALL_SIDES}
    with ExitStack() as stack:
        files = [stack.enter_context(TableFile(to)) for to in paths.values()]
        start = 0
        for table in read_tables(path):
            own = sides[start : start + len(table)]
            start += len(table)
            for number, file in enumerate(files):
                file.add(table.filter(pa.array(own == number)))
    return Splitted(
        paths={side: str(p) for side, p in paths.items()},
        rows={side: found.total() for side, found in labels.items()},
        labels={side: dict(sorted(found.items())) if target else {} for side, found in labels.items()},
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
