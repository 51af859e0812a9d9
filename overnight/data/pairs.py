"""Pairs of sentences made from documents: does the second follow the first?"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from unicodedata import east_asian_width

from overnight.data.normalise import digest
from overnight.problems.texts import NEXT, OTHER

SHORTEST = 20
"""Letters; what is shorter is a heading, a number, half a quotation."""
WIDE = 3
"""Letters that a sign of Chinese, Japanese or Korean stands for."""

_END = re.compile(r"(?<=[.!?…؟۔।॥։።])[\"')\]”’»]*\s+(?=[\"'(\[“‘„«]?[^\W\d_a-z])|(?<=[。！？])\s*|\s*\n\s*")


def sentences(text: str) -> list[str]:
    """The sentences of a text, by their punctuation and the lines they stand in; short ones are left out."""
    return [part for part in _END.split(text) if part and _letters(part) >= SHORTEST]


def _letters(text: str) -> int:
    return len(text) if text.isascii() else sum(WIDE if east_asian_width(sign) in "WF" else 1 for sign in text)


def next_sentence_pairs(texts: Sequence[str | None]) -> list[tuple[int, str, str, str]]:
    """(document, sentence, second sentence, label) for each sentence but the last of its document, twice.

    Once with the sentence behind it (`next`), once with one of another document (`other`), which depends on the
    sentence alone, so that every night makes the same pairs of the same documents.
    """
    documents = [sentences(text) if text else [] for text in texts]
    # in an order of their own, so that the order of the source decides nothing
    usable = sorted((number for number, found in enumerate(documents) if found), key=lambda number: documents[number])
    pairs: list[tuple[int, str, str, str]] = []
    for number in usable:
        own = documents[number]
        for first, second in zip(own, own[1:], strict=False):
            pairs.append((number, first, second, NEXT))
            if len(usable) > 1:
                draw = random.Random(digest(first))
                elsewhere = usable[draw.randrange(len(usable) - 1)]
                other = documents[usable[-1] if elsewhere == number else elsewhere]
                pairs.append((number, first, draw.choice(other), OTHER))
    return pairs
