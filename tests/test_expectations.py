"""Validation: what is refused row by row, what Great Expectations says of the table, and that no text gets out."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight.config import Validation
from overnight.errors import NightFailed, UserError
from overnight.expectations import rows, validate_rows

SENTENCES = {
    "good": "The crew was very friendly and we enjoyed the flight to city number {}.",
    "bad": "Our luggage was lost and nobody at the desk wanted to help us with case {}.",
    "plain": "The train to the airport leaves every hour from the platform number {}.",
}
FRENCH = "Le personnel était très aimable et nous avons bien aimé le voyage numéro {}."
CANARY = "zanzibar-secret"


def digest(*parts: str | None) -> str:
    return hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def table(rows: list[tuple[str | None, str | None]]) -> pd.DataFrame:
    """Rows as ingest leaves them; source rows are numbered from 1000, so that they differ from positions."""
    return pd.DataFrame(
        {
            "row_id": [digest(text, label) for text, label in rows],
            "text_id": [digest(text) for text, _ in rows],
            "source_row": range(1000, 1000 + len(rows)),
            "text": pd.Series([text for text, _ in rows], dtype=object),
            "label": pd.Series([label for _, label in rows], dtype=object),
        }
    )


def good_rows(count: int = 120) -> list[tuple[str | None, str | None]]:
    labels = list(SENTENCES)
    return [(SENTENCES[labels[i % 3]].format(i), labels[i % 3]) for i in range(count)]


def spoil(count: int, text=lambda t, i: t, label=lambda n, i: n) -> pd.DataFrame:
    """Good rows, the first `count` of them changed."""
    return table([(text(t, i), label(n, i)) if i < count else (t, n) for i, (t, n) in enumerate(good_rows())])


@pytest.fixture(scope="module")
def tokenizer():
    """Counts words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.fixture
def run(tmp_path: Path, tokenizer):
    def run(frame: pd.DataFrame, validation: dict | None = None, folder: str = "night", **arguments):
        path = tmp_path / f"{folder}.parquet"
        frame.to_parquet(path)
        settings = {"tokenizer": tokenizer, "max_length": 32, "previous": None} | arguments
        return validate_rows(
            path,
            Validation.model_validate(validation or {}),
            folder=tmp_path / folder,
            docs_folder=tmp_path / folder / "docs",
            **settings,
        )

    return run


def of(validated, name: str) -> dict:
    return {r["expectation"]: r for r in validated.results}[name]


def quarantine(validated) -> dict[int, str]:
    """Source row → reasons."""
    frame = pd.read_parquet(validated.quarantine)
    return dict(zip(frame.source_row.tolist(), frame.reasons.tolist(), strict=True))


THIRDS = {"labels": list(SENTENCES), "label_shares": dict.fromkeys(SENTENCES, 1 / 3)}

# expectation → settings of its entry, arguments of the call, bad rows
BAD = {
    "row_count": ({}, {}, table(good_rows(60))),
    "columns": ({}, {"slices": ["airline"]}, table(good_rows())),
    "not_null": ({}, {}, spoil(12, text=lambda t, i: None)),
    "labels": ({"known": list(SENTENCES)}, {}, spoil(12, label=lambda n, i: "weird")),
    "label_share": ({}, {"previous": THIRDS}, spoil(60, label=lambda n, i: "good")),
    "characters": ({}, {}, spoil(12, text=lambda t, i: str(i) if i % 2 else t * 2000)),
    "tokens": ({}, {}, spoil(12, text=lambda t, i: t * 5)),
    "duplicates": ({}, {}, pd.concat([table(good_rows()), table(good_rows(30))], ignore_index=True)),
    "contradictions": ({}, {}, spoil(12, text=lambda t, i: f"Text {i // 2} of a pair, with another label each.")),
    "encoding_damage": ({}, {}, spoil(12, text=lambda t, i: f"{t} caf\ufffd")),
    "language": ({"expected": ["en"]}, {}, spoil(60, text=lambda t, i: FRENCH.format(i))),
}


