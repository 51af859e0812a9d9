"""Bulk scoring: one row out for each row in, in its order, in every format, also after kill -9."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import shutil
import signal
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import Command, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from overnight.bulk import work
from overnight.bulk.inputs import look
from overnight.bulk.outputs import assemble, open_part
from overnight.bulk.run import Options, score_file
from overnight.data import encodings
from overnight.errors import UserError
from overnight.home import Home, read_json
from overnight.tracking.registry import Version

LABELS = ["bad", "good", "plain"]
TRICKY = ["plain words", 'a "quoted", text', "two\nlines", "a\ttab", "carriage\rreturn", "naïve café ☕", "  spaced  "]
FORMATS = ["csv", "tsv", "jsonl", "parquet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    """A finished model folder with an untrained head."""
    from overnight import problems
    from overnight.settings import Training
    from overnight.training.card import Card, finish_model_folder

    folder = tmp_path_factory.mktemp("finished") / "best"
    problem = problems.get("sequence-classification")
    problem.load_model(str(tiny_model), {"labels": LABELS}, Training()).save_pretrained(folder)
    finish_model_folder(folder, Card(problem.name, {"labels": LABELS}, 32, "macro_f1"), str(tiny_model))
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    from overnight.training.predict import Scorer

    return Scorer(folder)


@pytest.fixture
def place(tmp_path) -> Home:
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})


def version(number: int = 3) -> Version:
    return Version("tiny", number, None, ("champion",), {}, {}, "", 0.0)


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", quoting=csv.QUOTE_ALL)
            writer.writerows([rows[0], *(row.values() for row in rows)])
    return path


def read(path: Path) -> list[dict]:
    """The rows as a reader of the standard library, or Arrow, has them."""
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


PLAIN = Options()


def score(place, folder, source, target, number=3, options=PLAIN, **more):
    return score_file(place, version(number), folder, source, target, options, **more)


# -- rows in, rows out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("into", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_row_is_answered_in_its_place(tmp_path, place, folder, scorer, source, into):
    """From every format into every other: cells kept, answers those of the model, order that of the input."""
    rows = [{"id": str(i), "text": text, "more": f"{i} – {text}"} for i, text in enumerate(TRICKY)]
    out = tmp_path / f"out.{into}"
    facts = score(place, folder, write(tmp_path / f"in.{source}", rows), out, options=Options(scores=True))
    found = read(out)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    expected = scorer.predict_texts([{"text": " ".join(text.split())} for text in TRICKY])
    for row, answer in zip(found, expected, strict=True):
        assert (row["label"], row["model"], int(row["version"]), row["error"]) == (answer["label"], "tiny", 3, "")
        assert float(row["score"]) == pytest.approx(answer["score"], abs=1e-6)
        assert {x: float(row[f"score_{x}"]) for x in LABELS} == pytest.approx(answer["scores"], abs=1e-6)
    assert (facts["rows"], facts["errors"], facts["resumed"]) == (len(TRICKY), 0, 0)
    assert not (tmp_path / f"out.{into}.parts").exists()


def test_types_and_absent_keys_survive(tmp_path, place, folder):
    """JSON values stay JSON values, Parquet columns keep their types, JSON of one kind becomes a typed column."""
    rows = [{"text": "a", "n": 1, "deep": {"x": [1]}, "yes": True}, {"text": "b", "n": 2.5}, {"text": "c", "n": None}]
    source = write(tmp_path / "in.jsonl", rows)
    score(place, folder, source, tmp_path / "out.jsonl")
    assert [{k: v for k, v in row.items() if k in rows[0]} for row in read(tmp_path / "out.jsonl")] == rows
    score(place, folder, source, tmp_path / "out.parquet")
    kinds = {field.name: str(field.type) for field in parquet.read_schema(tmp_path / "out.parquet")}
    wanted = {"text": "string", "n": "double", "deep": "string", "yes": "bool", "score": "double", "version": "int64"}
    assert wanted.items() <= kinds.items()
    table = pa.table({"text": ["a"], "at": pa.array([1], pa.timestamp("ns")), "d": pa.array(["x"]).dictionary_encode()})
    parquet.write_table(table, tmp_path / "typed.parquet")
    score(place, folder, tmp_path / "typed.parquet", tmp_path / "again.parquet")
    assert parquet.read_table(tmp_path / "again.parquet").select(table.column_names).equals(table)


BROKEN = {
    "in.csv": ('text,id\na,1\nb\n"open,3\n,4\n  ,5\nlast,6\n', ["line 3: 1 fields", "line 4: "]),
    "in.jsonl": (
        '{"text": "a"}\nnot json\n[1]\n\n{"id": 1}\n{"text": null}\n{"text": "z"}\n',
        ["line 2: Expecting value", "line 3: a list"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_rows_are_told_and_not_lost(tmp_path, place, folder, name):
    """A row that cannot be read or has no text comes out with its reason; the others are scored."""
    content, broken = BROKEN[name]
    errors = dict(enumerate([*broken, "no text", "no text"], start=1))
    (tmp_path / name).write_text(content)
    facts = score(place, folder, tmp_path / name, tmp_path / "out.jsonl")
    found = read(tmp_path / "out.jsonl")
    assert len(found) == facts["rows"] == 6 and facts["errors"] == 4
    for number, row in enumerate(found):
        assert row["error"].startswith(errors.get(number, "")) and bool(row["error"]) == (number in errors)
        assert (row["label"] is None) == (row["score"] is None) == (number in errors)
    assert facts["first_errors"][0].startswith(f"row 2: {errors[1]}")


def test_scores_that_are_no_numbers_are_an_error(tmp_path, place, folder, monkeypatch):
    """A model that answers NaN is not believed."""
    from overnight.problems.sequence_classification import SequenceClassification

    nan = float("nan")
    answer = {"label": "bad", "score": nan, "scores": {"bad": nan}}
    monkeypatch.setattr(SequenceClassification, "decode", lambda self, outputs, *_: [answer] * len(outputs))
    score(place, folder, write(tmp_path / "in.csv", [{"text": "a"}]), tmp_path / "out.jsonl")
    (row,) = read(tmp_path / "out.jsonl")
    assert row["label"] is None and "no finite numbers" in row["error"]


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet='a",;\n\r\t ', max_size=80))
def test_no_row_is_lost_whatever_the_file_holds(tmp_path_factory, text):
    """Any junk below a header: as many rows in chunks as were counted, and as many again in what is written."""
    folder = tmp_path_factory.mktemp("junk")
    path = folder / "in.csv"
    path.write_text("text,b\nx,y\n" + text, newline="")
    source = look(path, "auto", {"text": "text"})
    added = pa.schema([("error", pa.string())])
    for kind in ("csv", "jsonl", "parquet"):
        part = open_part(folder / f"part.{kind}", source.schema, added)
        count = 0
        for chunk in source.chunks(0, 2, 3):
            part.write(chunk, {"error": chunk.errors})
            count += len(chunk)
        part.close()
        assemble([folder / f"part.{kind}"], folder / f"out.{kind}", source.schema, added)
        assert count == source.rows == len(read(folder / f"out.{kind}"))
    shutil.rmtree(folder)


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ("utf-8-sig", "ein schöner Tag"),
        ("utf-16", "ein schöner Tag"),
        ("windows-1252", "the “best” day – naïve"),
        ("windows-1251", "это очень хороший и тёплый день для прогулки по городу"),
    ],
)
def test_encodings_are_found_as_when_a_file_is_read_whole(tmp_path, codec, text):
    """Streamed and read whole, a file has the same encoding; cells come out as UTF-8."""
    path = tmp_path / "in.csv"
    path.write_bytes(("text\n" + f"{text}\n" * 200).encode(codec))
    whole, name = encodings.decode(path.read_bytes(), "auto", path, "in")
    assert encodings.check_text(path, "auto", "in").removeprefix("sloppy-") == name
    (chunk,) = look(path, "auto", {"text": "text"}).chunks(0, 1000, 10**9)
    assert chunk.records() == [{"text": text}] * 200 and whole == "text\n" + f"{text}\n" * 200


def test_a_wrong_byte_is_found_where_it_stands(tmp_path):
    """A named encoding that does not fit is refused by the position of the byte, also behind the first block."""
    path = tmp_path / "in.csv"
    path.write_bytes(b"text\n" + "é".encode() * 600_000 + b"\xff\n")
    with pytest.raises(UserError, match=r"is not utf-8 at byte 1,200,005"):
        look(path, "utf-8", {"text": "text"})


@pytest.mark.parametrize("kind", FORMATS)
def test_chunks_are_those_of_the_whole_file_after_a_skip(tmp_path, kind):
    """Whoever skips whole chunks is given the rest of the very same chunks; none exceeds its limits."""
    rows = [{"text": "x" * (i * 7 % 11 + 1), "id": str(i)} for i in range(50)]
    source = look(write(tmp_path / f"in.{kind}", rows), "auto", {"text": "text"})
    chunks = [chunk.texts for chunk in source.chunks(0, 8, 20)]
    assert [text["text"] for chunk in chunks for text in chunk] == [row["text"] for row in rows]
    assert all(len(c) <= 8 and sum(len(t["text"]) for t in c[:-1]) <= 20 for c in chunks)
    for done in range(len(chunks)):
        skipped = sum(map(len, chunks[:done]))
        assert [chunk.texts for chunk in source.chunks(skipped, 8, 20)] == chunks[done:]


def test_memory_stays_flat(tmp_path):
    """A file is neither looked at nor read in memory of its size."""
    path = tmp_path / "in.csv"
    path.write_text("text\n" + f"{'word ' * 200}\n" * 10_000)
    tracemalloc.start()
    assert sum(len(c) for c in look(path, "auto", {"text": "text"}).chunks(0, 512, 65_536)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


def test_columns_are_named_and_the_model_sees_them_repaired(tmp_path, place, folder, scorer):
    """`--column text=body`; mojibake is repaired for the model, as in training, and left alone in the output."""
    source = write(tmp_path / "in.csv", [{"body": "schÃ¶n   good", "text": "bad"}])
    score(place, folder, source, tmp_path / "out.jsonl", options=Options({"text": "body"}))
    (row,) = read(tmp_path / "out.jsonl")
    (answer,) = scorer.predict_texts([{"text": "schön good"}])
    assert row["body"] == "schÃ¶n   good" and row["score"] == pytest.approx(answer["score"], abs=1e-6)


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, place, folder):
    """Unknown endings, columns and roles, colliding names, a target that exists: one line each, no file touched."""
    source = write(tmp_path / "in.csv", [{"text": "a", "label": "good"}])
    exists = tmp_path / "there.csv"
    exists.write_text("mine")

    prefixed = Options(prefix="p_")

    def said(source=source, target=tmp_path / "out.csv", options=prefixed) -> str:
        with pytest.raises(UserError) as error:
            score(place, folder, source, target, options=options)
        return str(error.value)

    assert "has columns of the names that are added (label)" in said(options=Options())
    assert "no such column in in.csv, got 'texd'; did you mean text?" in said(options=Options({"text": "texd"}))
    assert "--column: not a text of sequence-classification (text), got 'txt'; did you mean text?" in said(
        options=Options({"txt": "text"})
    )
    assert "must be a file that ends in .csv" in said(source=tmp_path / "in.xlsx")
    assert "no such file" in said(source=tmp_path / "none.csv")
    assert "must end in .csv" in said(target=tmp_path / "out.xlsx")
    assert "its folder does not exist" in said(target=tmp_path / "none" / "out.csv")
    assert "exists already; --force replaces it" in said(target=exists)
    empty = tmp_path / "empty.csv"
    empty.write_text("text\n")
    assert "holds no rows" in said(source=empty)
    assert exists.read_text() == "mine" and sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".csv") == []
    score(place, folder, source, exists, options=Options(prefix="p_"), force=True)
    assert read(exists)[0].keys() == {"text", "label", "p_label", "p_score", "p_model", "p_version", "p_error"}


# -- a run that is stopped ---------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Chunks of some rows, and a part a chunk."""
    monkeypatch.setattr(work, "CHUNKS", {"cpu": (16, 65_536), "other": (16, 65_536)})
    monkeypatch.setattr(work, "PART_SECONDS", -1.0)


