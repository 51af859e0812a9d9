"""Requests that wait are scored together, in one worker thread, so that the event loop stays free.

    batcher = Batcher(max_texts=64, max_waiting=2000, observe=histogram.observe)
    task = asyncio.create_task(batcher.run())
    scored = await batcher.submit(model, rows)

The next batch is what arrived while the last one was computed: under load batches grow, and alone a request never
waits. Clients that get their answers together ask again together, a little apart. Without `LINGER` the first of them
would begin a batch alone, and from then on two halves of the clients would take turns, in batches of half the size.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

log = logging.getLogger(__name__)

LINGER = 0.003
"""Seconds at most that a batch waits for as many requests as there were when the last one was taken."""
SPARE = 64
"""Pieces of spare work that may wait; more are dropped."""

Row = Mapping[str, str]
Scored = tuple[dict[str, Any], int]
"""A prediction, and the tokens that the model saw of its row."""


class Model(Protocol):
    def score(self, rows: Sequence[Row]) -> list[Scored]: ...


class Full(Exception):
    """Too many texts wait already; `seconds` until they will have been scored."""

    def __init__(self, seconds: float):
        super().__init__(f"full for {seconds:.1f} s")
        self.seconds = seconds


@dataclass(eq=False)
class _Job:
    model: Model
    rows: Sequence[Row]
    future: asyncio.Future[list[Scored]]
    taken: int = 0
    scored: list[Scored] = field(default_factory=list)


class Batcher:
    """One queue, one worker.

    Args:
        max_texts: texts the model is given at once. A request with more is scored in parts, and others get their turn
            in between.
        max_waiting: texts that may be in the house.
        observe: is told the number of texts of each batch.
    """

    def __init__(self, max_texts: int, max_waiting: int, observe: Callable[[int], None] = lambda texts: None):
        self.max_texts, self.max_waiting, self.observe = max_texts, max_waiting, observe
        self.waiting = 0
        """Texts that were accepted and have not been answered."""
        self._jobs: deque[_Job] = deque()
        self._spare: deque[Callable[[], None]] = deque()
        self._arrived = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, "model")
        self._together = 1
        """Requests that waited when the last batch was taken."""
        self._speed = 100.0
        """Texts a second, lately."""

    async def submit(self, model: Model, rows: Sequence[Row]) -> list[Scored]:
        """Predictions of the rows in their order, all by this model.

        Raises:
            Full: too many texts wait.
            Exception: whatever the model raised.
        """
        if not rows:
            return []
        if self.waiting + len(rows) > self.max_waiting:
            raise Full(self.waiting / self._speed)
        job = _Job(model, rows, asyncio.get_running_loop().create_future())
        self.waiting += len(rows)
        self._jobs.append(job)
        self._arrived.set()
        try:
            return await job.future
        finally:
            self.waiting -= len(rows)

    def spare(self, work: Callable[[], None]) -> bool:
        """Has work done by the worker when no request waits; False: too much of it waits already, it is dropped."""
        if len(self._spare) >= SPARE:
            return False
        self._spare.append(work)
        self._arrived.set()
        return True

    async def run(self) -> None:
        """Scores until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if self._jobs:
                await self._linger()
                self._together = len(self._jobs)
                batch = self._take()
                if batch:
                    await self._score(batch)
            elif self._spare:
                try:
                    await loop.run_in_executor(self._worker, self._spare.popleft())
                except Exception:
                    log.exception("spare work failed")
            else:
                self._arrived.clear()
                await self._arrived.wait()

    def close(self) -> None:
        """Ends the worker once it is idle."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _linger(self) -> None:
        end = time.monotonic() + LINGER
        while len(self._jobs) < self._together and sum(len(j.rows) for j in self._jobs) < self.max_texts:
            left = end - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)

    def _take(self) -> list[tuple[_Job, Sequence[Row]]]:
        """The next batch: of one model, first come first served; what is left of a long request goes to the end."""
        model, room = self._jobs[0].model, self.max_texts
        batch: list[tuple[_Job, Sequence[Row]]] = []
        for _ in range(len(self._jobs)):
            if not room or self._jobs[0].model is not model:
                break
            job = self._jobs.popleft()
            if job.future.done():  # its client has gone, or a part of it failed
                continue
            part = job.rows[job.taken : job.taken + room]
            job.taken += len(part)
            room -= len(part)
            batch.append((job, part))
            if job.taken < len(job.rows):
                self._jobs.append(job)
        return batch

    async def _score(self, batch: list[tuple[_Job, Sequence[Row]]]) -> None:
        rows = [row for _, part in batch for row in part]
        began = time.monotonic()
        try:
            scored = await asyncio.get_running_loop().run_in_executor(self._worker, batch[0][0].model.score, rows)
            if len(scored) != len(rows):  # else somebody would wait for ever
                raise RuntimeError(f"{len(scored)} answers to {len(rows)} texts")
        except Exception as error:
            if len(batch) == 1:
                if not batch[0][0].future.done():
                    batch[0][0].future.set_exception(error)
                return
            for one in batch:  # whoever is to blame fails alone
                await self._score([one])
            return
        self._speed += 0.2 * (len(rows) / max(1e-6, time.monotonic() - began) - self._speed)
        self.observe(len(rows))
        start = 0
        for job, part in batch:
            job.scored += scored[start : start + len(part)]
            start += len(part)
            if len(job.scored) == len(job.rows) and not job.future.done():
                job.future.set_result(job.scored)
