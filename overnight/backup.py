"""All state in one folder; `restore` puts it back.

    DIR/home/…             the files of the home; SQLite databases through their own backup, so that servers may run
    DIR/databases/…        SQL dumps of the databases behind shared servers
    DIR/artifacts/…        the objects of MLflow's bucket
    DIR/manifest.json      written last: every file with its size and SHA-256

No night may run meanwhile; one that comes waits. What is made again by itself is left out.
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
from overnight.home import Home, Stores, redact, write_json
from overnight.nights import night_records, no_night
from overnight.stores import Bucket, Database
from overnight.tracking import registry

MANIFEST = "manifest.json"
MADE_AGAIN = ("data", "models", "validations", "smoke", "locks", ".restoring", ".replaced")
"""Folders of the home that are left out: caches, locks, which belong to living processes, a restore that was killed."""
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
    databases, bucket = shared_stores(home, stores, home_only)
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
        "files": {name: _facts(path) for name, path in files.items()},
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


# -- what there is -----------------------------------------------------------------------------------------------------


def shared_stores(home: Home, stores: Stores, home_only: bool) -> tuple[dict[str, Database], Bucket | None]:
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
    """Lets nights wait, and nobody move an alias, while files are copied."""
    names = {str(record["model"]) for record in night_records(home)}
    names |= {path.stem for path in (home.root / "ledger").glob("*.jsonl")}
    with ExitStack() as stack:
        if not stack.enter_context(no_night(home)):  # not by holding the models: scheduled nights would do nothing
            raise UserError(
                Complaint(str(home.root), "a night, a cleaning or another backup runs; try again afterwards")
            )
        for name in sorted(names):
            stack.enter_context(registry.one_writer(home, name))
        yield


def _home_files(root: Path) -> Iterator[tuple[Path, Path]]:
    """Each file that belongs into a backup, and its path below the root; folders may be links to other disks."""
    for parent, folders, names in os.walk(root, followlinks=True):
        here = Path(parent)
        if here == root:
            folders[:] = [name for name in folders if name not in MADE_AGAIN]
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
        folder.chmod(0o700)  # also one that was there
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