def test_every_expectation_passes_on_good_rows(run):
    """Good rows pass every expectation that `test_bad_rows_fail` makes fail, with the same settings, all blocking."""
    expect = {name: settings | {"severity": "block"} for name, (settings, _, _) in BAD.items()}
    good = run(table(good_rows()).assign(airline="x"), {"expect": expect}, slices=["airline"], previous=THIRDS)
    assert good.accepted and good.why == [] and all(result["passed"] for result in good.results)
    assert {result["expectation"] for result in good.results} >= set(BAD)


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_fail(run, name):
    """Each expectation can fail; with `block` that refuses the night, and the reason names this expectation alone."""
    settings, arguments, bad = BAD[name]
    refused = run(bad, {"expect": {name: settings | {"severity": "block"}}, "max_refused": 1}, **arguments)
    assert not of(refused, name)["passed"] and not refused.accepted
    assert [why.partition(":")[0] for why in refused.why] == [name]


@pytest.mark.parametrize("name", ["columns", "not_null", "tokens"])
def test_warnings_accept(run, name):
    """`warn` reports the failure and accepts the night; bad rows are refused all the same."""
    settings, arguments, bad = BAD[name]
    warned = run(bad, {"expect": {name: settings | {"severity": "warn"}}}, **arguments)
    assert warned.accepted and not of(warned, name)["passed"] and of(warned, name)["severity"] == "warn"
    assert warned.rows_refused == (12 if name == "not_null" else 0)


def test_off_does_not_look(run):
    """With everything `off` only rows without text or label are refused, because nothing can be learnt from them."""
    bad = pd.concat([frame for _, _, frame in BAD.values()], ignore_index=True)
    off = run(bad, {"expect": {name: {"severity": "off"} for name in BAD}})
    assert off.accepted and [r["expectation"] for r in off.results] == ["refused"]
    assert off.reasons == {"null_text": 12}


def test_defaults_accept_good_rows(run):
    """Nothing to say about good rows: all kept, in order, and every default expectation is in the record."""
    validated = run(table(good_rows()))
    assert validated.accepted and validated.rows_clean == validated.rows_in == 120
    assert validated.reasons == {} and quarantine(validated) == {}
    pd.testing.assert_frame_equal(
        pd.read_parquet(validated.path), table(good_rows()), check_dtype=False, check_column_type=False
    )
    names = "row_count columns not_null labels label_count label_share characters duplicates encoding_damage "
    assert [r["expectation"] for r in validated.results] == [*(names + "contradictions tokens refused").split()]


def test_reasons_of_refused_rows(run):
    """Every reason is given to exactly the rows it holds for, several to a row where several hold."""
    rows = good_rows()
    rows[0] = (None, "good")
    rows[1] = ("   ", "good")
    rows[2] = (rows[2][0], None)
    rows[3] = (rows[3][0], "weird")
    rows[4] = ("ab", "bad")
    rows[5] = ("x" * 200, "bad")
    rows[7] = rows[6]
    rows[8] = ("Twice with two labels.", "good")
    rows[9] = rows[10] = ("Twice with two labels.", "bad")
    rows[11] = ("a caf\ufffd", "good")
    rows[12] = ("said â€œhelloâ€\x9d to us", "good")
    rows[13] = ("Déjà vu – “naïve” façade, 5 € each 😀", "good")  # not ASCII, and sound
    rows[14] = ("\ufffd", "weird")
    expect = {"labels": {"known": list(SENTENCES)}, "characters": {"max": 150}}
    validated = run(table(rows), {"expect": expect})
    assert quarantine(validated) == {
        1000: "null_text",
        1001: "null_text",
        1002: "null_label",
        1003: "unknown_label",
        1004: "too_short",
        1005: "too_long",
        1007: "duplicate",
        1008: "contradiction",
        1009: "contradiction",
        1010: "duplicate;contradiction",
        1011: "encoding_damage",
        1012: "encoding_damage",
        1014: "unknown_label;too_short;encoding_damage",
    }
    assert validated.reasons["duplicate"] == 2 and validated.rows_refused == 13 and validated.rows_clean == 107
    assert list(pd.read_parquet(validated.quarantine)) == [*table(rows), "reasons"]
    assert not set(pd.read_parquet(validated.path).source_row) & set(quarantine(validated))


