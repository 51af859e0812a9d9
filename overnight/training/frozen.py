"""Hidden states at the freeze line, computed once for all trials of a night, not in each trial, epoch and evaluation.

    compute(problem, reference, facts, training, {"train": rows, …}, folder)     # once
    features = Features.open(folder, "train", rows)                              # in each trial

Layers that are not trained run without dropout, so they give the same for a row each time it is seen.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.lib.format import open_memmap

from overnight.training.batches import bucket
from overnight.training.layers import freeze
from overnight.training.packing import Packed

if TYPE_CHECKING:
    from overnight.problems.base import Facts, Problem
    from overnight.settings import Training
    from overnight.training.data import TokenizedRows
    from overnight.training.models import ModelReference

SHARE_OF_DISK = 0.25
"""Of what is free on the disk; with more, each trial computes them itself."""


class Features:
    """Hidden states (tokens × width, float32, memory-mapped) of the rows of one `TokenizedRows`."""

    def __init__(self, values: np.ndarray, rows: TokenizedRows):
        self._values = values
        self._ends = np.cumsum(rows.lengths)
        self._starts = self._ends - rows.lengths

    @classmethod
    def open(cls, folder: Path | None, side: str, rows: TokenizedRows) -> Features | None:
        """None when there are none, or they are of other rows."""
        path = folder / f"{side}.npy" if folder else None
        if path is None or not path.is_file():
            return None
        values = np.load(path, mmap_mode="r", allow_pickle=False)
        return cls(values, rows) if len(values) == rows.lengths.sum() else None

    def of(self, rows: np.ndarray) -> torch.Tensor:
        """Those of some rows, end to end."""
        parts = [self._values[self._starts[row] : self._ends[row]] for row in rows]
        return torch.from_numpy(np.concatenate(parts))

    def put(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Writes those of some rows, end to end."""
        done = 0
        for row in rows:
            start, end = self._starts[row], self._ends[row]
            self._values[start:end] = values[done : (done := done + end - start)]


def compute(
    problem: Problem,
    model_ref: ModelReference,
    facts: Facts,
    training: Training,
    sides: Mapping[str, TokenizedRows],
    folder: Path,
) -> dict[str, Any]:
    """Writes `<folder>/<side>.npy` for each side; the names of the sides written, and bytes.

    None are written when nothing is frozen, the model cannot be cut at the freeze line, or the disk is too full.
    """
    from accelerate import Accelerator

    from overnight.training.predict import TOKENS, inputs, prepare

    written: dict[str, Any] = {"sides": [], "bytes": 0}
    if not training.freeze_layers or problem.draws_inputs:
        return written
    model = problem.load_model(model_ref.base, facts, training, model_ref.revision)
    freeze(model, training.freeze_layers, training.freeze_embeddings)
    packed = Packed(model, training.freeze_layers)
    if not packed.takes_features:
        return written
    folder.mkdir(parents=True, exist_ok=True)
    tokens = {side: int(rows.lengths.sum()) for side, rows in sides.items()}
    width = model.config.hidden_size
    size = 4 * width * sum(tokens.values())
    if size > SHARE_OF_DISK * shutil.disk_usage(folder).free:
        return written
    model.to(Accelerator().device)
    packed.train(False)
    for side, rows in sides.items():
        path = folder / f"{side}.npy"
        temporary = path.with_suffix(".new")
        values = open_memmap(temporary, mode="w+", dtype=np.float32, shape=(tokens[side], width))
        try:
            _reserve(temporary)
        except OSError:  # the disk filled up meanwhile
            temporary.unlink()
            return written
        found = Features(values, rows)
        with torch.inference_mode():
            for batch in bucket(rows.lengths, TOKENS.get(model.device.type, TOKENS["other"])):
                tensors, packing = prepare(problem, model, rows, batch, None)
                found.put(batch, packed.features(inputs(problem, tensors), packing).cpu().numpy())
        values.flush()
        os.replace(temporary, path)
        written["sides"].append(side)
        written["bytes"] += 4 * width * tokens[side]
    return written


def _reserve(path: Path) -> None:
    """Takes the disk space of a file that was made with holes: to fill one on a full disk kills the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
