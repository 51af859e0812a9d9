"""How a home stands: who holds it, servers, next nights, last decisions, disk. From files alone, so it is quick."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from overnight import schedule
from overnight.config import Config
from overnight.home import Home, read_json, redact
from overnight.nights import held, night_records
from overnight.services import server_process
from overnight.tracking import ledger
from overnight.upkeep import holder


def look(home: Home, configs: Mapping[str, Config]) -> dict[str, Any]:
    """All facts of `overnight status`; times in epoch seconds, or ISO 8601 with a zone where they are for people.

    Args:
        configs: path → config with a schedule.
    """
    return {
        "home": str(home.root),
        "up": holder(home),
        "servers": {name: _server(home, name) for name in ("prefect", "mlflow")},
        "nights": next_nights(configs, datetime.now(UTC)),
        "models": _models(home),
        "disk": {"used": used(home.root), "free": shutil.disk_usage(_existing(home.root)).free},
    }


def next_nights(configs: Mapping[str, Config], now: datetime) -> list[dict[str, str]]:
    """The next time of each schedule, soonest first: in the schedule's zone (`at`) and in the reader's (`here`)."""
    found = []
    for path, config in configs.items():
        assert config.schedule is not None
        at = schedule.upcoming(config.schedule, now)[0]
        facts = {"config": path, "model": config.name, "cron": config.schedule.cron, "zone": config.schedule.timezone}
        found.append((at, {**facts, "at": at.isoformat(), "here": at.astimezone().isoformat()}))
    return [facts for _, facts in sorted(found, key=lambda pair: pair[0])]


def used(folder: Path) -> int:
    """Bytes that a folder takes on the disk; a file with several names counts once."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                facts = os.lstat(os.path.join(parent, name))
            except OSError:  # gone meanwhile
                continue
            if (facts.st_dev, facts.st_ino) not in seen:
                seen.add((facts.st_dev, facts.st_ino))
                total += facts.st_blocks * 512
    return total


def _server(home: Home, name: str) -> dict[str, Any]:
    shared = home.prefect_api if name == "prefect" else None if home.embedded_tracking else home.tracking_uri
    if shared:
        return {"link": redact(shared.removesuffix("/api")), "running": None, "shared": True}
    record = home.root / name / "server.json"
    running = server_process(record) is not None
    return {"link": (read_json(record) or {}).get("ui") if running else None, "running": running, "shared": False}


def _models(home: Home) -> list[dict[str, Any]]:
    last = {record["model"]: record for record in night_records(home)}
    found = []
    for name, record in sorted(last.items()):
        move = ledger.last_move(home, name)
        found.append(
            {
                "model": name,
                "night": record["id"],
                "state": record["state"],
                "running": held(home, name),
                "time": record.get("ended") or record["started"],
                "champion": move.to_version if move else None,
                "since": move.time if move else None,
            }
        )
    return found


def _existing(folder: Path) -> Path:
    return folder if folder.exists() else _existing(folder.parent)