def _score_slowly(root: str, folder: str, source: str, target: str) -> None:
    """In a process of its own: as `small`, with time between the parts to be killed in."""
    work.CHUNKS = dict.fromkeys(("cpu", "other"), (16, 65_536))
    work.PART_SECONDS = -1.0
    score(
        Home.from_environment({"OVERNIGHT_HOME": root}),
        Path(folder),
        Path(source),
        Path(target),
        log=True,
        progress=lambda done, rows, errors: time.sleep(0.2),
    )


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_killed_run_goes_on_where_it_stopped(tmp_path, place, folder, small, monkeypatch, kind):
    """kill -9 in the middle: what is done stays done, and the file is that of a run that nobody killed."""
    from overnight.training.predict import Scorer

    rows = [{"text": text, "id": str(i)} for i, text in enumerate(make_rows(150).text)]
    source, target = write(tmp_path / f"in.{kind}", rows), tmp_path / f"out.{kind}"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["overnight.warm", "flows.retrain", "great_expectations", "mlflow"])
    child = context.Process(target=_score_slowly, args=tuple(map(str, (place.root, folder, source, target))))
    child.start()
    manifest = tmp_path / f"out.{kind}.parts" / "manifest.json"
    while len((read_json(manifest) or {"parts": []})["parts"]) < 3:
        assert child.is_alive()
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert not target.exists()
    done = sum(part["rows"] for part in read_json(manifest)["parts"])
    assert 0 < done < 150

    asked = []
    predict = Scorer.predict
    monkeypatch.setattr(Scorer, "predict", lambda self, texts: asked.append(len(texts)) or predict(self, texts))
    facts = score(place, folder, source, target, log=True)
    assert facts["resumed"] == done and sum(asked) == 150 - done
    whole = tmp_path / f"whole.{kind}"
    score(place, folder, source, whole)
    assert read(target) == read(whole) and [row["id"] for row in read(target)] == [row["id"] for row in rows]
    lines = [line for path in (place.root / "scored" / "tiny").iterdir() for line in path.read_text().splitlines()]
    assert 150 - 16 <= len(lines) <= 150, "no text is logged twice; one part at most is not"