def test_too_many_refused_rows_stop_the_night(run):
    """Past `max_refused` the night is not accepted; the reason says how many and which rows, and never quotes them."""
    bad = spoil(30, text=lambda t, i: f"{CANARY} {t} \ufffd")
    assert run(bad, {"max_refused": 0.25}).accepted
    refused = run(bad, {"max_refused": 0.24})
    assert refused.why == [
        "refused: 25 % of rows were refused, limit 24 % (first source rows: 1000, 1001, 1002, 1003, 1004)"
    ]


def test_no_text_in_record_or_docs_unless_asked(run, tmp_path):
    """Whatever fails, the record and the Data Docs quote nothing by default; `show_examples` shows text, as text."""
    rows = good_rows()
    rows[:20] = [(f"<script>{CANARY}</script> $x {i} \ufffd", "good") for i in range(20)]
    rows[20] = (f"label of {CANARY}", f"{CANARY}-label")
    rows[21:31] = [("ab", CANARY)] * 10
    also = [
        {"expect": "expect_column_most_common_value_to_be_in_set", "arguments": {"column": "text", "value_set": ["a"]}},
        {"expect": "expect_column_values_to_not_match_regex", "arguments": {"column": "text", "regex": "secret"}},
        {"expect": "expect_column_values_to_be_unique", "arguments": {"column": "text"}},
    ]
    validation = {"expect": {"labels": {"known": list(SENTENCES)}}, "also": also}
    quiet = run(table(rows), validation, "quiet")
    written = json.dumps(asdict(quiet)) + "".join(
        p.read_text() for p in Path(quiet.docs).parent.rglob("*") if p.is_file()
    )
    assert len([r for r in quiet.results if not r["passed"]]) >= 7
    assert "secret" not in written.replace('"regex"', "") and "examples" not in written
    shown = run(table(rows), validation | {"show_examples": True}, "shown")
    assert CANARY in of(shown, "encoding_damage")["examples"][0]
    page = Path(shown.docs).read_text()
    assert CANARY in page and f"<script>{CANARY}" not in page and f"&lt;script&gt;{CANARY}&lt;/script&gt; $x" in page


def test_docs_ask_nobody(run):
    """The page needs no network: no address in it, no script, no picture; and it says what failed."""
    page = Path(run(spoil(12, text=lambda t, i: f"{t} \ufffd")).docs).read_text()
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(", page)
    assert "The rows were accepted" in page and "10 % of rows carry damaged characters, limit 5 %" in page


def test_previous_night(run):
    """Known labels and shares come from the facts of the last accepted night; tonight's are the next one's."""
    first = run(table(good_rows()))
    assert first.facts["labels"] == sorted(SENTENCES)
    assert first.facts["label_shares"] == pytest.approx(dict.fromkeys(SENTENCES, 1 / 3))
    assert of(first, "label_share")["observed"] is None
    second = run(
        spoil(30, label=lambda n, i: "weird" if i == 0 else "good"), previous=json.loads(json.dumps(first.facts))
    )
    assert quarantine(second) == {1000: "unknown_label"}
    share = of(second, "label_share")
    assert not share["passed"] and share["observed"] == pytest.approx((59 + 1 - 1) / 119 - 1 / 3, abs=1e-6)
    assert share["text"] == "the share of 'good' went from 33.3 % to 49.6 %, limit 10 points either way"
    gone = run(table(good_rows()), previous={"label_shares": THIRDS["label_shares"] | {"gone": 0.2}})
    assert "'gone' went from 20 % to 0 %" in of(gone, "label_share")["text"] and not of(gone, "label_share")["passed"]


def test_config_labels_win_over_the_previous_night(run):
    """A label that the config names is known, even when the last night had never seen it."""
    bad = spoil(10, label=lambda n, i: "weird")
    known = {"expect": {"labels": {"known": [*SENTENCES, "weird"]}}}
    assert run(bad, known, previous=THIRDS).rows_refused == 0
    assert run(bad, previous=THIRDS).reasons == {"unknown_label": 10}


def test_one_label_left(run):
    """Rows of a single label cannot train a classifier; the night stops before it tries."""
    refused = run(spoil(120, label=lambda n, i: "good"))
    assert not refused.accepted and refused.why[0].startswith("label_count: 1 different labels")


def test_missing_column_is_an_error(run):
    """A table without the problem's column is the user's mistake, named with what comes nearest, not bad data."""
    with pytest.raises(UserError, match="no such column, got 'text'; did you mean texts?"):
        run(table(good_rows()).rename(columns={"text": "texts"}))


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"expect": "expect_column_to_exists"}, "not an expectation.*did you mean expect_column_to_exist?"),
        ({"expect": "expect_column_to_exist", "arguments": {"column": "txt"}}, "got 'txt'; did you mean text?"),
        (
            {"expect": "expect_column_mean_to_be_between", "arguments": {"column": "text", "low": 1}},
            "low: extra fields",
        ),
    ],
)
def test_bad_further_expectations(run, entry, complaint):
    """Mistakes in `validation.also` are complained about with their place, before anything is judged."""
    with pytest.raises(UserError, match=f"validation → also → 0.*{complaint}"):
        run(table(good_rows()), {"also": [entry]})


