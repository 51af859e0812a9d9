"""Texts for texts: the metrics of sacrebleu, ROUGE, an encoder-decoder of two encoders, gettext's catalogues."""

from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import WORDS, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from overnight import problems
from overnight.config import Data
from overnight.config.sections import Generation
from overnight.data.files import parse_po
from overnight.data.ingest import ingest
from overnight.data.sources import read_source
from overnight.errors import UserError
from overnight.evaluation.bootstrap import draws
from overnight.problems.sequence_to_sequence import rouge
from overnight.settings import Training
from overnight.training import data
from overnight.training.card import Card, finish_model_folder
from overnight.training.fit import fit
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.packing import Packed
from overnight.training.predict import Scorer, forward
from overnight.writing import unspaced

TRANSLATION, SUMMARIZATION = problems.get("translation"), problems.get("summarization")
PLAIN = Training(dropout=0.0, attention_dropout=0.0)


def facts(**generation) -> dict:
    return {"generation": Generation(**{"max_new_tokens": 12} | generation).model_dump()}


sentences = st.lists(st.sampled_from("The the cat cat. sat, on — 12,5 % l'été 日本 été É".split()), max_size=9).map(
    " ".join
)
texts = st.one_of(sentences, sentences, st.text(max_size=12).filter(lambda text: not unspaced(text)))
pairs = st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=12)


def sacrebleu(outputs: list[str], targets: list[str]) -> dict[str, float]:
    """The scores of a corpus, of fresh scorers with sacrebleu's defaults; BLEU shown the signs of Chinese apart."""
    apart = [[re.sub("([日本])", r" \1 ", text) for text in side] for side in (outputs, targets)]
    return {
        "chrf": CHRF().corpus_score(outputs, [targets]).score,
        "bleu": BLEU(force=True).corpus_score(apart[0], [apart[1]]).score,
    }


