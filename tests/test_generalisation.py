"""How far a score carries: folds of the training rows, data of elsewhere, and a night that tells of both."""

from __future__ import annotations

import numpy as np
import yaml
from conftest import Project, make_rows
from hypothesis import given
from hypothesis import strategies as st

from overnight.training import data


@given(windows=st.lists(st.integers(1, 3), min_size=6, max_size=30), count=st.integers(2, 5), seed=st.integers(0, 99))
def test_folds_part_the_rows(tmp_path_factory, windows, count, seed):
    """Every row is judged once and never learnt from then, with all its windows, numbered from 0 without gaps."""
    row = [number for number, size in enumerate(windows) for _ in range(size)]
    features = {"input_ids": [[place] for place in range(len(row))], "row": row, "labels": row}
    rows = data.write(tmp_path_factory.mktemp("rows"), [features], {})
    judged = []
    for learnt, held in data.folds(rows, count, seed):
        own, others = set(held.column("labels").tolist()), set(learnt.column("labels").tolist())
        assert not own & others and own | others == set(row) and len(learnt) + len(held) == len(row)
        judged += sorted(own)
        for part in (learnt, held):
            assert sorted(set(part.column("row").tolist())) == list(range(len(set(part.column("labels").tolist()))))
            for i in range(len(part)):
                assert part[i]["row"] == part.column("row")[i] and part[i]["labels"] == part.column("labels")[i]
    assert sorted(judged) == list(range(len(windows)))


def test_folds_of_rows_without_windows(tmp_path):
    """A feature is a row where nothing says otherwise."""
    rows = data.write(tmp_path, [{"input_ids": [[1], [2, 3], [4]], "labels": [0, 1, 0]}], {})
    parts = data.folds(rows, 3, 1)
    assert sorted(int(held[0]["input_ids"][0]) for _, held in parts) == [1, 2, 4]
    assert all(np.array_equal(learnt.lengths, [len(learnt[i]["input_ids"]) for i in range(2)]) for learnt, _ in parts)


def test_a_night_tells_of_both(tmp_path, tiny_model, prefect_api):
    """Each fold has a value; other data are judged with their labels translated; what cannot be read costs nothing."""
    project = Project(tmp_path, tiny_model, prefect_api)
    other = make_rows(60, seed=9).replace({"label": {"good": "fine"}})
    other.loc[:4, "label"] = "surprise"
    other.rename(columns={"text": "body"}).to_csv(tmp_path / "other.csv", index=False)
    facts = yaml.safe_load(project.config.read_text())
    replace = {"label": {"fine": "good"}}
    facts["evaluation"] = {
        "cross_validation": 2,
        "also_on": [
            {"name": "others", "data": {"source": "other.csv", "columns": {"text": "body"}, "replace": replace}},
            {"name": "nowhere", "data": {"source": "nothing.csv"}},
        ],
    }
    facts["search"] = {"trials": 1}
    project.write(facts)
    record = project.facts("run", "tiny.yaml")
    folds = record["search"]["folds"]
    assert folds["metric"] == "macro_f1" and len(folds["folds"]) == 2
    assert folds["mean"] == sum(folds["folds"]) / 2 > 0.4 and folds["sd"] >= 0
    others, nowhere = record["elsewhere"]
    assert (others["rows"], others["left_out"], others["champion"], others["error"]) == (55, 5, None, None)
    assert others["candidate"]["low"] <= others["candidate"]["value"] <= others["candidate"]["high"]
    assert others["candidate"]["value"] > 0.4
    assert nowhere["candidate"] is None and "no such file or folder" in nowhere["error"]
    page = (project.home / "nights" / record["id"] / "report.html").read_text()
    assert "On other data" in page and "over 2 folds" in page and "no such file or folder" in page
