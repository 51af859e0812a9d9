"""A few test rows with what the models wrote for them, for a report to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

COUNT = 5
LONGEST = 400
"""Characters; the middle of a longer text is left out, since a text may be read to its end and gone on with."""


class Sample(TypedDict):
    given: dict[str, str]
    """Role → text."""
    wanted: str | None
    """None where a text is its own target."""
    outputs: dict[str, str]
    """Model (`candidate`, `champion`) → what it wrote."""


def samples(
    rows: Mapping[str, Sequence[str]], target: str, predictions: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Sample]:
    """The first rows, which are in the order of their digests: always the same of the same data.

    Args:
        rows: role → cells.
        target: the role that is foretold; among the texts where a text is its own target.
        predictions: model → of each row, with its `output`.
    """
    texts = [role for role in rows if role != target] or [target]
    count = min(COUNT, len(rows[target]))
    return [
        {
            "given": {role: shortened(rows[role][row]) for role in texts},
            "wanted": None if target in texts else shortened(rows[target][row]),
            "outputs": {model: shortened(str(told[row]["output"] or "")) for model, told in predictions.items()},
        }
        for row in range(count)
    ]


def shortened(text: str) -> str:
    """A text of at most `LONGEST` characters, without its middle if need be."""
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2 - 2
    return f"{text[:half]} … {text[-half:]}"
