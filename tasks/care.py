"""Before and after the work: reconcile what an earlier night left, the morning report, and cleaning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from overnight.cleaning import clean as clean_home
from overnight.config import Retention
from overnight.healing import heal
from overnight.home import Home
from overnight.progress import emit
from overnight.report import night_markdown, write_report
from overnight.services import mlflow_pages
from overnight.tracking import ledger
from overnight.tracking.night import DOCS, REPORT, finish_night, pages_of
from overnight.tracking.store import TrackingUnavailable
from tasks.artifacts import link, markdown, table
from tasks.history import delete_flow_runs


@task(name="reconcile", cache_policy=NO_CACHE)
def reconcile(home: Home, name: str) -> list[str]:
    """Heals what a killed night left. MLflow being away is no reason not to train: it is asked again later."""
    try:
        healed = heal(home, name)
        doubt = ledger.doubt(home, name)
        if doubt:
            healed.append(doubt)
            emit(warning=doubt)
    except TrackingUnavailable as error:
        healed = [str(error)]
        emit(warning=str(error))
    table("reconcile", [{"what": line} for line in healed or ["nothing to heal"]], "What earlier nights left")
    return healed


def _links(home: Home, record: Mapping[str, Any], page: Path, experiment_id: str, run_id: str) -> None:
    """Where the night is told: the page, and MLflow's pages where they are served."""
    name, number = str(record["model"]), (record.get("candidate") or {}).get("version")
    link("report-page", page.as_uri(), "report.html", "The morning report, on the machine of the night")
    served = home.mlflow_pages or mlflow_pages(home)  # a browser may know the server by another address
    if served is None:
        return
    run = pages_of(experiment_id, run_id)["run"]
    link("mlflow-run", f"{served}/{run}", str(record["id"]), "The night's run in MLflow")
    if number is not None:
        where = f"{served}/#/models/{name}/versions/{number}"
        link("mlflow-version", where, f"{name} version {number}", "The candidate in MLflow's registry")


@task(name="report", cache_policy=NO_CACHE)
def report(home: Home, folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """Writes the morning report: an HTML page, a page in Prefect, and both on the night's run in MLflow.

    The night is decided by now: whatever breaks here is said, and changes nothing.
    """
    page, text, sent = folder / "report.html", "", "yes"
    try:
        text = night_markdown(cast(Any, record))
        markdown("report", text, str(record["state"]))
        write_report(cast(Any, record), folder)
    except Exception as error:
        emit(warning=f"the report could not be drawn: {type(error).__name__}: {error}")
    try:
        run = finish_night(
            home,
            record,
            text,
            {
                page: REPORT,
                folder / "confusion_matrix.png": REPORT,
                folder / "night.json": REPORT,
                folder / "config.json": "",
                folder / "data_docs": DOCS,
            },
        )
        _links(home, record, page, *run)
    except TrackingUnavailable as error:
        sent = str(error)
        emit(warning=sent)
    return {"page": str(page), "sent": sent}


@task(name="clean", cache_policy=NO_CACHE)
def clean(home: Home, name: str, keep: Retention) -> None:
    """Removes what the last nights do not need. The night is over by now: whatever breaks here changes nothing."""
    try:
        done = clean_home(home, {name: keep}, apply=True, forget_flow_runs=delete_flow_runs)
    except Exception as error:
        emit(warning=f"not cleaned: {type(error).__name__}: {error}")
        return
    rows = [{"what": i.what, "how many": i.count, "bytes": i.bytes} for one in done.values() for i in one.items]
    table("clean", rows, f"What went; the last {keep.nights} nights stay")


@contextmanager
def cleaned_afterwards(home: Home, name: str, retention: Retention) -> Iterator[None]:
    """Cleans behind the block, which holds the model, if the config wants that; an interrupted night just ends."""
    try:
        yield
    except Exception:
        if retention.auto:
            clean(home, name, retention)
        raise
    if retention.auto:
        clean(home, name, retention)
