"""A month: thirty nights of one model in a row, cleaned after each. What is left does not grow, and the story is whole.

python -m pytest -m slow tests/test_thirty_nights.py -s       # prints what each night left
OVERNIGHT_TEST_NIGHTS=14 python -m pytest -m slow tests/test_thirty_nights.py -s
"""

from __future__ import annotations

import os
import resource

import pytest
import yaml
from conftest import Project, make_rows, prefect_says

NIGHTS = int(os.environ.get("OVERNIGHT_TEST_NIGHTS", "30"))
KEPT = 5
SETTLED = 15
"""The night after which the home should have its size: what is kept of nights that were cut short is smaller."""
BAD, DRIFTED, BETTER, ROLLBACK = {7, 8, 16, 23}, 10, 4, 13
"""Nights with half the labels unknown; with shifted shares; from which training is not cut short; before which a person
rolls back."""


def rows_of(night: int):
    """The data of a night: six rows more than the night before had."""
    rows = make_rows(300 + 6 * night)
    if night in BAD:
        rows.loc[rows.index % 2 == 0, "label"] = "surprise"
    if night == DRIFTED:
        rows = rows[(rows.label != "plain") | (rows.index % 4 == 0)]
    return rows


def measure(project: Project) -> dict[str, int]:
    from overnight.unused import disk_usage

    return {
        "home": disk_usage([project.home]),
        "mlflow.db": (project.home / "mlflow" / "mlflow.db").stat().st_size,
        "artifacts": disk_usage([project.home / "mlflow" / "artifacts"]),
        "journal": (project.home / "optuna" / "studies.journal").stat().st_size,
        "nights": disk_usage([project.home / "nights"]),
        "data": disk_usage([project.home / "data"]),
        "folders": len(list((project.home / "nights").iterdir())),
    }


def run(project: Project, *arguments: str, code: int = 0) -> None:
    """One command, with more patience than other tests have: a busy machine fails no month."""
    done = project.start(*arguments)
    assert done.wait(1800) == code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "not cleaned" not in done.stderr, done.stderr


def flow_runs(project: Project, api: str) -> int:
    """Flow runs that Prefect still knows of this project."""
    wanted = {"flow_runs": {"name": {"any_": [str(project.config)]}}}
    return int(prefect_says("POST", f"{api}/flow_runs/count", json=wanted))


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_thirty_nights(tmp_path_factory, tiny_model, prefect_api):
    """The right champion each morning, a ledger that tells why, and after a month the disk of a fortnight."""
    project = Project(tmp_path_factory.mktemp("month"), tiny_model, prefect_api)
    facts = yaml.safe_load(project.config.read_text())
    facts["training"] |= {"epochs": 3}
    facts |= {"search": {"trials": 1}, "promotion": {"floor": 0.0}, "evaluation": {"resamples": 200}}
    project.write(facts | {"retention": {"nights": KEPT, "auto": True}})
    champion: int | None = None
    story: list[tuple[str, int | None, int]] = []
    sizes: dict[int, dict[str, int]] = {}
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    for night in range(1, NIGHTS + 1):
        rows_of(night).to_csv(project.folder / "rows.csv", index=False)
        if night == ROLLBACK:
            assert [what for what, _, _ in story].count("promote") >= 2, "there is a version to go back to"
            run(project, "rollback", "tiny", "--reason", "wrong on weekends")
            earlier = next(came for what, came, to in reversed(story) if what == "promote" and to == champion)
            story.append(("rollback", champion, earlier))
            champion = earlier
            assert project.champion() == champion
        weak = ["--set", "training.learning_rate=1e-5"] if night < BETTER else []
        run(project, "run", str(project.config), *weak, code=3 if night in BAD else 0)
        record = project.facts("report")
        if night in BAD:
            assert record["state"] == "refused" and "label" in record["why"]
        elif record["state"] == "promoted":
            story.append(("promote", champion, record["candidate"]["version"]))
            champion = record["candidate"]["version"]
        else:
            assert record["state"] == "kept"
            story.append(("keep", champion, record["candidate"]["version"]))
        if night == DRIFTED:
            assert not next(r for r in record["data"]["results"] if r["expectation"] == "label_share")["passed"]
        assert project.champion() == champion, "each morning"
        counts = {"versions": len(project.facts("models", "tiny")), "flow runs": flow_runs(project, prefect_api)}
        sizes[night] = measure(project) | counts
        shown = " ".join(f"{name} {size:,}" for name, size in sizes[night].items())
        print(f"night {night:2} {record['state']:8} champion {champion} {shown}", flush=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    print(f"processor seconds of ended children: {seconds:.0f}")

    entries = project.facts("history", "tiny")
    assert [(e["action"], e["from_version"], e["to_version"]) for e in entries] == story
    assert all(e["reason"] and e["who"] and (e["night"] or e["action"] == "rollback") for e in entries)
    assert {"promote", "keep", "rollback"} <= {e["action"] for e in entries} or NIGHTS < ROLLBACK
    ever = {number for what, came, to in story if what != "keep" for number in (came, to)} - {None}
    made = {to for what, _, to in story[-KEPT:]}
    assert ever <= {v["number"] for v in project.facts("models", "tiny")} <= ever | made
    assert max(size["folders"] for size in sizes.values()) <= KEPT + 1 + len(ever)
    assert sizes[NIGHTS]["flow runs"] <= KEPT + 1
    assert not [finding for finding in project.facts("doctor") if finding["state"] == "broken"]
    again = project.facts("clean", "tiny", "--apply")
    assert not sum(item["count"] for item in again["items"])
    if NIGHTS > SETTLED:
        then, now = sizes[SETTLED], sizes[NIGHTS]
        for name in ("mlflow.db", "journal", "nights", "data"):
            assert now[name] < 1.35 * then[name], name
        # champions are kept for ever, and how many there were is up to the data
        assert now["artifacts"] / now["versions"] < 1.35 * then["artifacts"] / then["versions"]
        assert now["home"] - now["artifacts"] < 1.35 * (then["home"] - then["artifacts"])
