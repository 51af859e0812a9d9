"""Token classification: spans from tags and texts, windows of long texts, strict metrics, CoNLL files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities, precision_recall_fscore_support
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from overnight import problems
from overnight.data.normalise import normalise, repair
from overnight.errors import DataRefused, UserError
from overnight.problems.tags import bio, chunks
from overnight.problems.token_classification import _windows
from overnight.settings import Training
from overnight.training.models import load_tokenizer
from overnight.training.packing import Packed
from overnight.training.predict import forward

relaxed = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

PROBLEM = problems.get("token-classification")
TYPES = ["LOC", "PER", "x-y"]
FACTS = PROBLEM.facts({"entities": [json.dumps([{"start": 0, "end": 1, "type": kind}]) for kind in TYPES]})
SCHEMES = {"BIO": "BI", "BIOES": "BIES", "IO": "I"}


def tags_of(prefixes: str):
    return st.one_of(st.just("O"), st.builds("{}-{}".format, st.sampled_from(prefixes), st.sampled_from(TYPES)))


sequences = st.sampled_from([*SCHEMES.values()]).flatmap(lambda prefixes: st.lists(tags_of(prefixes), max_size=15))
sentences = st.sampled_from([*SCHEMES.values()]).flatmap(
    lambda prefixes: st.lists(
        st.lists(st.tuples(tags_of(prefixes), tags_of(prefixes)), min_size=1, max_size=12), min_size=1, max_size=6
    )
)


def clean(text: str) -> str | None:
    return normalise(repair(text))


def prepare(**columns: list) -> tuple[list, list, list]:
    """Reasons, texts and entities (read) of rows of either form."""
    count = len(next(iter(columns.values())))
    table = {role: list(columns.get(role, [None] * count)) for role in PROBLEM.roles()}
    reasons = PROBLEM.prepare(table, clean)
    assert {*table} == {"text", "entities"}
    return reasons, table["text"], [None if cell is None else json.loads(cell) for cell in table["entities"]]


def prepare_one(text: str, entities: object) -> tuple:
    cell = entities if isinstance(entities, str) else json.dumps(entities)
    return tuple(part[0] for part in prepare(text=[text], entities=[cell]))


def as_span(entity: dict) -> tuple:
    return entity["start"], entity["end"], entity["type"]


def encode(tokenizer, texts, spans=None, max_length=64, facts=FACTS) -> list[dict]:
    batch = {"text": texts}
    if spans is not None:
        cells = [[{"start": a, "end": b, "type": kind} for a, b, kind in row] for row in spans]
        batch["entities"] = [json.dumps(row) for row in cells]
    encoded = PROBLEM.encode(tokenizer, batch, facts, max_length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def decoded(features: list[dict], codes: list, facts=FACTS) -> list[list[tuple]]:
    """Spans of each row, when the tokens of each feature are given these labels."""
    outputs = [(20 * np.eye(len(facts["labels"]))[np.asarray(row)]).astype(np.float32) for row in codes]
    return [[as_span(entity) for entity in row["entities"]] for row in PROBLEM.decode(outputs, facts, features)]


def answered(features: list[dict], facts=FACTS) -> list[list[tuple]]:
    """Spans of each row from a model that has learnt the labels; where there is none it says B of the first type."""
    return decoded(features, [[1 if code < 0 else code for code in one["labels"]] for one in features], facts)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


class TestTags:
    @relaxed
    @given(sequences)
    def test_chunks_are_those_of_seqeval(self, tags):
        """Any sequence of BIO, BIOES or IO, also one that breaks its scheme, has seqeval's chunks."""
        assert [(kind, first, after - 1) for first, after, kind in chunks(tags)] == get_entities(tags)

    @relaxed
    @given(sequences)
    def test_other_names_of_the_same_tags(self, tags):
        """BILOU is BIOES with other letters, an underscore is a dash; types alone are IO."""
        expected = list(chunks(tags))
        renamed = [f"{ {'E': 'L', 'S': 'U'}.get(tag[0], tag[0]) }{tag[1:]}" for tag in tags]
        assert list(chunks(renamed)) == expected
        assert list(chunks([tag.replace("-", "_", 1) for tag in tags])) == expected
        if all(tag[0] in "OI" for tag in tags):
            assert list(chunks([tag.removeprefix("I-") for tag in tags])) == expected

    def test_tags_without_a_type(self):
        """B and I alone, as in data of key phrases, are spans of one type, as seqeval has it."""
        tags = ["B", "I", "O", "B", "B", "O", "I"]
        assert list(chunks(tags)) == [(0, 2, "_"), (3, 4, "_"), (4, 5, "_"), (6, 7, "_")]
        assert [(kind, first, after - 1) for first, after, kind in chunks(tags)] == get_entities(tags)

    @relaxed
    @given(sequences)
    def test_bio_is_the_way_back(self, tags):
        """Words get the tags that stand for the same chunks, in proper BIO: an I follows a B or I of its type."""
        words = [(3 * i, 3 * i + 2) for i in range(len(tags))]
        spans = [(words[first][0], words[after - 1][1], kind) for first, after, kind in chunks(tags)]
        found = bio(words, spans)
        assert list(chunks(found)) == list(chunks(tags))
        for before, tag in zip(["O", *found], found, strict=False):
            assert tag[0] != "I" or before[1:] == tag[1:]

    def test_words_that_a_span_cuts(self):
        """A word that is partly in a span belongs to it; one of two spans to the second."""
        assert bio([(0, 4), (5, 9), (10, 14)], [(2, 7, "x")]) == ["B-x", "I-x", "O"]
        assert bio([(0, 4), (4, 8)], [(0, 4, "x"), (4, 8, "x")]) == ["B-x", "B-x"]


