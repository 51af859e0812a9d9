"""Token ids on disk: right, made once, and made again when they are not whole."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from overnight.data.normalise import digest
from overnight.data.store import BATCH, write_table
from overnight.data.tokenization import cache_key, token_lengths, tokenize, tokenizer_digest
from overnight.errors import DataRefused
from overnight.problems.sequence_classification import SequenceClassification
from overnight.problems.texts import encode_texts
from overnight.training import data
from overnight.training.models import load_tokenizer
from overnight.training.scratch import make_base

PROBLEM = SequenceClassification()
FACTS = {"labels": ["bad", "good", "plain"]}


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model)


def save(path: Path, texts: list[str], labels: list[str]) -> Path:
    rows = zip(texts, labels, strict=True)
    write_table({"row_id": [digest(f"{t}|{x}") for t, x in rows], "text": texts, "label": labels}, path)
    return path


@pytest.fixture
def rows(tmp_path, tiny_rows) -> Path:
    return save(tmp_path / "rows.parquet", tiny_rows.text.tolist(), tiny_rows.label.tolist())


def test_rows_are_encoded_in_their_order(tmp_path, rows, tokenizer, tiny_rows):
    """Each row's ids are what the tokenizer gives for it, cut at the limit, with the label's number."""
    made = tokenize(rows, PROBLEM, tokenizer, FACTS, 10, tmp_path / "tokens")
    found = data.open(made.folder)
    assert (made.cached, made.rows, made.longest) == (False, 400, 10)
    assert made.tokens == int(found.lengths.sum())
    for i in (0, 7, 399):
        expected = tokenizer(tiny_rows.text[i], truncation=True, max_length=10)["input_ids"]
        assert found[i]["input_ids"].tolist() == expected
        assert FACTS["labels"][found[i]["labels"]] == tiny_rows.label[i]


def test_more_rows_than_a_batch_keep_their_order(tmp_path, tokenizer):
    """Rows are streamed in batches; the borders between them show nowhere."""
    texts = [f"no{i % 7} good" * (i % 3 + 1) for i in range(BATCH * 2 + 5)]
    made = tokenize(
        save(tmp_path / "a.parquet", texts, ["good"] * len(texts)), PROBLEM, tokenizer, FACTS, 64, tmp_path / "t"
    )
    assert data.open(made.folder).lengths.tolist() == token_lengths(texts, tokenizer)


def test_the_same_work_is_done_once(tmp_path, rows, tokenizer, tiny_model):
    """A second call, and one with the tokenizer loaded from a copy elsewhere, find the folder and touch nothing."""
    from transformers import AutoTokenizer

    made = tokenize(rows, PROBLEM, tokenizer, FACTS, 16, tmp_path / "tokens")
    stamps = {p: p.stat().st_mtime_ns for p in Path(made.folder).iterdir()}
    shutil.copytree(tiny_model, tmp_path / "elsewhere")
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "elsewhere")):
        again = tokenize(rows, PROBLEM, same, FACTS, 16, tmp_path / "tokens")
        assert again.cached and again.folder == made.folder and again.tokens == made.tokens
    assert {p: p.stat().st_mtime_ns for p in Path(made.folder).iterdir()} == stamps


def test_whatever_changes_the_result_changes_the_key(tmp_path, rows, tokenizer, tiny_rows, tiny_model):
    """Length, labels, rows, their order and the vocabulary each give another key; a call's padding does not."""
    from transformers import AutoTokenizer

    texts, labels = tiny_rows.text.tolist(), tiny_rows.label.tolist()
    other = AutoTokenizer.from_pretrained(tiny_model)
    other.add_tokens(["flightcrew"])
    keys = [
        cache_key(rows, PROBLEM, tokenizer, FACTS, 16),
        cache_key(rows, PROBLEM, tokenizer, FACTS, 17),
        cache_key(rows, PROBLEM, tokenizer, {"labels": ["good", "bad", "plain"]}, 16),
        cache_key(rows, PROBLEM, other, FACTS, 16),
        cache_key(save(tmp_path / "b.parquet", texts[::-1], labels[::-1]), PROBLEM, tokenizer, FACTS, 16),
        cache_key(save(tmp_path / "c.parquet", texts[1:], labels[1:]), PROBLEM, tokenizer, FACTS, 16),
    ]
    assert len(set(keys)) == len(keys)
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=5)
    assert tokenizer_digest(tokenizer) == before


