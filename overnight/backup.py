"""All state in one folder, and back.

    DIR/home/…             the files of the home; SQLite databases through their own backup, so that servers may run
    DIR/databases/…        SQL dumps of the databases behind shared servers
    DIR/artifacts/…        the objects of MLflow's bucket
    DIR/manifest.json      written last: every file with its size and SHA-256

No night may run meanwhile; the models are held. What is made again by itself is left out.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from overnight.errors import Complaint, NightFailed, UserError
from overnight.home import Home, Stores, read_json, redact, write_json
from overnight.nights import held, night_records, one_night_at_a_time
from overnight.services import server_process
from overnight.stores import Bucket, Database
from overnight.tracking import registry, store

MANIFEST = "manifest.json"
MADE_AGAIN = ("data", "models", "validations", "smoke", "locks")
"""Folders of the home that are left out: caches, and locks, which belong to living processes."""
STAGING = ".restoring"
SQLITE = b"SQLite format 3\0"


def back_up(home: Home, stores: Stores, folder: Path, home_only: bool = False) -> dict[str, Any]:
    """Copies the home, and what lies behind shared servers, into an empty or new folder.

    Args:
        home_only: leaves the shared servers to somebody else's backup.

    Returns:
        The manifest.

    Raises:
        UserError: the folder is not empty or lies in the home, there is nothing to back up, a night is running, or the
            environment names a shared server but not what lies behind it.
        NightFailed: a database is damaged, or a store cannot be reached.
    """
    databases, bucket = _shared(home, stores, home_only)
    _check_folder(home, folder)
    with _quiet(home):
        for source, path in _home_files(home.root):
            _copy(source, folder / "home" / path)
        # before the artifacts: what a database names must be among them
        for name, database in databases.items():
            (folder / "databases").mkdir(parents=True, exist_ok=True)
            database.dump(folder / "databases" / f"{name}.sql")
        if bucket:
            bucket.fetch(folder / "artifacts")
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    if not files:
        raise UserError(Complaint(str(home.root), "there is no state yet, nothing to back up"))
    manifest = {
        "overnight": version("overnight"),
        "mlflow": version("mlflow"),
        "prefect": version("prefect"),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "home": str(home.root),
        "databases": sorted(databases),
        "artifacts": bucket is not None,
        "files": {
            name: {"bytes": path.stat().st_size, "sha256": registry.sha256(path)} for name, path in files.items()
        },
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def restore(home: Home, stores: Stores, folder: Path, force: bool = False, home_only: bool = False) -> dict[str, Any]:
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
    databases, bucket = _shared(home, stores, home_only)
    if not home_only:
        _check_targets(home, manifest, databases, bucket)
    _check_unused(home)
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


# -- what there is -----------------------------------------------------------------------------------------------------


def _shared(home: Home, stores: Stores, home_only: bool) -> tuple[dict[str, Database], Bucket | None]:
    """The databases by name and the bucket behind the servers that the environment names."""
    if home_only:
        return {}, None
    missing, urls = [], {}
    if home.prefect_api:
        urls["prefect"] = ("PREFECT_API_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL", stores.prefect)
    served = home.tracking_uri.startswith(("http://", "https://"))
    if served:
        urls["mlflow"] = ("MLFLOW_TRACKING_URI", "MLFLOW_BACKEND_STORE_URI", stores.mlflow)
    elif not home.embedded_tracking:
        urls["mlflow"] = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_URI", home.tracking_uri)
    if "://" in home.study_storage:
        urls["optuna"] = ("OVERNIGHT_STUDY_STORAGE", "OVERNIGHT_STUDY_STORAGE", home.study_storage)
    for server, name, url in urls.values():
        if not url or not url.startswith("postgresql"):
            got = redact(url) if url else None
            rule = f"must name the PostgreSQL database behind {server}, or leave it out with --home-only"
            missing.append(Complaint(name, rule, got))
    if served and not (stores.artifacts or "").startswith("s3://"):
        rule = "must name the bucket of MLflow's artifacts, as s3://mlflow, or leave it out with --home-only"
        missing.append(Complaint("MLFLOW_ARTIFACTS_DESTINATION", rule, stores.artifacts))
    if missing:
        raise UserError(*missing)
    databases = {name: Database(str(url)) for name, (_, _, url) in urls.items()}
    return databases, Bucket(str(stores.artifacts), stores.s3_endpoint) if served else None


@contextmanager
def _quiet(home: Home) -> Iterator[None]:
    """Holds every model, so that no night runs and no alias moves while files are copied."""
    names = {str(record["model"]) for record in night_records(home)}
    names |= {path.stem for path in (home.root / "ledger").glob("*.jsonl")}
    with ExitStack() as stack:
        for name in sorted(names):
            home.folder("locks")
            stack.enter_context(one_night_at_a_time(home, name))
            stack.enter_context(registry.one_writer(home, name))
        yield


def _home_files(root: Path) -> Iterator[tuple[Path, Path]]:
    """Each file that belongs into a backup, and its path below the root; folders may be links to other disks."""
    for parent, folders, names in os.walk(root, followlinks=True):
        here = Path(parent)
        if here == root:
            folders[:] = [name for name in folders if name not in (*MADE_AGAIN, STAGING)]
        folders.sort()
        for name in sorted(names):
            if name == "server.json" or name.endswith((".lock", "-wal", "-shm", "-journal")) or name.startswith("."):
                continue  # of living processes, or part of a database that is copied as one
            yield here / name, (here / name).relative_to(root)


def _facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": registry.sha256(path)}


def _check_folder(home: Home, folder: Path) -> None:
    inside = folder.resolve().is_relative_to(home.root.resolve())
    if inside:
        raise UserError(Complaint(str(folder), "must not lie in the home, which it would then hold too"))
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # databases hold what not everybody may read
        if any(folder.iterdir()):
            raise UserError(Complaint(str(folder), "must be empty; each backup has a folder of its own"))
    except OSError as error:
        raise UserError(Complaint(str(folder), "must be a folder that can be written", error.strerror)) from None


# -- copying -----------------------------------------------------------------------------------------------------------


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(source, "rb") as file:
            database = file.read(len(SQLITE)) == SQLITE
        if database:
            _copy_database(source, target)
        else:
            shutil.copyfile(source, target)
    except FileNotFoundError:  # a server's own temporary file
        return
    if source.suffix == ".journal":
        _whole_lines(target)


def _copy_database(source: Path, target: Path) -> None:
    """By SQLite's backup: a consistent copy while servers write."""
    try:
        with closing(sqlite3.connect(source, timeout=60)) as old, closing(sqlite3.connect(target)) as new:
            old.backup(new)
            found = new.execute("pragma quick_check").fetchone()[0]
    except sqlite3.DatabaseError as error:
        found = str(error)
    if found != "ok":
        raise NightFailed(Complaint(str(source), "this SQLite database is damaged", found))


