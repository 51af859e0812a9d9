"""MLflow's store: made once without races, reached through an explicit client, silent.

prepare(home)                             # schema of the embedded store, environment
experiment_id = experiment(home, "sentiment")
with reaching(home):                      # connection errors → TrackingUnavailable
    client(home).get_run(...)
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import lru_cache
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.errors import Complaint, NightFailed
from overnight.home import Home, read_json, redact, write_json

if TYPE_CHECKING:
    from mlflow import MlflowClient

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    # a server's client would print addresses on standard output, into what --json gives
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # else the uv.lock and pyproject.toml of the folder we happen to run in travel with every model
    "MLFLOW_UV_AUTO_DETECT": "false",
    # MLflow's own 7 retries hold a call for four minutes; our spool retries for as long as it takes
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
# errors of MLflow that say something about the question, not about the way to the server
ANSWERS = {
    "BAD_REQUEST",
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_CONFLICT",
}
_globals = threading.RLock()


class TrackingUnavailable(NightFailed):
    """MLflow does not answer, or refuses us; nothing is lost, the spool is replayed later."""


def quiet_environment() -> None:
    """What MLflow reads while it is imported; a value the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def import_quietly() -> None:
    """Imports MLflow; afterwards it speaks of errors alone, and its database layer raises instead of logging."""
    quiet_environment()
    import mlflow  # noqa: F401

    for logger, level in (("mlflow", logging.ERROR), ("mlflow.store.db", logging.CRITICAL), ("alembic", logging.ERROR)):
        logging.getLogger(logger).setLevel(level)


@lru_cache(maxsize=8)
def _client(uri: str, process: int) -> MlflowClient:
    import_quietly()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def client(home: Home) -> MlflowClient:
    """The client of the home's store; `prepare` comes first."""
    return client_of(home.tracking_uri)


def client_of(uri: str) -> MlflowClient:
    """The client of a store or server."""
    return _client(uri, os.getpid())


@contextmanager
def globally(home: Home) -> Iterator[None]:
    """Points MLflow's global state at the home, for the few of its functions that know nothing else; then puts it back.

    MLflow copies the global URI into the environment, where a later `Home.from_environment` would take it for the
    user's wish: hence the care on the way out.
    """
    client(home)
    import mlflow

    with _globals:
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        mlflow.set_tracking_uri(home.tracking_uri)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(None if before == environment else before)  # type: ignore[arg-type]
            if environment is not None:
                os.environ["MLFLOW_TRACKING_URI"] = environment


@contextmanager
def reaching(home: Home) -> Iterator[None]:
    """Turns errors of connection, permission and capacity into TrackingUnavailable; answers of MLflow pass."""
    quiet_environment()
    import requests
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        if error.error_code in ANSWERS:
            raise
        raise unavailable(home, error) from None
    except (requests.RequestException, SQLAlchemyError, ConnectionError, TimeoutError) as error:
        raise unavailable(home, error) from None


def unavailable(home: Home, error: Exception) -> TrackingUnavailable:
    """One line from what may be pages; URIs inside the reason lose their passwords."""
    text = re.sub(r"\w[\w+.-]*://\S+", lambda match: redact(match.group()), str(error))
    text = " ".join(text.rpartition("Caused by")[2].partition("(Background on")[0].split())
    reason = text if len(text) <= 200 else text[:199] + "…"
    rule = f"cannot be used now: {reason or type(error).__name__}"
    return TrackingUnavailable(Complaint(f"MLflow at {redact(home.tracking_uri)}", rule))


def prepare(home: Home) -> None:
    """Makes the folders and, for the embedded store, the schema: once, under a lock.

    MLflow migrates on first use; several processes at once on a fresh SQLite file would ruin it for good. A store of
    an older MLflow is copied beside itself before it is migrated. A shared server is not contacted.

    Raises:
        NightFailed: when the store cannot be migrated (it is put back as it was).
        UserError: when the home cannot be written.
    """
    from filelock import FileLock

    quiet_environment()
    folder = home.folder("mlflow")
    home.folder("mlflow", "artifacts")
    if not home.embedded_tracking:
        return
    marker = folder / "schema.json"
    facts = {"mlflow": installed_version("mlflow")}
    database = Path(home.tracking_uri.removeprefix("sqlite:///"))
    if read_json(marker) == facts and database.exists():
        return
    with FileLock(folder / "schema.lock", timeout=600):
        if read_json(marker) == facts and database.exists():
            return
        if _tables(database):
            _upgrade(home, database)
        else:
            _create(database, folder / "artifacts")
        write_json(marker, facts)


def experiment(home: Home, name: str) -> str:
    """The id of the experiment, made when missing; called by the parent alone, children get the id.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    with reaching(home):
        mlflow = client(home)
        found = mlflow.get_experiment_by_name(name)
        if found is None:
            # a database has no artifact root of its own (MLflow would take the current folder), a server has
            served = home.tracking_uri.startswith(("http://", "https://", "databricks"))
            location = None if served else (home.folder("mlflow", "artifacts") / name).as_uri()
            try:
                return str(mlflow.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                found = mlflow.get_experiment_by_name(name)
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            mlflow.restore_experiment(found.experiment_id)
        return str(found.experiment_id)


def relocate(database: Path, was: Path, now: Path) -> None:
    """Tells the store of a home that was moved where its artifacts now lie: MLflow keeps their absolute addresses.

    Every text column is looked at, so that a column of a later MLflow is not forgotten. Nobody may use the store.
    """
    old, new = f"{was.as_uri()}/", f"{now.as_uri()}/"
    with closing(sqlite3.connect(database)) as connection, connection:
        tables = connection.execute("select name from sqlite_master where type = 'table'").fetchall()
        for (table,) in tables:
            for column in connection.execute(f'pragma table_info("{table}")').fetchall():
                name, kind = column[1], str(column[2]).upper()
                if "CHAR" in kind or "TEXT" in kind:
                    change = f'update "{table}" set "{name}" = replace("{name}", ?, ?) where instr("{name}", ?)'
                    connection.execute(change, (old, new, old))


def _tables(database: Path) -> bool:
    """Whether the file holds a store, so that an empty or half-made one is made anew."""
    if not database.exists():
        return False
    with closing(sqlite3.connect(database)) as connection:
        try:
            return bool(connection.execute("select count(*) from experiments").fetchone())
        except sqlite3.DatabaseError:
            return False


def _create(database: Path, artifacts: Path) -> None:
    """Made under another name first: a process killed half-way leaves nothing that looks like a store."""
    import_quietly()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    new = database.with_name(f"{database.name}.new")
    new.unlink(missing_ok=True)
    store = SqlAlchemyStore(f"sqlite:///{new}", artifacts.as_uri())
    store.engine.dispose()
    os.replace(new, database)


def _upgrade(home: Home, database: Path) -> None:
    """MLflow's own `db upgrade`; the copy beside the store is kept, and put back when it fails."""
    import_quietly()
    from mlflow.db import upgrade

    copy = database.with_name(f"{database.stem}-before-{installed_version('mlflow')}{database.suffix}")
    with closing(sqlite3.connect(database)) as old, closing(sqlite3.connect(copy)) as new:
        old.backup(new)
    try:
        upgrade.main([home.tracking_uri], standalone_mode=False)
    except Exception as error:  # of Alembic, SQLAlchemy or a migration itself
        shutil.copyfile(copy, database)
        rule = f"MLflow {installed_version('mlflow')} cannot migrate this store"
        raise NightFailed(Complaint(str(database), rule, str(error).splitlines()[0])) from None
