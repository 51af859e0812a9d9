"""Files of tagged words and of spans: what a source of token classification may look like."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest

from overnight import problems
from overnight.config import Data
from overnight.data.files import parse_conll
from overnight.data.ingest import ingest
from overnight.errors import UserError

PROBLEM = problems.get("token-classification")


class TestConll:
    def test_sentences(self):
        """Tabs or blanks, any number of columns, comments, document marks, blank lines; a hash tag is a token."""
        text = (
            "-DOCSTART- -X- -X- O\n\n"
            "# sent_id = 1\n"
            "EU NNP B-NP B-ORG\nrejects VBZ B-VP O\n\n\n"
            "# a comment\r\n#tag\tO\r\nNew York\tB-LOC\r\n#\tO\r\n\t\r\n"
            "ranked  O\n# O\n1 O\n\n"
            "# O\n7 O"
        )
        parsed = parse_conll(text)
        assert parsed.names == ["tokens", "tags"] and parsed.broken == []
        assert parsed.rows == [
            [["EU", "rejects"], ["B-ORG", "O"]],
            [["#tag", "New York", "#"], ["O", "B-LOC", "O"]],
            [["ranked", "#", "1"], ["O", "O", "O"]],
            [["#", "7"], ["O", "O"]],
        ]
        assert parse_conll("").rows == [] and parse_conll("\n# x y\n\n").rows == []

    def test_a_token_without_a_tag_breaks_its_sentence(self):
        """Line and reason are told, the sentences around it are read and keep their places."""
        parsed = parse_conll("a O\n\nb O\nc\nd\n\ne\t\n\nf O\n")
        assert parsed.broken == [(4, "a token without a tag"), (7, "a token without a tag")]
        assert [row[0] for row in parsed.rows] == [["a"], ["f"]] and parsed.positions == [0, 3]

    def test_only_line_feeds_end_lines(self):
        """Other signs that Python takes for line ends may stand in a token."""
        assert parse_conll("a\u2028b\tO\nc\x85\x1ed\tB-x\n").rows == [[["a\u2028b", "c\x85\x1ed"], ["O", "B-x"]]]


def ingested(data: Data, folder) -> tuple:
    made = ingest(data, folder, PROBLEM)
    rows = sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])
    return made, rows


class TestIngest:
    """From files of each form to rows with spans in the cleaned text."""

    TOKENS = [["Zoe\u0308", "likes", "New", "York", "."], ["😀", "#1"], ["שלום", "Anna"]]
    TAGS = [["B-PER", "O", "B-LOC", "I-LOC", "O"], ["O", "O"], ["O", "S-PER"]]
    TEXTS = ["Zoe\u0308  likes New\u00a0York .", " 😀 #1\n", "שלום  Anna"]
    ENTITIES = [[[0, 4, "PER"], [12, 20, "LOC"]], [], [[6, 10, "PER"]]]
    FOUND = [
        ("Zoë likes New York .", [(0, 3, "PER"), (10, 18, "LOC")]),
        ("😀 #1", []),
        ("שלום Anna", [(5, 9, "PER")]),
    ]

    def write(self, path, rows) -> Data:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Data(source=str(path))

    def test_each_form_gives_the_same_rows(self, tmp_path):
        """Tokens with tags, texts with spans, and CoNLL files: the same texts, spans and fingerprint."""
        pairs = list(zip(self.TOKENS, self.TAGS, strict=True))
        conll = "\n\n".join("\n".join(f"{a}\tX\t{b}" for a, b in zip(*pair, strict=True)) for pair in pairs)
        (tmp_path / "a.conll").write_text(conll)
        (tmp_path / "a.txt").write_text(conll.replace("\t", " "))
        sources = [
            Data(source=str(tmp_path / "a.conll")),
            Data(source=str(tmp_path / "a.txt"), format="conll"),
            self.write(tmp_path / "a.jsonl", [{"tokens": a, "tags": b} for a, b in pairs]),
            self.write(tmp_path / "b.jsonl", [{"w": a, "t": b} for a, b in pairs]).model_copy(
                update={"columns": {"tokens": "w", "tags": "t"}}
            ),
            self.write(
                tmp_path / "c.jsonl",
                [{"text": a, "entities": b} for a, b in zip(self.TEXTS, self.ENTITIES, strict=True)],
            ),
        ]
        fingerprints = set()
        for place, data in enumerate(sources):
            made, rows = ingested(data, tmp_path / str(place))
            assert [(row["text"], PROBLEM.truth(row["entities"])) for row in rows] == self.FOUND
            assert {*rows[0]} == {"row_id", "text_id", "source_row", "text", "entities"}
            assert made.labels == {}
            fingerprints.add(made.fingerprint)
        assert len(fingerprints) == 1

    def test_refused_rows_say_why(self, tmp_path):
        """What cannot be made a row stays, without its target, for the validation to refuse by its reason."""
        rows = [
            {"text": "Anna is here", "entities": [[0, 4, "PER"]]},
            {"text": "Anna is here", "entities": [[0, 40, "PER"]]},
            {"text": "Nobody knows", "entities": None},
        ]
        _, found = ingested(self.write(tmp_path / "a.jsonl", rows), tmp_path / "out")
        assert [row["refusal"] for row in found] == [None, "span_outside_of_text", None]
        assert [row["entities"] is None for row in found] == [False, True, True]

    def test_broken_sentences_are_left_out_and_told(self, tmp_path):
        """One sentence of 150 with a token without a tag: the others are read, the place is told."""
        lines = [f"Anna{i} B-PER\nsleeps O\n" for i in range(150)]
        lines[70] = "Anna B-PER\nsleeps\n"
        (tmp_path / "a.iob2").write_text("\n".join(lines))
        made, rows = ingested(Data(source=str(tmp_path / "a.iob2")), tmp_path / "out")
        assert (made.rows, made.broken_rows, made.broken) == (149, 1, ("a.iob2 line 212: a token without a tag",))
        assert [row["source_row"] for row in rows] == [*range(70), *range(71, 150)]
        assert all(row["text"][slice(*PROBLEM.truth(row["entities"])[0][:2])].startswith("Anna") for row in rows)

    def test_neither_form_is_a_user_error(self, tmp_path):
        """Columns of the form that is nearly there are asked for."""
        data = self.write(tmp_path / "a.jsonl", [{"tokens": ["a"], "tag": ["O"]}])
        with pytest.raises(UserError, match="tags: no such column in a.jsonl, got 'tags'; did you mean tag"):
            ingest(data, tmp_path / "out", PROBLEM)