class TestMetrics:
    @settings(relaxed, max_examples=60)
    @given(sentences)
    def test_metrics_equal_seqevals(self, rows):
        """Strict precision, recall and F1, micro, of each type, and macro over the types that the rows have."""
        sides = [[[pair[side] for pair in row] for row in rows] for side in (0, 1)]
        tokens = [json.dumps([f"w{'ö' * (i % 3)}{i}" for i in range(len(row))]) for row in rows]
        cells = [prepare(tokens=tokens, tags=[json.dumps(row) for row in side])[2] for side in sides]
        targets = [[as_span(entity) for entity in row] for row in cells[0]]
        found = PROBLEM.metrics(targets, [{"entities": row} for row in cells[1]], FACTS)
        for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
            assert found[name] == pytest.approx(score(*sides, zero_division=0))
        *scores, support = precision_recall_fscore_support(*sides, average=None, zero_division=0)
        kinds = sorted({kind for side in sides for row in side for kind, _, _ in get_entities(row)})
        for name, values in zip(("precision", "recall", "f1"), scores, strict=True):
            each = {kind: v for kind, v, count in zip(kinds, values, support, strict=True) if count}
            assert {kind: found[f"{name}/{kind}"] for kind in TYPES} == pytest.approx(dict.fromkeys(TYPES, 0.0) | each)
            if name == "f1":
                assert found["macro_f1"] == pytest.approx(np.mean([*each.values()]) if each else 0.0)
                if len(each) == len(kinds) > 0:
                    assert found["macro_f1"] == pytest.approx(f1_score(*sides, average="macro", zero_division=0))

    def test_types_that_only_one_side_knows(self):
        """Spans of a type the rows do not have are wrong ones; rows of a type the model does not have are missed."""
        facts = {"types": ["a"], "labels": ["O", "B-a", "I-a"]}
        said = [{"entities": [{"start": 0, "end": 1, "type": "a"}, {"start": 2, "end": 3, "type": "old"}]}]
        found = PROBLEM.metrics([[(0, 1, "a"), (4, 5, "new")]], said, facts)
        assert (found["precision"], found["recall"], found["macro_f1"]) == (0.5, 0.5, 0.5)
        assert found["f1/a"] == 1 and found["recall/new"] == 0

    def test_no_spans_at_all(self):
        """Nothing there and nothing said: a right row, and no division by zero."""
        assert PROBLEM.right([], {"entities": []}, FACTS)
        assert set(PROBLEM.metrics([[]], [{"entities": []}], FACTS).values()) == {0.0}


WORDS = [
    "Paris",
    "\u200fשלום",
    "مرحبا",
    "Zoe\u0308",
    "naïve",
    "😀",
    "👩\u200d👩\u200d👧",
    "東京",
    "don’t",
    "x",
    "e\u0301",
    "İ",
]
BLANKS = [" ", "  ", "\n\t", "\u00a0", " \r\n "]


