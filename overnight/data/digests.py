"""Digests of many rows as arrays of 16 bytes each, which sort as their hexadecimal texts do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

KIND = "S16"
_AT_ONCE = 65_536


def packed(digests: Iterable[str]) -> np.ndarray:
    return np.frombuffer(bytes.fromhex("".join(digests)), KIND)


def hexes(ids: np.ndarray) -> Iterator[str]:
    """The texts of packed digests, one after the other."""
    for start in range(0, len(ids), _AT_ONCE):
        text = ids[start : start + _AT_ONCE].tobytes().hex()
        yield from (text[at : at + 32] for at in range(0, len(text), 32))


@dataclass(frozen=True)
class Groups:
    """Rows of equal digests."""

    order: np.ndarray
    """The rows by their digests, equal ones as they come."""
    starts: np.ndarray
    """Where in this order a group begins."""

    @classmethod
    def of(cls, ids: np.ndarray) -> Groups:
        order = ids.argsort(kind="stable")
        ordered = ids[order]
        return cls(order, np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ids)]))

    def first(self) -> np.ndarray:
        """Whether a row is the first of its group."""
        found = np.zeros(len(self.order), bool)
        found[self.order[self.starts]] = True
        return found

    def spread(self, of_group: np.ndarray) -> np.ndarray:
        """For each row what is said of its group."""
        sizes = np.diff(self.starts, append=len(self.order))
        found = np.empty(len(self.order), of_group.dtype)
        found[self.order] = np.repeat(of_group, sizes)
        return found
