"""The night: from raw text to a decided model version.

    overnight run configs/sentiment.yaml

reconcile → ingest → validate → split → tokenize → search → evaluate → register → gate → promote → report
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow

from overnight import problems
from overnight.config import Config, load_config
from overnight.data.ingest import Ingested
from overnight.data.store import read_columns
from overnight.errors import DataRefused
from overnight.home import Home
from overnight.lineage import lineage, version_tags
from overnight.nights import Night, begin_night, last_accepted, one_night_at_a_time, timed, unchanged
from overnight.processes import cores
from overnight.search.study import Direction
from overnight.search.trial import Job
from overnight.tracking import registry
from overnight.tracking.night import night_run
from overnight.training.predict import Card, finish_model_folder
from tasks.care import reconcile, report
from tasks.data import ingest, split, tokenize, validate
from tasks.model import gate, judge, promote, register
from tasks.search import search


@flow(name="retrain", flow_run_name="{config_path}", log_prints=False)
def retrain(config_path: str, overrides: list[str] | None = None, force: bool = False) -> dict[str, Any]:
    """Runs one night; returns its record.

    Raises:
        UserError: the config or the source is wrong.
        DataRefused: the data did not pass the validation.
        NightFailed: the night could not finish.
    """
    home = Home.from_environment()
    config = load_config(config_path, overrides or (), problems=problems.roles())
    stages: dict[str, float] = {}
    with one_night_at_a_time(home, config.name):
        with timed(stages, "reconcile"):
            reconcile(home, config.name)
        with timed(stages, "ingest"):
            rows = ingest(config.data, config.problem, home.data / config.name, f"{config_path}: data")
        why = None if force else unchanged(home, config, rows.fingerprint, lambda: registry.champion(home, config.name))
        if why:
            return {"model": config.name, "state": "skipped", "why": why, "stages": stages}
        night = begin_night(home, config, rows.fingerprint, forced=force, stages=stages)
        try:
            with night:
                night.update(data=asdict(rows), lineage=lineage(config_path))
                take_through(home, config, night, rows)
        finally:
            if night.record["state"] != "interrupted":
                with night.stage("report"):
                    report(home, night.folder, night.record)
        return night.record


def take_through(home: Home, config: Config, night: Night, rows: Ingested) -> None:
    """From accepted rows to the decision; what is learnt on the way goes into the night's record."""
    problem, folder, model = problems.get(config.problem), night.folder, config.model
    metric = config.evaluation.metric or problem.default_metric

    with night.stage("validate"):
        previous = last_accepted(home, config.name)
        docs = folder / "data_docs"
        clean = validate(rows, config.validation, config.data.slices, config.problem, model, previous, folder, docs)
        night.update(data={**night.record["data"], **asdict(clean)})
        if not clean.accepted:
            raise DataRefused(*clean.why)

    with night.stage("split"):
        sides = split(clean, config.split, config.problem, folder / "rows")
        facts = problem.facts(read_columns(sides.paths["train"], problem.required_roles))
        counts = {"split": sides.rows, "near_duplicates": sides.near_duplicates}
        night.update(data={**night.record["data"], **counts}, facts=facts)

    with night.stage("tokenize"):
        tokens = tokenize(sides, config.problem, model, facts, home.data / config.name / "tokens")

    with night.stage("search"):
        job = Job(
            config.problem,
            model.base,
            model.revision,
            tokens["train"].folder,
            tokens["validation"].folder,
            facts,
            metric,
        )
        direction: Direction = "minimize" if metric in problem.lower_is_better else "maximize"
        found = search(home, folder, config.name, config.search, config.training, job, direction)
        night.update(search=found, metric=metric)

    with night.stage("evaluate"):
        candidate = Path(found["checkpoint"])
        finish_model_folder(
            candidate, Card(config.problem, facts, model.max_length, metric), model.base, model.revision
        )
        champion = registry.champion(home, config.name)
        judged = judge(
            candidate,
            registry.download(home, champion) if champion else None,
            Path(sides.paths["test"]),
            folder / "evaluation",
            config.problem,
            facts["labels"],
            metric,
            config.evaluation,
            config.data.slices,
            cores(),
        )
        ours = {"trial": found["best"], "evaluation": judged["candidate"]}
        theirs = {"version": champion.number, "evaluation": judged["champion"]} if champion else None
        night.update(candidate=ours, champion=theirs, comparison=judged["comparison"])

    with night.stage("register"):
        run_id = night_run(home, config.name, night.id)[1]
        tags = version_tags(night.record, run_id)
        version = register(
            home, config.name, candidate, run_id, config.problem, tags, judged["candidate"], config.description
        )
        night.update(candidate={**ours, "version": version.number}, lineage={**night.record["lineage"], "run": run_id})

    with night.stage("gate"):
        decision = gate(config.promotion, judged["candidate"], judged["champion"], judged["comparison"], config.problem)
        night.update(decision=decision.record())

    with night.stage("promote"):
        entry = promote(home, version, champion.number if champion else None, decision, night.id)
        state = {"promote": "promoted", "keep": "kept", "wait": "waiting"}[decision.outcome]
        night.update(ledger=entry, state=state)
