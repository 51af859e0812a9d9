"""Question answering: SQuAD's metrics and files, answers that stay where they stand, windows, no answer."""

from __future__ import annotations

import dataclasses
import json
import re
import string
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import WORDS, make_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overnight import problems
from overnight.config import Data, Split
from overnight.data.ingest import ingest
from overnight.data.normalise import normalise, repair
from overnight.data.split import SIDES, split_rows
from overnight.errors import UserError
from overnight.problems.question_answering import answer_tokens, scores
from overnight.settings import Training
from overnight.training import data
from overnight.training.card import Card, finish_model_folder
from overnight.training.fit import fit
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.predict import Scorer, predict
from overnight.writing import unspaced

relaxed = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

PROBLEM = problems.get("question-answering")
OURS = Path(__file__).parents[1] / "configs" / "data" / "qa.json"
ALWAYS = {"no_answer": False, "threshold": 0.0}
PERHAPS = {"no_answer": True, "threshold": 0.0}


def clean(text: str) -> str | None:
    return normalise(repair(text))


def spaced(text: str) -> bool:
    return not unspaced(text)


def prepare(context: str | None, answers: object) -> tuple[str | None, list | None]:
    """Reason and answers of one row."""
    cell = answers if isinstance(answers, str | None) else json.dumps(answers)
    columns = {"question": ["what"], "context": [context], "answers": [cell]}
    (reason,) = PROBLEM.prepare(columns, clean)
    assert columns["context"] == [context], "the context is cleaned by who called"
    found = columns["answers"][0]
    return reason, None if found is None else json.loads(found)


def answer(context: str, text: str, place: int | None = None) -> dict:
    return {"text": text, "start": context.index(text) if place is None else place}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


