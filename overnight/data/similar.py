"""Texts that are nearly equal to one of a more protected side: all of them are found, and nothing else.

A text's *shingles* are its words and its pairs of neighbouring words. Pairs make the order count; the single words keep
short texts comparable. How alike two texts are is their Jaccard similarity: shared shingles over all shingles. In a
text of 20 words, one changed word leaves a similarity of 0.86, in one of 10 words 0.73, in one of 5 words 0.5: short
texts must be nearly equal.

Of n shingles, the rarest first, two texts of a similarity of t share one of the first n - ⌈t·n⌉ + 1 (prefix filter:
Chaudhuri, Ganti and Kaushik 2006, A Primitive Operator for Similarity Joins), and not too late among them (positional
filter: Xiao, Wang, Lin and Yu 2008, Efficient Similarity Joins for Near Duplicate Detection). Only texts that do are
compared. Shingles are numbers, in a file; what is held are the first shingles of the protected texts.

Tried and dropped: MinHash, which misses a pair now and then, takes 160 numbers a text, and compares each text with a
share of all others, however unlike they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from overnight.errors import Complaint, NightFailed

NUMBERS = 2**20
"""Shingles, or pairs of texts, that are looked at together."""
ROWS = 2**14
"""Texts that are looked at together, at most."""
ENOUGH = 100
"""Texts with one shingle that are looked at in any case."""
_BITS = np.uint64(50)
"""Of a shingle's number; the 14 above it hold a text's place among `ROWS`, or how often the shingle occurs."""
_MOST = 2**14 - 1
_NUMBER = np.uint64(2**50 - 1)
_ROUNDING = 1e-9


class Shingles:
    """The shingles of many texts, in a file that has no name and goes with the process at the latest.

    Args:
        folder: where it is; none: where the system has such files.

    Raises:
        NightFailed: when the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._file: Any = tempfile.TemporaryFile(dir=folder)
        self._sizes: list[np.ndarray] = [np.zeros(0, np.int64)]

    def add(self, texts: Sequence[str]) -> None:
        for start in range(0, len(texts), 256):  # long texts have many words
            numbers, sizes = shingles(texts[start : start + 256])
            self._sizes.append(sizes)
            try:
                self._file.write(numbers.tobytes())
            except OSError as error:
                why = error.strerror or str(error)
                raise NightFailed(Complaint(str(self._folder), "cannot be written", why)) from None

    def sizes(self) -> np.ndarray:
        self._sizes = [np.concatenate(self._sizes)]
        return self._sizes[0]

    def read(self, wanted: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Some texts' places, shingles (ascending, text after text) and sizes, for a number of texts at a time."""
        sizes = self.sizes()
        self._file.seek(0)
        for part in _parts(sizes + NUMBERS // ROWS, NUMBERS):
            own = sizes[part]
            numbers = np.frombuffer(self._file.read(8 * int(own.sum())), np.uint64)
            kept = wanted[part]
            yield np.flatnonzero(kept) + part.start, numbers[np.repeat(kept, own)], own[kept]

    def mapped(self) -> np.ndarray:
        """The shingles of all texts."""
        self._file.flush()
        return np.memmap(self._file, np.uint64, "r") if self.sizes().any() else np.zeros(0, np.uint64)


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the shingles of at most `ROWS` canonical texts, ascending, text after text, and how many each has.

    A word's number is its hash in this process; which texts are alike does not depend on it.
    """
    words: list[str] = []
    counts = []
    for text in texts:
        own = text.split()
        words += own
        counts.append(len(own))
    single = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    place = np.repeat(np.arange(len(texts), dtype=np.uint64) << _BITS, counts)
    beside = place[1:] == place[:-1]
    double = single[:-1] * np.uint64(0x9E3779B97F4A7C15) + single[1:]
    double = (double ^ (double >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    keys = [place | single >> np.uint64(14), (place[1:] | double >> np.uint64(14))[beside]]
    found = np.unique(np.concatenate(keys))
    return found & _NUMBER, np.bincount((found >> _BITS).astype(np.int64), minlength=len(texts))


class Protected:
    """Texts to which others must not be nearly equal.

    Args:
        texts: their shingles.
        wanted: which of them count; the others are copies.
        sides: of each, a number that is the greater, the more protected it is.
        threshold: the similarity from which two texts are nearly equal.
    """

    def __init__(self, texts: Shingles, wanted: np.ndarray, sides: np.ndarray, threshold: float):
        self._sides, self._threshold = sides, threshold
        self._sizes = texts.sizes()
        self._starts = np.cumsum(self._sizes) - self._sizes
        # how often shingles occur, those with the same last bits together: about so rare is enough
        self._counts = np.zeros(1 << min(26, max(12, int(self._sizes.sum()).bit_length() + 1)), np.uint16)
        for _, numbers, _ in texts.read(wanted):
            slots, more = np.unique(self._slots(numbers), return_counts=True)
            self._counts[slots] = np.minimum(self._counts[slots] + more, _MOST)
        first = [(np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int32))]
        for places, numbers, sizes in texts.read(wanted):
            text, number, at = self._first(numbers, sizes)
            first.append((number, places[text].astype(np.int32), at.astype(np.int32)))
        self._number, self._text, self._at = map(np.concatenate, zip(*first, strict=True))
        del first
        order = np.argsort(self._number)
        self._number, self._text, self._at = self._number[order], self._text[order], self._at[order]
        self._all = texts.mapped()

    def _slots(self, numbers: np.ndarray) -> np.ndarray:
        return numbers & np.uint64(len(self._counts) - 1)

    def _first(self, numbers: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Text, number and place of those shingles of which one is shared with every text that is nearly equal."""
        order = np.argsort(self._counts[self._slots(numbers)].astype(np.uint64) << _BITS | numbers)
        text = np.repeat(np.arange(len(sizes), dtype=np.uint16), sizes)
        order = order[np.argsort(text[order], kind="stable")]
        at = np.arange(len(numbers)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        enough = sizes - np.ceil(self._threshold * sizes - _ROUNDING).astype(np.int64) + 1
        kept = at < np.repeat(enough, sizes)
        return text[kept].astype(np.int64), numbers[order][kept], at[kept]

    def near(self, texts: Shingles, wanted: np.ndarray, sides: np.ndarray) -> tuple[np.ndarray, int]:
        """Which texts are nearly equal to one of a more protected side, and the number of such pairs.

        Of a shingle that very many protected texts have, `ENOUGH` of them are looked at first, and the others only for
        texts of which nothing was found: where a template fills a corpus, pairs are then not counted to the last.

        Args:
            wanted: which of them are looked at.
            sides: of each.
        """
        found = np.zeros(len(wanted), bool)
        pairs = 0
        for places, numbers, sizes in texts.read(wanted):
            text, at, low, many = self._shared(numbers, sizes)
            some = np.minimum(many, ENOUGH)
            near = self._count(numbers, sizes, sides[places], text, at, low, some)
            rest = np.isin(text, text[(many > ENOUGH) & (near[text] == 0)])
            near += self._count(numbers, sizes, sides[places], text[rest], at[rest], low[rest], many[rest])
            found[places] = near > 0
            pairs += int(near.sum())
        return found, pairs

    def _shared(self, numbers: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
        """Text and place of the first shingles that are among those of protected texts, and where they are there: from
        which entry on, and how many."""
        text, number, at = self._first(numbers, sizes)
        known = np.flatnonzero(self._counts[self._slots(number)])
        known = known[np.argsort(number[known])]  # neighbours are looked up one after the other
        low = np.searchsorted(self._number, number[known])
        many = np.searchsorted(self._number, number[known], side="right") - low
        back = np.flatnonzero(many)
        back = back[np.argsort(known[back])]  # text after text again
        return text[known[back]], at[known[back]], low[back], many[back]

    def _count(
        self,
        numbers: np.ndarray,
        sizes: np.ndarray,
        sides: np.ndarray,
        text: np.ndarray,
        at: np.ndarray,
        low: np.ndarray,
        many: np.ndarray,
    ) -> np.ndarray:
        """How many more protected texts each text is nearly equal to, of those behind these shared shingles."""
        near = np.zeros(len(sizes), np.int64)
        for part in _parts(np.bincount(text, many, len(sizes)).astype(np.int64), NUMBERS):
            own = slice(*np.searchsorted(text, (part.start, part.stop)))
            one = np.repeat(text[own], many[own])
            entry = _ranges(low[own], many[own])
            other = self._text[entry]
            size, length = sizes[one], self._sizes[other]
            needed = np.ceil((size + length) * (self._threshold / (1 + self._threshold)) - _ROUNDING)
            left = np.minimum(size - np.repeat(at[own], many[own]), length - self._at[entry])
            kept = (left >= needed) & (self._sides[other] > sides[one])
            both = np.unique(one[kept] << 32 | other[kept])
            one, other = both >> 32, both & (2**32 - 1)
            near += np.bincount(one[self._alike(numbers, sizes, one, other)], minlength=len(sizes))
        return near

    def _alike(self, numbers: np.ndarray, sizes: np.ndarray, text: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Which of these pairs are nearly equal."""
        place = np.arange(len(sizes), dtype=np.uint64) << _BITS
        have = np.repeat(place, sizes) | numbers
        lengths = self._sizes[other]
        found = []
        for part in _parts(lengths, NUMBERS):
            size, length = sizes[text[part]], lengths[part]
            asked = np.repeat(place[text[part]], length) | self._all[_ranges(self._starts[other[part]], length)]
            at = np.minimum(np.searchsorted(have, asked), len(have) - 1)
            shared = np.add.reduceat(have[at] == asked, np.cumsum(length) - length, dtype=np.int64)
            found.append(shared / (size + length - shared) >= self._threshold)
        return np.concatenate(found) if found else np.zeros(0, bool)


def _parts(sizes: np.ndarray, at_most: int) -> Iterator[slice]:
    """Slices whose sizes add up to no more than that, unless one alone has more."""
    ends = np.cumsum(sizes)
    start = done = 0
    while start < len(sizes):
        stop = max(start + 1, int(np.searchsorted(ends, done + at_most, side="right")))
        yield slice(start, stop)
        start, done = stop, int(ends[stop - 1])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The numbers from each start on, one range behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)
