"""From the best checkpoint to a decision: evaluate, register, gate, promote."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from prefect import task
from prefect.cache_policies import NO_CACHE

from overnight import problems
from overnight.config import Evaluation as EvaluationSection
from overnight.config import Promotion
from overnight.evaluation import Comparison, Evaluation, compare, evaluate
from overnight.generalisation import Carried, judge_elsewhere
from overnight.home import Home
from overnight.problems.base import Facts
from overnight.processes import run_child
from overnight.progress import emit
from overnight.promotion import Decision, decide
from overnight.report import confusion_matrix_png, decision_markdown, model_markdown, version_markdown
from overnight.samples import samples
from overnight.scoring import PREDICTIONS, SMOKE_TEXT, score_models, smoke_in_child
from overnight.tracking import ledger, registry
from overnight.tracking.night import night_run, pages_of
from overnight.tracking.registry import Version
from overnight.tracking.store import TrackingUnavailable
from tasks.artifacts import markdown, table

AWAY: list[float] = [5, 20, 60, 120, 300]
"""Seconds between the attempts while a server does not answer: minutes in all, as a restart takes."""


def server_away(task: Any, run: Any, state: Any) -> bool:
    """Retry while MLflow does not answer; anything else will not pass by itself."""
    try:
        state.result()
    except TrackingUnavailable:
        return True
    except Exception:
        return False
    return False


@task(name="evaluate", cache_policy=NO_CACHE, retries=5, retry_delay_seconds=AWAY, retry_condition_fn=server_away)
def judge(
    home: Home,
    name: str,
    candidate: Path,
    validation: Path,
    test: Path,
    folder: Path,
    problem: str,
    facts: Facts,
    metric: str,
    section: EvaluationSection,
    slices: tuple[str, ...],
    threads: int,
    quote: bool = False,
) -> dict[str, Any]:
    """Scores candidate and champion on the same test rows and compares them.

    Args:
        validation: tokenized rows, for what is tuned after training; `test`: Parquet file.
        quote: whether texts of the data may be told.

    Returns:
        {"candidate": Evaluation, "champion": {"version", "evaluation"} | None, "comparison": Comparison | None,
        "elsewhere": [Carried], "samples": [Sample]}
    """
    import pandas as pd

    kind = problems.get(problem)
    champion = registry.champion(home, name)
    models = {"candidate": str(candidate)}
    if champion:
        models["champion"] = str(registry.download(home, champion))
    roles = list(kind.text_roles)
    options: dict[str, Any] = {"rows": str(test), "text_roles": roles, "validation": str(validation), "metric": metric}
    scored = run_child(score_models, folder, threads, models=models, candidate="candidate", **options)
    predictions = json.loads((folder / PREDICTIONS).read_text())
    rows = pd.read_parquet(test)
    targets = [kind.truth(cell) for cell in rows[kind.target]]
    columns = {name: rows[name].tolist() for name in slices}
    options = {"metric": metric, "confidence": section.confidence, "resamples": section.resamples}

    def evaluation(name: str) -> Evaluation:
        latency = scored["latency"][name]
        return evaluate(kind, facts, targets, predictions[name], slices=columns, latency=latency, **options)

    found: dict[str, Any] = {"candidate": evaluation("candidate"), "champion": None, "comparison": None}
    if champion:
        theirs = json.loads((Path(models["champion"]) / "overnight.json").read_text())["facts"]
        found["champion"] = {"version": champion.number, "evaluation": evaluation("champion")}
        found["comparison"] = compare(
            kind,
            facts,
            targets,
            predictions["candidate"],
            predictions["champion"],
            champion_facts=theirs,
            lower_is_better=metric in kind.lower_is_better,
            **options,
        )
    sets = judge_elsewhere(section.also_on, kind, facts, models, folder / "elsewhere", threads, options)
    if sets:
        table("also_on", list(map(_row, sets)), f"{metric} on data of elsewhere")
    found["elsewhere"] = sets
    found["samples"] = []
    if quote and kind.generates:
        texts = {role: rows[role].tolist() for role in dict.fromkeys((*roles, kind.target))}
        found["samples"] = samples(texts, kind.target, predictions)
    markdown("evaluation", _evaluation_markdown(found["candidate"]), f"The candidate on {len(targets):,} test rows")
    return found


@task(name="register", cache_policy=NO_CACHE, retries=5, retry_delay_seconds=AWAY, retry_condition_fn=server_away)
def register(
    home: Home,
    name: str,
    model: Path,
    night: str,
    problem: str,
    tags: Mapping[str, Any],
    evaluation: Evaluation,
    description: str,
) -> Version:
    """Makes the candidate a version of the registered model; retried, since a server may be away for minutes."""
    inputs = problems.get(problem).text_roles
    run_id = night_run(home, name, night)[1]
    version = registry.register(
        home,
        name,
        model,
        run_id=run_id,
        inputs=inputs,
        example={role: [SMOKE_TEXT] for role in inputs},  # never a text of the data
        tags={**tags, "overnight.parent_run": run_id},
        metrics={key: metric["value"] for key, metric in evaluation["metrics"].items() if metric["value"] is not None},
        description=description,
    )
    registry.set_alias(home, name, registry.CANDIDATE, version.number)
    markdown("version", f"**{name}** version **{version.number}**, alias `candidate`", "The candidate")
    return version


@task(name="gate", cache_policy=NO_CACHE)
def gate(
    promotion: Promotion,
    candidate: Evaluation,
    champion: Mapping[str, Any] | None,
    comparison: Comparison | None,
    problem: str,
) -> Decision:
    """Decides, and shows the decision."""
    worse = candidate["metric"] in problems.get(problem).lower_is_better
    decision = decide(
        promotion, candidate, champion["evaluation"] if champion else None, comparison, lower_is_better=worse
    )
    markdown("decision", decision_markdown(decision.record()), decision.outcome)
    return decision


@task(name="promote", cache_policy=NO_CACHE, retries=5, retry_delay_seconds=AWAY, retry_condition_fn=server_away)
def promote(
    home: Home, version: Version, champion: Mapping[str, Any] | None, decision: Decision, record: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes the decision on the version and into the ledger, and moves the alias when it says so.

    Args:
        record: the night's, of which the descriptions in MLflow tell.
    """
    night = str(record["id"])
    outcome = decision.record()
    tags = {"overnight.decision": decision.outcome, "overnight.reasons": json.dumps(outcome["reasons"])[:4900]}
    registry.set_tags(home, version.name, version.number, tags)
    why = "; ".join(reason.text for reason in decision.reasons if reason.passed == (decision.would == "promote"))
    if decision.outcome == "promote":
        entry = ledger.promote(
            home,
            version.name,
            version.number,
            reason=why,
            smoke=lambda model: smoke_in_child(home, model),
            who="overnight",
            night=night,
            gate=outcome,
        )
    else:
        entry = ledger.record(
            home,
            version.name,
            "keep",
            from_version=champion["version"] if champion else None,
            to_version=version.number,
            reason=f"{'waits for a person' if decision.outcome == 'wait' else 'kept'}: {why}",
            who="overnight",
            night=night,
            gate=outcome,
        )
    try:
        _describe(home, version, decision, record)
    except Exception as error:  # the decision stands, whatever MLflow's pages say of it
        emit(warning=f"version {version.number} is not described in MLflow: {type(error).__name__}: {error}")
    return {"n": entry.n, "action": entry.action, "reason": entry.reason}


