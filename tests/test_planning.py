"""`overnight plan`: what a night would do."""

from __future__ import annotations

import json

import pytest
from conftest import make_rows

from overnight.config import load_config
from overnight.home import Home
from overnight.planning import plan_night


@pytest.fixture
def planned(tmp_path, tiny_model):
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})

    def plan(problem: str, words: int):
        rows = make_rows(60)
        rows["text"] = [" ".join([text] * 20).split(" ") for text in rows.text]
        rows["text"] = [" ".join(text[:words]) for text in rows.text]
        rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
        config = tmp_path / "m.yaml"
        facts = {
            "name": "m",
            "problem": problem,
            "model": {"base": str(tiny_model), "max_length": 32},
            "data": {"source": str(tmp_path / "rows.jsonl")},
            "training": {"epochs": 500, "batch_size": 8},
            "search": {"trials": 3, "minutes": 1000},
        }
        config.write_text(json.dumps(facts))
        folder = tmp_path / f"plan-{problem}-{words}"
        return plan_night(home, load_config(config), "m.yaml: data", folder)

    return plan


def test_a_trial_is_its_rows_at_the_measured_speed(planned):
    """Rows that fall to training, times epochs, through the speed."""
    found = planned("sequence-classification", 12)
    assert found["rows"] == 60 and found["train"] == 42
    assert found["trial_minutes"] == pytest.approx(42 * 500 / found["samples_per_second"] / 60, rel=0.02, abs=0.01)
    assert found["search_minutes"] == found["trial_minutes"], "nothing is searched: one trial"
    assert "1, each at most" in found["lines"]["trials"]


def test_windows_of_long_texts_count(planned):
    """A text that is read in several windows takes as many times as long."""
    found = planned("masked-lm", 100)
    assert found["trial_minutes"] * 60 * found["samples_per_second"] / 500 > 3 * 42