class TestMetrics:
    @settings(max_examples=150, deadline=None)
    @given(pairs)
    def test_chrf_and_bleu_are_sacrebleus(self, rows):
        """Of any corpus, to the last digits."""
        outputs, targets = map(list, zip(*rows, strict=True))
        found = TRANSLATION.metrics(targets, [{"output": text} for text in outputs], facts())
        assert found == pytest.approx(sacrebleu(outputs, targets), abs=1e-9)

    @settings(max_examples=40, deadline=None)
    @given(pairs, st.integers(0, 99))
    def test_resamples_are_sacrebleus(self, rows, seed):
        """The score of each resample is that of a corpus of the rows that were drawn."""
        outputs, targets = map(list, zip(*rows, strict=True))
        tally = TRANSLATION.tally(targets, [{"output": text} for text in outputs], facts())
        (drawn,) = draws(tally.group, len(tally.adds), 5, seed)
        found = tally.metrics(drawn @ tally.adds)
        for number, counts in enumerate(drawn):
            places = [place for place, count in enumerate(counts) for _ in range(int(count))]
            expected = sacrebleu([outputs[i] for i in places], [targets[i] for i in places])
            assert {name: values[number] for name, values in found.items()} == pytest.approx(expected, abs=1e-9)

    def test_known_corpus(self):
        """What is right has 100, what shares nothing has 0."""
        targets = ["the cat sat on the mat", "été à Paris"]
        right, wrong = ([{"output": text} for text in of] for of in (targets, ["", "xyz"]))
        assert TRANSLATION.metrics(targets, right, facts()) == pytest.approx({"chrf": 100, "bleu": 100})
        assert TRANSLATION.metrics(targets, wrong, facts()) == pytest.approx({"chrf": 0, "bleu": 0}, abs=1e-6)
        assert TRANSLATION.metric_names(facts()) == ["chrf", "bleu"]

    def test_bleu_of_chinese_is_sacrebleus(self):
        """As its tokenizer for Chinese has it, also with Latin words and numbers in between."""
        targets = ["我们昨天下午去了北京大学。", "这台 iPhone 手机的价格是 5,999 元，不算贵。", "他说：好的！"]
        outputs = ["昨天下午我们去北京大学了。", "这 iPhone 手机价格是 5,999 元，不贵。", "他说：好吧！"]
        found = TRANSLATION.metrics(targets, [{"output": text} for text in outputs], facts())
        expected = BLEU(tokenize="zh").corpus_score(outputs, [targets]).score
        assert found["bleu"] == pytest.approx(expected) and expected > 20

    @pytest.mark.parametrize(
        ("output", "target", "expected"),
        [
            # Lin 2004, section 3: the same unigrams, another order
            ("police kill the gunman", "police killed the gunman", (3 / 4, 1 / 3, 3 / 4)),
            ("the gunman kill police", "police killed the gunman", (3 / 4, 1 / 3, 1 / 2)),
            ("the cat was found under the bed", "the cat was under the bed", (12 / 13, 8 / 11, 12 / 13)),
            ("The CAT, sat.", "the cat sat", (1, 1, 1)),
            ("cats sat", "cat sat", (1 / 2, 0, 1 / 2)),
            ("the the the", "the cat", (2 / 5, 0, 2 / 5)),
            ("東京の雨", "東京は雨", (3 / 4, 1 / 3, 3 / 4)),
            ("iPhone手机", "iPhone 机", (4 / 5, 0, 4 / 5)),
            ("กรุง", "กรุงเทพ", (8 / 11, 6 / 9, 8 / 11)),
            ("हिन्दी की", "हिन्दी कि", (1 / 2, 0, 1 / 2)),
            ("مَرحبا بكم", "بكم", (2 / 3, 0, 2 / 3)),
            ("", "cat", (0, 0, 0)),
            ("…", "cat", (0, 0, 0)),
            ("cat", "cat", (1, 0, 1)),
            ("snake_case", "snake case", (1, 1, 1)),
        ],
    )
    def test_rouge(self, output, target, expected):
        """F1 of words, pairs of words and the longest common subsequence; case, punctuation and word forms."""
        assert rouge(output, target) == pytest.approx(expected)

    @settings(max_examples=100, deadline=None)
    @given(texts, texts)
    def test_rouge_of_any_texts(self, one, other):
        """Between 0 and 1, the same in both directions, and never more of pairs or of the sequence than of words."""
        first, second, longest = rouge(one, other)
        assert rouge(other, one) == pytest.approx((first, second, longest))
        assert 0 <= longest <= first <= 1 and 0 <= second <= 1

    def test_rouge_of_a_data_set(self):
        """The mean over rows."""
        found = SUMMARIZATION.metrics(["the cat", "a b c"], [{"output": "the cat"}, {"output": "a b d"}], facts())
        assert found == pytest.approx({"rouge1": (1 + 2 / 3) / 2, "rouge2": 0.75, "rougeL": (1 + 2 / 3) / 2})


