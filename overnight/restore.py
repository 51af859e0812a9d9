"""Puts back what `backup` wrote, to where it was or to another place; everything is verified and asked first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from overnight.backup import MANIFEST, shared_stores
from overnight.errors import Complaint, NightFailed, UserError
from overnight.home import Home, Stores, read_json, write_json
from overnight.nights import held, no_night
from overnight.services import server_process
from overnight.stores import Bucket, Database
from overnight.tracking import registry, store

STAGING, REPLACED = ".restoring", ".replaced"
LOCKS = "locks"
"""The folder of the home that stays: processes wait for what is in it."""


def put_back(home: Home, stores: Stores, folder: Path, force: bool = False, home_only: bool = False) -> dict[str, Any]:
    """Puts a backup in place of the home and of what lies behind shared servers; the home may lie elsewhere than then.

    Everything is verified and asked before anything is touched. A database is replaced as a whole or not at all; so is
    the home.

    Args:
        force: replaces what is there.
        home_only: restores the home alone.

    Returns:
        The manifest.

    Raises:
        UserError: the backup is not whole, something is in use or not empty, or the environment does not name what the
            backup holds.
        NightFailed: a database or the store refused.
    """
    manifest = verified(folder)
    databases, bucket = shared_stores(home, stores, home_only)
    if not home_only:
        _check_targets(home, manifest, databases, bucket)
    with no_night(home) as alone:
        _check_unused(home, alone)
        if not force:
            _check_empty(home, databases, bucket)
        for name, database in databases.items():
            database.load(folder / "databases" / f"{name}.sql")
        if bucket:
            bucket.put(folder / "artifacts")
        _place_home(home, folder / "home", Path(manifest["home"]))
    return manifest


def verified(folder: Path) -> dict[str, Any]:
    """The manifest of a backup whose files are all there and unchanged.

    Raises:
        UserError: with one complaint a file.
    """
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise UserError(Complaint(str(folder), f"is no whole backup, {MANIFEST} is written last and is not there"))
    wrong = []
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(Complaint(str(path), "is missing from the backup"))
        elif path.stat().st_size != facts["bytes"] or registry.sha256(path) != facts["sha256"]:
            wrong.append(Complaint(str(path), "is not what was backed up"))
    if wrong:
        raise UserError(*wrong)
    return manifest


def _check_targets(home: Home, manifest: dict[str, Any], databases: dict[str, Database], bucket: Bucket | None) -> None:
    kept = set(manifest["databases"]) | ({"artifacts"} if manifest["artifacts"] else set())
    named = set(databases) | ({"artifacts"} if bucket else set())
    if kept != named:
        holds = f"the backup holds {_words(kept)}, the environment names {_words(named)}"
        raise UserError(Complaint("restore", f"{holds} (of shared servers); --home-only restores the home alone"))
    if "mlflow" in kept and not bucket and manifest["home"] != str(home.root):
        rule = f"must be {manifest['home']}, since MLflow's database names the artifacts in it"
        raise UserError(Complaint("OVERNIGHT_HOME", rule, str(home.root)))


def _words(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _check_unused(home: Home, alone: bool) -> None:
    running = [path.stem for path in (home.root / "locks").glob("*.lock") if held(home, path.stem)]
    used = [Complaint(name, "a process holds this model; end it before a restore") for name in sorted(running)]
    if not alone and not used:
        used.append(Complaint(str(home.root), "a night, a cleaning or a backup runs; end it before a restore"))
    for name in ("prefect", "mlflow"):
        if server_process(home.root / name / "server.json"):
            used.append(Complaint(f"{name} server", "of this home runs; end the command that uses it before a restore"))
    if used:
        raise UserError(*used)


def _check_empty(home: Home, databases: dict[str, Database], bucket: Bucket | None) -> None:
    full = []
    if any(path.name != LOCKS for path in home.root.iterdir()):
        full.append(str(home.root))
    full += [database.where for database in databases.values() if not database.empty()]
    if bucket and next(bucket.keys(), None) is not None:
        full.append(bucket.where)
    if full:
        raise UserError(*[Complaint(where, "is not empty; --force replaces what it holds") for where in full])


def _place_home(home: Home, source: Path, was: Path) -> None:
    """Copied beside its place and told where it now lies; then the old is moved aside and the new into its place.

    Inside of the home, which may be the mount point of a volume. Nothing is deleted before all is in its place.
    """
    staging = home.folder() / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    if source.exists():
        shutil.copytree(source, staging)
    else:  # of an installation whose home held nothing
        staging.mkdir()
    if was != home.root:
        database = staging / "mlflow" / "mlflow.db"
        if database.exists():
            store.relocate(database, was, home.root)
        for path in [*staging.glob("nights/*/night.json"), *staging.glob("nights/*/trials/*/params.json")]:
            facts = read_json(path)
            if facts is not None:
                write_json(path, _relocated(facts, str(was), str(home.root)))
    replaced = home.root / REPLACED
    shutil.rmtree(replaced, ignore_errors=True)
    replaced.mkdir()
    kept = (STAGING, REPLACED, LOCKS)
    moves = [(old, replaced / old.name) for old in home.root.iterdir() if old.name not in kept]
    moves += [(new, home.root / new.name) for new in staging.iterdir()]
    done: list[tuple[Path, Path]] = []
    try:
        for move in moves:
            move[0].rename(move[1])
            done.append(move)
    except OSError as error:
        for was, now in reversed(done):
            now.rename(was)
        shutil.rmtree(staging)
        replaced.rmdir()
        rule = "cannot be moved, so the home stays as it was"
        raise NightFailed(Complaint(str(error.filename), rule, error.strerror)) from None
    staging.rmdir()
    shutil.rmtree(replaced)


def _relocated(facts: Any, was: str, now: str) -> Any:
    """The facts with every path below `was` as one below `now`."""
    if isinstance(facts, dict):
        return {key: _relocated(value, was, now) for key, value in facts.items()}
    if isinstance(facts, list):
        return [_relocated(value, was, now) for value in facts]
    if isinstance(facts, str) and facts.startswith(f"{was}/"):
        return now + facts[len(was) :]
    return facts
