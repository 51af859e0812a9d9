"""Windows judged, remembered, and the rule asked.

result = monitor(home, version, folder, settings)                       # what was scored since the last time
result = monitor(home, version, folder, settings, labelled=File(Path("labelled.csv")))
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.config.operations import Monitor
from overnight.home import Home
from overnight.monitor.judge import File, Judge
from overnight.monitor.reference import Reference
from overnight.monitor.state import Record, merged, recent, records, remember

if TYPE_CHECKING:
    from overnight.tracking.registry import Version


def monitor(
    home: Home,
    version: Version,
    folder: Path,
    settings: Monitor,
    labelled: File | None = None,
    *,
    since: float = 0.0,
    keep: bool = True,
    progress: Callable[[Record], None] = lambda record: None,
) -> dict[str, Any]:
    """Judges new windows of scored traffic, or those of a file, and asks the rule.

    Args:
        folder: the version's model folder.
        labelled: a file with texts, and labels where they are known; absent: what was logged since the last time.
        since: when the version became champion; windows from before do not count.
        keep: whether the windows are remembered, and count for the next time.
        progress: is given each window when it has been judged.

    Returns:
        what `overnight.monitor.latest` describes.

    Raises:
        UserError: for whatever is wrong with the file.
    """
    judge = Judge(home, version, folder, settings)
    history = records(home, version.name)
    found: list[Record] = []
    waiting = unjudged = 0
    if labelled is not None or isinstance(judge.reference, Reference):
        read = judge.traffic(history) if labelled is None else judge.windows_of(labelled)
        for window in read:
            if labelled is None and len(window) < settings.window:
                waiting = len(window)
                continue
            record = judge.record(window)
            if not record["findings"]:  # it neither drifted nor did it not
                unjudged += len(window)
                continue
            found.append(record)
            progress(record)
    history = remember(home, version.name, found) if keep else merged(history, found)
    looked = recent(history, version.number, settings.windows, since)
    drifted = sum(record["drifted"] for record in looked)
    result = {
        "model": version.name,
        "version": version.number,
        "night": version.tags.get("overnight.night"),
        "time": time.time(),
        "source": "traffic" if labelled is None else labelled.path.name,
        "windows": found,
        "waiting": waiting,
        "unjudged": unjudged,
        "rule": f"{settings.drifted} of the last {settings.windows} windows",
        "recent": {"drifted": drifted, "windows": len(looked)},
        "fired": drifted >= settings.drifted,
        "missing": None if isinstance(judge.reference, Reference) else judge.reference,
    }
    return result | {"text": sentence(result, looked)}


def sentence(result: Mapping[str, Any], looked: list[Record]) -> str:
    """The result in one line."""
    if not looked:
        return result["missing"] or "no whole window since the champion came or an alarm was raised"
    drifted, windows = result["recent"]["drifted"], result["recent"]["windows"]
    names = sorted({name for record in looked for name, one in record["findings"].items() if one["drifted"]})
    found = f" ({', '.join(names)})" if names else ""
    rule = f"an alarm needs {result['rule']}"
    return f"{drifted} of the last {windows} windows drifted{found}; {'ALARM' if result['fired'] else rule}"