def rows_of(problem, base, texts: list[str], targets: list[str] | None, max_length: int = 24, **generation) -> list:
    batch = {"text": texts} | ({} if targets is None else {"target": targets})
    encoded = problem.encode(load_tokenizer(str(base)), batch, facts(**generation), max_length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


class TestModels:
    def test_prefix_and_targets(self, tiny_model, tmp_path):
        """What stands in front of every input stands in front of no target; targets come back as they were."""
        tokenizer = load_tokenizer(str(tiny_model))
        texts, targets = ["a flight", "late crew " * 30], ["un vol – 🙂", "tard " * 40]
        rows = rows_of(TRANSLATION, tiny_model, texts, targets, prefix="bag was: ")
        assert rows[0]["input_ids"] == tokenizer("bag was: a flight")["input_ids"]
        assert rows[0]["labels"] == tokenizer("un vol – 🙂")["input_ids"]
        assert len(rows[1]["input_ids"]) == len(rows[1]["labels"]) == 24
        assert "labels" not in rows_of(TRANSLATION, tiny_model, texts, None)[0]
        written = data.write(tmp_path, [{name: [row[name] for row in rows] for name in rows[0]}], {})
        assert TRANSLATION.targets(written, facts()) == targets == [TRANSLATION.truth(cell) for cell in targets]

    def test_loss_is_transformers(self, tiny_model):
        """The model's own mean over the target's tokens, times the tokens."""
        model = TRANSLATION.load_model(str(tiny_model), facts(), PLAIN).eval()
        batch = TRANSLATION.collate(rows_of(TRANSLATION, tiny_model, ["a", "b c"], ["good", "bad crew today"]), 0)
        with torch.no_grad():
            outputs = model(**batch)
        count = TRANSLATION.counted(batch)
        assert count == int((batch["labels"] >= 0).sum())
        expected = float(outputs.loss) * count
        assert float(TRANSLATION.loss(outputs, batch, PLAIN, None)) == pytest.approx(expected, rel=1e-5)

    def test_two_encoders(self, tiny_model, recwarn):
        """Both halves begin as the base; the second reads what the first made of the text, and sees no word that it
        is to write; nothing is advised on the way."""
        model = TRANSLATION.load_model(str(tiny_model), facts(), PLAIN).eval()
        base = problems.get("sequence-classification").load_model(str(tiny_model), {"labels": ["a"]}, PLAIN).bert
        for name, weight in base.state_dict().items():
            if not name.startswith("pooler"):
                assert torch.equal(model.encoder.state_dict()[name], weight)
                assert torch.equal(model.decoder.bert.state_dict()[name], weight)
        rows = rows_of(TRANSLATION, tiny_model, ["good crew"], ["bad bag today"])
        batch = TRANSLATION.collate(rows, 0)
        other = batch | {"labels": batch["labels"].clone()}
        other["labels"][0, 2:] = 9
        with torch.no_grad():
            one, two = model(**batch).logits, model(**other).logits
            elsewhere = model(**batch | {"input_ids": batch["input_ids"].flip(1)}).logits
        assert torch.allclose(one[:, :3], two[:, :3], atol=1e-6) and not torch.allclose(one[:, 3:], two[:, 3:])
        assert not torch.allclose(one, elsewhere)
        assert not [one for one in recwarn if "torch" not in str(one.filename)]

    def test_an_encoder_decoder_is_taken_as_it_is(self, tmp_path, tiny_model):
        """T5, with its own dropouts set and its outputs the same in a batch as alone."""
        torch.manual_seed(2)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 450}
        tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
        T5ForConditionalGeneration(T5Config(**sizes, **tokens)).save_pretrained(tmp_path)
        load_tokenizer(str(tiny_model)).save_pretrained(tmp_path)
        model = TRANSLATION.load_model(str(tmp_path), facts(), Training(dropout=0.3)).eval()
        assert type(model) is T5ForConditionalGeneration and model.config.dropout_rate == 0.3
        rows = rows_of(TRANSLATION, tmp_path, ["good crew", "a", "late bag with our train and crew"], None)
        packed, tokenizer = Packed(model), load_tokenizer(str(tmp_path))
        together = TRANSLATION.decode(forward(TRANSLATION, packed, rows, facts=facts()), facts(), rows, tokenizer)
        for row, answer in zip(rows, together, strict=True):
            alone = forward(TRANSLATION, packed, [row], facts=facts())
            assert TRANSLATION.decode(alone, facts(), [row], tokenizer) == [answer]

    @pytest.mark.parametrize("beams", [1, 3])
    def test_what_no_numbers_wrote_is_no_output(self, tiny_model, beams):
        """A row whose numbers are none is found out, and no other one of its batch."""
        model, tokenizer = TRANSLATION.load_model(str(tiny_model), facts(), PLAIN), load_tokenizer(str(tiny_model))
        rows = rows_of(TRANSLATION, tiny_model, ["good crew", "late bag", "late crew"], None)
        with torch.no_grad():
            model.encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("bag")] = float("nan")
        told = facts(num_beams=beams)
        answers = TRANSLATION.decode(forward(TRANSLATION, Packed(model), rows, facts=told), told, rows, tokenizer)
        assert [TRANSLATION.broken(one) is None for one in answers] == [True, False, True]
        assert answers[1] == {"output": None} and TRANSLATION.gist(answers[1]) == ("nothing", 0.0)

    def test_dropouts_reach_both_halves(self, tiny_model, tmp_path):
        """Of an encoder, and of the encoder-decoder that a run before made of one."""
        TRANSLATION.load_model(str(tiny_model), facts(), PLAIN).save_pretrained(tmp_path)
        load_tokenizer(str(tiny_model)).save_pretrained(tmp_path)
        for base in (tiny_model, tmp_path):
            model = TRANSLATION.load_model(str(base), facts(), Training(dropout=0.4, attention_dropout=0.3))
            for half in (model.encoder, model.decoder):
                found = {module.p for module in half.modules() if isinstance(module, torch.nn.Dropout)}
                assert found == {0.4, 0.3}

    def test_nothing_that_writes_is_refused(self, tmp_path):
        """An unknown folder is the user's mistake."""
        with pytest.raises(UserError, match="model → base"):
            TRANSLATION.load_model(str(tmp_path), facts(), PLAIN)


