"""What a model's monitor remembers: a line a judged window, a line an alarm, and its last result.

.overnight/monitor/<name>/windows.jsonl
.overnight/monitor/<name>/latest.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overnight.home import Home, read_json, write_json, write_text

Record = dict[str, Any]

KEPT = 1000
"""Windows and alarms that are remembered, the newest; half of them at most from one look."""


def folder_of(home: Home, name: str) -> Path:
    return home.root / "monitor" / name


def records(home: Home, name: str) -> list[Record]:
    """Windows and alarms, oldest first."""
    path = folder_of(home, name) / "windows.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def merged(history: Sequence[Record], found: Sequence[Record]) -> list[Record]:
    """With new records; a window that was judged before is not counted twice: the new judgement takes its place.

    Its place too, so that an alarm that was raised about it is not raised again.
    """
    by_key = {record["key"]: record for record in history} | {record["key"]: record for record in found}
    return list(by_key.values())


def remember(home: Home, name: str, found: Sequence[Record]) -> list[Record]:
    """Adds windows or alarms to those that are kept; returns them all."""
    # read anew: judging takes minutes, and others judge too; of a large file what will be known again when it is judged
    # once more
    history = _cut(merged(records(home, name), found[-(KEPT // 2) :]))
    home.folder("monitor", name)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in history]
    write_text(folder_of(home, name) / "windows.jsonl", "".join(lines))
    return history


def _cut(history: Sequence[Record]) -> list[Record]:
    """The newest; of each version also what says where its traffic goes on, and its last alarm."""
    last: dict[tuple[int, str], int] = {}
    for place, record in enumerate(history):
        last |= {(record["version"], what): place for what in ("cursor", "alarm") if record.get(what)}
    kept = set(last.values())
    return [record for place, record in enumerate(history) if place >= len(history) - KEPT or place in kept]


def alarmed(home: Home, name: str, version: int, now: float) -> None:
    """Notes that an alarm was raised: the windows up to now are not counted for another one."""
    remember(home, name, [{"key": f"alarm {now}", "version": version, "alarm": now}])


def recent(history: Sequence[Record], version: int, windows: int, since: float = 0.0) -> list[Record]:
    """The last windows of a version that no alarm has been raised about yet, at most so many, oldest first.

    Args:
        since: when it became champion. What it scored before, as an earlier champion or a candidate, is not counted.
    """
    found: list[Record] = []
    for record in history:
        if record["version"] != version:
            continue
        if "alarm" in record:
            found = []
        elif (record.get("until") or record.get("judged") or since) >= since:
            found.append(record)
    return found[-windows:]


def save(home: Home, result: Mapping[str, Any]) -> None:
    """Keeps the last result of a model's monitor."""
    write_json(folder_of(home, result["model"]) / "latest.json", result)


def latest(home: Home, name: str) -> dict[str, Any] | None:
    """The last result of a model's monitor, as `overnight monitor --json` printed it; None before the first.

    Keys: `model`, `version`, `time` (Unix seconds), `source`, `windows` (those judged in that run), `waiting` and
    `unjudged` (rows whose window is not full, and rows of which nothing could be told), `recent` (drifted ones among
    those that the rule looked at, as `{"drifted": 2, "windows": 5}`), `rule`, `fired`, `told`, `text` (one sentence),
    and `missing` where there was nothing to compare with.
    """
    found: dict[str, Any] | None = read_json(folder_of(home, name) / "latest.json")
    return found
