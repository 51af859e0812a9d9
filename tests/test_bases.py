"""A base of the registry, and rows that a config makes of others: `models:/…`, `data.replace`, `data.pairs`."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from overnight import problems
from overnight.config import Config, Data
from overnight.data.ingest import Ingested, ingest
from overnight.data.pairs import NEXT, OTHER, next_sentence_pairs, sentences
from overnight.errors import NightFailed, UserError
from overnight.home import Home
from overnight.settings import Training
from overnight.tracking import registry, runs, store
from overnight.tracking.bases import on_its_base
from overnight.training.card import Card, finish_model_folder
from overnight.training.models import load_tokenizer

PROBLEM = problems.get("sequence-classification")
PAIRS = problems.get("pair-classification")


def config(base: str) -> Config:
    return Config.model_validate(
        {"name": "topics", "model": {"base": base, "revision": "abc"}, "data": {"source": "rows.csv"}}
    )


@pytest.fixture(scope="module")
def registered(tmp_path_factory, empty_store, tiny_model) -> Home:
    """A home with two versions of a language model, the second the champion."""
    root = tmp_path_factory.mktemp("bases") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    problem = problems.get("masked-lm")
    for number in (1, 2):
        folder = tmp_path_factory.mktemp("model") / "best"
        model = problem.load_model(str(tiny_model), {}, Training())
        model.bert.embeddings.word_embeddings.weight.data.fill_(number)
        model.save_pretrained(folder)
        finish_model_folder(folder, Card(problem.name, {}, 64, "perplexity"), str(tiny_model))
        run_id = runs.open_night(home, store.experiment(home, "pretrain"), f"night-{number}")
        facts = {"inputs": ("text",), "example": {"text": ["a"]}, "tags": {}, "metrics": {"perplexity": 3.0}}
        assert registry.register(home, "pretrain", folder, run_id=run_id, **facts).number == number
    registry.set_alias(home, "pretrain", registry.CHAMPION, 2)
    registry.set_alias(home, "pretrain", "first", 1)
    return home


class TestBases:
    @pytest.mark.parametrize(("reference", "number"), [("@champion", 2), ("@first", 1), ("/1", 1), ("/2", 2)])
    def test_a_version_is_its_folder(self, registered, reference, number):
        """By alias and by number: the folder of that version, named for the lineage; a revision means nothing there.
        Other problems start from its weights, with its tokenizer."""
        found, told = on_its_base(registered, config(f"models:/pretrain{reference}"))
        assert told == f"pretrain version {number}" and found.model.revision is None
        version = registry.version_of(registered, "pretrain", number)
        assert Path(found.model.base) == registry.download(registered, version)
        assert found.model_copy(update={"model": None}) == config("x").model_copy(update={"model": None})
        model = PROBLEM.load_model(found.model.base, {"labels": ["a", "b"]}, Training())
        assert (model.bert.embeddings.word_embeddings.weight == number).all()
        assert load_tokenizer(found.model.base)("good")["input_ids"][0] == 2

    def test_another_champion_is_another_base(self, registered):
        """A night after the alias has moved is a new one, also where nothing else has changed."""
        before, _ = on_its_base(registered, config("models:/pretrain@champion"))
        registry.set_alias(registered, "pretrain", registry.CHAMPION, 1)
        after, told = on_its_base(registered, config("models:/pretrain@champion"))
        registry.set_alias(registered, "pretrain", registry.CHAMPION, 2)
        assert told == "pretrain version 1" and after.model.base != before.model.base

    @pytest.mark.parametrize("base", ["new", "./folder", "pkg://x/model", "google-bert/bert-base-uncased"])
    def test_other_bases_stay(self, tmp_path, base):
        """Folders and hub names are none of the registry's business: it is not even asked."""
        home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "nothing")})
        assert on_its_base(home, config(base)) == (config(base), None)
        assert not home.root.exists()

    @pytest.mark.parametrize(
        ("base", "said"),
        [
            (
                "models:/pretrian@champion",
                "model → base: no such registered model, got 'pretrian'; did you mean pretrain?",
            ),
            (
                "models:/pretrain@champoin",
                "no version of pretrain has this alias, got 'champoin'; did you mean champion?",
            ),
            ("models:/pretrain/7", r"pretrain: no such version \(it has 1, 2\), got 7"),
            ("models:/pretrain", "must read models:/name@alias or models:/name/number, got 'models:/pretrain'"),
            ("models:/pretrain/latest", "must read models:/name@alias"),
            ("models:/pretrain@champion/1", "must read models:/name@alias"),
            ("models://pretrain@champion", "must read models:/name@alias"),
        ],
    )
    def test_wrong_names(self, registered, base, said):
        """The user's mistakes, with what was probably meant."""
        with pytest.raises(UserError, match=said):
            on_its_base(registered, config(base))

    def test_damaged_weights(self, registered, tmp_path):
        """Of a version whose weights are not those that were registered no night starts."""
        root = tmp_path / "home"
        shutil.copytree(registered.root, root)
        home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
        found, _ = on_its_base(home, config("models:/pretrain/1"))
        weights = Path(found.model.base) / "model.safetensors"
        kept = weights.read_bytes()
        weights.write_bytes(b"other")
        try:
            with pytest.raises(NightFailed, match="models:/pretrain/1: its weights are not those"):
                on_its_base(home, config("models:/pretrain/1"))
        finally:
            weights.write_bytes(kept)


