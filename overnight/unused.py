"""Which files under the home no kept night needs, and how much disk they take."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from overnight.home import Home, read_json
from overnight.nights import RECORD
from overnight.retention import Retained

LEFT_BEHIND = 86_400.0
"""Seconds after which what only a running command needs is needed by none."""
COMPARED = {"rows", "evaluation"}
"""Folders of a night that hold the rows and predictions of its version."""


def unused_files(
    home: Home,
    name: str,
    records: Iterable[Mapping[str, Any]],
    retained: Retained,
    aliased: Mapping[int, str | None],
    scored_days: int,
) -> dict[str, list[Path]]:
    """What of a model's files goes, by kind. The records of nights stay: they tell of all the rest.

    Args:
        records: of the model's nights.
        aliased: versions behind an alias → the night of each. Only these stay fetched from a server, and of their
            nights the rows and predictions, with which the monitor compares.
        scored_days: days of which the scored texts stay.
    """
    old = [record for record in records if record["id"] not in retained.whole]
    whole = [record for record in records if record["id"] in retained.whole]
    return {
        "folders of fetched versions": [
            folder
            for folder in _folders(home.root / "models" / name)
            if folder.name not in set(map(str, aliased)) and not folder.name.startswith(".")  # is being fetched
        ],
        "folders of ingested rows": [
            folder
            for folder in _folders(home.data / name)
            if folder.name not in {"tokens", *(str(record["fingerprint"])[:16] for record in whole)}
        ],
        "folders of token ids": list(_tokens(home, name, whole)),
        "days of scored texts": list(_scored(home.root / "scored" / name, scored_days)),
        "hidden states of the monitor": [
            path
            for path in sorted((home.root / "monitor" / name).glob("hidden-*.npy"))
            if path.stem.removeprefix("hidden-") not in set(map(str, aliased))
        ],
        "folders and tables of nights": [
            part
            for record in old
            for part in (home.nights / record["id"]).iterdir()
            if not small(part) and not (record["id"] in aliased.values() and part.name in COMPARED)
        ],
    }


def left_behind(home: Home) -> list[Path]:
    """What killed commands left: half-made models, half-fetched versions, logs of failed smoke tests, empty nights."""
    places = [
        *(home.root / "smoke").glob("*"),
        *home.mlflow.glob("register-*"),
        *(home.root / "models").glob("*/.*"),
        *(folder for folder in _folders(home.nights) if not (folder / RECORD).exists()),
    ]
    return [place for place in places if _age(place) > LEFT_BEHIND]


def remove(path: Path) -> None:
    """Removes a file or folder that may be gone already; of a night's folder the record last."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for part in path.iterdir():
        if part.name != RECORD:
            remove(part)
    shutil.rmtree(path)


def disk_usage(paths: Iterable[Path]) -> int:
    """Bytes that files and folders take on the disk, those below them included; a file of several links once."""
    seen: dict[tuple[int, int], int] = {}
    waiting = list(paths)
    while waiting:
        path = waiting.pop()
        try:
            facts = path.lstat()
            if path.is_dir() and not path.is_symlink():
                waiting += path.iterdir()
        except OSError:  # gone meanwhile: servers and nights go on beside us
            continue
        seen[facts.st_dev, facts.st_ino] = facts.st_blocks * 512
    return sum(seen.values())


def _folders(place: Path) -> list[Path]:
    return sorted(folder for folder in place.iterdir() if folder.is_dir()) if place.is_dir() else []


def small(part: Path) -> bool:
    """Whether it is one of a night's small files, such as its record, config and report, and holds no rows."""
    return part.is_file() and part.suffix != ".parquet"


def _tokens(home: Home, name: str, whole: Iterable[Mapping[str, Any]]) -> Iterator[Path]:
    jobs = [
        (read_json(path) or {}).get("job", {})
        for record in whole
        for path in (home.nights / record["id"]).glob("trials/*/params.json")
    ]
    used = {Path(job[side]).name for job in jobs for side in ("train", "validation") if side in job}
    place = home.data / name / "tokens"
    for path in sorted(place.iterdir()) if place.is_dir() else []:
        if path.name.removesuffix(".lock") not in used:
            yield path


def _scored(place: Path, kept: int) -> Iterator[Path]:
    """Days of UTC before the last `kept`."""
    first = datetime.now(UTC).date() - timedelta(days=kept)
    for path in sorted(place.glob("*.jsonl")):
        try:
            if date.fromisoformat(path.stem) < first:
                yield path
        except ValueError:
            continue


def _age(path: Path) -> float:
    """Seconds since it was changed; 0 for one that is gone meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
