"""What a text is before anything looks at it, and what of it decides that two texts are the same.

`repair` and `normalise` change the text that models see, as little as possible. `canonical` is never shown to a model:
retweets and copies that differ in case, links, mentions or punctuation have one canonical text, and with it one
`text_id`, so that they always land on the same side of the split.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import regex

from overnight.writing import UNSPACED, WORD

if TYPE_CHECKING:
    from ftfy import TextFixerConfig

URL, MENTION = "xurl", "xuser"

# where words are not parted by spaces, what follows a link or a name is not taken for a part of it
_URL = regex.compile(rf"(?:https?://|www\.)[^\s{UNSPACED}]+")
_NAME = rf"@(?:[\w--[{UNSPACED}]]+|\w+(?=[\s:]))"
_MENTION = regex.compile(rf"(?<![[\w--[{UNSPACED}]]@]){_NAME}", regex.V1)
# "RT @someone: ", "MT ", also repeated: what a retweet puts in front of the text it repeats
_RETWEET = regex.compile(rf"^(?:\W*\b(?:rt|mt)\b[\s:]*(?:{_NAME})?[\s:]*)+", regex.V1)
# pictographs carry meaning and stay
_TOKEN = regex.compile(rf"[{UNSPACED}\u2600-\u27bf\U0001f000-\U0001faff]|{WORD}", regex.V1)
_SURROGATE = re.compile("[\ud800-\udfff]")
_WHOLE_FLOAT = re.compile(r"-?\d+(?:\.0*)?")


@lru_cache(1)
def _fixer() -> TextFixerConfig:
    """ftfy's repair of encodings alone: no entity, quote, ligature or width is touched, and no NFKC."""
    from ftfy import TextFixerConfig

    return TextFixerConfig(
        unescape_html=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        normalization=None,
        explain=False,
    )


def repair(text: str) -> str:
    """The text with mojibake undone where that is certain; plain ASCII is returned as it is."""
    if text.isascii():
        return text
    from ftfy import fix_text

    return fix_text(text, _fixer())


def normalise(text: str) -> str | None:
    """NFC, without surrounding blanks, runs of white space as one space; None when nothing is left. Case stays."""
    text = " ".join(text.split())
    if not text:
        return None
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", whole_signs(text))


def whole_signs(text: str) -> str:
    """Of the same length, without half surrogate pairs (from an escape in JSON): they are no signs, and no UTF-8."""
    return _SURROGATE.sub("\ufffd", text)


def canonical(text: str | None) -> str:
    """The words by which a text is recognised, space-separated; "" for a text that is absent.

    Lower case, NFKC, entities resolved, links and mentions as placeholders, leading retweet marks and all punctuation
    dropped. A text of nothing but punctuation is its own canonical text.
    """
    if text is None:
        return ""
    if "&" in text:
        text = html.unescape(text)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = text.lower().strip()
    words = _URL.sub(f" {URL} ", text)
    if "rt" in words or "mt" in words:
        words = _RETWEET.sub("", words) or words
    words = _MENTION.sub(f" {MENTION} ", words)
    return " ".join(_TOKEN.findall(words)) or " ".join(text.split())


def canonical_row(texts: Sequence[str | None]) -> str:
    """The canonical texts of a row's text roles, one a line (a canonical text has no line breaks)."""
    return canonical(texts[0]) if len(texts) == 1 else "\n".join(map(canonical, texts))


def digest(text: str) -> str:
    """blake2b-128 in hex."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def row_digest(values: Iterable[str | None]) -> str:
    """The `row_id` of a row's role values; no two different rows give the same bytes."""
    parts = ["-" if value is None else f"{len(value)}:{value}" for value in values]
    return digest("\n".join(parts))


def uniform(identifier: str, purpose: bytes) -> float:
    """A number in [0, 1) that depends on the identifier alone; independent for each purpose (at most 16 bytes)."""
    hashed = hashlib.blake2b(identifier.encode(), digest_size=8, person=purpose).digest()
    return (int.from_bytes(hashed, "big") >> 11) / 2**53


def whole_numbers(labels: Iterable[str | None]) -> bool:
    """Whether all labels are whole numbers, with or without a fraction of zeros."""
    return all(label is None or _WHOLE_FLOAT.fullmatch(label) for label in labels)


def without_fraction(label: str | None) -> str | None:
    """Labels `1.0` and `2.` as `1` and `2`, where `whole_numbers`: a file that once had an empty cell."""
    return label if label is None else label.partition(".")[0]


def labels_as_text(labels: Sequence[str | None]) -> list[str | None]:
    """All the labels there are, without fractions where they are whole numbers."""
    return [*map(without_fraction, labels)] if whole_numbers(labels) else list(labels)
