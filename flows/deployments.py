"""The nights as Prefect deployments: one a config, started by its schedule or by an event that says the data drifted.

    for change in deploy(home, configs, Path.cwd(), complete=True): print(change)

What is deployed is what `prefect.yaml` says, so `prefect deploy --all` in the same folder does the same. Addresses of
servers are in neither: they may hold a password, so a worker takes them from its own environment.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flows.automations import Change, drift, silence, trigger_in_words, triggers_of
from flows.turns import end_dead_runs, thin_backlog
from flows.worker import POOL
from overnight.config import Config
from overnight.errors import Complaint, NightFailed
from overnight.home import Home

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

TAG = "overnight"
ENTRYPOINT, APPROVAL = "flows.retrain.retrain", "flows.approval.approve"
NOTICE = """\
# Written by `overnight deploy`, from the configs that have a schedule; written anew each time.
# `prefect deploy --all` in this folder applies it too, but for the automation that ends silent nights.
"""


def definitions(configs: Mapping[str, Config], pool: dict[str, Any]) -> list[dict[str, Any]]:
    """The `deployments:` of a prefect.yaml.

    Args:
        configs: path, relative to the project's folder → config with a schedule.
        pool: by `work_pool`.
    """
    return [_definition(path, config, pool) for path, config in configs.items()]


def approvals(configs: Mapping[str, Config], pool: dict[str, Any]) -> list[dict[str, Any]]:
    """As `definitions`: for models whose candidates wait for a person, what asks in Prefect's pages."""
    return [
        {
            "name": config.name,
            "description": f"Asks a person about a version of {config.name} that waits.",
            "tags": [TAG],
            "entrypoint": APPROVAL,
            "work_pool": deepcopy(pool),
        }
        for config in configs.values()
        if config.promotion.mode == "manual"
    ]


def work_pool(name: str = POOL, directory: str = "{{ $PWD }}", home: str = "{{ $OVERNIGHT_HOME }}") -> dict[str, Any]:
    """The `work_pool:` of a deployment.

    Args:
        directory: the project's folder; absent: wherever `prefect deploy` is called.
        home: what OVERNIGHT_HOME is where it is set; absent: a reference to the variable.
    """
    environment = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    if os.environ.get("OVERNIGHT_HOME"):
        environment["OVERNIGHT_HOME"] = home
    return {"name": name, "job_variables": {"working_dir": directory, "env": environment}}


def prefect_yaml(configs: Mapping[str, Config], pool: str = POOL) -> str:
    """The text of prefect.yaml."""
    place = work_pool(pool)
    facts = {"pull": [], "deployments": definitions(configs, place) + approvals(configs, place)}
    return NOTICE + yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=120)


def deploy(
    home: Home,
    configs: Mapping[str, Config],
    directory: Path,
    *,
    complete: bool,
    pool: str = POOL,
    check: bool = False,
) -> list[Change]:
    """Makes the Prefect server hold these deployments, their triggers, the work pool and the automation; idempotent.

    Args:
        configs: path → config with a schedule.
        directory: the project's folder, in which the nights run.
        complete: whether these are all of the folder: deployments of its other configs are then removed, but for those
            of other pools, whose folder is on another machine. Runs that were, and their history, stay.
        pool: the work pool, whose worker runs the nights.
        check: only tell.

    Raises:
        NightFailed: Prefect refuses or does not answer.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectException

    place = work_pool(pool, str(directory), str(home.root))
    wanted = {d["name"]: d for d in definitions(configs, place)}
    try:
        with get_client(sync_client=True) as client:
            there = {d.name: d for d in _ours(client)}
            changes = [Change("crashed", *dead) for dead in ([] if check else end_dead_runs(home, client))]
            changes += [_pool(client, pool, check), silence(client, check)]
            changes += [_apply(client, there.get(name), definition, check) for name, definition in wanted.items()]
            asking = {d["name"]: d for d in approvals(configs, place)}
            changes += [change for name in wanted for change in _ask(client, name, asking.get(name), check)]
            changes += [Change("paused", n, "in Prefect; it starts no night") for n in wanted if _paused(there.get(n))]
            for name, deployment in there.items():
                missed = 0 if check or name not in wanted else thin_backlog(client, deployment.id)
                if missed:
                    changes.append(Change("cancelled", name, f"{missed} missed runs; the newest runs for all"))
                here = deployment.job_variables.get("working_dir") == str(directory)
                here &= deployment.work_pool_name == pool
                if complete and here and name not in wanted:
                    if not check:
                        remove(client, deployment)
                    changes.append(Change("removed", name, "no config of this folder schedules it"))
            return changes
    except (PrefectException, httpx.HTTPError) as error:
        raise NightFailed(Complaint("Prefect", f"{type(error).__name__}: {' '.join(str(error).split())}")) from None


def remove(client: SyncPrefectClient, deployment: DeploymentResponse) -> None:
    """Removes a deployment, the automation that belongs to it, and what asks about its model."""
    client.delete_resource_owned_automations(f"prefect.deployment.{deployment.id}")
    client.delete_deployment(deployment.id)
    asking = _asking(client, deployment.name)
    if asking is not None:
        client.delete_deployment(asking.id)


def _definition(path: str, config: Config, pool: dict[str, Any]) -> dict[str, Any]:
    assert config.schedule is not None
    return {
        "name": config.name,
        "description": config.description or f"The nights of {config.name}.",
        "tags": [TAG],
        "entrypoint": ENTRYPOINT,
        "parameters": {"config_path": path},
        "schedules": [{"cron": config.schedule.cron, "timezone": config.schedule.timezone}],
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW"},
        "work_pool": deepcopy(pool),  # else YAML would refer from one deployment to the other
        "triggers": [drift(config.name)],
    }


def _apply(
    client: SyncPrefectClient, there: DeploymentResponse | None, definition: dict[str, Any], check: bool
) -> Change:
    name, schedule = definition["name"], definition["schedules"][0]
    after = _facts(definition)
    before = {} if there is None else _facts_of(client, there)
    differing = [f"{what} {before[what]} → {after[what]}" for what in before if before[what] != after[what]]
    if there is not None and not differing:
        return Change("unchanged", name, f"{schedule['cron']} {schedule['timezone']}")
    if not check:
        _runner_deployment(definition).apply()
    if there is None:
        return Change("created", name, f"{schedule['cron']} {schedule['timezone']}")
    return Change("updated", name, "; ".join(differing))


def _ask(client: SyncPrefectClient, name: str, definition: dict[str, Any] | None, check: bool) -> Iterator[Change]:
    """Makes, changes or removes what asks a person about a model's versions."""
    from prefect.deployments.runner import RunnerDeployment

    there, what = _asking(client, name), f"approval of {name}"
    if definition is None:
        if there is not None:
            if not check:
                client.delete_deployment(there.id)
            yield Change("removed", what, "its candidates wait for nobody")
        return
    pool, variables = definition["work_pool"]["name"], definition["work_pool"]["job_variables"]
    if there is not None and (there.work_pool_name, there.job_variables) == (pool, variables):
        yield Change("unchanged", what)
        return
    if not check:
        RunnerDeployment.from_entrypoint(
            APPROVAL,
            name=name,
            description=definition["description"],
            tags=definition["tags"],
            work_pool_name=pool,
            job_variables=variables,
        ).apply()
    yield Change("created" if there is None else "updated", what)


