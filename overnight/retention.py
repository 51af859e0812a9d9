"""What is kept of a model's nights and versions: a pure function from facts to what goes.

    keep_and_let_go(nights, versions, champions={3, 7}, keep=14)

| of a night | what is left |
|---|---|
| *whole*: the last `keep` nights, the last that decided, one that runs or can be continued | everything |
| *shrunk*: an older one that a kept version came from | record, config, report, its run in MLflow, that version |
| *gone*: every other | nothing |

A version is kept when it stands behind an alias, was ever champion, belongs to a whole night, was made by no night, or
another was copied from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class NightFacts:
    id: str
    started: float
    """Unix seconds."""
    open: bool = False
    """Runs, or can be continued."""
    decided: bool = False
    """Reached its gate: the next night asks whether anything has changed since, and compares its data with these."""


@dataclass(frozen=True)
class VersionFacts:
    number: int
    night: str | None
    """None: registered by other means."""
    created: float = 0.0
    named: bool = False
    """Stands behind an alias, or another version was copied from it."""


@dataclass(frozen=True)
class Retained:
    """Ids of nights, oldest first, and numbers of the versions that go."""

    whole: tuple[str, ...]
    shrunk: tuple[str, ...]
    gone: tuple[str, ...]
    versions: tuple[int, ...]


def keep_and_let_go(
    nights: Iterable[NightFacts], versions: Collection[VersionFacts], champions: Collection[int], keep: int
) -> Retained:
    """Decides about all nights and versions of one model.

    Args:
        nights: those that are known from anywhere; one that only its version tells of is added.
        champions: numbers of all versions that were ever champion.
        keep: nights that are kept whole, at least 1.
    """
    known = {night.id: night for night in nights}
    for version in versions:
        if version.night is not None and version.night not in known:
            known[version.night] = NightFacts(version.night, version.created)
    order = sorted(known.values(), key=lambda night: (night.started, night.id))
    whole = {night.id for night in order[-keep:]}
    whole |= {night.id for night in order if night.open}
    whole |= {night.id for night in [night for night in order if night.decided][-1:]}
    kept = [
        version
        for version in versions
        if version.named or version.number in champions or version.night is None or version.night in whole
    ]
    shrunk = {version.night for version in kept if version.night} - whole
    return Retained(
        whole=tuple(night.id for night in order if night.id in whole),
        shrunk=tuple(night.id for night in order if night.id in shrunk),
        gone=tuple(night.id for night in order if night.id not in whole | shrunk),
        versions=tuple(sorted({version.number for version in versions} - {version.number for version in kept})),
    )