def test_learns_and_serves(tiny_model, tmp_path, capfd):
    """Two tiny encoders learn some pairs by heart; the finished folder writes what the engine measured, whatever
    stands beside it, and for either problem; nothing is printed."""
    draw = random.Random(3)
    texts = make_rows(8, seed=7).text.tolist()
    targets = [" ".join(draw.choices(WORDS["good"], k=3)) for _ in texts]
    batches = [rows_of(TRANSLATION, tiny_model, texts * times, targets * times) for times in (6, 1)]
    rows, few = (
        data.write(tmp_path / str(len(batch)), [{name: [row[name] for row in batch] for name in batch[0]}], {})
        for batch in batches
    )
    training = Training(
        epochs=16, batch_size=8, learning_rate=5e-3, dropout=0.0, evaluations_per_epoch=1, precision="float32"
    )
    capfd.readouterr()
    result = fit(
        TRANSLATION, ModelReference(str(tiny_model)), facts(), rows, few, training,
        folder=tmp_path / "run", metric="chrf",
    )  # fmt: skip
    assert result["value"] > 90 and result["packing"] == "padded"
    best = tmp_path / "run" / "best"
    asked = [{"text": text} for text in texts]
    for problem, metric in ((SUMMARIZATION, "rougeL"), (TRANSLATION, "chrf")):
        finish_model_folder(best, Card(problem.name, facts(), 24, metric), str(tiny_model))
        scorer = Scorer(best)
        answers = scorer.predict_texts(asked)
        found = problem.metrics(targets, answers, facts())
        assert found == pytest.approx(result["metrics"]) if problem is TRANSLATION else found[metric] > 0.9
        assert sum(problem.right(target, one, facts()) for target, one in zip(targets, answers, strict=True)) >= 7
    assert capfd.readouterr() == ("", "")
    assert [scorer.predict_texts([one])[0] for one in asked[:3]] == answers[:3]
    plain = AutoModelForSeq2SeqLM.from_pretrained(best).eval()
    ids = scorer.tokenizer(texts[0], truncation=True, max_length=24, return_tensors="pt")
    written = plain.generate(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=12)
    assert scorer.tokenizer.decode(written[0], skip_special_tokens=True) == answers[0]["output"]
    assert np.isfinite(scorer.hidden(asked)).all()


CATALOGUE = r"""
msgid ""
msgstr ""
"Project-Id-Version: demo\n"
"Content-Type: text/plain; charset=UTF-8\n"

#: views.py:3
msgid "Two words"
msgstr "Deux mots"

msgid ""
"A long "
"text with \"quotes\"\n"
msgstr ""
"Un long "
"texte « cité »\n"

#, fuzzy
#| msgid "Old"
msgid "Uncertain"
msgstr "Incertain"

msgid "Not yet"
msgstr ""

msgctxt "month"
msgid "May"
msgstr "mai"

msgctxt "verb"
msgid "May"
msgstr "pouvoir"

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d fichier"
msgstr[1] "%d fichiers"

#~ msgid "Gone"
#~ msgstr "Parti"
"""


