"""`overnight models`, `promote`, `refuse`, `rollback`, `history`: versions, and who put which into production."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from overnight.cli import app
from overnight.cli.output import AsJson, ModelName, Reason, print_json, print_table, when
from overnight.errors import Complaint, UserError
from overnight.home import Home
from overnight.processes import TO_ASK, warm_up


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model; absent: all.")] = None,
    as_json: AsJson = False,
) -> None:
    """List versions with their aliases, metrics and lineage."""
    from overnight.tracking import registry, store

    home = Home.from_environment()
    store.prepare(home)
    names = [name] if name else registry.names(home)
    found = [version for one in names for version in registry.versions(home, one)]
    if as_json:
        print_json([_facts(version) for version in found])
        return
    columns = ("version", "aliases", "macro F1", "gate", "night", "created")
    for one in names:
        rows = [
            (
                v.number,
                ", ".join(v.aliases),
                _number(v.metrics.get("macro_f1")),
                v.tags.get("overnight.decision", ""),
                v.tags.get("overnight.night", "").removeprefix(f"{one}-"),
                when(v.created),
            )
            for v in found
            if v.name == one
        ]
        print_table(one, columns, rows, "no version yet")
    if not names:
        typer.echo("no model yet; `overnight run CONFIG` makes one")


@app.command()
def promote(
    name: ModelName,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Number of the version.")],
    reason: Reason,
    as_json: AsJson = False,
) -> None:
    """Make a version the champion, after a smoke test."""
    from overnight import approval
    from overnight.tracking import store

    warm_up(TO_ASK)  # while this process imports MLflow, which takes as long
    home = Home.from_environment()
    store.prepare(home)
    _moved(approval.promote(home, name, version, reason=reason, smoke=_smoke(home)), as_json)
    _settle(home, name)


@app.command()
def refuse(
    name: ModelName,
    version: Annotated[int, typer.Argument(metavar="VERSION", help="Number of the version that waits.")],
    reason: Reason,
    as_json: AsJson = False,
) -> None:
    """Keep a version out that waits for a person; the champion stays."""
    from overnight import approval
    from overnight.tracking import store

    home = Home.from_environment()
    store.prepare(home)
    entry = approval.refuse(home, approval.waiting(home, name, version), reason=reason)
    if as_json:
        print_json(entry.__dict__)
    else:
        typer.echo(f"{name}: version {version} is kept out; ledger entry {entry.n}")
    _settle(home, name)


@app.command()
def rollback(
    name: ModelName,
    reason: Reason,
    to: Annotated[int | None, typer.Option("--to", metavar="VERSION", help="Absent: the champion before this.")] = None,
    as_json: AsJson = False,
) -> None:
    """Bring an earlier version back, after a smoke test."""
    from overnight.tracking import ledger, store

    warm_up(TO_ASK)  # while this process imports MLflow, which takes as long
    home = Home.from_environment()
    store.prepare(home)
    _moved(ledger.rollback(home, name, reason=reason, to=to, smoke=_smoke(home)), as_json)
    _settle(home, name)


@app.command()
def history(
    name: ModelName,
    n: Annotated[int | None, typer.Argument(metavar="[N]", help="One entry, with the report of its gate.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the ledger: who, when, why, from which version to which; of one entry also what the gate saw."""
    from overnight.tracking import ledger, registry, store

    home = Home.from_environment()
    store.prepare(home)
    registry.versions(home, name)  # an unknown name is the user's mistake
    entries = ledger.read(home, name)
    if n is not None:
        _entry([entry for entry in entries if entry.n == n], name, n, as_json)
        return
    if as_json:
        print_json([entry.__dict__ for entry in entries])
        return
    rows = [(e.n, when(e.time), e.action, e.from_version, e.to_version, e.who, e.reason) for e in entries]
    print_table(f"History of {name}", ("n", "when", "what", "from", "to", "who", "why"), rows)


def _entry(entries: list[Any], name: str, n: int, as_json: bool) -> None:
    if not entries:
        raise UserError(Complaint(f"{name}: history", f"no such entry; `overnight history {name}` lists them", str(n)))
    if as_json:
        print_json([entry.__dict__ for entry in entries])
        return
    for entry in entries:  # two machines on one server may both have written this number
        gate = entry.gate or {}
        facts = [
            ("what", entry.action),
            ("when", when(entry.time)),
            ("who", entry.who),
            ("why", entry.reason),
            ("from", entry.from_version),
            ("to", entry.to_version),
            ("night", entry.night),
            *[(key, value) for key, value in gate.items() if key != "reasons"],
        ]
        print_table(f"Entry {n} of {name}", ("", ""), [fact for fact in facts if fact[1] is not None])
        rules = [("✓" if r["passed"] else "✗", r["rule"], r["text"]) for r in gate.get("reasons", ())]
        if rules:
            print_table("The gate", ("", "rule", "what it saw"), rules)


def _smoke(home: Home) -> Any:
    from overnight.scoring import smoke_in_child

    return lambda model: smoke_in_child(home, model)


def _settle(home: Home, name: str) -> None:
    """What follows from an answer or another champion: records of nights, and runs that ask in Prefect's pages."""
    from overnight.approval import settle
    from overnight.services import known_server

    try:
        for line in settle(home, name):
            typer.echo(line, err=True)
        if known_server(home):
            from flows.approval import resolve

            resolve(home, name)
    except Exception as error:  # it is done; what is left here, the next night does
        typer.echo(f"a run in Prefect's pages may still ask: {type(error).__name__}: {error}", err=True)


def _moved(entry: Any, as_json: bool) -> None:
    if as_json:
        print_json(entry.__dict__)
    else:
        before = "none" if entry.from_version is None else f"version {entry.from_version}"
        typer.echo(f"{entry.name}: champion is version {entry.to_version} (was {before}); ledger entry {entry.n}")


def _facts(version: Any) -> dict[str, Any]:
    facts = {key: getattr(version, key) for key in ("name", "number", "aliases", "created", "run_id", "metrics")}
    return {**facts, "tags": {k: v for k, v in version.tags.items() if k.startswith("overnight.")}}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
