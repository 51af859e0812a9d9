"""What a source may be, and what is said when it is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from overnight.config import Data
from overnight.data import encodings
from overnight.data.sources import parse_hub, read_pieces, read_source
from overnight.data.store import BATCH
from overnight.errors import UserError

PLAIN = "text,label\na fine day,good\nlost again,bad\n"


def read(source: Path | str, **options):
    """The table of a source whose columns are called text and label unless `columns` says otherwise."""
    data = Data(source=str(source), **options)
    return read_source(data, [{role: data.columns.get(role, role) for role in ("text", "label")}], where="c.yaml: data")


def complaint(source: Path | str, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **options)
    return str(caught.value)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_each_kind_of_file_gives_the_same_rows(tmp_path):
    """CSV, TSV, semicolons, JSONL and Parquet are told apart by name and header and read to equal columns."""
    rows = [{"text": "a, fine day", "label": "good"}, {"text": 'said "no"\nand left', "label": "bad"}]
    csv = 'text,label\n"a, fine day",good\n"said ""no""\nand left",bad\n'
    write(tmp_path / "a.csv", csv)
    write(tmp_path / "b.csv", csv.replace(",label", ";label").replace(",good", ";good").replace(",bad", ";bad"))
    write(tmp_path / "c.tsv", csv.replace(",label", "\tlabel").replace(",good", "\tgood").replace(",bad", "\tbad"))
    write(tmp_path / "d.csv", csv.replace("\n", "\r\n"))
    write(tmp_path / "e.jsonl", "\n".join(json.dumps(row) for row in rows) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    for path in sorted(tmp_path.iterdir()):
        table = read(path)
        expected = [r["text"].replace("\n", "\r\n") if path.name == "d.csv" else r["text"] for r in rows]
        assert table.columns == {"text": expected, "label": ["good", "bad"]}, path.name
        assert table.source_rows == [0, 1]


def test_a_glob_puts_files_together_in_sorted_order(tmp_path, monkeypatch):
    """Files of one kind are concatenated by name, positions go on; a home folder is expanded; two kinds are refused."""
    write(tmp_path / "b.csv", "label,text\nbad,second\n")
    write(tmp_path / "a.csv", "text,label\nfirst,good\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    table = read("~/*.csv")
    assert table.columns["text"] == ["first", "second"] and table.columns["label"] == ["good", "bad"]
    assert table.source_rows == [0, 1]
    write(tmp_path / "c.tsv", "text\tlabel\nx\ty\n")
    assert "must match files of one kind (.csv, .tsv found)" in complaint(tmp_path / "*")
    assert "no file matches" in complaint(tmp_path / "*.jsonl")


def test_columns_are_found_by_name_and_slices_are_kept(tmp_path):
    """Roles are renamed as the config says, slices keep their names, other columns are not read, empty is None."""
    path = write(tmp_path / "a.csv", "body,topic,region,secret\nhello,x,north,1\n,y,,2\nNA,,south,3\n")
    table = read(path, columns={"text": "body", "label": "topic"}, slices=["region"])
    assert table.columns == {
        "text": ["hello", None, "NA"],
        "label": ["x", "y", None],
        "region": ["north", None, "south"],
    }


def test_every_missing_column_is_named_with_the_nearest(tmp_path):
    """A wrong role column and a wrong slice are both reported, each with the column that was probably meant."""
    path = write(tmp_path / "a.csv", "text,label,region\nx,y,z\n")
    said = complaint(path, columns={"text": "txt"}, slices=["regoin"])
    assert "c.yaml: data → columns → text: no such column in a.csv, got 'txt'; did you mean text?" in said
    assert "c.yaml: data → slices: no such column in a.csv, got 'regoin'; did you mean region?" in said
    assert "no such column in a.csv (which has text, label, region), got 'zzz'" in complaint(
        path, columns={"text": "zzz"}
    )


def test_a_missing_file_names_its_sibling(tmp_path):
    """A slip in a file name is answered with the file that is there, written as the user wrote the path."""
    write(tmp_path / "reviews.csv", PLAIN)
    said = complaint(tmp_path / "revews.csv")
    assert said.startswith("c.yaml: data → source: no such file or folder, got")
    assert said.endswith(f"did you mean {tmp_path}/reviews.csv?")
    assert "no such path in the package" in complaint("pkg://datasets/nothing.csv")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"text,label\n", "has a header but no rows"),
        (b"\x89PNG\r\n\x1a\n\0\0", "this is a PNG picture"),
        (b"PK\x03\x04rest", "this is a zip archive"),
        (b"\x1f\x8b\x08rest", "this is a gzip archive"),
        (b"text,label\nx\0y,z\n", "holds binary data"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, content, rule):
    """Empty files, pictures, archives and NUL bytes are recognised by content, whatever the name says."""
    assert rule in complaint(write(tmp_path / "a.csv", content))


def test_other_files_and_folders_are_refused(tmp_path):
    """An unknown ending, a damaged Parquet file and a folder without classes each get their own rule."""
    assert "must be a file that ends in .csv, .tsv, .jsonl" in complaint(write(tmp_path / "a.xlsx", b"x"))
    assert "cannot be read as Parquet" in complaint(write(tmp_path / "a.parquet", b"PAR1 nothing PAR1"))
    folder = tmp_path / "folder"
    write(folder / "rows.csv", PLAIN)
    said = complaint(folder)
    assert "a folder must hold a sub-folder a class" in said and f"did you mean {folder}/*.csv?" in said


def test_a_file_without_permission_is_a_user_error(tmp_path):
    """A file that cannot be opened is named with the reason of the system."""
    path = write(tmp_path / "a.csv", PLAIN)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root reads everything: a loop of links cannot be opened by anybody
        path.unlink()
        path.mkdir()
        with pytest.raises(UserError, match="cannot be read"):
            encodings.read_bytes(path, "c.yaml: data → source")
    else:
        assert "cannot be read (Permission denied)" in complaint(path)


def test_few_broken_rows_are_counted_and_many_refused(tmp_path):
    """Wrong field counts and unfinished quotes cost their own line only; above 1 % the first five lines are named."""
    lines = ["text,label"] + [f'"text {i}",good' for i in range(400)]
    lines[101] = "too,many,fields"
    lines[201] = '"never closed,bad'
    table = read(write(tmp_path / "few.csv", "\n".join(lines) + "\n"))
    assert [(b.place, b.reason) for b in table.reading.broken] == [
        ("few.csv line 102", "3 fields instead of 2"),
        ("few.csv line 202", "',' expected after '\"'"),
    ]
    assert len(table.columns["text"]) == 398 and table.columns["text"][-1] == "text 399"
    assert table.source_rows[99:102] == [99, 101, 102]

    for i in range(11, 17):
        lines[i] = "alone"
    said = complaint(write(tmp_path / "many.csv", "\n".join(lines)))
    assert "8 of 400 rows cannot be read, at most 1 % may be" in said
    assert [f"line {n} " in said for n in (12, 13, 14, 15, 16, 17)] == [True] * 5 + [False]


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path):
    """The last unfinished quote in a file without others is one broken row, and the rows below it are read."""
    lines = ["text,label"] + [f"text {i},good" for i in range(300)]
    lines[151] = '"open,bad'
    table = read(write(tmp_path / "a.csv", "\n".join(lines)))
    assert len(table.columns["text"]) == 299 and [b.place for b in table.reading.broken] == ["a.csv line 152"]


def test_broken_json_lines_follow_the_same_rule(tmp_path):
    """A bad line and one that is no object are counted; a file of bad lines is refused by their numbers."""
    good = [json.dumps({"text": f"text {i}", "label": "good"}) for i in range(300)]
    table = read(write(tmp_path / "a.jsonl", "\n".join([*good[:5], '{"text": ', "[1]", *good[5:]])))
    assert [b.place for b in table.reading.broken] == ["a.jsonl line 6", "a.jsonl line 7"]
    assert len(table.columns["text"]) == 300
    said = complaint(write(tmp_path / "b.jsonl", "text,label\nx,y\n"))
    assert "2 of 2 rows cannot be read" in said and "b.jsonl line 1 (Expecting value)" in said


@pytest.mark.parametrize(
    ("encoding", "text", "name"),
    [
        ("utf-8", "crème brûlée 🙂", "utf-8"),
        ("utf-8-sig", "crème brûlée 🙂", "utf-8"),
        ("utf-16", "crème brûlée 🙂", "utf-16"),
        ("cp1252", "crème brûlée – “so”", "windows-1252"),
        ("cp1251", "Самолёт опоздал на три часа, и никто ничего не сказал пассажирам о причине", "cp1251"),
    ],
)
def test_the_encoding_is_found(tmp_path, encoding, text, name):
    """Marks, UTF-8, western legacy bytes and another script are told apart, and the text comes out unharmed."""
    rows = "".join(f"{text.replace(',', ' ')} {i},good\n" for i in range(20))
    table = read(write(tmp_path / "a.csv", ("text,label\n" + rows).encode(encoding)))
    assert table.columns["text"][3] == f"{text.replace(',', ' ')} 3"
    assert list(table.columns) == ["text", "label"] and table.reading.encodings == {name}


def test_an_encoding_of_the_config_is_obeyed_or_refused(tmp_path):
    """A named encoding is used as it is; one that does not fit, or does not exist, is a user error."""
    path = write(tmp_path / "a.csv", "text,label\nżółw,x\n".encode("iso8859-2"))
    assert read(path, encoding="iso8859-2").columns["text"] == ["żółw"]
    assert "a.csv is not utf-8 at byte 11; try encoding: auto" in complaint(path, encoding="utf-8")
    assert "no such encoding, got 'utf-88'" in complaint(path, encoding="utf-88")


def test_a_folder_a_class(tmp_path):
    """Sub-folders are labels, .txt files are rows in the order of their paths, other files are left alone."""
    write(tmp_path / "tech" / "2.txt", "second")
    write(tmp_path / "tech" / "1.txt", "first\nline")
    write(tmp_path / "sport" / "1.txt", "third")
    write(tmp_path / "sport" / "notes.md", "no")
    write(tmp_path / "__pycache__" / "x.pyc", b"\0")
    table = read(tmp_path, slices=["file"])
    assert table.columns == {
        "text": ["third", "first\nline", "second"],
        "label": ["sport", "tech", "tech"],
        "file": ["sport/1.txt", "tech/1.txt", "tech/2.txt"],
    }
    write(tmp_path / "sport" / "2.txt", b"\0\0")
    assert "1 of 4 rows cannot be read" in complaint(tmp_path)


def test_a_text_a_line(tmp_path):
    """`format: lines`: the file's name is the label, blank lines are none, other line ends stay in their text; the
    hint is there for who has not said so."""
    write(tmp_path / "reviews" / "neg.txt", "差。\n  \n一般\u2028般\r\n\n")
    write(tmp_path / "reviews" / "pos.txt", '好, "很好"')
    table = read(tmp_path / "reviews" / "*.txt", format="lines")
    assert table.columns == {"text": ["差。", "一般\u2028般\r", '好, "很好"'], "label": ["neg", "neg", "pos"]}
    assert table.source_rows == [0, 1, 2] and table.reading.broken == []
    said = complaint(tmp_path / "reviews" / "*.txt")
    assert "must be a file that ends in .csv" in said and said.endswith(
        "did you mean data.format: lines (a text a line)?"
    )
    write(tmp_path / "reviews" / "new.txt", "\n \n")
    assert "the file is empty" in complaint(tmp_path / "reviews" / "*.txt", format="lines")


def test_numbers_become_text(tmp_path):
    """Typed cells of Parquet and JSON come as text; nulls and not-a-number as None."""
    table = pa.table({"text": ["a", "b", None], "label": [1.0, float("nan"), 2.5], "flag": [True, False, None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet", slices=["flag"]).columns
    assert found == {"text": ["a", "b", None], "label": ["1.0", None, "2.5"], "flag": ["true", "false", None]}


def test_hub_names_are_taken_apart():
    """Name, config and revision; a path is a name too; anything else is an error."""
    assert parse_hub("hf://stanfordnlp/imdb") == ("stanfordnlp/imdb", None, None)
    assert parse_hub("hf://nyu-mll/glue:sst2@bcdcba79") == ("nyu-mll/glue", "sst2", "bcdcba79")
    assert parse_hub("hf:///data/mine@main") == ("/data/mine", None, "main")
    with pytest.raises(ValueError, match="must read"):
        parse_hub("hf://:config")


def test_a_hub_data_set_is_read(tmp_path, monkeypatch):
    """A folder that `datasets` knows how to build: splits put together or one chosen, class labels as names."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    for split, rows in {"train": (["a", "b"], [1, -1]), "test": (["c"], [0])}.items():
        made = datasets.Dataset.from_dict({"text": rows[0], "label": rows[1]}, features=features)
        made.to_parquet(tmp_path / "mine" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    both = read(f"hf://{tmp_path}/mine")
    assert both.columns == {"text": ["a", "b", "c"], "label": ["yes", None, "no"]}
    assert read(f"hf://{tmp_path}/mine", split="test").columns["text"] == ["c"]
    assert "the dataset cannot be loaded: Unknown split" in complaint(f"hf://{tmp_path}/mine", split="tset")
    assert "did you mean text?" in complaint(f"hf://{tmp_path}/mine", columns={"text": "txt"})


def test_an_unreachable_hub_is_a_user_error():
    """Offline, a hub name that is not cached ends in a complaint and no traceback."""
    said = complaint("hf://nobody/nothing-of-the-kind")
    assert said.startswith("c.yaml: data → source: the dataset cannot be loaded:")
    assert said.endswith("got 'hf://nobody/nothing-of-the-kind'")


@given(st.integers(1, 9))
def test_pieces_of_any_size_are_the_same_rows(size):
    """Cells, positions, broken rows and encodings do not depend on how many rows are read together."""
    lines = [f"text {i},{'good' if i % 3 else ''}" for i in range(30)]
    lines[7] = "too,many,fields"
    objects = [json.dumps({"text": f"text {i}", "label": i} if i % 4 else {"other": i}) for i in range(30)]
    objects[9] = "["
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr("overnight.data.sources.MAX_BROKEN", 0.1)
        sources = [
            write(folder / "a.csv", "\n".join(["text,label", *lines])),
            write(folder / "b.jsonl", "\n".join(objects)),
            write(folder / "c.conll", "\n\n".join(f"w{i} O" if i != 5 else "alone" for i in range(30))),
            write(folder / "texts" / "good" / "1.txt", "one").parents[1],
        ]
        write(folder / "texts" / "bad" / "1.txt", "two")
        parquet.write_table(
            pa.table({"text": [*"abcdefgh"], "label": range(8)}), folder / "d.parquet", row_group_size=3
        )
        for source in (*sources, folder / "d.parquet"):
            roles = ("tokens", "tags") if source.suffix == ".conll" else ("text", "label")
            asked = Data(source=str(source)), [{role: role for role in roles}]
            whole = read_source(*asked)
            for module in ("sources", "files"):
                patch.setattr(f"overnight.data.{module}.BATCH", size)
            pieces = list(read_pieces(*asked))
            for module in ("sources", "files"):
                patch.setattr(f"overnight.data.{module}.BATCH", BATCH)
            assert all(0 < len(piece.source_rows) <= size for piece in pieces)
            assert [n for piece in pieces for n in piece.source_rows] == whole.source_rows
            for role in roles:
                assert [cell for piece in pieces for cell in piece.columns[role]] == whole.columns[role]
            assert pieces[-1].reading == whole.reading


def test_a_key_of_the_last_line_is_a_column(tmp_path):
    """JSON lines are looked through for the columns, and only as far as there are some to be found."""
    rows = [*({"text": str(i)} for i in range(5)), {"label": "late"}]
    table = read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows))))
    assert table.columns["label"] == [None] * 5 + ["late"] and table.columns["text"][-1] is None
    assert "which has text, label" in complaint(tmp_path / "a.jsonl", columns={"label": "zzz"})


def test_reading_a_file_imports_nothing_heavy(tmp_path):
    """`plan` and `validate` read CSV files without waiting for torch, datasets or pandas."""
    write(tmp_path / "a.csv", PLAIN)
    code = (
        "import sys; from overnight.config import Data; from overnight.data.sources import read_source\n"
        f"read_source(Data(source={str(tmp_path / 'a.csv')!r}), [{{'text': 'text', 'label': 'label'}}])\n"
        "print([m for m in ('torch', 'datasets', 'pandas', 'transformers') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"
