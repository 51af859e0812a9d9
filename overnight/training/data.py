"""Tokenized rows on disk: flat memory-mapped arrays that every trial reads and none copies.

A folder holds, for each feature, `<feature>.npy`: all rows' values one after another. A feature with a list in each row
(`input_ids`) has `<feature>.offsets.npy` beside it: row i is values[offsets[i]:offsets[i + 1]]. `meta.json` is written
last, so its existence proves that the rest is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

if TYPE_CHECKING:
    import torch

META = "meta.json"


class TokenizedRows:
    """Rows of one folder. `rows[i]` is one row's features, `rows.lengths` the number of tokens of each."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / META).read_text())
        features: dict[str, str] = self.meta["features"]
        self._values = {name: _map(folder / f"{name}.npy") for name in features}
        self._offsets = {n: _map(folder / f"{n}.offsets.npy") for n, kind in features.items() if kind == "list"}
        self.lengths: np.ndarray = np.diff(self._offsets["input_ids"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for name, values in self._values.items():
            offsets = self._offsets.get(name)
            row[name] = values[i] if offsets is None else values[offsets[i] : offsets[i + 1]]
        return row

    def column(self, name: str) -> np.ndarray:
        """All rows' values of a feature that is one number a row."""
        if name in self._offsets or name not in self._values:
            raise KeyError(name)
        return self._values[name]

    def values(self, name: str) -> np.ndarray:
        """All rows' values of a feature, one row's after another's."""
        return self._values[name]


class Part(TokenizedRows):
    """Some rows of a `TokenizedRows`, as one of its own; rows are numbered anew where features carry their `row`."""

    def __init__(self, rows: TokenizedRows, features: np.ndarray):
        self.folder, self.meta = rows.folder, rows.meta
        self._rows, self._features = rows, features
        self.lengths: np.ndarray = rows.lengths[features]
        self._numbers: np.ndarray | None = None
        if "row" in rows.meta["features"]:
            self._numbers = np.unique(rows.column("row")[features], return_inverse=True)[1]

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = self._rows[int(self._features[i])]
        return row if self._numbers is None else row | {"row": self._numbers[i]}

    def column(self, name: str) -> np.ndarray:
        """All rows' values of a feature that is one number a row."""
        if name == "row" and self._numbers is not None:
            return self._numbers
        return self._rows.column(name)[self._features]

    def values(self, name: str) -> np.ndarray:
        """All rows' values of a feature, one row's after another's."""
        return np.concatenate([np.atleast_1d(self[i][name]) for i in range(len(self))])


def folds(rows: TokenizedRows, count: int, seed: int) -> list[tuple[Part, Part]]:
    """(rows to learn from, rows to judge by) of each fold; every row is in one fold, with all its windows."""
    numbers = np.asarray(rows.column("row")) if "row" in rows.meta["features"] else np.arange(len(rows))
    place = np.random.default_rng(seed).permutation(int(numbers.max()) + 1) % count
    of = place[numbers]
    return [(Part(rows, np.flatnonzero(of != fold)), Part(rows, np.flatnonzero(of == fold))) for fold in range(count)]


def open(folder: str | Path) -> TokenizedRows:
    """Opens what `write` wrote; FileNotFoundError when it was not finished."""
    return TokenizedRows(Path(folder))


def write(folder: str | Path, batches: Iterable[Mapping[str, Sequence[Any]]], meta: Mapping[str, Any]) -> TokenizedRows:
    """Streams batches of features (feature → one entry a row) into a folder; memory stays flat.

    `meta` is kept beside them as it is; `token_type_ids` that are all zero are left out, as models assume them.

    Raises:
        ValueError: when there is no row, or the batches differ in their features.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / META).unlink(missing_ok=True)
    columns: dict[str, _Column] = {}
    rows = 0
    try:
        for batch in batches:
            count = len(batch["input_ids"])
            if rows == 0 and count:
                columns = {name: _Column(folder, name, values[0]) for name, values in batch.items()}
            if count and columns.keys() != batch.keys():
                raise ValueError(f"features of all batches must be equal, got {sorted(columns)} and {sorted(batch)}")
            for name, column in columns.items():
                if len(batch[name]) != count:
                    raise ValueError(f"{name} must have {count} rows like input_ids, got {len(batch[name])}")
                column.extend(batch[name])
            rows += count
    finally:
        for column in columns.values():
            column.close()
    if rows == 0:
        raise ValueError("no rows to write")
    if "token_type_ids" in columns and not columns["token_type_ids"].any:
        columns.pop("token_type_ids").remove()
    features = {name: column.kind for name, column in columns.items()}
    temporary = folder / f"{META}.tmp"
    temporary.write_text(json.dumps(dict(meta) | {"rows": rows, "features": features}, indent=2))
    os.replace(temporary, folder / META)
    return open(folder)


def pad(features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """One batch, every list padded to the longest of its feature: `input_ids`, `attention_mask` and the others.

    Lists of `labels` are padded with -100, which losses leave out; other lists with 0.
    """
    import torch  # a night writes rows, and has no need of it, in a process that starts seconds sooner without

    fill = {"input_ids": pad_token_id, "labels": -100}
    batch: dict[str, torch.Tensor] = {}
    for name, first in features[0].items():
        values = [feature[name] for feature in features]
        if np.ndim(first) == 0:
            array = np.asarray(values)
        else:
            array = np.full((len(values), max(map(len, values))), fill.get(name, 0), dtype=np.int64)
            for row, value in zip(array, values, strict=True):
                row[: len(value)] = value
        batch[name] = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array)
    lengths = torch.tensor([len(feature["input_ids"]) for feature in features])
    batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def _map(path: Path) -> np.ndarray:
    # a plain view: each slice of a memmap is made a memmap of its own, which takes longer than reading it
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


class _Column:
    """One feature while it is written: values are appended, the array's header is corrected at the end."""

    def __init__(self, folder: Path, name: str, first: Any):
        self.path = folder / f"{name}.npy"
        self.kind = "number" if np.ndim(first) == 0 else "list"
        whole = np.asarray(first).dtype.kind in "iub"
        self.dtype = np.dtype("uint8" if name == "token_type_ids" else "int32" if whole else "float32")
        self.any = False
        self._lengths: list[np.ndarray] = []
        self._count = 0
        self._file = self.path.open("wb")
        self._header()

    def _header(self) -> None:
        # numpy leaves room in the header for a longer first axis, so that appended files can be corrected in place
        description = npy.dtype_to_descr(self.dtype)
        npy.write_array_header_1_0(self._file, {"descr": description, "fortran_order": False, "shape": (self._count,)})

    def extend(self, values: Sequence[Any]) -> None:
        if self.kind == "list":
            self._lengths.append(np.fromiter(map(len, values), dtype=np.int64, count=len(values)))
            flat = np.fromiter(chain.from_iterable(values), dtype=self.dtype, count=int(self._lengths[-1].sum()))
        else:
            flat = np.asarray(values, dtype=self.dtype)
        self.any = self.any or bool(flat.any())
        self._count += len(flat)
        flat.tofile(self._file)

    def close(self) -> None:
        self._file.seek(0)
        self._header()
        self._file.close()
        if self.kind == "list":
            lengths = np.concatenate([np.zeros(1, dtype=np.int64), *self._lengths])
            np.save(self.path.with_suffix(".offsets.npy"), np.cumsum(lengths))

    def remove(self) -> None:
        self.path.unlink()
        self.path.with_suffix(".offsets.npy").unlink(missing_ok=True)
