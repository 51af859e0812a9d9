"""Right-to-left texts, emoji, accents and scripts without spaces: from raw rows to a model that says where in a text
something stands, by the service and in bulk, in characters of the text as it was sent."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path

import pytest
from starlette.testclient import TestClient
from test_registry import register

from overnight import problems
from overnight.bulk.run import Options as BulkOptions
from overnight.bulk.run import score_file
from overnight.config import Data
from overnight.data.ingest import ingest
from overnight.data.store import read_columns
from overnight.data.tokenization import tokenize
from overnight.home import Home
from overnight.serving.app import create_app
from overnight.serving.options import Options
from overnight.settings import Training
from overnight.tracking import registry
from overnight.training import data
from overnight.training.card import Card, finish_model_folder
from overnight.training.fit import fit
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.predict import Scorer
from overnight.training.scratch import make_base

PIECES = [
    ("وصل ", "أحمد", " إلى القاهرة"),
    ("وَصَلَ  ثم غادر ", "مُحَمَّد", " أمس."),
    ("אתמול,  בערב ", "דנה", " נסעה לחיפה"),
    ("\u200fשָׁלוֹם\n", "יוסי", "! hello (ok)"),
    ("‫نص‬  می‌گوید ", "سارا", " در ۱۴۰۰"),
    ("👩🏽\u200d🚀  ", "👨\u200d👩\u200d👧\u200d👦", " 🇩🇪🇫🇷"),
    ("❤\ufe0f \u200b ", "👍🏿", " ok"),
    ("🙂🙂  🇬🇷", "🏴\u200d☠\ufe0f", "🇨🇭"),
    ("q\u0323\u0307 ", "x\u0302y", " z"),
    ("我昨天 \u3000 住在", "北京", "，他也是。"),
    ("昨日、", "東京タワー", "に行きました"),
    ("ฉันอยู่ที่", "กรุงเทพ", "มานาน"),
    ("मैं  ", "दिल्ली", " में हूँ।"),
    ("나는  ", "서울", " 에 산다"),
]
"""What stands before, the part to be found, what stands behind."""
TEXTS = ["".join(pieces) for pieces in PIECES]
PLACES = [(len(before), len(before) + len(part)) for before, part, _ in PIECES]
QUESTION = "who, what or where?"


def of_spans(text: str, start: int, end: int) -> dict:
    return {"text": text, "entities": [[start, end, "x"]]}


def of_questions(text: str, start: int, end: int) -> dict:
    return {"question": QUESTION, "context": text, "answers": [{"text": text[start:end], "start": start}]}


def span(answer: dict) -> list[tuple[int, int]]:
    return [(one["start"], one["end"]) for one in answer["entities"]]


def answered(answer: dict) -> list[tuple[int, int]]:
    return [] if answer["start"] is None else [(answer["start"], answer["end"])]


CASES = {"token-classification": (of_spans, span, "f1"), "question-answering": (of_questions, answered, "exact_match")}


@pytest.fixture(scope="module", params=CASES)
def learnt(request, tmp_path_factory):
    """The problem, and a model that was taught the rows by heart: ingested, encoded, trained, finished."""
    folder = tmp_path_factory.mktemp(request.param)
    problem = problems.get(request.param)
    make, _, metric = CASES[request.param]
    rows = [make(text, *place) for text, place in zip(TEXTS, PLACES, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ingest(Data(source=str(folder / "rows.jsonl")), folder / "rows", problem)
    cells = read_columns(made.path, problem.required_roles)
    assert all(cell is not None for column in cells.values() for cell in column), "no row is refused"
    facts = problem.facts(cells)
    texts = [text for role in problem.text_roles for text in cells[role]]
    shape = {"architecture": "bert", "layers": 2, "width": 64, "heads": 2, "vocabulary": 800, "length": 96}
    base = make_base(folder / "base", texts, **shape)
    tokenized = tokenize(made.path, problem, load_tokenizer(str(base)), facts, 96, folder / "tokens")
    taught = data.open(Path(tokenized.folder))
    training = Training(
        epochs=150, batch_size=8, learning_rate=2e-3, dropout=0.0, evaluations_per_epoch=1, patience=150,
        precision="float32",
    )  # fmt: skip
    result = fit(
        problem, ModelReference(str(base)), facts, taught, taught, training, folder=folder / "run", metric=metric
    )
    assert result["value"] == 1.0, "else nothing below would mean much"
    finish_model_folder(folder / "run" / "best", Card(problem.name, facts, 96, metric), str(base))
    return problem, folder / "run" / "best"


def asked(problem) -> list[dict[str, str]]:
    text_role = problem.text_roles[-1]
    return [dict.fromkeys(problem.text_roles, QUESTION) | {text_role: text} for text in TEXTS]


def found_in(problem, answers: list[dict]) -> list[list[str]]:
    """What stands at the places of the answers, in the texts as they were sent."""
    places = CASES[problem.name][1]
    return [[text[a:b] for a, b in places(answer)] for text, answer in zip(TEXTS, answers, strict=True)]


WANTED = [[part] for _, part, _ in PIECES]


def test_of_the_model(learnt):
    """Of the raw text, whatever cleaning does to it before training."""
    problem, folder = learnt
    answers = Scorer(folder).predict_texts(asked(problem))
    assert found_in(problem, answers) == WANTED
    if problem.name == "question-answering":
        assert [[answer["answer"]] for answer in answers] == WANTED


def test_decomposed_letters(learnt):
    """Accents that training would compose: whatever is answered stands where it says, in the text as it was sent."""
    problem, folder = learnt
    role = problem.text_roles[-1]
    texts = ["Zoe\u0308 " + "  e\u0301" * count + f" {text}" for count, text in enumerate(TEXTS)]
    rows = [row | {role: text} for row, text in zip(asked(problem), texts, strict=True)]
    for text, answer in zip(texts, Scorer(folder).predict_texts(rows), strict=True):
        for start, end in CASES[problem.name][1](answer):
            part = text[start:end]
            assert part and part == part.strip() and answer.get("answer", part) == part
            assert end == len(text) or not unicodedata.combining(text[end]), "no letter is cut from its accent"


def test_of_the_service(learnt, home):
    """JSON there and back."""
    problem, folder = learnt
    inputs = problem.text_roles
    register(home, folder, inputs=inputs, example={role: [QUESTION] for role in inputs}, metrics={"f1": 1.0})
    registry.set_alias(home, "sentiment", registry.CHAMPION, 1)
    with TestClient(create_app(home, Options("sentiment", follow_seconds=0.1))) as client:
        end = time.monotonic() + 60
        while client.get("/ready").status_code != 200 and time.monotonic() < end:
            time.sleep(0.1)
        answer = client.post("/predict", json={"rows": asked(problem)})
    assert answer.status_code == 200, answer.text
    assert found_in(problem, answer.json()["predictions"]) == WANTED


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_in_bulk(learnt, tmp_path, kind):
    """The file keeps the texts as they are, and the places are of those."""
    problem, folder = learnt
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in asked(problem)))
    version = registry.Version("tiny", 1, None, (), {}, {}, "", 0.0)
    place = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    if kind == "csv":
        score_file(place, version, folder, source, tmp_path / "between.csv", BulkOptions(prefix="first_"))
        source = tmp_path / "between.csv"
    score_file(place, version, folder, source, tmp_path / "out.jsonl", BulkOptions())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row[problem.text_roles[-1]] for row in rows] == TEXTS
    if problem.name == "token-classification":
        for row in rows:
            row["entities"] = json.loads(row["entities"])
    assert found_in(problem, rows) == WANTED


def test_half_a_sign_in_bulk(learnt, tmp_path):
    """Half a surrogate pair, which JSON can hold and no tokenizer can read, moves nothing."""
    problem, folder = learnt
    row = asked(problem)[0]
    role = problem.text_roles[-1]
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {role: "\ud83d  " + TEXTS[0]}) + "\n")
    place = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    version = registry.Version("tiny", 1, None, (), {}, {}, "", 0.0)
    facts = score_file(place, version, folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl", BulkOptions())
    assert (facts["rows"], facts["errors"]) == (2, 0)