def _whole_lines(path: Path) -> None:
    """Cuts a line that was being written, so that what is appended later does not continue it."""
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


# -- restoring ---------------------------------------------------------------------------------------------------------


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


def _check_unused(home: Home) -> None:
    running = [path.stem for path in (home.root / "locks").glob("*.lock") if held(home, path.stem)]
    used = [Complaint(name, "a process holds this model; end it before a restore") for name in sorted(running)]
    for name in ("prefect", "mlflow"):
        if server_process(home.root / name / "server.json"):
            used.append(Complaint(f"{name} server", "of this home runs; end the command that uses it before a restore"))
    if used:
        raise UserError(*used)


def _check_empty(home: Home, databases: dict[str, Database], bucket: Bucket | None) -> None:
    full = []
    if home.root.exists() and any(home.root.iterdir()):
        full.append(str(home.root))
    full += [database.where for database in databases.values() if not database.empty()]
    if bucket and next(bucket.keys(), None) is not None:
        full.append(bucket.where)
    if full:
        raise UserError(*[Complaint(where, "is not empty; --force replaces what it holds") for where in full])


def _place_home(home: Home, source: Path, was: Path) -> None:
    """Copied beside its place and told where it now lies, then moved there whole.

    Inside of the home, which may be the mount point of a volume.
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
    for old in home.root.iterdir():
        if old == staging:
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    for new in staging.iterdir():
        new.rename(home.root / new.name)
    staging.rmdir()


def _relocated(facts: Any, was: str, now: str) -> Any:
    """The facts with every path below `was` as one below `now`."""
    if isinstance(facts, dict):
        return {key: _relocated(value, was, now) for key, value in facts.items()}
    if isinstance(facts, list):
        return [_relocated(value, was, now) for value in facts]
    if isinstance(facts, str) and facts.startswith(f"{was}/"):
        return now + facts[len(was) :]
    return facts
