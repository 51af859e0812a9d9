"""optuna-dashboard on the home's studies, for `overnight ui --optuna`.

with dashboard_server(home) as address:      # "http://127.0.0.1:PORT"
    ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from overnight.errors import Complaint, UserError
from overnight.home import Home
from overnight.services import LOOPBACK, free_port, start_server, stop_server

# the address of a study storage may hold a password, and arguments are for everybody to see
SERVE = f"""
import os
from optuna_dashboard import run_server
run_server(os.environ["OVERNIGHT_STUDY_STORAGE"], {LOOPBACK!r}, int(os.environ["OVERNIGHT_DASHBOARD_PORT"]))
"""


@contextmanager
def dashboard_server(home: Home) -> Iterator[str]:
    """The address of the dashboard, which is served for the length of this block.

    Raises:
        UserError: optuna-dashboard is not installed, or there is no study yet.
        NightFailed: when it does not answer in time; the text names its log file.
    """
    if find_spec("optuna_dashboard") is None:
        rule = "needs the package optuna-dashboard: pip install 'overnight[dashboard]'"
        raise UserError(Complaint("--optuna", rule, "not installed"))
    file = Path(home.study_storage.removeprefix("sqlite:///"))
    if "://" not in str(file) and not file.exists():  # the dashboard would make an empty file and die
        raise UserError(Complaint("--optuna", "there is no study yet; the first night makes one", str(file)))
    folder, port = home.folder("optuna"), free_port()
    record, address = folder / "server.json", f"http://{LOOPBACK}:{port}"
    stop_server(record)  # of a command that was killed
    environment = {"OVERNIGHT_STUDY_STORAGE": home.study_storage, "OVERNIGHT_DASHBOARD_PORT": str(port)}
    command = [sys.executable, "-c", SERVE]
    # any page under /dashboard is the dashboard's own
    start_server(command, record, folder / "server.log", f"{address}/dashboard/health", environment, {"ui": address})
    try:
        yield address
    finally:
        stop_server(record)
