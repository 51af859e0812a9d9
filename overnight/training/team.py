"""Several devices that train one model: a process each, with the same weights, each with its share of a step's rows.

Gradients are added up once a step, so that a step is the one that a single device would have made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, distributed


class Team:
    """The processes that train this model; a process alone is a team of one, for which nothing costs anything."""

    def __init__(self, accelerator: Accelerator):
        self.rank, self.size = accelerator.process_index, accelerator.num_processes
        # what is agreed upon travels beside the device, which else would have to be waited for
        self._beside: Any = distributed.new_group(backend="gloo") if self.size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This process's part of some rows."""
        return np.array_split(rows, self.size)[self.rank]

    def agree(self, values: Sequence[int]) -> list[int]:
        """The leader's values, for all."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values)
        distributed.broadcast(tensor, 0, group=self._beside)
        return [int(value) for value in tensor]

    def total(self, number: int) -> int:
        """The sum of all processes' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        distributed.all_reduce(tensor, group=self._beside)
        return int(tensor)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor, on the device, by the sum of all processes'."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)

    def gather(self, found: Any) -> list[Any]:
        """What each process has found (small Python objects and arrays), in their order."""
        if self.size == 1:
            return [found]
        every: list[Any] = [None] * self.size
        distributed.all_gather_object(every, found, group=self._beside)
        return every
