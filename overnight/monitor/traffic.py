"""Scored texts in windows of consecutive rows: from the lines that `overnight serve` and `score` write, or from a file.

.overnight/scored/<name>/2026-11-25.jsonl      # days of UTC, lines are only added
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from overnight.data.normalise import normalise, repair

_DAY = re.compile(r"\d{4}-\d{2}-\d{2}\.jsonl")

Cursor = tuple[str, int]
"""File name and byte up to which the lines have been read."""


@dataclass
class Window:
    """Consecutive scored rows; all lists are of one length, or empty where nothing is known."""

    source: str
    """`traffic`, or the name of the file."""
    key: str = ""
    """The same for the same rows."""
    labels: list[str] = field(default_factory=list)
    """Predicted."""
    scores: list[float] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)
    texts: list[dict[str, str]] = field(default_factory=list)
    """Role → text of each row, when all are known."""
    targets: list[Any] = field(default_factory=list)
    """The truth, as the problem compares it; None where it is not known."""
    answers: list[dict[str, Any]] = field(default_factory=list)
    """Predictions, as the model gave them, where there are true labels."""
    since: float | None = None
    until: float | None = None
    """Unix seconds of the first and the last row."""
    cursor: Cursor | None = None
    """Where traffic goes on after the last row."""

    def __len__(self) -> int:
        return len(self.labels)


def traffic(folder: Path, version: int, size: int, roles: Sequence[str], after: Cursor | None) -> Iterator[Window]:
    """Windows of `size` rows that a version scored, in the order of the lines; the last one may be smaller.

    Args:
        after: lines up to here are left out.
    """
    window = Window("traffic")
    texts: list[dict[str, str] | None] = []
    for line, cursor in _lines(folder, after):
        if line.get("version") != version:
            continue
        try:
            label, score, characters, at = (
                str(line["label"]),
                float(line["score"]),
                int(line["characters"]),
                line["time"],
            )
        except (KeyError, TypeError, ValueError):
            continue
        window.labels.append(label)
        window.scores.append(score)
        window.characters.append(characters)
        texts.append(_texts(line.get("text"), roles))
        window.since, window.until = window.since or at, at
        window.cursor = cursor
        if len(window) == size:
            window.key = " ".join(map(str, cursor))
            known = [text for text in texts if text]
            window.texts = known if len(known) == size else []
            yield window
            window, texts = Window("traffic"), []
    yield window


def end(folder: Path) -> Cursor | None:
    """Where the newest line ends; None before the first."""
    days = _days(folder)
    return (days[-1].name, days[-1].stat().st_size) if days else None


def _days(folder: Path) -> list[Path]:
    """The files of scored traffic, oldest first; what else lies there is none of ours."""
    return sorted(path for path in folder.glob("*.jsonl") if _DAY.fullmatch(path.name))


def _texts(text: Any, roles: Sequence[str]) -> dict[str, str] | None:
    """Role → text, as the model sees it; None when a line lacks one."""
    row = {roles[0]: text} if isinstance(text, str) and len(roles) == 1 else text
    if not isinstance(row, dict) or not all(isinstance(row.get(role), str) for role in roles):
        return None
    return {role: normalise(repair(row[role])) or "" for role in roles}


def _lines(folder: Path, after: Cursor | None) -> Iterator[tuple[dict[str, Any], Cursor]]:
    """Whole lines and where each ends; a line that is still being written, or is none of ours, is left out."""
    for path in _days(folder):
        if after and path.name < after[0]:
            continue
        with open(path, "rb") as file:
            if after and path.name == after[0]:
                file.seek(after[1])
            place = file.tell()
            for line in file:
                place += len(line)
                if not line.endswith(b"\n"):
                    break
                try:
                    facts = json.loads(line)
                except ValueError:
                    continue
                if isinstance(facts, dict):
                    yield facts, (path.name, place)
