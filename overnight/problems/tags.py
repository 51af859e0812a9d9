"""Tags of tokens and the spans they stand for, in every common scheme.

BIO (also called IOB2), its older form IOB1, BIOES, BILOU and IO are read by one rule, that of the CoNLL evaluation
script (Tjong Kim Sang & Buchholz 2000), which seqeval follows: a chunk begins at B, S or U, at another type, or after
O; it ends before O, B, S, U, another type, or after E, L, S, U.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

OUTSIDE = "O"
_SAME = {"L": "E", "U": "S"}


def split_tag(tag: str) -> tuple[str, str]:
    """`B-PER` → (B, PER); a tag without a prefix is the type itself, and inside; one without a type is of type `_`."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    if len(tag) == 1 and tag in "BIESLU":
        return _SAME.get(tag, tag), "_"
    if tag[1:2] in ("-", "_") and tag[0] in "BIESLU" and len(tag) > 2:
        return _SAME.get(tag[0], tag[0]), tag[2:]
    return "I", tag


def chunks(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(first token, token after the last, type) of each chunk, in order."""
    start, before, kind = -1, OUTSIDE, ""
    for place, tag in enumerate([*tags, OUTSIDE]):
        prefix, own = split_tag(tag)
        ends = start >= 0 and (prefix in ("O", "B", "S") or before in ("E", "S") or own != kind)
        if ends:
            yield start, place, kind
            start = -1
        if prefix != OUTSIDE and start < 0:
            start, kind = place, own
        before = prefix


def bio(words: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, str]]) -> list[str]:
    """The BIO tag of each word (start, end), given spans (start, end, type) that do not overlap, both in order."""
    tags = [OUTSIDE] * len(words)
    place = 0
    for start, end, kind in spans:
        while place < len(words) and words[place][1] <= start:
            place += 1
        first = True
        while place < len(words) and words[place][0] < end:
            tags[place] = f"{'B' if first else 'I'}-{kind}"
            first = False
            place += 1
    return tags
