"""The base of a model that begins with nothing: `model: {base: new, new: {layers: 4, …}}`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from overnight.config import Model
from overnight.data.store import read_cells
from overnight.processes import run_child

NEW = "new"


def with_base(model: Model, train: str, text_roles: tuple[str, ...], folder: Path, fingerprint: str) -> Model:
    """The section with a folder for its base: one made below `folder` of the training rows, when it is to be new.

    The same rows and settings find the folder that was made of them, so that a night can be continued.
    """
    if model.base != NEW:
        return model
    settings = settings_of(model)
    key = hashlib.sha256(json.dumps([settings, fingerprint], sort_keys=True).encode()).hexdigest()[:16]
    base = folder / key
    if not (base / "config.json").is_file():
        run_child(make, folder / f".{key}", 1, base=str(base), train=train, roles=list(text_roles), settings=settings)
    return model.model_copy(update={"base": str(base), "revision": None})


def settings_of(model: Model) -> dict[str, Any]:
    """What decides about a new base, but for the texts."""
    return {**model.new.model_dump(), "length": model.max_length}


def make(folder: Path, *, base: str, train: str, roles: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Makes the base; runs in a child process."""
    from overnight.training.scratch import make_base

    texts = _Texts(train, roles)
    make_base(Path(base), texts, **settings)
    return {"texts": texts.count}


class _Texts:
    """The texts of a Parquet file, which is read as often as they are gone through."""

    def __init__(self, path: str, roles: list[str]):
        self._path, self._roles = path, roles
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        self.count = 0
        for role in self._roles:
            for text in filter(None, read_cells(self._path, role)):
                self.count += 1
                yield text
