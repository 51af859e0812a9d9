"""The micro-batcher: who is scored together, in which order, and what happens to those who cannot be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from overnight.serving.batching import Batcher, Full


@dataclass
class Slow:
    """A model that answers a row with its text, and waits for leave when told to."""

    leave: threading.Event = field(default_factory=threading.Event)
    batches: list[list[str]] = field(default_factory=list)

    def score(self, rows: Any) -> list[Any]:
        self.batches.append([row["text"] for row in rows])
        assert self.leave.wait(30)
        if any(row["text"] == "poison" for row in rows):
            raise ValueError("poison")
        return [({"label": row["text"]}, len(row["text"])) for row in rows]


def rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def batched(scenario: Callable[[Batcher], Any], **limits: int) -> Any:
    """Runs a coroutine with a batcher that works."""

    async def body() -> Any:
        batcher = Batcher(**{"max_texts": 4, "max_waiting": 100} | limits)
        task = asyncio.create_task(batcher.run())
        try:
            return await scenario(batcher)
        finally:
            task.cancel()
            batcher.close()

    return asyncio.run(body())


def test_what_waits_is_scored_together():
    """While a batch is computed others arrive: they are the next one, and each gets its own answers in its order."""
    model = Slow()

    async def scenario(batcher: Batcher) -> Any:
        first = asyncio.create_task(batcher.submit(model, rows("a")))
        while not model.batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(batcher.submit(model, rows(*text))) for text in ("bc", "d", "e", "f")]
        await asyncio.sleep(0)
        model.leave.set()
        return await asyncio.gather(first, *others)

    found = batched(scenario)
    assert model.batches == [["a"], ["b", "c", "d", "e"], ["f"]], "at most four at once"
    assert ["".join(one["label"] for one, _ in answer) for answer in found] == ["a", "bc", "d", "e", "f"]


def test_a_long_request_lets_others_in_between():
    """A request of ten texts is scored in parts; one that came later does not wait for all of them."""
    model = Slow()

    async def scenario(batcher: Batcher) -> Any:
        long = asyncio.create_task(batcher.submit(model, rows(*"abcdefghij")))
        short = asyncio.create_task(batcher.submit(model, rows("x")))
        await asyncio.sleep(0)
        model.leave.set()
        return await asyncio.gather(long, short)

    long, _ = batched(scenario)
    assert model.batches == [list("abcd"), ["x", "e", "f", "g"], ["h", "i", "j"]]
    assert "".join(one["label"] for one, _ in long) == "abcdefghij"


def test_requests_of_two_models_are_never_mixed():
    """Who came before a switch is answered by the old model, who came after by the new one."""
    old, new = Slow(), Slow()
    old.leave.set()
    new.leave.set()

    async def scenario(batcher: Batcher) -> Any:
        return await asyncio.gather(
            batcher.submit(old, rows(*"abcdef")), batcher.submit(new, rows("x")), batcher.submit(old, rows("g"))
        )

    batched(scenario)
    assert old.batches == [list("abcd"), ["g", "e", "f"]] and new.batches == [["x"]]


def test_a_request_that_fails_fails_alone():
    """The model cannot do with one request: the others of its batch are answered."""
    model = Slow()

    async def scenario(batcher: Batcher) -> Any:
        waiting = [asyncio.create_task(batcher.submit(model, rows(text))) for text in ("a", "poison", "b")]
        await asyncio.sleep(0)
        model.leave.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        assert batcher.waiting == 0
        return found

    a, poison, b = batched(scenario)
    assert a[0][0]["label"] == "a" and b[0][0]["label"] == "b" and isinstance(poison, ValueError)


def test_the_queue_has_an_end():
    """What does not fit is refused at once, and fits again afterwards; nothing is in the house in the end."""
    model = Slow()

    async def scenario(batcher: Batcher) -> None:
        waiting = asyncio.create_task(batcher.submit(model, rows("a", "b")))
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.submit(model, rows("c", "d"))
        assert await batcher.submit(model, []) == []
        model.leave.set()
        await waiting
        await batcher.submit(model, rows("c", "d", "e"))
        assert batcher.waiting == 0

    batched(scenario, max_waiting=3)


def test_spare_work_waits_for_requests_and_never_piles_up():
    """Work that may be dropped comes after every request, survives an error, and is refused beyond its limit."""
    model = Slow()
    done: list[str] = []

    async def scenario(batcher: Batcher) -> None:
        waiting = asyncio.create_task(batcher.submit(model, rows("a")))
        await asyncio.sleep(0)
        assert batcher.spare(lambda: 1 / 0)
        taken = [batcher.spare(lambda: done.append(model.batches[-1][0])) for _ in range(100)]
        assert taken.count(True) == 63
        last = asyncio.create_task(batcher.submit(model, rows("b")))
        await asyncio.sleep(0)
        model.leave.set()
        await asyncio.gather(waiting, last)
        while len(done) < 63:
            await asyncio.sleep(0.001)

    batched(scenario)
    assert done == ["b"] * 63, "after both requests"


def test_a_model_that_answers_too_little_is_an_error():
    """Fewer answers than texts: the request fails, nobody waits for ever and the next request is answered."""

    class Short(Slow):
        def score(self, rows: Any) -> list[Any]:
            return super().score(rows)[:1]

    model = Short()
    model.leave.set()

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="1 answers to 2 texts"):
            await batcher.submit(model, rows("a", "b"))
        assert len(await batcher.submit(model, rows("c"))) == 1

    batched(scenario)