def _interrupted(place, folder, source, target, after: int, **more):
    def progress(done, rows, errors):
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(place, folder, source, target, progress=progress, **more)


@pytest.mark.parametrize("change", ["version", "input", "options"])
def test_other_work_begins_anew(tmp_path, place, folder, small, change):
    """Parts of another version, of an input that changed, or under other options are not continued."""
    source, target = write(tmp_path / "in.csv", make_rows(60).to_dict("records")), tmp_path / "out.csv"
    options = Options(prefix="p_")
    _interrupted(place, folder, source, target, 32, options=options)
    if change == "input":
        write(source, make_rows(60, seed=2).to_dict("records"))
    if change == "options":
        options = Options(prefix="p_", scores=True)
    facts = score(place, folder, source, target, number=4 if change == "version" else 3, options=options)
    assert facts["resumed"] == 0 and len(read(target)) == 60


def test_the_same_work_goes_on(tmp_path, place, folder, small):
    """An interrupted run leaves what it has done, with `--force` too; the old file stays until the new one is whole."""
    source, target = write(tmp_path / "in.csv", [{"text": t} for t in make_rows(60).text]), tmp_path / "out.csv"
    target.write_text("old")
    _interrupted(place, folder, source, target, 32, force=True)
    assert target.read_text() == "old"
    assert score(place, folder, source, target, force=True)["resumed"] == 32 and len(read(target)) == 60


