"""Artifacts of the night's tasks. A page that cannot be written never costs a night."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

log = logging.getLogger("overnight.artifacts")


def table(key: str, rows: Sequence[Mapping[str, Any]], description: str) -> None:
    """A table artifact."""
    _publish(create_table_artifact, key, description, table=[dict(row) for row in rows])


def markdown(key: str, text: str, description: str) -> None:
    """A Markdown artifact."""
    _publish(create_markdown_artifact, key, description, markdown=text)


def _publish(create: Any, key: str, description: str, **content: Any) -> None:
    try:
        create(key=re.sub(r"[^a-z0-9-]+", "-", key.lower()), description=description, **content)
    except Exception as error:
        log.warning("artifact %s not written: %s", key, error)
