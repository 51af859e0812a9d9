"""A finished model folder's card: what the folder says of itself beside its weights. Needs no PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from overnight.training.models import load_tokenizer, quiet

CARD = "overnight.json"


@dataclass(frozen=True)
class Card:
    """The content of `overnight.json`."""

    problem: str
    facts: dict[str, Any]
    max_length: int
    metric: str


def finish_model_folder(folder: str | Path, card: Card, base: str, revision: str | None = None) -> None:
    """Makes `best/` of a run a model folder: adds the base model's tokenizer and the card."""
    folder = Path(folder)
    with quiet():
        load_tokenizer(base, revision).save_pretrained(folder)
    write_card(folder, card)


def write_card(folder: Path, card: Card) -> None:
    """Writes the card of a model folder, in place of an earlier one."""
    (folder / CARD).write_text(json.dumps(asdict(card), indent=2, ensure_ascii=False))