@pytest.mark.parametrize(
    "damage", ["no meta", "short ids", "short offsets", "bad meta", "missing labels", "other count"]
)
def test_a_folder_that_is_not_whole_is_made_again(tmp_path, rows, tokenizer, damage):
    """A killed writer, a truncated array or a damaged record never reaches training."""
    made = tokenize(rows, PROBLEM, tokenizer, FACTS, 16, tmp_path / "tokens")
    folder = Path(made.folder)
    whole = np.array(data.open(folder)[399]["input_ids"])
    if damage == "no meta":
        (folder / "meta.json").unlink()
    elif damage == "bad meta":
        (folder / "meta.json").write_text('{"rows": 4')
    elif damage == "missing labels":
        (folder / "labels.npy").unlink()
    elif damage == "other count":
        (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"rows": 400', '"rows": 399'))
    else:
        path = folder / ("input_ids.npy" if damage == "short ids" else "input_ids.offsets.npy")
        path.write_bytes(path.read_bytes()[:-8])
    again = tokenize(rows, PROBLEM, tokenizer, FACTS, 16, tmp_path / "tokens")
    assert not again.cached and again.folder == made.folder
    assert data.open(folder)[399]["input_ids"].tolist() == whole.tolist()
    assert tokenize(rows, PROBLEM, tokenizer, FACTS, 16, tmp_path / "tokens").cached


def _in_process(rows: Path, model: Path, root: Path, results) -> None:
    from transformers import AutoTokenizer

    made = tokenize(rows, PROBLEM, AutoTokenizer.from_pretrained(model), FACTS, 16, root)
    results.put((made.cached, made.tokens))


def test_two_processes_make_one_folder(tmp_path, rows, tiny_model):
    """Two at the same time: one writes, the other waits and finds it done."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=_in_process, args=(rows, tiny_model, tmp_path / "t", results)) for _ in range(2)]
    for process in both:
        process.start()
    found = sorted(results.get(timeout=60) for _ in both)
    for process in both:
        process.join(timeout=60)
    assert [cached for cached, _ in found] == [False, True] and found[0][1] == found[1][1]


def test_a_row_that_cannot_be_encoded_leaves_no_finished_folder(tmp_path, rows, tokenizer):
    """An unknown label is the problem's to refuse, and what was begun does not count as done."""
    with pytest.raises(DataRefused, match="not a label of the training rows"):
        tokenize(rows, PROBLEM, tokenizer, {"labels": ["good"]}, 16, tmp_path / "tokens")
    assert not list((tmp_path / "tokens").glob("*/meta.json"))


def test_lengths_are_not_cut(tokenizer):
    """The validation sees how long a text really is, special tokens included, beyond any limit of the model."""
    tokenizer(["a b"], truncation=True, max_length=5)
    short, long = token_lengths(["good", "good " * 600], tokenizer)
    assert short == len(tokenizer("good")["input_ids"]) and long - 2 == (short - 2) * 600
    assert token_lengths([], tokenizer) == []


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_many_texts_are_encoded_as_one(kind, sides, tmp_path, tiny_model):
    """The fast way of large batches gives what the tokenizer itself gives, cut alike; types where some are not 0."""
    texts = ["", "a good flight", "word " * 90, "مرحبا بالعالم 👩🏽‍🚀 e\u0301", "naïve 東京タワー"] * 30
    if kind == "gpt2":
        make_base(tmp_path / "base", texts, architecture=kind, layers=1, width=8, heads=1, vocabulary=300, length=32)
    tokenizer = load_tokenizer(str(tiny_model if kind == "bert" else tmp_path / "base"))
    given = [texts, texts[::-1]][:sides]
    expected = dict(tokenizer(*given, truncation=True, max_length=24, return_attention_mask=False))
    found = encode_texts(tokenizer, *given, max_length=24)
    assert found["input_ids"] == expected["input_ids"]
    alone = [encode_texts(tokenizer, *([side[i]] for side in given), max_length=24) for i in range(len(texts))]
    assert found["input_ids"] == [one["input_ids"][0] for one in alone]
    types = expected.get("token_type_ids") or [[]]
    assert found.get("token_type_ids", types) == types
    assert ("token_type_ids" in found) == (kind == "bert" and sides == 2)