def test_two_runs_do_not_share_a_target(tmp_path, place, folder, small):
    """While one process writes, another is told so."""
    source, target = write(tmp_path / "in.csv", [{"text": t} for t in make_rows(40).text]), tmp_path / "out.csv"

    def meanwhile(done, rows, errors):
        with pytest.raises(UserError, match="another process is writing there"):
            score(place, folder, source, target)

    score(place, folder, source, target, progress=meanwhile)
    assert len(read(target)) == 40


# -- the log of scored texts -------------------------------------------------------------------------------------------


def test_scored_texts_are_logged_without_the_text(tmp_path, place, folder):
    """A line a scored text with what the monitor reads; the text itself only when it is asked for."""
    source = write(tmp_path / "in.csv", [{"text": "a lovely day"}, {"text": ""}, {"text": "secret"}])
    score(place, folder, source, tmp_path / "a.csv", log=True)
    (path,) = (place.root / "scored" / "tiny").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.keys() for line in lines] == [{"time", "version", "label", "score", "characters", "tokens"}] * 2
    assert (lines[0]["characters"], lines[0]["version"]) == (12, 3) and lines[0]["tokens"] > 2
    assert abs(lines[0]["time"] - time.time()) < 600 and "secret" not in path.read_text()
    score(place, folder, source, tmp_path / "b.csv", log_texts=True)
    assert json.loads(path.read_text().splitlines()[-1])["text"] == "secret"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def registered(tmp_path_factory, empty_store, folder) -> dict[str, str]:
    """The environment of a home in which the model is version 1 of `tiny`, and champion."""
    from overnight.tracking import registry, runs, store

    root = tmp_path_factory.mktemp("bulk") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    run = runs.open_night(home, store.experiment(home, "tiny"), "night-1")
    example, facts = {"text": ["a"]}, {"tags": {}, "metrics": {}}
    registry.register(home, "tiny", folder, run_id=run, inputs=("text",), example=example, **facts)
    registry.set_alias(home, "tiny", registry.CHAMPION, 1)
    return os.environ | {"OVERNIGHT_HOME": str(root), "COLUMNS": "120"}


