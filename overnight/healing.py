"""What a killed night leaves behind, and how it is put right before the next one starts."""

from __future__ import annotations

from functools import partial

from overnight.approval import settle
from overnight.home import Home, write_json
from overnight.nights import KILLED, Night, night_records
from overnight.processes import RESULT
from overnight.scoring import smoke_in_child
from overnight.tracking import ledger, registry, runs, store


def heal(home: Home, name: str) -> list[str]:
    """Heals one model's state; the caller holds the model, so that no night of it is alive.

    Nights without a process are marked as interrupted (the next run may continue the latest), records that MLflow did
    not get are sent, its open runs are closed, half-made versions are deleted, what one of the ledger's two places has
    lost is copied from the other, an alias that somebody moved by hand is smoke-tested and written into the ledger, and
    questions to a person that are over are closed. Optuna's trials are healed by the search that continues or replaces
    them.

    Returns:
        What was done, one line each.

    Raises:
        TrackingUnavailable: when MLflow does not answer; what needs no MLflow is healed by then.
    """
    done = []
    records = night_records(home, name)
    for record in records:
        if record["state"] == "running":
            Night(home.nights / record["id"], record).update(state="interrupted", why=KILLED)
            done.append(f"night {record['id']} had no process: marked as interrupted")
    store.prepare(home)
    experiment_id = store.experiment(home, name)
    for record in records:
        waiting = runs.pending(home.nights / record["id"] / "trials")
        if waiting:
            for folder in waiting if record is not records[-1] else ():
                if not (folder / RESULT).exists():  # only the latest night can be continued
                    write_json(folder / RESULT, {"state": "stopped"})
            run_id = runs.open_night(home, experiment_id, record["id"])
            sent = [runs.sync_trial(home, experiment_id, run_id, folder) for folder in waiting]
            done.append(f"night {record['id']}: sent the records of {len(sent)} trials to MLflow")
    # on a shared server the nights of other machines run, whose processes cannot be seen from here
    ours = None if home.embedded_tracking else {record["id"] for record in records}
    done += [f"MLflow run {run} had no process: closed" for run in runs.heal(home, experiment_id, ours)]
    if name in registry.names(home):
        done += [f"version {number} was half-made: deleted" for number in registry.heal_versions(home, name, ours)]
        copied = ledger.rebuild(home, name)
        if copied:
            done.append(f"{copied} ledger entries stood in one of two places only: copied into the other")
        moved = ledger.observe(home, name, smoke=partial(smoke_in_child, home))
        if moved:
            done.append(f"the champion alias was moved by other means: {moved.reason}")
        done += settle(home, name, overdue=True)
    return done