def test_further_expectations(run):
    """Any expectation of Great Expectations is one list entry, with its own severity."""
    entry = {"expect": "expect_column_values_to_not_match_regex", "arguments": {"column": "text", "regex": "crew"}}
    refused = run(table(good_rows()), {"also": [entry]})
    assert not refused.accepted and of(refused, entry["expect"])["observed"] == pytest.approx(1 / 3, abs=1e-4)
    assert run(table(good_rows()), {"also": [entry | {"severity": "warn"}]}).accepted
    assert run(table(good_rows()), {"also": [entry | {"severity": "off"}]}).accepted
    lenient = entry | {"arguments": entry["arguments"] | {"mostly": 0.6}}
    assert run(table(good_rows()), {"also": [lenient]}).accepted


def test_what_cannot_be_evaluated_fails_the_night(run):
    """An exception inside Great Expectations is not bad data; its message may quote a value and is not passed on."""
    entry = {"expect": "expect_column_mean_to_be_between", "arguments": {"column": "text", "min_value": 0}}
    with pytest.raises(NightFailed, match="expect_column_mean_to_be_between: Great Expectations could not") as failure:
        run(spoil(12, text=lambda t, i: CANARY), {"also": [entry]})
    assert CANARY not in str(failure.value)


def test_all_texts_missing(run):
    """A column of nothing is refused row by row, and the night with it."""
    validated = run(table([(None, label) for _, label in good_rows()]))
    assert validated.reasons == {"null_text": 120} and validated.rows_clean == 0 and not validated.accepted
    assert {"not_null", "refused"} <= {why.partition(":")[0] for why in validated.why}


def test_one_row_and_none(run):
    """Tiny tables are refused for their size, not by an exception."""
    one = run(table(good_rows(1)))
    assert one.rows_clean == 1 and {why.partition(":")[0] for why in one.why} == {"row_count", "label_count"}
    none = run(table([]), folder="none")
    assert (none.rows_in, none.rows_clean) == (0, 0)
    assert none.why == ["row_count: 0 rows came in, expected at least 100"]
    assert list(pd.read_parquet(none.path)) == list(table([]))  # the columns, and no row


def test_pairs_and_problems_without_labels(run):
    """Several text columns make one input; without a target nothing is asked of labels."""
    frame = table(good_rows()).drop(columns="label").assign(context="Some other words around it.")
    frame.loc[3, "context"] = None
    frame.loc[4, "context"] = "lost \ufffd"
    settings = {"columns": ("text", "context"), "text_roles": ("text", "context"), "target": None}
    validated = run(frame, **settings)
    assert quarantine(validated) == {1003: "null_text", 1004: "encoding_damage"} and validated.accepted
    assert "label_count" not in [r["expectation"] for r in validated.results]
    assert validated.facts["tokens"]["max"] > 15


