"""The golden set: a version that no longer answers as on the night it was made does not get into production."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from overnight import problems
from overnight.errors import NightFailed
from overnight.golden import GOLDEN, TOLERANCE, check_golden, compare, golden_texts, write_golden
from overnight.home import Home
from overnight.scoring import score_models, smoke_in_child
from overnight.settings import Training
from overnight.training.card import Card, finish_model_folder
from overnight.training.models import load_tokenizer
from overnight.training.predict import Scorer

LABELS = ["bad", "good", "plain"]
MAX_LENGTH = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, tiny_rows) -> Path:
    """A model folder as the night's evaluation leaves it: with its golden set."""
    folder = tmp_path_factory.mktemp("made") / "best"
    problem = problems.get("sequence-classification")
    torch.manual_seed(3)
    model = problem.load_model(str(tiny_model), {"labels": LABELS}, Training())
    model.classifier.weight.data *= 100  # an untrained head says a third for everything
    model.save_pretrained(folder)
    finish_model_folder(folder, Card(problem.name, {"labels": LABELS}, MAX_LENGTH, "macro_f1"), str(tiny_model))
    rows = folder.with_name("rows.parquet")
    tiny_rows[:20].to_parquet(rows)
    models = {"candidate": str(folder)}
    score_models(folder.parent, models=models, rows=str(rows), text_roles=["text"], candidate="candidate")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def prediction(label: str, good: float) -> dict:
    return {"label": label, "score": max(good, 1 - good), "scores": {"good": good, "bad": 1 - good}}


def test_texts_are_drawn_from_the_tokenizer(made, tiny_rows):
    """Sixteen different texts of several lengths, the same at every call, none of them a row of the data."""
    tokenizer = load_tokenizer(str(made))
    texts = [row["text"] for row in golden_texts(tokenizer, ["text"], MAX_LENGTH)]
    assert texts == [row["text"] for row in golden_texts(tokenizer, ["text"], MAX_LENGTH)]
    assert len(set(texts)) == 16 and not set(texts) & set(tiny_rows.text)
    lengths = [len(tokenizer(text)["input_ids"]) for text in texts]
    assert min(lengths) < 10 and max(lengths) > MAX_LENGTH, "the last one is cut"
    assert not any("##" in text or "[" in text for text in texts)
    pairs = golden_texts(tokenizer, ["question", "context"], MAX_LENGTH)
    assert all(set(pair) == {"question", "context"} and pair["question"] != pair["context"] for pair in pairs)


def test_the_night_leaves_a_set_that_the_model_passes(made):
    """What the evaluation wrote names device and number format, and holds on one thread as on all."""
    facts = json.loads((made / GOLDEN).read_text())
    assert facts["computed"]["device"] == "cpu" and facts["computed"]["dtype"] == "float32"
    assert len(facts["texts"]) == len(facts["predictions"]) == 16
    assert check_golden(made, Scorer(made)) == 16


@pytest.mark.parametrize("damage", ["weights", "vocabulary", "labels"])
def test_a_damaged_version_fails_its_smoke_test(folder, tmp_path, damage):
    """It loads and its scores are probabilities, but they are not those it was promoted for: the old test passed it."""
    if damage == "weights":
        weights = load_file(folder / "model.safetensors")
        weights["classifier.weight"] *= 1.5
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif damage == "vocabulary":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        codes = tokenizer["model"]["vocab"]
        words = [word for word in codes if word.isalpha() and len(word) > 1]
        for word, other in zip(words, reversed(words), strict=True):
            if word < other:
                codes[word], codes[other] = codes[other], codes[word]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    else:
        card = json.loads((folder / "overnight.json").read_text())
        card["facts"]["labels"] = LABELS[::-1]
        (folder / "overnight.json").write_text(json.dumps(card))
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    with pytest.raises(
        NightFailed, match=r"\d+ of 16 golden texts are answered otherwise.* scores up to (0\.\d+|1) away"
    ):
        smoke_in_child(home, folder)
    (folder / GOLDEN).unlink()
    smoke_in_child(home, folder)


def test_smoke_test_after_a_good_one(made, folder, tmp_path):
    """The verdict on a model is never that on the model before it; what failed leaves its log, what passed nothing."""
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    smoke_in_child(home, made)
    assert not list((home.root / "smoke").iterdir())
    (folder / GOLDEN).write_text('{"texts": [')
    with pytest.raises(NightFailed, match="golden.json cannot be read"):
        smoke_in_child(home, folder)
    assert list((home.root / "smoke").glob("*/worker.log"))


def test_a_version_without_a_golden_set_passes(folder):
    """Models of earlier versions of overnight have none."""
    (folder / GOLDEN).unlink()
    assert check_golden(folder, Scorer(folder)) == 0


def test_writing_twice_changes_nothing(made):
    """A retried evaluation writes the same set."""
    before = (made / GOLDEN).read_text()
    write_golden(made, Scorer(made))
    assert compare(json.loads(before)["predictions"], json.loads((made / GOLDEN).read_text())["predictions"])[0] == 0
    assert json.loads(before)["texts"] == json.loads((made / GOLDEN).read_text())["texts"]


@pytest.mark.parametrize(
    ("ours", "theirs", "wrong"),
    [
        (prediction("good", 0.9), prediction("good", 0.9 + TOLERANCE / 2), 0),
        (prediction("good", 0.9), prediction("good", 0.9 + TOLERANCE * 2), 1),
        (prediction("good", 0.5002), prediction("bad", 0.4998), 0),
        (prediction("good", 0.9), prediction("bad", 0.9), 1),
        (prediction("good", 0.9), prediction("good", float("nan")), 1),
        (prediction("good", 0.9), {"label": "good", "score": 0.9, "scores": {"good": 0.9}}, 1),
        ([{"start": 3, "end": 7, "word": "a", "score": 0.5}], [{"start": 3, "end": 7, "word": "a", "score": 0.5}], 0),
        ([{"start": 3, "end": 7, "word": "a", "score": 0.5}], [{"start": 3, "end": 8, "word": "a", "score": 0.5}], 1),
        ({"text": "a", "entities": []}, {"text": "a", "entities": [{"score": 0.5}]}, 1),
    ],
)
def test_what_counts_as_another_answer(ours, theirs, wrong):
    """Scores may move by the tolerance, labels only between near-ties, and all else not at all."""
    assert compare([ours, ours], [ours, theirs])[0] == wrong
    assert compare([ours], [ours]) == (0, 0.0)


def test_missing_answers_are_wrong_ones():
    """A model that answers fewer texts than it was asked."""
    assert compare([prediction("good", 0.9)] * 3, [prediction("good", 0.9)])[0] == 2
