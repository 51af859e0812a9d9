"""The middle of the night: from ingested rows to a decided version.

validate → split → tokenize → search → evaluate → register → gate → promote
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from flows.turns import within
from overnight import problems
from overnight.config import Config
from overnight.data.ingest import Ingested
from overnight.data.store import read_cells
from overnight.errors import DataRefused
from overnight.home import Home
from overnight.intake import facts_of
from overnight.lineage import version_tags
from overnight.newbase import with_base
from overnight.nights import Night, last_accepted
from overnight.processes import cores
from overnight.schedule import Turn
from overnight.search.study import Direction
from overnight.search.trial import Job
from overnight.training.card import Card, finish_model_folder
from tasks.data import split, tokenize, validate
from tasks.model import gate, judge, promote, register
from tasks.search import search


def reach_decision(home: Home, config: Config, night: Night, rows: Ingested, turn: Turn | None = None) -> None:
    """From accepted rows to the decision; what is learnt on the way goes into the night's record."""
    problem, folder, model = problems.get(config.problem), night.folder, config.model

    with night.stage("validate"):
        previous = last_accepted(home, config.name)
        docs = folder / "data_docs"
        clean = validate(rows, config.validation, config.data.slices, config.problem, model, previous, folder, docs)
        night.update(data={**night.record["data"], **asdict(clean), "previous": previous})
        if not clean.accepted:
            raise DataRefused(*clean.why)

    with night.stage("split"):
        sides = split(clean, config.split, config.problem, folder / "rows")
        cells = {role: read_cells(sides.paths["train"], role) for role in problem.required_roles}
        facts = facts_of(problem, cells, model)
        counts = {"split": sides.rows, "near_duplicates": sides.near_duplicates}
        night.update(data={**night.record["data"], **counts}, facts=facts)
        metric = problem.check_metric(config.evaluation.metric or problem.default_metric, facts)

    with night.stage("tokenize"):
        bases = home.data / config.name / "bases"
        model = with_base(model, sides.paths["train"], problem.text_roles, bases, rows.fingerprint)
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
        limits = within(config.search, turn, home, config.name)
        folds = config.evaluation.cross_validation
        found = search(home, folder, config.name, limits, config.training, job, direction, folds)
        night.update(search=found, metric=metric)

    with night.stage("evaluate"):
        candidate = Path(found["checkpoint"])
        finish_model_folder(
            candidate, Card(config.problem, facts, model.max_length, metric), model.base, model.revision
        )
        judged = judge(
            home,
            config.name,
            candidate,
            Path(tokens["validation"].folder),
            Path(sides.paths["test"]),
            folder / "evaluation",
            config.problem,
            facts,
            metric,
            config.evaluation,
            config.data.slices,
            len(cores()),
            config.validation.show_examples,
        )
        ours, champion = {"trial": found["best"], "evaluation": judged["candidate"]}, judged["champion"]
        told = {name: judged[name] for name in ("comparison", "elsewhere", "samples")}
        night.update(candidate=ours, champion=champion, **told)

    with night.stage("register"):
        tags = version_tags(night.record)
        version = register(
            home, config.name, candidate, night.id, config.problem, tags, judged["candidate"], config.description
        )
        lineage = {**night.record["lineage"], "run": version.run_id}
        night.update(candidate={**ours, "version": version.number}, lineage=lineage)

    with night.stage("gate"):
        decision = gate(config.promotion, judged["candidate"], champion, judged["comparison"], config.problem)
        night.update(decision=decision.record())

    with night.stage("promote"):
        entry = promote(home, version, champion, decision, night.record)
        state = {"promote": "promoted", "keep": "kept", "wait": "waiting"}[decision.outcome]
        night.update(ledger=entry, state=state)
