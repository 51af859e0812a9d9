"""What is installed, reachable and stale; heals what is safe to heal."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from overnight.errors import OvernightError
from overnight.home import Home
from overnight.lineage import PACKAGES
from overnight.nights import held, night_records, one_night_at_a_time
from overnight.services import server_process

MARKS = {"good": "✓", "healed": "+", "note": "·", "broken": "✗"}
LITTLE_DISK = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `state` is good, healed, note or broken."""

    state: str
    what: str
    found: str

    @property
    def mark(self) -> str:
        return MARKS[self.state]


def examine(home: Home) -> list[Finding]:
    """All findings; an examination that itself breaks is a finding, not an error."""
    findings: list[Finding] = []
    parts: list[Callable[[Home], Iterator[Finding]]] = [_installed, _machine, _home, _servers, _models]
    for part in parts:
        try:
            findings += part(home)
        except OvernightError as error:
            findings.append(Finding("broken", part.__name__.strip("_"), str(error)))
    return findings


def _installed(home: Home) -> Iterator[Finding]:
    python = sys.version.split()[0]
    yield Finding("good" if sys.version_info >= (3, 11) else "broken", "Python", python)
    for name in PACKAGES:
        try:
            yield Finding("good", name, version(name))
        except PackageNotFoundError:
            yield Finding("broken", name, "not installed")
    for name, limit in (("fastapi", (0, 151)), ("sqlalchemy", (2, 1))):
        found = version(name)
        numbers = tuple(int(part) for part in found.split(".")[:2])
        if numbers >= limit:
            yield Finding("broken", name, f"{found} breaks Prefect's server; pyproject.toml says why and caps it")


def _machine(home: Home) -> Iterator[Finding]:
    import torch

    from overnight.processes import cores
    from overnight.training.device import choose_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{len(cores())} cores"
    yield Finding("good", "device", f"{device.type} ({name}), {choose_precision('auto', device)}")


def _home(home: Home) -> Iterator[Finding]:
    folder = home.folder()
    probe = folder / ".doctor"
    try:
        probe.write_text("")
        probe.unlink()
        yield Finding("good", "home", str(folder))
    except OSError as error:
        yield Finding("broken", "home", f"{folder}: {error.strerror}")
    free = shutil.disk_usage(folder).free
    yield Finding("good" if free > LITTLE_DISK else "note", "disk", f"{free / 2**30:.1f} GiB free")


def _servers(home: Home) -> Iterator[Finding]:
    for name in ("prefect", "mlflow"):
        record = home.root / name / "server.json"
        if record.exists() and server_process(record) is None:
            record.unlink()
            yield Finding("healed", f"{name} server", "the record of a dead server was removed")
        elif record.exists():
            yield Finding("good", f"{name} server", "running")
        else:
            yield Finding("note", f"{name} server", "not running; it is started when needed")


def _models(home: Home) -> Iterator[Finding]:
    from overnight.healing import heal
    from overnight.tracking import ledger, registry, store

    store.prepare(home)
    yield Finding("good", "MLflow", store.redact(home.tracking_uri))
    known = {str(record["model"]) for record in night_records(home)} | set(registry.names(home))
    for name in sorted(known):
        if held(home, name):
            yield Finding("note", name, "a night is running; not touched")
            continue
        with one_night_at_a_time(home, name):
            for line in heal(home, name):
                yield Finding("healed", name, line)
        if name not in registry.names(home):
            yield Finding("note", name, "no version yet")
            continue
        yield _champion(home, name)
        for wrong in ledger.problems(ledger.read(home, name)):
            yield Finding("broken", name, wrong)


def _champion(home: Home, name: str) -> Finding:
    from overnight.scoring import smoke_in_child
    from overnight.tracking import registry

    champion = registry.champion(home, name)
    if champion is None:
        return Finding("note", name, "no champion yet")
    found = f"champion is version {champion.number}"
    try:
        smoke_in_child(home, registry.download(home, champion))
    except OvernightError as error:
        return Finding("broken", name, f"{found}; {error}")
    return Finding("good", name, f"{found}; its weights are as registered, and it passes the smoke test")
