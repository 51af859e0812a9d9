"""Words in any script. Chinese, Japanese, Thai and some others put no spaces between them: there each sign is one."""

from __future__ import annotations

import regex

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\u30fc\uff70\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
"""The scripts without spaces between words, as part of a set of characters of `regex`."""
WORD = rf"[[\p{{L}}\p{{N}}]--[{UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]*"
"""A word of another script: letters and digits, with the vowel signs and accents that follow them."""

_SIGN = regex.compile(f"[{UNSPACED}]")
_WORDS = regex.compile(rf"[{UNSPACED}]|{WORD}", regex.V1)
_PARTS = regex.compile(rf"[{UNSPACED}]|[^{UNSPACED}]+")


def unspaced(text: str) -> bool:
    """Whether some of a text is in a script without spaces between words."""
    return not text.isascii() and _SIGN.search(text) is not None


def words(text: str) -> list[str]:
    """The words of a text, without punctuation and symbols."""
    found: list[str] = _WORDS.findall(text)
    return found


def parts(text: str) -> list[str]:
    """What stands between the blanks of a text, punctuation and all; where it has no spaces, each sign."""
    between = text.split()
    return [part for one in between for part in _PARTS.findall(one)] if unspaced(text) else between
