"""The passwords of a shared installation: `docker/.env`, random, written once, shown to nobody."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from overnight.errors import Complaint, UserError

HEAD = """\
# Passwords of docker/compose.yaml, made by `overnight init-stack`. Keep a copy where you keep passwords: a backup holds
# the databases, not this file. docs/operations.md says how to change one.
"""

SETTINGS = """\

# What may be set besides; these are the defaults.
# names by which browsers call the servers, behind a proxy with TLS; links in reports and notifications begin with them
#MLFLOW_PUBLIC_HOST=mlflow.example.com
#MLFLOW_PUBLIC_URL=https://mlflow.example.com
#PREFECT_PUBLIC_URL=https://prefect.example.com
# the model that the service answers with, and whether it writes a line a text, without the text, for the monitor
#OVERNIGHT_SERVE=sentiment
#OVERNIGHT_LOG_SCORES=true
# folders of this machine: data that configs name as data/…, and where backups are written
#OVERNIGHT_DATA=../data
#OVERNIGHT_BACKUPS=./backups
#OVERNIGHT_WORKER_MEMORY=16g

# Addresses of notifications are secrets too. They go into worker.env beside this file, by the names that configs call
# them, as TEAM_CHAT=https://hooks.slack.com/services/…
"""

PASSWORDS = {
    "POSTGRES_PASSWORD": "PostgreSQL: the superuser, whom no service uses",
    "PREFECT_DB_PASSWORD": "PostgreSQL: the database of Prefect's server",
    "MLFLOW_DB_PASSWORD": "PostgreSQL: the database of MLflow's server",
    "OPTUNA_DB_PASSWORD": "PostgreSQL: Optuna's studies",
    "S3_ACCESS_KEY": "the store of MLflow's artifacts",
    "S3_SECRET_KEY": "",
    "PREFECT_AUTH_STRING": "Prefect's API and pages: user:password",
    "MLFLOW_ADMIN_PASSWORD": "MLflow: the user `admin`, as whom the worker logs in",
    "MLFLOW_SERVICE_PASSWORD": "MLflow: the user `service`, who only reads",
    "MLFLOW_SECRET_KEY": "MLflow: signs the forms of its pages",
}


def write_passwords(path: Path, force: bool = False) -> None:
    """Writes fresh passwords, readable by the owner alone.

    Raises:
        UserError: the file is there already, or cannot be written.
    """
    if path.exists() and not force:
        rule = "exists already, and its passwords are in use; --force writes new ones, which a started database ignores"
        raise UserError(Complaint(str(path), rule))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(_text())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(Complaint(str(path), "cannot be written", error.strerror)) from None


def _text() -> str:
    lines = [HEAD]
    for name, meaning in PASSWORDS.items():
        password = secrets.token_hex(24)  # letters and digits: it stands in addresses too
        if meaning:
            lines.append(f"# {meaning}\n")
        lines.append(f"{name}={'admin:' if name == 'PREFECT_AUTH_STRING' else ''}{password}\n")
    return "".join([*lines, SETTINGS])