def encode(tokenizer, rows: list[tuple[str, str, list[dict]]], max_length: int = 64) -> list[dict]:
    """Features of rows of question, context and answers."""
    batch = dict(zip(("question", "context", "answers"), map(list, zip(*rows, strict=True)), strict=True))
    batch["answers"] = [json.dumps(answers) for answers in batch["answers"]]
    encoded = PROBLEM.encode(tokenizer, batch, ALWAYS, max_length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def knowing(features: list[dict]) -> list[np.ndarray]:
    """What a model would say that has learnt the labels."""
    return [20 * np.eye(len(one["input_ids"]), dtype=np.float32)[one["labels"]].T for one in features]


class TestMetrics:
    @staticmethod
    def official(said: str, wanted: list[str]) -> tuple[float, float]:
        """Exact match and F1 of one question, from the definition in Rajpurkar et al. 2018 and its script's comments:
        lower case, no punctuation, no articles, blanks made even; words as a bag; the best of all answers."""

        def words(text: str) -> list[str]:
            bare = "".join(sign for sign in text.lower() if sign not in string.punctuation)
            parts = re.split(r"(\W+)", bare)  # words and what is between them, in turns
            return "".join(" " if part in ("a", "an", "the") else part for part in parts).split()

        best = [0.0, 0.0]
        for one in [words(text) for text in wanted if words(text)] or [[]]:
            own = words(said)
            shared = sum(min(own.count(word), one.count(word)) for word in {*own})
            f1 = float(own == one)
            if own and one:
                precision, recall = shared / len(own), shared / len(one)
                f1 = 2 * precision * recall / (precision + recall) if shared else 0.0
            best = [max(best[0], float(own == one)), max(best[1], f1)]
        return best[0], best[1]

    texts = st.one_of(
        st.lists(
            st.sampled_from("The the a an A cat Cat cat's, cat. a’s -a- 1,000 . … the! theatre é É".split()), max_size=6
        ).map(" ".join),
        st.text(max_size=6),
    )

    @settings(max_examples=300, deadline=None)
    @given(texts.filter(spaced), st.lists(texts.filter(spaced), max_size=3))
    def test_equal_the_official_definition(self, said, wanted):
        """Exact match and F1 of any answer against any answers, in scripts with spaces between words."""
        assert scores(said, wanted) == pytest.approx(self.official(said, wanted))

    @staticmethod
    def of_mlqa(said: str, wanted: str) -> tuple[float, float]:
        """Exact match and F1 as MLQA defines them for Chinese (Lewis et al. 2020): no punctuation of any kind, each
        sign of CJK a token of its own, other signs by the blanks between them."""

        def tokens(text: str) -> list[str]:
            bare = "".join(sign for sign in text.lower() if unicodedata.category(sign)[0] != "P")
            return "".join(f" {sign} " if "\u4e00" <= sign <= "\u9fa5" else sign for sign in bare).split()

        ours, theirs = tokens(said), tokens(wanted)
        shared = sum(min(ours.count(token), theirs.count(token)) for token in {*ours})
        both = len(ours) + len(theirs)
        return float(ours == theirs), 2 * shared / both if both else 1.0

    @settings(max_examples=200, deadline=None)
    @given(*[st.text("北京东西，。《》、 7Xx", min_size=1, max_size=7).map("中{}".format)] * 2)
    def test_chinese_as_mlqa(self, said, wanted):
        """Of any two Chinese answers, also with some Latin in them."""
        assert scores(said, [wanted]) == pytest.approx(self.of_mlqa(said, wanted))

    @pytest.mark.parametrize(
        ("said", "wanted", "exact", "f1"),
        [
            ("the Eiffel Tower!", ["Eiffel tower"], 1, 1),
            ("Eiffel", ["Eiffel Tower"], 0, 2 / 3),
            ("tower Eiffel", ["Eiffel Tower"], 0, 1),
            ("in 1889 or 1890", ["1889", "in 1889"], 0, 2 / 3),
            ("x x y", ["x y y"], 0, 2 / 3),
            ("", [], 1, 1),
            ("x", [], 0, 0),
            ("", ["x"], 0, 0),
            ("the", [], 1, 1),
            ("an", ["a", "the"], 1, 1),
            ("北京大学", ["北京"], 0, 2 / 3),
            ("《红楼梦》。", ["红楼梦"], 1, 1),
            ("在 1889年", ["1889 年"], 0, 4 / 5),
            ("。", ["北京"], 0, 0),
            ("東京タワー", ["東京のタワー"], 0, 10 / 11),
            ("กรุงเทพ", ["กรุง"], 0, 8 / 11),
            # spaces part the words of these
            ("서울 타워", ["서울"], 0, 2 / 3),
            ("سارة حداد", ["حداد"], 0, 2 / 3),
        ],
    )
    def test_known_cases(self, said, wanted, exact, f1):
        """Order does not count for F1, articles and punctuation count for nothing, the closest answer counts; without
        spaces between words each sign is one."""
        assert scores(said, wanted) == (exact, pytest.approx(f1))

    def test_normalisation(self):
        """In the order of the script: punctuation goes before articles, so that "-a-" is one, and "a.b" is none."""
        assert answer_tokens(" The  U.S.A, an\tAnswer ") == ["usa", "answer"]
        assert answer_tokens("-a- a.b theatre") == ["ab", "theatre"]

    def test_of_a_data_set(self):
        """Means over questions; of those with and without an answer apart, where there are some without."""
        wanted = [["cat"], ["black cat", "cat"], [], []]
        said = [{"answer": text} for text in ("cat", "black", "", "dog")]
        found = PROBLEM.metrics(wanted, said, PERHAPS)
        assert found == pytest.approx(
            {"f1": (1 + 2 / 3 + 1) / 4, "exact_match": 0.5, "answerable_f1": 5 / 6, "no_answer_accuracy": 0.5}
        )
        assert PROBLEM.metrics(wanted, said, ALWAYS) == pytest.approx({"f1": 2 / 3, "exact_match": 0.5})
        assert np.isnan(PROBLEM.tally(wanted[:2], said[:2], PERHAPS).values()["no_answer_accuracy"])


class TestRows:
    context = "Yeast is a living fungus. It eats sugar."

    @pytest.mark.parametrize(
        "cell",
        [
            [{"text": "sugar", "start": 34}],
            [{"text": "sugar", "answer_start": 34}],
            {"text": ["sugar"], "answer_start": [34]},
        ],
    )
    def test_forms(self, cell):
        """Our own form, SQuAD's and the hub's are one; no answer and no cell are two things."""
        assert prepare(self.context, cell) == (None, [{"text": "sugar", "start": 34}])
        assert prepare(self.context, "[]") == prepare(self.context, {"text": [], "answer_start": []}) == (None, [])
        assert prepare(self.context, None) == (None, None) == prepare(None, "[]")

    @pytest.mark.parametrize(
        ("cell", "reason"),
        [
            ([answer(context, "sugar", 32)], "answer_not_in_context"),
            ([answer(context, "salt", 33)], "answer_not_in_context"),
            ([answer(context, ".", -1)], "answer_not_in_context"),
            ([answer(context, "sugar"), answer(context, "sugar", 999)], "answer_not_in_context"),
            ([answer(context, "", 0)], "empty_answer"),
            ([answer(context, " ", 5)], "empty_answer"),
            ("sugar", "unreadable_answers"),
            ("7", "unreadable_answers"),
            ('"sugar"', "unreadable_answers"),
            (["sugar"], "unreadable_answers"),
            ([["sugar", 33]], "unreadable_answers"),
            ([{"text": "sugar"}], "unreadable_answers"),
            ([{"text": "sugar", "start": "34"}], "unreadable_answers"),
            ([{"text": None, "start": 33}], "unreadable_answers"),
            ({"text": ["sugar"], "answer_start": []}, "unreadable_answers"),
            ({"text": "sugar", "answer_start": 33}, "unreadable_answers"),
            ("[" * 200_000, "unreadable_answers"),
        ],
    )
    def test_refused(self, cell, reason):
        """What is wrong with a row is said of it, and it has no answers then."""
        assert prepare(self.context, cell) == (reason, None)

    words = st.sampled_from(["cafe\u0301", "crème", "x", "–", "日本", "No.", "e\u0301\u0302", "🙂"])
    blanks = st.sampled_from([" ", "  ", "\n", "\t ", "\u00a0", " \r\n "])

    @relaxed
    @given(st.lists(st.tuples(words, blanks), min_size=1, max_size=12), blanks, st.data())
    def test_answers_move_with_the_cleaned_context(self, pieces, front, draw):
        """Blanks that are made even and letters that are composed: the context reads like the answer where it says."""
        context, places = front, []
        for word, blank in pieces:
            places.append((len(context), len(context) + len(word)))
            context += word + blank
        first = draw.draw(st.integers(0, len(places) - 1))
        last = draw.draw(st.integers(first, len(places) - 1))
        text = context[places[first][0] : places[last][1]]
        reason, found = prepare(context, [answer(context, text, places[first][0])])
        assert reason is None and found[0]["text"] == clean(text)
        assert clean(context)[found[0]["start"] :].startswith(found[0]["text"])
        assert found[0]["start"] == len(clean("".join(w + b for w, b in pieces[:first]) + "x")) - 1

    def test_blanks_around_an_answer(self):
        """An answer that was cut out with blanks loses them, and begins where its first letter stands."""
        assert prepare(self.context, [answer(self.context, " living ")]) == (None, [{"text": "living", "start": 11}])

    def test_lost_in_cleaning(self):
        """Mojibake before the answer moves it; an answer that begins within what is repaired is refused."""
        context = "donâ€™t eat crÃ¨me"
        assert prepare(context, [answer(context, "eat")]) == (None, [{"text": "eat", "start": 6}])
        assert prepare(context, [answer(context, "crÃ¨me")]) == (None, [{"text": "crème", "start": 10}])
        assert prepare(context, [answer(context, "¨me")]) == ("answer_lost_in_cleaning", None)

    def test_facts_truth_and_targets(self, tokenizer, tmp_path):
        """Whether some questions have no answer; the tokenized rows tell the truth of the cells."""
        rows = [("who", self.context, [answer(self.context, "Yeast"), answer(self.context, "fungus")])]
        cells = [json.dumps(row[2]) for row in rows]
        assert PROBLEM.facts({"answers": cells}) == ALWAYS and PROBLEM.facts({"answers": [*cells, "[]"]}) == PERHAPS
        rows.append(("what", "no 🙂 answer", []))
        features = encode(tokenizer, rows, 16)
        written = data.write(tmp_path, [{name: [one[name] for one in features] for name in features[0]}], {})
        assert PROBLEM.targets(written, ALWAYS) == [["Yeast", "fungus"], []]


class TestWindows:
    @relaxed
    @given(st.data())
    def test_the_answer_is_where_it_can_be_seen(self, tokenizer, draw):
        """Windows of any length cover the context; those that hold the answer are labelled with it, others with
        nothing; and a model that knows the labels gives the answer, once a row."""
        words = draw.draw(st.lists(st.sampled_from(sum(WORDS.values(), [])), min_size=1, max_size=90))
        first = draw.draw(st.integers(0, len(words) - 1))
        last = draw.draw(st.integers(first, min(first + 2, len(words) - 1)))
        context = " ".join(words)
        text = " ".join(words[first : last + 1])
        start = len(" ".join([*words[:first], ""]))
        length = draw.draw(st.integers(16, 40))
        rows = [("which one", context, [answer(context, text, start)]), ("crew", "late", [])]
        features = encode(tokenizer, rows, length)
        assert [one["row"] for one in features] == [0] * (len(features) - 1) + [1]
        assert max(len(one["input_ids"]) for one in features) <= length
        seen = set()
        for one in features[:-1]:
            places = [place for place in zip(one["starts"], one["ends"], strict=True) if place[0] >= 0]
            seen |= {i for a, b in places for i in range(a, b)}
            begin, end = one["labels"]
            if (begin, end) != (0, 0):
                assert (one["starts"][begin], one["ends"][end]) == (start, start + len(text))
            else:
                assert places[0][0] > start or places[-1][1] < start + len(text)
        assert seen == {i for i, sign in enumerate(context) if sign != " "}
        found = PROBLEM.decode(knowing(features), PERHAPS, features)
        assert [(one["answer"], one["start"]) for one in found] == [(text, start), ("", None)]

    def test_a_window_repeats_the_end_of_the_one_before(self, tokenizer):
        """By a sixth of the longest input, so that an answer of so many tokens is whole in one of them."""
        context = " ".join(make_rows(20).text)
        features = encode(tokenizer, [("who", context, [])], 60)
        assert len(features) > 3
        for before, one in zip(features, features[1:], strict=False):
            last = [start for start in before["starts"] if start >= 0]
            assert last.index(min(start for start in one["starts"] if start >= 0)) == len(last) - 9

    def test_long_questions_leave_room(self, tokenizer):
        """A question may take half of the input, and is cut there."""
        features = encode(tokenizer, [("who was it " * 40, "the crew was late", []), ("", "", [])], 24)
        assert max(len(one["input_ids"]) for one in features) <= 24
        assert {one["row"] for one in features} == {0, 1}
        first = [one for one in features if one["row"] == 0]
        assert max(end for one in first for end in one["ends"]) == len("the crew was late")

    def test_tokens_that_count_a_blank_in(self, tokenizer):
        """Where a tokenizer counts the blank before a word in, the answer does without it."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        inner = Tokenizer(models.WordLevel({"▁a": 0, "▁big": 1, "▁crew": 2, "?": 3}, unk_token="?"))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        with_blanks = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
        assert with_blanks("a big", return_offsets_mapping=True)["offset_mapping"][1] == (1, 5)
        features = encode(with_blanks, [("a", "a big crew", [answer("a big crew", "big crew")])])
        # no special tokens here: the first token stands for no answer
        assert PROBLEM.decode(knowing(features), ALWAYS, features)[0]["answer"] == "big crew"


def feature(row: int, context: str, spans: list[tuple[int, int]]) -> dict:
    """A window whose first token stands for no answer."""
    starts, ends = zip((-1, -1), *spans, strict=True)
    return {"row": row, "starts": starts, "ends": ends, "context": np.array([ord(sign) for sign in context])}


class TestAnswers:
    def test_the_best_span_of_all(self):
        """The likeliest pair of a start and an end behind it, not longer than 30 tokens; its share among all."""
        one = feature(0, "aa bb cc", [(0, 2), (3, 5), (6, 8)])
        logits = np.array([[0, 0], [1, 0], [4, 3], [0, 2]], dtype=np.float32)
        (found,) = PROBLEM.decode([logits], ALWAYS, [one])
        pairs = np.exp([1 + 0, 1 + 3, 1 + 2, 4 + 3, 4 + 2, 0 + 2])
        assert (found["answer"], found["start"], found["end"]) == ("bb", 3, 5)
        assert found["score"] == pytest.approx(pairs[3] / pairs.sum())
        (perhaps,) = PROBLEM.decode([logits], PERHAPS, [one])
        assert perhaps["answer"] == "bb" and perhaps["score"] == pytest.approx(pairs[3] / (pairs.sum() + 1))
        logits[0] = 9
        (none,) = PROBLEM.decode([logits], PERHAPS, [one])
        assert none == {"answer": "", "start": None, "end": None, "score": pytest.approx(1, abs=1e-4)}
        assert PROBLEM.decode([logits], ALWAYS, [one])[0]["answer"] == "bb"

    def test_spans_that_are_none(self):
        """Ends before starts, and spans of more than 30 tokens."""
        words = feature(0, "x" * 80, [(2 * i, 2 * i + 1) for i in range(40)])
        logits = np.zeros((41, 2), dtype=np.float32)
        logits[2, 0] = logits[35, 1] = 9
        logits[40, 0] = logits[1, 1] = 8
        (found,) = PROBLEM.decode([logits], ALWAYS, [words])
        assert found["end"] - found["start"] < 60 and found["start"] < found["end"]
        assert PROBLEM.decode([logits[:1]], ALWAYS, [feature(0, "", [])])[0]["answer"] == ""

    def test_windows_of_a_row(self):
        """No answer is as likely as where it is least so; a span that two windows show counts once, as where it is
        likeliest."""
        windows = [feature(0, "aa bb", [(0, 2), (3, 5)]), feature(0, "", [(3, 5)])]
        logits = [np.array([[5, 5], [0, -9], [0, 1]]), np.array([[0.5, 0.5], [2, 2]])]
        (found,) = PROBLEM.decode([one.astype(np.float32) for one in logits], PERHAPS, windows)
        everything = np.exp([4, 1, 0 + 1, -9])  # bb, no answer, aa bb, aa
        assert found["answer"] == "bb"
        assert found["score"] == pytest.approx(everything[0] / everything.sum(), rel=1e-4)

    @relaxed
    @given(st.lists(st.tuples(st.integers(-6, 6), st.sampled_from(["ab", "ab cd", "zz", None])), min_size=1))
    def test_tuned_threshold_is_the_best(self, questions):
        """No other threshold has a higher F1 on the rows it was set by; without questions of that kind nothing is
        set."""
        features = [feature(row, "ab", [(0, 2)]) for row in range(len(questions))]
        # by `margin` no answer wins over "ab"
        outputs = [np.array([[margin, 0], [0, 0]], dtype=np.float32) for margin, _ in questions]
        targets = [[] if wanted is None else [wanted] for _, wanted in questions]
        tuned = PROBLEM.tuned(outputs, targets, PERHAPS, features, "f1")

        def f1(threshold: float) -> float:
            facts = PERHAPS | {"threshold": threshold}
            return PROBLEM.metrics(targets, PROBLEM.decode(outputs, facts, features), facts)["f1"]

        assert f1(tuned["threshold"]) == pytest.approx(max(f1(half / 2) for half in range(-15, 16)))
        assert PROBLEM.tuned(outputs, targets, ALWAYS, features, "f1") == ALWAYS


class TestFiles:
    paragraph = {
        "context": "Yeast is a living  fungus.",
        "qas": [{"id": "1", "question": "What is it?", "answers": [{"text": "living  fungus", "answer_start": 11}]}],
    }

    def read(self, folder: Path, content: object) -> list[dict]:
        (folder / "a.json").write_text(content if isinstance(content, str) else json.dumps(content))
        made = ingest(Data(source=str(folder / "a.json"), format="squad", slices=("title",)), folder / "out", PROBLEM)
        return sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])

    def test_squad(self, tmp_path):
        """1.1 has answers to all questions, 2.0 marks those that have none, whatever else they say."""
        first = {"version": "1.1", "data": [{"title": "Yeast", "paragraphs": [self.paragraph]}]}
        (row,) = self.read(tmp_path, first)
        assert (row["question"], row["context"]) == ("What is it?", "Yeast is a living fungus.")
        assert json.loads(row["answers"]) == [{"text": "living fungus", "start": 11}] and row["title"] == "Yeast"
        hard = {"id": "2", "question": "Where?", "is_impossible": True, "answers": [], "plausible_answers": [{}]}
        second = self.paragraph | {"qas": [self.paragraph["qas"][0] | {"is_impossible": False}, hard]}
        rows = self.read(tmp_path, {"version": "v2.0", "data": [{"title": "Yeast", "paragraphs": [second, second]}]})
        assert [json.loads(row["answers"]) for row in rows] == [[{"text": "living fungus", "start": 11}], []] * 2
        assert len({row["text_id"] for row in rows}) == 2

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"data": 3}', {"data": [{"paragraphs": [{}]}]}, "[" * 200_000])
    def test_what_is_none(self, tmp_path, content):
        """Another JSON, or none at all, is the user's mistake."""
        with pytest.raises(UserError, match="a.json|the file is empty"):
            self.read(tmp_path, content)

    def test_our_own_set(self, tmp_path):
        """Every answer stands where it says, also once it is read; ids are unique; there is enough of it, with
        questions that have no answer among it."""
        asked = [
            (paragraph["context"], one)
            for article in json.loads(OURS.read_text())["data"]
            for paragraph in article["paragraphs"]
            for one in paragraph["qas"]
        ]
        assert len(asked) >= 200 and len({one["id"] for _, one in asked}) == len(asked)
        assert len({(context, one["question"]) for context, one in asked}) == len(asked)
        for context, one in asked:
            assert bool(one["answers"]) != one["is_impossible"], one["id"]
            for found in one["answers"]:
                start = found["answer_start"]
                assert context[start : start + len(found["text"])] == found["text"], one["id"]
        assert 0.1 < sum(one["is_impossible"] for _, one in asked) / len(asked) < 0.5
        made = ingest(Data(source=str(OURS), format="squad"), tmp_path / "rows", PROBLEM)
        table = pq.read_table(made.path)
        assert len(table) == len(asked) and "refusal" not in table.column_names
        for row in table.to_pylist():
            for found in json.loads(row["answers"]):
                assert row["context"][found["start"] :].startswith(found["text"])

    def test_questions_of_one_context_stay_together(self, tmp_path):
        """Else a model would be asked in the test about a text that it has learnt by heart."""
        made = ingest(Data(source=str(OURS), format="squad"), tmp_path / "rows", PROBLEM)
        sides = split_rows(made.path, Split(), tmp_path / "sides", text_roles=PROBLEM.split_roles, target=None)
        contexts = {side: {*pq.read_table(path)["context"].to_pylist()} for side, path in sides.paths.items()}
        assert all(contexts[side] for side in SIDES)
        assert sum(map(len, contexts.values())) == len(set().union(*contexts.values()))
        assert sum(sides.rows.values()) == made.rows


def test_learns_and_serves(tiny_model, tokenizer, tmp_path):
    """Questions about long texts, some of which have no answer, are learnt by heart; the finished folder gives the
    answers that the engine measured, each a span of the text as it was sent."""
    rows = []
    for place, (text, label) in enumerate(make_rows(24, seed=3).itertuples(index=False)):
        context = " ".join(["with our train city"] * (place % 3 * 6) + [text])
        word = next(word for word in text.split() if word in WORDS[label])
        rows.append((f"what was {label}", context, [] if label == "plain" else [answer(context, word)]))
    features = encode(tokenizer, rows, 40)
    assert len(features) > len(rows)
    written = data.write(tmp_path / "rows", [{name: [one[name] for one in features] for name in features[0]}], {})
    facts = PROBLEM.facts({"answers": [json.dumps(row[2]) for row in rows]})
    training = Training(epochs=60, batch_size=8, learning_rate=4e-3, dropout=0.0, evaluations_per_epoch=1)
    result = fit(
        PROBLEM,
        ModelReference(str(tiny_model)),
        facts,
        written,
        written,
        dataclasses.replace(training, precision="float32", patience=15),
        folder=tmp_path / "run",
        metric="f1",
    )
    assert result["value"] > 0.9
    best = tmp_path / "run" / "best"
    finish_model_folder(best, Card(PROBLEM.name, facts, 40, "f1"), str(tiny_model))
    found = Scorer(best).predict_texts([{"question": row[0], "context": row[1]} for row in rows])
    measured = PROBLEM.decode(predict(PROBLEM, best, written, facts), facts, written)
    assert all(PROBLEM.same(one, other) for one, other in zip(found, measured, strict=True))
    assert PROBLEM.metrics(PROBLEM.targets(written, facts), found, facts) == pytest.approx(result["metrics"])
    for (_, context, _), one in zip(rows, found, strict=True):
        assert one["answer"] == ("" if one["start"] is None else context[one["start"] : one["end"]])