class TestPrepare:
    @relaxed
    @given(
        st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(BLANKS), st.booleans()), min_size=1, max_size=9),
        st.sampled_from(["", *BLANKS]),
    )
    def test_spans_survive_cleaning(self, pieces, front):
        """Double blanks, letters to be composed, emoji, right-to-left text: each span still holds its own words."""
        text, spans = front, []
        for word, blank, marked in pieces:
            if marked:
                spans.append([len(text), len(text) + len(word), "x"])
            text += word + blank
        reason, whole, entities = prepare_one(text, spans)
        assert (reason, whole) == (None, clean(text))
        assert [whole[e["start"] : e["end"]] for e in entities] == [clean(word) for word, _, marked in pieces if marked]

    def test_mojibake_before_a_span_and_in_it(self):
        """Repaired letters move the spans behind them along."""
        text = "donâ€™t fly to ZÃ¼rich now"
        reason, whole, (entity,) = prepare_one(text, [[text.index("Z"), text.index(" now"), "x"]])
        assert (reason, whole) == (None, "don’t fly to Zürich now")
        assert whole[entity["start"] : entity["end"]] == "Zürich"

    def test_mojibake_that_shows_between_tokens(self):
        """A text of tokens is repaired as one, and so are its spans."""
        _, (text,), ((entity,),) = prepare(tokens=['["naïveÂ", "Paris", "Ã©tÃ", "x"]'], tags=["O B-LOC O O"])
        assert text == clean(text) == "naïve Paris étà x"
        assert text[entity["start"] : entity["end"]] == "Paris"

    def test_forms_of_an_entity(self):
        """`type` or `label`, an object or a list of three; in any order; blanks around a span are not part of it."""
        given = [{"start": 3, "end": 9, "label": " b "}, [0, 3, "a"], {"start": 9, "end": 15, "type": "c", "id": 7}]
        reason, text, entities = prepare_one("aaa  bbb cccc  d", given)
        assert (reason, text) == (None, "aaa bbb cccc d")
        assert [as_span(entity) for entity in entities] == [(0, 3, "a"), (4, 7, "b"), (8, 12, "c")]
        assert prepare_one("aaa", [])[2] == []

    def test_forms_of_tokens(self):
        """JSON lists or words with spaces between; tokens of nothing are left out with their tags."""
        expected = ([None], ["New York [x] 7"], [[{"start": 0, "end": 8, "type": "LOC"}]])
        assert (
            prepare(tokens=['["New", "York", " ", "[x]", 7]'], tags=['["B-LOC", "I-LOC", "O", "O", "O"]']) == expected
        )
        assert prepare(tokens=["New York [x] 7"], tags=["B-LOC I-LOC O O"]) == expected
        assert prepare(tokens=["[ a"], tags=["O B-x"])[1:] == (["[ a"], [[{"start": 2, "end": 3, "type": "x"}]])

    @pytest.mark.parametrize(
        ("text", "entities", "reason"),
        [
            ("Paris", [[0, 6, "x"]], "span_outside_of_text"),
            ("Paris", [[-1, 2, "x"]], "span_outside_of_text"),
            ("Paris", [[2, 2, "x"]], "span_outside_of_text"),
            ("Paris is", [[0, 5, "x"], [4, 8, "x"]], "overlapping_spans"),
            ("Paris", "Paris", "unreadable_entities"),
            ("Paris", "null", "unreadable_entities"),
            ("Paris", "{}x", "unreadable_entities"),
            ("Paris", "[" * 200_000, "unreadable_entities"),
            ("Paris", {"start": 0}, "unreadable_entities"),
            ("Paris", [{"start": 0, "end": 5}], "unreadable_entities"),
            ("Paris", [["0", 5, "x"]], "unreadable_entities"),
            ("Paris", [[0, 5, " "]], "unreadable_entities"),
            ("Paris", [[0, 5]], "unreadable_entities"),
            ("a   b", [[1, 3, "x"]], "span_lost_in_cleaning"),
            ("naïveÂ\nParis", [[7, 12, "x"]], "span_lost_in_cleaning"),
            ("e\u0301 b", [[1, 2, "x"]], "span_lost_in_cleaning"),
        ],
    )
    def test_refused_spans(self, text, entities, reason):
        """A row of which nothing can be made gets its reason and keeps its text, and its neighbours are untouched."""
        cell = entities if isinstance(entities, str) else json.dumps(entities)
        good = '[{"start": 0, "end": 1, "type": "x"}]'
        reasons, texts, found = prepare(text=["a", text, "b", "c", None], entities=[good, cell, good, None, good])
        assert reasons == [None, reason, None, None, None]
        assert texts == ["a", text, "b", "c", None]
        assert found == [json.loads(good), None, json.loads(good), None, None]

    def test_refused_tags(self):
        """As many tags as tokens, or none of it."""
        reasons, _, found = prepare(tokens=["a b", "a b", "a"], tags=["O", "O B-x", None])
        assert reasons == ["tokens_and_tags_of_unequal_length", None, None]
        assert found == [None, [{"start": 2, "end": 3, "type": "x"}], None]

    def test_facts(self):
        """Types in order, each with a B and an I; rows without any entity are refused as a whole."""
        assert FACTS["labels"] == ["O", "B-LOC", "I-LOC", "B-PER", "I-PER", "B-x-y", "I-x-y"]
        with pytest.raises(DataRefused, match="no row to train on has any"):
            PROBLEM.facts({"entities": ["[]", "[]"]})