def test_the_command_scores_by_alias_and_number(tmp_path, registered):
    """`overnight score NAME[@VERSION] IN OUT`: the line at the end, JSON, and who is not there."""
    write(tmp_path / "in.csv", [{"body": "a lovely day"}, {"body": ""}])
    command = Command(["score", "tiny", "in.csv", "out.jsonl", "--column", "text=body"], registered, tmp_path)
    assert command.wait() == 0, command.stderr
    assert "out.jsonl: 2 rows, 1 of them with an error (column error); scored by tiny version 1" in command.stdout
    assert "row 2: no text" in command.stderr and "2 of 2 rows, 1 errors" in command.stderr
    command = Command(["score", "tiny@1", "in.csv", "two.csv", "--column", "text=body", "--json"], registered, tmp_path)
    assert command.wait() == 0 and json.loads(command.stdout)["version"] == 1
    for name, told in (("tiny@7", "no such version (it has 1)"), ("tiny@chmpion", "did you mean champion?")):
        command = Command(["score", name, "in.csv", "three.csv"], registered, tmp_path)
        assert command.wait() == 2 and told in command.stderr
    for pair in ("text", "=body"):
        command = Command(["score", "tiny", "in.csv", "three.csv", "--column", pair], registered, tmp_path)
        assert command.wait() == 2 and "must read ROLE=COLUMN" in command.stderr


def test_an_interrupt_leaves_what_the_next_run_continues(tmp_path, registered):
    """ctrl-c ends with 130 and one line; the same command then does the rest."""
    write(tmp_path / "in.csv", [{"text": text} for text in make_rows(500).text] * 80)
    command = Command(["score", "tiny", "in.csv", "out.csv"], registered, tmp_path).until("0 of 40,000")
    command.signal(signal.SIGINT)
    assert command.wait() == 130 and "run it again to continue" in command.stderr
    assert not (tmp_path / "out.csv").exists() and (tmp_path / "out.csv.parts").is_dir()
    command = Command(["score", "tiny", "in.csv", "out.csv"], registered, tmp_path)
    assert command.wait() == 0, command.stderr
    assert len(read(tmp_path / "out.csv")) == 40_000
