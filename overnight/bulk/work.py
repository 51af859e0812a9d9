"""The work itself: chunks scored, written, counted, remembered."""

from __future__ import annotations

import copy
import json
import queue
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.bulk.inputs import Chunk, Input
from overnight.bulk.outputs import open_part
from overnight.errors import Complaint, NightFailed
from overnight.home import Home, write_json
from overnight.processes import cores

if TYPE_CHECKING:
    import pyarrow as pa

    from overnight.problems.base import Prediction, Problem
    from overnight.tracking.registry import Version
    from overnight.training.predict import Scorer

CHUNKS = {"cpu": (512, 65_536), "other": (2048, 8_000_000)}
"""Rows and characters at most that are scored at once: on a CPU some seconds of one core."""
PART_SECONDS, PART_BYTES = 20.0, 2**26
"""A part is closed after either: what a kill costs, and what is held while the parts are put together."""
MANIFEST = "manifest.json"
BEHIND = ("model", "version", "error")
"""What is added to each row behind the columns of the problem."""
SHOWN = 5
"""Errors that are told one by one."""

Progress = Callable[[int, int, int], None]
"""Is told the rows done, all rows, and the errors among those done."""


class Work:
    """The rows that are left, scored part by part; a part counts from the moment that the manifest names it."""

    def __init__(
        self,
        found: Input,
        parts: Path,
        suffix: str,
        manifest: dict[str, Any],
        added: pa.Schema,
        version: Version,
        cells: Callable[[Prediction], list[Any]],
    ):
        self.found, self.parts, self.suffix = found, parts, suffix
        self.manifest, self.added, self.version, self.cells = manifest, added, version, cells
        self.done, self.errors = (sum(part[what] for part in manifest["parts"]) for what in ("rows", "errors"))

    def run(self, scorer: Scorer, lines: ScoreLines | None, progress: Progress) -> None:
        part, begun, before = None, 0.0, (0, 0)
        progress(self.done, self.found.rows, self.errors)
        with closing(_answers(scorer, self.found, self.done)) as answers:
            for chunk, predictions, tokens in answers:
                if part is None:
                    path = self.parts / f"{len(self.manifest['parts']):05}{self.suffix}"
                    part = open_part(path, self.found.schema, self.added)
                    begun, before = time.monotonic(), (self.done, self.errors)
                part.write(chunk, self._columns(chunk, predictions, scorer.problem))
                self._count(chunk)
                if lines is not None:
                    lines.add(scorer.problem, [text for text in chunk.texts if text], predictions, tokens)
                full = time.monotonic() - begun > PART_SECONDS or path.stat().st_size > PART_BYTES
                if full or self.done == self.found.rows:
                    part.close()
                    rows, errors = self.done - before[0], self.errors - before[1]
                    self.manifest["parts"].append({"file": path.name, "rows": rows, "errors": errors})
                    write_json(self.parts / MANIFEST, self.manifest)
                    part = None
                    if lines is not None:
                        lines.flush()
                progress(self.done, self.found.rows, self.errors)
        if self.done != self.found.rows:
            raise NightFailed(Complaint(str(self.found.path), "changed while it was read"))

    def _columns(self, chunk: Chunk, predictions: list[Prediction], problem: Problem) -> dict[str, list[Any]]:
        """The added columns of a chunk; marks rows whose scores are no numbers."""
        left = iter(predictions)
        answers = [next(left) if text else None for text in chunk.texts]
        for place, answer in enumerate(answers):
            broken = problem.broken(answer) if answer else None
            if broken:
                answers[place], chunk.errors[place] = None, broken
        rows = [self._row(answer, error) for answer, error in zip(answers, chunk.errors, strict=True)]
        return {name: list(cells) for name, cells in zip(self.added.names, zip(*rows, strict=True), strict=True)}

    def _row(self, answer: Prediction | None, error: str) -> list[Any]:
        own = len(self.added) - len(BEHIND)
        given = self.cells(answer) if answer else [None] * own
        return [*given, self.version.name, self.version.number, error]

    def _count(self, chunk: Chunk) -> None:
        told = self.manifest["first_errors"]
        for number, error in enumerate(chunk.errors, start=self.done + 1):
            if error:
                self.errors += 1
                if len(told) < SHOWN:
                    told.append(f"row {number:,}: {error}")
        self.done += len(chunk)


def _answers(scorer: Scorer, found: Input, skip: int) -> Generator[tuple[Chunk, list[Prediction], list[int]]]:
    """Chunks in their order, with the predictions and token counts of those rows that have a text.

    On a CPU each core scores a chunk of its own, which wastes less than all cores on one. Every chunk is computed by
    one thread alone, so that the numbers do not depend on how many there are.
    """
    import torch

    on_cpu = scorer.model.model.device.type == "cpu"
    threads = len(cores()) if on_cpu else 1
    twins: queue.SimpleQueue[Scorer] = queue.SimpleQueue()
    for _ in range(threads):
        twin = copy.copy(scorer)
        twin.tokenizer = copy.deepcopy(scorer.tokenizer)  # a fast tokenizer serves one thread
        twins.put(twin)

    def score(chunk: Chunk) -> tuple[list[Prediction], list[int]]:
        twin = twins.get()
        try:
            return twin.predict([text for text in chunk.texts if text])
        finally:
            twins.put(twin)

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1 if on_cpu else before,))
    waiting: deque[tuple[Chunk, Future[tuple[list[Prediction], list[int]]]]] = deque()
    try:
        for chunk in found.chunks(skip, *CHUNKS["cpu" if on_cpu else "other"]):
            waiting.append((chunk, pool.submit(score, chunk)))
            if len(waiting) > threads:
                first, future = waiting.popleft()
                yield first, *future.result()
        for first, future in waiting:
            yield first, *future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        torch.set_num_threads(before)


class ScoreLines:
    """Lines about scored texts for the monitor: `<folder>/<day in UTC>.jsonl`, as `overnight serve` writes them."""

    def __init__(self, home: Home, version: Version, texts: bool):
        self.folder, self.version, self.texts = home.folder("scored", version.name), version.number, texts
        self._waiting: list[str] = []

    def add(
        self, problem: Problem, rows: list[dict[str, str]], predictions: list[Prediction], tokens: list[int]
    ) -> None:
        now = round(time.time(), 3)
        for row, answer, count in zip(rows, predictions, tokens, strict=True):
            label, score = problem.gist(answer)
            line = {
                "time": now,
                "version": self.version,
                "label": label,
                "score": score,
                "characters": sum(map(len, row.values())),
                "tokens": count,
            }
            if self.texts:
                line["text"] = next(iter(row.values())) if len(row) == 1 else row
            self._waiting.append(json.dumps(line, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Writes what was added."""
        with open(self.folder / f"{datetime.now(UTC):%Y-%m-%d}.jsonl", "ab") as file:
            file.write("".join(self._waiting).encode())
        self._waiting.clear()