LONG = "great Anna visited lovely Buenos Aires and the awful stationmaster Xaver in Zwickau with horrible Ypsilanti"
GOLD = [
    (LONG.index(word), LONG.index(word) + len(word), kind)
    for word, kind in [("Anna", "PER"), ("Buenos Aires", "LOC"), ("stationmaster Xaver", "PER"), ("Zwickau", "LOC")]
]


class TestEncode:
    @relaxed
    @given(
        st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), max_size=40),
        st.integers(0, 40),
        st.integers(1, 30),
    )
    def test_windows_answer_for_every_word_once(self, words, tail, room):
        """Whatever the room, the words and the tokens between: no window is longer, and each sees its own words."""
        placed, tokens = [], 0
        for gap, size in words:
            placed.append((tokens + gap, 0, 1))
            tokens += gap + size
        tokens += tail
        windows = list(_windows(placed, tokens, room))
        assert [word for _, _, own in windows for word in own] == list(range(len(placed)))
        assert windows and all(0 <= last - first <= room and last <= tokens for first, last, _ in windows)
        assert all(first <= placed[word][0] < last for first, last, own in windows for word in own)
        if tokens <= room:
            assert len(windows) == 1

    def test_windows_share_context(self):
        """Where a window does not end with the text, the words it answers for see an eighth more on that side."""
        windows = list(_windows([(i, i, i + 1) for i in range(100)], 100, 16))
        assert len(windows) < 10
        for first, last, own in windows:
            assert first == max(0, own[0] - 2) and last >= min(100, own[-1] + 3)

    @pytest.mark.parametrize("max_length", range(3, 61, 3))
    def test_long_texts_are_read_whole(self, tokenizer, max_length):
        """A model that knows the labels finds the spans of a long text however short its windows are, between rows
        that fit."""
        texts = ["lovely Anna", LONG, "", "Zwickau"]
        spans = [[(7, 11, "PER")], GOLD, [], [(0, 7, "LOC")]]
        features = encode(tokenizer, texts, spans, max_length)
        assert max(len(one["input_ids"]) for one in features) <= max_length
        assert all(len({len(one[n]) for n in ("input_ids", "starts", "ends", "labels")}) == 1 for one in features)
        assert answered(features) == spans
        assert sum(code >= 0 for one in features for code in one["labels"]) == sum(len(t.split()) for t in texts)
        assert [
            [(*s[:2], FACTS["types"][s[2]]) for s in np.reshape(one["gold"], (-1, 3))]
            for one in features
            if len(one["gold"])
        ] == [row for row in spans if row]

    def test_predictions_of_a_long_text(self, tokenizer, tiny_model):
        """A model reads windows; what comes out are spans of the text, in order, apart, and sure to some degree."""
        model = Packed(PROBLEM.load_model(str(tiny_model), FACTS, Training()))
        text = " ".join([LONG] * 5)
        found = {}
        for max_length in (16, 120):
            features = encode(tokenizer, ["lovely", text], max_length=max_length)
            (_, prediction) = PROBLEM.decode(forward(PROBLEM, model, features), FACTS, features)
            places = [(e["start"], e["end"]) for e in prediction["entities"]]
            flat = [place for pair in places for place in pair]
            assert places and flat == sorted(flat) and flat[-1] <= len(text)
            assert all(text[a:b].strip() == text[a:b] != "" for a, b in places)
            assert all(0 < e["score"] <= 1 and e["type"] in TYPES for e in prediction["entities"])
            found[max_length] = len({one["row"] for one in features}), len(features)
        assert found[16][0] == found[120][0] == 2 and found[16][1] > 5 * found[120][1] / 2

    def test_first_sub_words_have_the_labels(self, tokenizer):
        """Of a word in pieces the first one is learnt and asked; the others and the special tokens are not."""
        (one,) = encode(tokenizer, ["lovely Ypsilanti"], [[(7, 16, "PER")]])
        tokens = tokenizer.convert_ids_to_tokens(one["input_ids"])
        labels = dict(zip(tokens, one["labels"], strict=True))
        assert labels["lovely"] == 0 and labels["y"] == FACTS["labels"].index("B-PER")
        assert len(tokens) > 5 and sum(code >= 0 for code in one["labels"]) == 2
        assert all(code == -100 for token, code in labels.items() if token[:2] == "##" or token in ("[CLS]", "[SEP]"))

    @pytest.mark.parametrize("text", ["  GREAT \n\n 😀   lövely\t", "great😀, e\u0301 naïf שלום", "我住在北京 ok"])
    def test_spans_are_those_of_the_raw_text(self, tokenizer, text):
        """Serving gets back places in the text as it was sent, blanks, case and accents and all."""
        (features,) = encode(tokenizer, [text])
        (spans,) = decoded([features], [[1] * len(features["input_ids"])])
        words = [text[a:b] for a, b, _ in spans]
        assert "".join(words) == "".join(text.split())
        assert all(word and word == word.strip() for word in words) and len(words) >= 3

    def test_texts_without_words(self, tokenizer):
        """Empty and blank texts are rows too, wherever they stand."""
        features = encode(tokenizer, ["", "great", " \n ", ""])
        assert [one["row"] for one in features] == [0, 1, 2, 3]
        assert decoded(features, [[1] * len(one["input_ids"]) for one in features]) == [[], [(0, 5, "LOC")], [], []]

    def test_chinese_without_blanks(self, tokenizer):
        """Each sign is a word: a span within a sentence without blanks is found."""
        spans = [[(3, 5, "LOC"), (6, 7, "PER")]]
        assert answered(encode(tokenizer, ["我住在北京，他也是"], spans)) == spans

    @pytest.mark.parametrize(
        ("text", "spans"),
        [
            ("We met Anna, in Paris.", [(7, 11, "PER"), (16, 21, "LOC")]),
            ("(Anna's) Paris/Zwickau", [(1, 5, "PER"), (9, 14, "LOC"), (15, 22, "LOC")]),
            ("我住在北京，他也是", [(3, 5, "LOC")]),
            ("ฉันอยู่ที่กรุงเทพ", [(10, 17, "LOC")]),
            ("मैं दिल्ली में हूँ।", [(4, 10, "LOC")]),
        ],
    )
    def test_tokenizers_that_split_at_blanks_alone(self, text, spans):
        """With SentencePiece a comma and a whole Chinese sentence belong to a word; spans end before and within it."""
        pieces = [("<unk>", 0.0), ("▁", -1.0), *((sign, -2.0) for sign in sorted(set(text) - {" "}))]
        pieces += [(f"▁{word}", -3.0) for word in ("Anna", "Paris", "in", "We", "met")] + [("Zwickau", -3.0)]
        inner = Tokenizer(models.Unigram(pieces, unk_id=0))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        assert answered(
            encode(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"), [text], [spans])
        ) == [spans]

    def test_signs_of_several_tokens(self):
        """Where tokens are bytes, those of one sign are one word, and accents belong to the letter before them."""
        text = "great 😀👍🏽  lo\u0308 北"
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE({sign: code for code, sign in enumerate(alphabet)}, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        (one,) = encode(PreTrainedTokenizerFast(tokenizer_object=inner), [text], max_length=100)
        words = [text[a:b] for a, b in zip(one["starts"], one["ends"], strict=True) if a >= 0]
        assert words == ["great", "😀", "👍", "\U0001f3fd", "lo\u0308", "北"] and len(one["input_ids"]) > 25

    def test_letters_stay_together(self):
        """What a tokenizer of that kind cuts within a word, vowel signs and accents included, is one word."""
        text = "दिल्ली naïve Zoe\u0308 x1"
        inner = Tokenizer(models.Unigram([("<unk>", 0.0), *((s, -2.0) for s in {*text.replace(" ", "▁")})], unk_id=0))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
        (one,) = encode(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"), [text])
        words = [text[a:b] for a, b in zip(one["starts"], one["ends"], strict=True) if a >= 0]
        assert words == text.split()
        assert len(one["input_ids"]) > 15

    def test_a_type_that_was_not_learnt_is_refused(self, tokenizer):
        """By name, with the one that was probably meant."""
        with pytest.raises(DataRefused, match="not a type of the training rows, got 'LOK'; did you mean LOC"):
            encode(tokenizer, ["x"], [[(0, 1, "LOK")]])

    def test_a_tokenizer_must_know_places(self, tmp_path):
        """Without offsets there are no spans: the model is refused, in one line."""
        slow = type("Slow", (), {"is_fast": False})()
        with pytest.raises(UserError, match="does not know where a token stands"):
            encode(slow, ["x"])