def write(folder: Path, rows: list[dict], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(made: Ingested) -> list[dict]:
    return sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])


class TestReplace:
    def test_cells_are_replaced(self, tmp_path):
        """Those of the role that is named, blanks around them or not; others stay, and so do absent ones."""
        cells = ["positive", " negative ", "neutral", None, "positively"]
        source = write(tmp_path, [{"text": f"positive {i}", "topic": cell} for i, cell in enumerate(cells)])
        data = Data(
            source=source, columns={"label": "topic"}, replace={"label": {"positive": "good", "negative": "bad"}}
        )
        made = ingest(data, tmp_path / "out", PROBLEM)
        assert [row["label"] for row in read(made)] == ["good", "bad", "neutral", None, "positively"]
        assert [row["text"] for row in read(made)] == [f"positive {i}" for i in range(5)]

    def test_before_the_problem_looks(self, tmp_path):
        """Names become numbers, so that words can be learnt as values."""
        source = write(tmp_path, [{"text": text, "value": text} for text in ("good", "bad", "2", "none")])
        data = Data(source=source, replace={"value": {"bad": "-1", "good": "1"}})
        rows = read(ingest(data, tmp_path / "out", problems.get("regression")))
        assert [float(row["value"]) for row in rows if row["value"]] == [1, -1, 2]
        assert [row["refusal"] for row in rows] == [None, None, None, "not_a_number"]

    def test_equal_to_data_that_were_so(self, tmp_path):
        """The rows and the fingerprint are those of a source that has the other names."""
        rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(6)]
        other = [row | {"label": {"a": "x", "b": "y"}[row["label"]]} for row in rows]
        one = ingest(
            Data(source=write(tmp_path, rows), replace={"label": {"a": "x", "b": "y"}}), tmp_path / "1", PROBLEM
        )
        two = ingest(Data(source=write(tmp_path, other, "b.jsonl")), tmp_path / "2", PROBLEM)
        assert one.fingerprint == two.fingerprint and one.labels == {"x": 3, "y": 3}

    def test_unknown_roles(self, tmp_path):
        """A slip in a role is told with the role that was meant."""
        source = write(tmp_path, [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}])
        data = Data(source=source, replace={"lable": {"a": "b"}})
        with pytest.raises(UserError) as caught:
            ingest(data, tmp_path / "out", PROBLEM, where="c.yaml: data")
        assert str(caught.value) == (
            "c.yaml: data → replace → lable: not a column that is read, got 'lable'; did you mean label?"
        )


DOCUMENTS = [
    "The first story begins here. It goes on for a while! Does it end with a question?",
    "Another matter altogether.\nIts second line is no sentence\nIts third line is one more.",
    "Short. Much too short. Only this one is long enough to be taken.",
    "",
    "A story of two sentences, no more. “It ends with what somebody said,” wrote Ana.",
]