def _asking(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    from prefect.exceptions import ObjectNotFound

    from tasks.approval import FLOW

    try:
        return client.read_deployment_by_name(f"{FLOW}/{name}")
    except ObjectNotFound:
        return None


def _runner_deployment(definition: dict[str, Any]) -> Any:
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.events import DeploymentEventTrigger
    from prefect.schedules import Cron

    limit = definition["concurrency_limit"]
    return RunnerDeployment.from_entrypoint(
        definition["entrypoint"],
        name=definition["name"],
        description=definition["description"],
        tags=definition["tags"],
        parameters=definition["parameters"],
        schedules=[Cron(s["cron"], timezone=s["timezone"]) for s in definition["schedules"]],
        concurrency_limit=ConcurrencyLimitConfig(
            limit=limit["limit"], collision_strategy=ConcurrencyLimitStrategy(limit["collision_strategy"])
        ),
        work_pool_name=definition["work_pool"]["name"],
        job_variables=definition["work_pool"]["job_variables"],
        triggers=[DeploymentEventTrigger.model_validate(trigger) for trigger in definition["triggers"]],
    )


def _facts(definition: dict[str, Any]) -> dict[str, str]:
    """What is compared, in words."""
    from prefect.utilities.callables import parameter_schema

    from flows.retrain import retrain

    limit, trigger = definition["concurrency_limit"], definition["triggers"][0]
    return {
        "schedule": ", ".join(f"{s['cron']} {s['timezone']}" for s in definition["schedules"]),
        "entrypoint": definition["entrypoint"],
        "parameters": _said(definition["parameters"]),
        "limit": f"{limit['limit']} {limit['collision_strategy']}",
        "work pool": definition["work_pool"]["name"],
        "job variables": _said(definition["work_pool"]["job_variables"]),
        "description": definition["description"],
        "tags": _said(sorted(definition["tags"])),
        "trigger": trigger_in_words(trigger["name"], trigger["match"]["prefect.resource.id"], trigger["parameters"]),
        "signature": _said(parameter_schema(retrain).model_dump(mode="json", exclude_unset=True)),
    }


def _facts_of(client: SyncPrefectClient, deployment: DeploymentResponse) -> dict[str, str]:
    """The same of what the server holds."""
    limit, options = deployment.global_concurrency_limit, deployment.concurrency_options
    schedules = [s.schedule for s in deployment.schedules]
    return {
        "schedule": ", ".join(f"{getattr(s, 'cron', s)} {getattr(s, 'timezone', '')}" for s in schedules),
        "entrypoint": deployment.entrypoint or "none",
        "parameters": _said(deployment.parameters),
        "limit": f"{limit.limit if limit else 'none'} {options.collision_strategy.value if options else ''}",
        "work pool": deployment.work_pool_name or "none",
        "job variables": _said(deployment.job_variables),
        "description": deployment.description or "",
        "tags": _said(sorted(deployment.tags)),
        "trigger": ", ".join(triggers_of(client, deployment)) or "none",
        "signature": _said(deployment.parameter_openapi_schema),
    }


def _said(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _ours(client: SyncPrefectClient) -> list[DeploymentResponse]:
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    tagged = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(deployment_filter=tagged, limit=200, offset=len(found)):
        found += page
    return [d for d in found if d.entrypoint == ENTRYPOINT]


def _paused(deployment: DeploymentResponse | None) -> bool:
    return deployment is not None and (deployment.paused or not any(s.active for s in deployment.schedules))


def _pool(client: SyncPrefectClient, name: str, check: bool) -> Change:
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(name)
        return Change("unchanged", "work pool", name)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        if not check:
            client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        return Change("created", "work pool", f"{name}, of processes")
