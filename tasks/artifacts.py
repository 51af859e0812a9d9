"""Artifacts of the night's tasks. A page that cannot be written never costs a night."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

log = logging.getLogger("overnight.artifacts")


def table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table artifact."""
    _publish(create_table_artifact, key, description, table=[dict(row) for row in rows])


def markdown(key: str, text: str, description: str) -> None:
    """A Markdown artifact."""
    _publish(create_markdown_artifact, key, description, markdown=text)


def link(key: str, address: str, text: str, description: str) -> None:
    """A link artifact."""
    _publish(create_link_artifact, key, description, link=address, link_text=text)


def progress(key: str, description: str) -> Callable[[float, str], None]:
    """A progress artifact at 0; what is returned moves it: percent, description."""
    made = _publish(create_progress_artifact, key, description, progress=0.0)

    def move(percent: float, description: str) -> None:
        if made is not None:
            _quietly(key, lambda: update_progress_artifact(made, percent, description))

    return move


def _publish(create: Callable[..., Any], key: str, description: str, **content: Any) -> Any:
    name = re.sub(r"[^a-z0-9-]+", "-", key.lower())
    return _quietly(name, lambda: create(key=name, description=description, **content))


def _quietly(key: str, write: Callable[[], Any]) -> Any:
    try:
        return write()
    except Exception as error:
        log.warning("artifact %s not written: %s", key, error)
        return None
