"""What a night is doing right now: a plain channel from the work to whoever shows it.

    with listen(show):            # show({"stage": "search", "text": "trial 3", ...})
        emit(stage="search", ...)

Nobody listening costs nothing; a listener's error never reaches the work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[dict[str, Any]], None]
_listeners: list[Listener] = []


def emit(**event: Any) -> None:
    """Tells all listeners."""
    for listener in tuple(_listeners):
        with contextlib.suppress(Exception):
            listener(event)


@contextmanager
def listen(listener: Listener) -> Iterator[None]:
    """Calls `listener` with every event while the block runs."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
