"""Where state lives: the home folder and the servers that the environment names.

    home = Home.from_environment()      # .overnight/, or $OVERNIGHT_HOME

The environment is read here and nowhere else, and only when asked to.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from overnight.errors import Complaint, UserError


@dataclass(frozen=True)
class Home:
    """The folder that holds all local state, and the addresses of shared servers where there are any."""

    root: Path
    tracking_uri: str
    """MLflow store: $MLFLOW_TRACKING_URI, else SQLite under the home."""
    study_storage: str
    """Optuna storage: $OVERNIGHT_STUDY_STORAGE, else the path of a journal file under the home."""
    prefect_api: str | None
    """Shared Prefect server: $PREFECT_API_URL; None: a server of the home's own."""
    mlflow_pages: str | None = None
    """Where a browser finds the shared MLflow server: $OVERNIGHT_MLFLOW_PAGES; None: where its clients do."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Home:
        """Reads the environment; touches no disk.

        Raises:
            UserError: when $MLFLOW_TRACKING_URI names a file store, which MLflow no longer maintains.
        """
        environ = os.environ if environ is None else environ
        root = Path(environ.get("OVERNIGHT_HOME") or ".overnight").absolute()
        tracking = environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow' / 'mlflow.db'}"
        if tracking.startswith("file:") or "://" not in tracking and not tracking.startswith("databricks"):
            raise UserError(
                Complaint(
                    "MLFLOW_TRACKING_URI",
                    "must be a database or a server, file stores are unmaintained",
                    tracking,
                )
            )
        storage = environ.get("OVERNIGHT_STUDY_STORAGE") or str(root / "optuna" / "studies.journal")
        pages = environ.get("OVERNIGHT_MLFLOW_PAGES", "").rstrip("/") or None
        return cls(root, tracking, storage, environ.get("PREFECT_API_URL") or None, pages)

    @property
    def embedded_tracking(self) -> bool:
        """Whether MLflow's store is the home's own."""
        return self.tracking_uri.startswith("sqlite:///" + str(self.root))

    def folder(self, *parts: str) -> Path:
        """A folder under the home, made when missing.

        Raises:
            UserError: when the home cannot be written.
        """
        path = self.root.joinpath(*parts)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                Complaint(str(self.root), "the home must be a folder that can be written", error.strerror)
            ) from None
        return path

    # The rooms of the home, in one place so that `overnight doctor` and the docs can name them.
    @property
    def mlflow(self) -> Path:
        return self.root / "mlflow"

    @property
    def prefect(self) -> Path:
        return self.root / "prefect"

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def nights(self) -> Path:
        return self.root / "nights"


@dataclass(frozen=True)
class Stores:
    """What lies behind shared servers, named as the servers name it; only `overnight backup` and `restore` ask."""

    prefect: str | None
    """Database of Prefect's server: $PREFECT_SERVER_DATABASE_CONNECTION_URL."""
    mlflow: str | None
    """Database of MLflow's server: $MLFLOW_BACKEND_STORE_URI."""
    artifacts: str | None
    """Where MLflow's server keeps artifacts: $MLFLOW_ARTIFACTS_DESTINATION, as s3://bucket."""
    s3_endpoint: str | None
    """An S3-compatible store that is not Amazon's: $MLFLOW_S3_ENDPOINT_URL."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Stores:
        """Reads the environment; contacts nothing."""
        environ = os.environ if environ is None else environ
        return cls(
            environ.get("PREFECT_SERVER_DATABASE_CONNECTION_URL") or None,
            environ.get("MLFLOW_BACKEND_STORE_URI") or None,
            environ.get("MLFLOW_ARTIFACTS_DESTINATION") or None,
            environ.get("MLFLOW_S3_ENDPOINT_URL") or None,
        )


def redact(uri: str) -> str:
    """The URI without user, password and query values, fit for logs and reports."""
    base, mark, query = uri.partition("?")
    base = re.sub(r"^([\w+.-]+://)[^/]*@", r"\1***@", base)
    return base + mark + re.sub(r"=[^&]*", "=***", query)


def write_json(path: Path, facts: Any) -> None:
    """Writes whole or not at all: a reader never sees half a file, and a full disk leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=2, default=str, ensure_ascii=False)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Like `write_json`, for text."""
    # not mkstemp, whose files nobody else could read: a home may be shared
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any | None:
    """The facts of a JSON file, or None when it is absent or not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def take_lock(file: IO[str], seconds: float = 1.0) -> bool:
    """Takes the lock of an open file until the file is closed; False when another process keeps it.

    Waits a second: who only looks whether the lock is held, holds it for that moment.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        else:
            return True
