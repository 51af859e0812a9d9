"""What counts as a word, in any script: the same for near-duplicates, ROUGE, BLEU and the F1 of answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.writing import parts, unspaced, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's mat, 12,5 %", "The cat s mat 12 5"),
        ("飞机晚点了！", "飞 机 晚 点 了"),
        ("iPhone手机很好", "iPhone 手 机 很 好"),
        ("人々のコーヒー・ネット", "人 々 の コ ー ヒ ー ネ ッ ト"),
        ("ｺｰﾋｰ 𠮷野家", "ｺ ｰ ﾋ ｰ 𠮷 野 家"),
        ("กรุงเทพ", "ก ร ุ ง เ ท พ"),
        ("ភាសាខ្មែរ", "ភ ា ស ា ខ ្ ម ែ រ"),
        # vowel signs and accents belong to their word
        ("हिन्दी की कि", "हिन्दी की कि"),
        ("தமிழ் மொழி", "தமிழ் மொழி"),
        ("مَرحبا، بالعالم؟", "مَرحبا بالعالم"),
        ("שָׁלוֹם־עולם", "שָׁלוֹם עולם"),
        ("Zoe\u0308 x\u0302", "Zoe\u0308 x\u0302"),
        ("한국어 문장", "한국어 문장"),
        # pictures are none, nor is what joins or colours them
        ("👩🏽\u200d🚀 🇩🇪 ❤\ufe0f ok", "ok"),
        ("snake_case", "snake case"),
        ("…!?", ""),
    ],
)
def test_words(text, expected):
    """Letters and digits, by spaces and punctuation; sign by sign where there are no spaces between words."""
    assert words(text) == expected.split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("the cat, 12,5 %", "the cat, 12,5 %"),
        ("《红楼梦》 is it.", "《 红 楼 梦 》 is it."),
        ("iPhone手机", "iPhone 手 机"),
        ("안녕하세요!  좋아요", "안녕하세요! 좋아요"),
    ],
)
def test_parts(text, expected):
    """All signs but blanks stay."""
    assert parts(text) == expected.split()
    assert unspaced(text) == any(sign in text for sign in "红机")


@given(st.text())
def test_nothing_is_lost(text):
    """The parts put together are the text without its blanks; where each script has spaces, they are those of `split`;
    words are in the text in their order."""
    assert "".join(parts(text)) == "".join(text.split())
    if not unspaced(text):
        assert parts(text) == text.split()
    start = 0
    for word in words(text):
        start = text.index(word, start) + len(word)
