"""What a server is asked for; the defaults are those of `overnight serve`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    name: str
    """The registered model."""
    alias: str = "champion"
    follow_seconds: float = 5.0
    """Seconds between two looks at the registry."""
    shadow: float = 0.0
    """Share of the texts that the candidate is asked too, 0 to 1."""
    log_scores: bool = False
    """Whether each text leaves a line under `scored/<name>/` of the home."""
    log_texts: bool = False
    """Whether that line holds the text."""
    max_bytes: int = 2_000_000
    """Bytes of a request's body."""
    max_rows: int = 1000
    """Texts of a request."""
    max_queue: int = 2000
    """Texts that are accepted and not answered yet; `max_rows` at least."""
    max_batch: int = 64
    """Texts that the model is given at once."""