def test_without_tokenizer(run):
    """Without a tokenizer tokens are left out, the rest is judged."""
    validated = run(table(good_rows()), tokenizer=None)
    assert validated.accepted and "tokens" not in [r["expectation"] for r in validated.results]


def test_record_is_deterministic_and_json(run):
    """The same rows give the same record and files; it is JSON all through, with plain numbers."""
    frame = BAD["duplicates"][2]
    first, second = (run(frame, {"expect": {"language": {"expected": ["en"]}}}) for _ in range(2))
    assert asdict(first) == asdict(second) == json.loads(json.dumps(asdict(first)))
    assert 0.9 < first.facts["languages"]["en"] <= 1
    assert first.facts["chars"]["p50"] > 60 and first.facts["tokens"]["max"] == 16


TEXTS = st.sampled_from(
    [None, " ", "ab", "good text", "other text", "lost \ufffd", "nul \x00", "x" * 30, "naïve, and fine"]
)


@settings(deadline=None)
@given(
    st.lists(st.tuples(TEXTS, st.sampled_from(["a", "b", "c", None, ""])), min_size=1, max_size=40), st.integers(1, 9)
)
def test_pieces_of_any_size_are_judged_the_same(drawn, size):
    """Reasons, measures and files do not depend on how many rows are read together; what needs a look at other rows is
    what comparing each with each other says."""
    expect = Validation.model_validate({"expect": {"characters": {"max": 20}, "labels": {"known": ["a", "b"]}}}).expect
    told = ["text", "label"]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        table(drawn).to_parquet(folder / "rows.parquet")
        found = []
        for batch in (4096, size):
            patch.setattr("overnight.data.store.BATCH", batch)
            read = rows.read(folder / "rows.parquet", told, ["text"], "label", "label")
            refused = rows.refusals(read, expect, "label", None)
            measured = rows.measure(read, ~refused.any(axis=1).to_numpy(), expect, ["text"], "label", 32, None)
            frames = map(pd.read_parquet, rows.write(read, refused, told, folder))
            found.append([refused, measured.facts, *(frame.to_csv() for frame in frames)])
    for one, other in zip(*found, strict=True):
        assert one.equals(other) if isinstance(one, pd.DataFrame) else one == other
    whole = [(text, label or None) for text, label in drawn]
    for place, (text, label) in enumerate(whole):
        there = bool(text and text.strip())
        labels = {other for same, other in whole if same == text and other}
        assert refused["duplicate"][place] == (there and (text, drawn[place][1]) in drawn[:place])
        assert refused["contradiction"][place] == (there and len(labels) > 1)
        assert refused["encoding_damage"][place] == bool(text and (set(text) & {"\ufffd", "\x00"}))
        assert refused["null_label"][place] == (label is None)
        assert refused["unknown_label"][place] == (label == "c")
        assert refused["too_long"][place] == bool(text and len(text) > 20)


def test_quiet_and_leaves_nothing_behind(run, capfd, caplog, monkeypatch, tmp_path):
    """No progress bar, warning or temporary file; the process's own Great Expectations context is what it was."""
    import great_expectations as gx
    from great_expectations.data_context.data_context.context_factory import project_manager

    mine = gx.get_context(mode="ephemeral")
    capfd.readouterr()
    caplog.clear()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    run(BAD["tokens"][2])
    assert list((tmp_path / "temporary").iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []
    assert project_manager.get_current_project() is mine
    project_manager.set_project(None)


def test_nights_at_the_same_time(run):
    """Two nights in one process do not see each other's rows."""
    found = {}
    frames = {f"night-{i}": table(good_rows(100 + i)) for i in range(4)}
    threads = [
        threading.Thread(target=lambda name=name: found.update({name: run(frames[name], folder=name).rows_in}))
        for name in frames
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: len(frame) for name, frame in frames.items()}
