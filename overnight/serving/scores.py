"""Scored traffic on disk: a JSON line a text, for `overnight monitor`. Without the texts, unless asked for.

Length and text are those that the model saw, so that they can be compared with the training rows.

    .overnight/scored/<name>/2026-11-25.jsonl      # days of UTC
    {"time": 1795600000.123, "version": 3, "label": "good", "score": 0.98, "characters": 21, "tokens": 6}

A thread of its own writes, so that a slow disk delays no answer; when the disk cannot keep up, or is full, lines are
dropped and counted.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.serving.batching import Row, Scored
from overnight.serving.metrics import Metrics

if TYPE_CHECKING:
    from overnight.problems.base import Problem

log = logging.getLogger(__name__)

WAITING = 1000
"""Answers whose lines may wait to be written."""


class ScoreLog:
    """Writes into a folder, a file a day.

    Args:
        texts: whether the lines hold the texts.
    """

    def __init__(self, folder: Path, texts: bool, metrics: Metrics):
        self.folder, self.texts, self.metrics = folder, texts, metrics
        self._queue: queue.Queue[list[str] | None] = queue.Queue(WAITING)
        self._failed = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="scores")
        self._thread.start()

    def add(self, version: int, problem: Problem, rows: Sequence[Row], scored: Sequence[Scored]) -> None:
        """Lines of an answered request."""
        now = round(time.time(), 3)
        lines = [
            self._line(now, version, row, problem.gist(prediction), tokens)
            for row, (prediction, tokens) in zip(rows, scored, strict=True)
        ]
        try:
            self._queue.put_nowait(lines)
        except queue.Full:
            self.metrics.lines_dropped.inc(len(lines))

    def close(self) -> None:
        """Writes what waits, for some seconds at most."""
        try:
            self._queue.put(None, timeout=5)
        except queue.Full:
            return
        self._thread.join(5)

    def _line(self, now: float, version: int, row: Row, gist: tuple[str, float], tokens: int) -> str:
        facts = {
            "time": now,
            "version": version,
            "label": gist[0],
            "score": gist[1],
            "characters": sum(map(len, row.values())),
            "tokens": tokens,
        }
        if self.texts:
            facts["text"] = next(iter(row.values())) if len(row) == 1 else dict(row)
        return json.dumps(facts, ensure_ascii=False) + "\n"

    def _run(self) -> None:
        while (lines := self._queue.get()) is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                # one write an answer: several servers may share a home
                with open(self.folder / f"{datetime.now(UTC):%Y-%m-%d}.jsonl", "ab") as file:
                    file.write("".join(lines).encode())
                self._failed = False
            except OSError as error:
                self.metrics.lines_dropped.inc(len(lines))
                if not self._failed:
                    self._failed = True
                    log.warning("%s: scored texts cannot be written: %s", self.folder, error.strerror)