def _describe(home: Home, version: Version, decision: Decision, record: Mapping[str, Any]) -> None:
    night = str(record["id"])
    pages = pages_of(*night_run(home, version.name, night))
    told = version_markdown(cast(Any, record), decision.outcome, pages, home.nights / night)
    registry.set_description(home, version.name, told, version.number)
    registry.set_description(home, version.name, model_markdown(version.name, record["config"]["description"]))


def _evaluation_markdown(evaluation: Evaluation) -> str:
    rows = [
        f"| {name} | {_number(m['value'])} | {_number(m['low'])} | {_number(m['high'])} |"
        for name, m in evaluation["metrics"].items()
    ]
    lines = ["| metric | value | low | high |", "|---|---|---|---|", *rows]
    if evaluation["confusion"]:
        picture = base64.b64encode(confusion_matrix_png(evaluation["confusion"])).decode()
        lines = [f"![confusion matrix](data:image/png;base64,{picture})", "", *lines]
    return "\n".join(lines)


def _row(one: Carried) -> dict[str, Any]:
    """A set of other data, for a table artifact."""
    values = {of: _number((one[of] or {"value": None})["value"]) for of in ("champion", "candidate")}
    return {"data": one["name"], "rows": one["rows"], "left out": one["left_out"], **values, "why not": one["error"]}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