class TestPairs:
    def test_sentences(self):
        """By punctuation and lines, also within quotes and without spaces; short ones are none."""
        assert sentences(DOCUMENTS[0]) == [
            "The first story begins here.",
            "It goes on for a while!",
            "Does it end with a question?",
        ]
        assert len(sentences(DOCUMENTS[1])) == 3
        assert sentences(DOCUMENTS[2]) == ["Much too short.", "Only this one is long enough to be taken."][1:]
        assert sentences("It costs 3.5 dollars or e.g. a bit more than that.") == [
            "It costs 3.5 dollars or e.g. a bit more than that."
        ]
        assert sentences("今天天气很好。我们一起去公园。好的。") == ["今天天气很好。", "我们一起去公园。"]
        assert sentences("هل وصل القطار في موعده؟ نعم وصل قبل عشر دقائق. حسنا.") == [
            "هل وصل القطار في موعده؟",
            "نعم وصل قبل عشر دقائق.",
        ]
        assert sentences("यह पहला वाक्य काफी लंबा है। और यह दूसरा वाक्य भी है।") == [
            "यह पहला वाक्य काफी लंबा है।",
            "और यह दूसरा वाक्य भी है।",
        ]

    def test_pairs_of_documents(self):
        """Each sentence but the last with the one behind it, and with one of another document."""
        pairs = next_sentence_pairs([*DOCUMENTS, None])
        assert len(pairs) == 2 * (2 + 2 + 0 + 1)
        parts = [sentences(text) for text in DOCUMENTS]
        for number, first, second, label in pairs:
            place = parts[number].index(first)
            if label == NEXT:
                assert parts[number][place + 1] == second
            else:
                assert label == OTHER and second not in parts[number]
                assert second in sum(parts, [])
        assert Counter(label for *_, label in pairs) == {NEXT: 5, OTHER: 5}

    def test_other_sentences_come_from_everywhere(self):
        """No document is left out, and none is drawn more often than chance has it."""
        texts = [". ".join(f"Sentence number {i} of document {n}" for i in range(20)) + "." for n in range(12)]
        drawn = Counter(
            int(second.split()[-1].strip(".")) for _, _, second, label in next_sentence_pairs(texts) if label == OTHER
        )
        assert len(drawn) == 12 and max(drawn.values()) < 3 * 19 and min(drawn.values()) > 5

    def test_one_document_has_no_others(self):
        assert {label for *_, label in next_sentence_pairs(DOCUMENTS[:1])} == {NEXT}

    def test_the_order_of_documents_decides_nothing(self):
        """Every order of the same documents gives the same pairs."""
        found = set()
        for order in itertools.islice(itertools.permutations(DOCUMENTS), 30):
            found.add(tuple(sorted(pair[1:] for pair in next_sentence_pairs(order))))
        assert len(found) == 1

    def test_ingest(self, tmp_path):
        """Rows of pair classification, with the slices of their document; the same again from another order."""
        draw = random.Random(1)
        rows = [{"body": text, "label": "sport", "year": str(2000 + i)} for i, text in enumerate(DOCUMENTS)]
        shuffled = draw.sample(rows, len(rows))
        options = {"columns": {"text": "body"}, "pairs": "next-sentence", "slices": ("year",)}
        one, two = (
            ingest(Data(source=write(tmp_path, part, name), **options), tmp_path / name[0], PAIRS)
            for part, name in ((rows, "a.jsonl"), (shuffled, "b.jsonl"))
        )
        assert one.fingerprint == two.fingerprint
        assert (one.rows, one.labels) == (10, {NEXT: 5, OTHER: 5})
        for row in read(one):
            document = DOCUMENTS[row["source_row"]]
            assert row["text"] in document and row["year"] == str(2000 + row["source_row"])
            assert (row["second"] in document) == (row["label"] == NEXT)

    def test_of_another_problem(self, tmp_path):
        """Pairs are rows of one problem only; others say so."""
        source = write(tmp_path, [{"text": text} for text in DOCUMENTS])
        with pytest.raises(
            UserError,
            match=r"data → pairs: makes rows of pair-classification and masked-lm-next-sentence, got 'regression'",
        ):
            ingest(Data(source=source, pairs="next-sentence"), tmp_path / "out", problems.get("regression"))