class TestCatalogues:
    def test_what_is_read(self):
        """Translated messages with their context; the head, fuzzy, obsolete, plural and empty ones are left out."""
        parsed = parse_po(CATALOGUE)
        assert parsed.names == ["text", "target", "context", "language"]
        assert parsed.rows == [
            ["Two words", "Deux mots", None, None],
            ['A long text with "quotes"\n', "Un long texte « cité »\n", None, None],
            ["May", "mai", "month", None],
            ["May", "pouvoir", "verb", None],
        ]
        named = CATALOGUE.replace('charset=UTF-8\\n"\n', 'charset=UTF-8\\n"\n"Language: fr\\n"\n', 1)
        assert {row[3] for row in parse_po(named).rows} == {"fr"}

    def test_ingest(self, tmp_path):
        """A file that ends in .po is one by itself; another by `data.format`; the context can be a slice."""
        for name, form in (("a.po", "auto"), ("b.txt", "po")):
            (tmp_path / name).write_text(CATALOGUE)
            source = Data(source=str(tmp_path / name), format=form, slices=("context",))
            made = ingest(source, tmp_path / "out", TRANSLATION)
            rows = sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])
            assert [(row["text"], row["target"]) for row in rows][:2] == [
                ("Two words", "Deux mots"),
                ('A long text with "quotes"', "Un long texte « cité »"),
            ]
            assert [row["context"] for row in rows] == [None, None, "month", "verb"]

    @pytest.mark.parametrize("content", ['msgid "a"\nmsgid', 'msgid "a"\nmsgfoo "b"\n', "text,target\na,b\n"])
    def test_what_is_none(self, tmp_path, content):
        """A file of another kind is the user's mistake, told with its line."""
        (tmp_path / "a.po").write_text(content)
        with pytest.raises(UserError, match=r"data → source: cannot be read as po \(.*line"):
            ingest(Data(source=str(tmp_path / "a.po")), tmp_path / "out", TRANSLATION)

    def test_wildcards_in_a_package(self, tmp_path, monkeypatch):
        """`**` finds files at any depth of an installed package, sorted; the rest of the name is an ordinary glob."""
        package = tmp_path / "wordy_package"
        for place, word in (("b", "two"), ("a/deep", "three"), ("", "one")):
            folder = package / place / "locale" / "fr"
            folder.mkdir(parents=True)
            (folder / "app.po").write_text(f'msgid "{word}"\nmsgstr "mot"\n')
            (folder / "js.po").write_text(f'msgid "{word} more"\nmsgstr "mot"\n')
        (package / "__init__.py").write_text("raise ImportError('a source is not imported')")
        monkeypatch.syspath_prepend(tmp_path)

        def read(source: str) -> list[str | None]:
            return read_source(Data(source=source), [{"text": "text", "target": "target"}]).columns["text"]

        assert read("pkg://wordy_package/**/fr/app.po") == ["three", "two", "one"]
        assert read("pkg://wordy_package/b/locale/*/*.po") == ["two", "two more"]
        assert read("pkg://wordy_package/?/**/[a-i]*.po") == ["three", "two"]
        assert read("pkg://wordy_package/b/locale/fr/app.po") == ["two"]
        with pytest.raises(UserError, match="no file matches"):
            read("pkg://wordy_package/**/de/*.po")
        with pytest.raises(UserError, match="no such path in the package.*did you mean pkg://wordy_package/locale"):
            read("pkg://wordy_package/locales/**/*.po")
        with pytest.raises(UserError, match="needs the installed package 'wordless_package'"):
            read("pkg://wordless_package/**/*.po")


def test_rows_are_refused(tmp_path):
    """A pair without one of its texts has a null there, which the validation refuses; others stay as they are."""
    (tmp_path / "a.csv").write_text("text,target\nTwo  words,Deux\tmots\n,Rien\nNothing, \n")
    made = ingest(Data(source=str(tmp_path / "a.csv")), tmp_path / "out", TRANSLATION)
    rows = sorted(pq.read_table(made.path).to_pylist(), key=lambda row: row["source_row"])
    assert [(row["text"], row["target"]) for row in rows] == [
        ("Two words", "Deux mots"),
        (None, "Rien"),
        ("Nothing", None),
    ]


def test_our_own_config_finds_catalogues():
    """`configs/translation-po.yaml` reads Django's catalogues, where Django is installed."""
    pytest.importorskip("django")
    source = "pkg://django/**/locale/fr/LC_MESSAGES/django.po"
    assert source in (Path(__file__).parents[1] / "configs" / "translation-po.yaml").read_text()
    table = read_source(Data(source=source), [{"text": "text", "target": "target"}])
    assert len(table.source_rows) > 500 and all(table.columns["target"])
