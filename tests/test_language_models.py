"""Masked and causal language models: what is hidden, what is foretold, what is written; and models from nothing."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from conftest import make_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from overnight import problems
from overnight.config import Model
from overnight.config.sections import Generation
from overnight.data.store import write_table
from overnight.errors import NightFailed, UserError
from overnight.evaluation import evaluate
from overnight.newbase import make, settings_of, with_base
from overnight.settings import Training
from overnight.training import data
from overnight.training.card import Card, finish_model_folder
from overnight.training.fit import fit
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.packing import Packed
from overnight.training.predict import Scorer, forward, inputs
from overnight.training.scratch import make_base

MASKED = problems.get("masked-lm")
CAUSAL = problems.get("text-generation")
PLAIN = Training(dropout=0.0, attention_dropout=0.0)
LINES = [
    "the crew was friendly and the flight was great",
    "my bag went to another city and nobody knew",
    "a seat at the window is all that you need",
    "monday is the day on which trains are late",
]


def written(problem, base, texts: list[str], facts: dict, max_length: int, folder) -> data.TokenizedRows:
    return data.write(folder, [problem.encode(load_tokenizer(str(base)), {"text": texts}, facts, max_length)], {})


def features_of(problem, base, texts: list[str], facts: dict, max_length: int) -> list[dict]:
    encoded = problem.encode(load_tokenizer(str(base)), {"text": texts}, facts, max_length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


@pytest.fixture(scope="module")
def features(tiny_model):
    """Windows of 30 texts; words that are in no vocabulary are spelt in letters."""
    texts = make_rows(29, seed=5).text.tolist() + ["unheardof words elsewhere " * 30]
    return features_of(MASKED, tiny_model, texts, {}, 40)


class TestMaskedLM:
    def test_whole_words_are_hidden(self, features):
        """15 % of the words of a window, one at least; all tokens of each, and no special one; labels are what they
        were, and all others stay as they are."""
        for one in features:
            batch = MASKED.collate([one], 0, training=True)
            ids, words = np.array(one["input_ids"]), np.array(one["words"])
            shown, labels = batch["input_ids"][0].numpy(), batch["labels"][0].numpy()
            hidden = labels >= 0
            assert {*words[hidden]}.isdisjoint({*words[~hidden]}) and (words[hidden] >= 0).all()
            known = len({*words.tolist()} - {-1})
            assert len({*words[hidden]}) == max(1, round(0.15 * known))
            assert (labels[hidden] == ids[hidden]).all() and (shown[~hidden] == ids[~hidden]).all()
            assert MASKED.counted(batch) == hidden.sum()
        assert any(len({*one["words"]}) < len(one["words"]) - 2 for one in features), "some words have several tokens"

    def test_eighty_ten_ten(self, features):
        """Of many hidden words: shown as the mask, as others, as they are; a word is shown in one way."""
        torch.manual_seed(1)
        ways = {"mask": 0, "other": 0, "same": 0}
        one = max(features, key=lambda one: len(one["input_ids"]))
        words, mask = np.array(one["words"]), one["mask"]
        batch = MASKED.collate([one] * 3000, 0, training=True)
        for shown, labels in zip(batch["input_ids"].numpy(), batch["labels"].numpy(), strict=True):
            for word in {*words[labels >= 0]}:
                place = words == word
                masked = shown[place] == mask
                same = (shown[place] == labels[place]).all()
                ways["mask" if masked.all() else "same" if same else "other"] += 1
        count = sum(ways.values())
        assert count >= 3000
        shares = {way: number / count for way, number in ways.items()}
        assert shares == pytest.approx({"mask": 0.8, "other": 0.1, "same": 0.1}, abs=0.03)

    def test_always_the_same_in_an_evaluation(self, features):
        """Of a text, whatever else is in its batch; while training others each time, by torch's seed."""
        together = MASKED.collate(features, 0)
        for row, one in enumerate(features[:10]):
            alone = MASKED.collate([one], 0)
            length = len(one["input_ids"])
            for name in ("input_ids", "labels"):
                assert torch.equal(together[name][row, :length], alone[name][0])

        def drawn(seed):
            torch.manual_seed(seed)
            return [MASKED.collate(features, 0, training=True)["labels"] for _ in range(2)]

        first, second = drawn(1)
        assert not torch.equal(first, second) and not torch.equal(first, together["labels"])
        assert all(torch.equal(one, other) for one, other in zip(drawn(1), (first, second), strict=True))

    def test_words_are_read_once(self, features, tiny_model):
        """The windows of a long text hold all of its tokens, each once."""
        text = "unheardof words elsewhere " * 30
        own = [one for one in features if one["row"] == features[-1]["row"]]
        assert len(own) > 5 and max(len(one["input_ids"]) for one in own) == 40
        ids = [id for one in own for id in one["input_ids"][1:-1]]
        assert ids == load_tokenizer(str(tiny_model))(text, add_special_tokens=False)["input_ids"]

    def test_loss_and_metrics_are_transformers(self, features, tiny_model):
        """The loss is the model's own times the hidden tokens; perplexity is its exponential, and the share that is
        found that of the likeliest tokens."""
        model = MASKED.load_model(str(tiny_model), {}, PLAIN).eval()
        batch = MASKED.collate(features, 0)
        with torch.no_grad():
            outputs = model(**batch)
        count = MASKED.counted(batch)
        loss = MASKED.loss(outputs, batch, PLAIN, None)
        assert float(loss) == pytest.approx(float(outputs.loss) * count, rel=1e-5)
        predictions = MASKED.decode(forward(MASKED, Packed(model), features), {}, features)
        assert sum(one["hidden"] for one in predictions) == count and len(predictions) == 30
        found = MASKED.metrics([None] * 30, predictions, {})
        right = outputs.logits.argmax(-1) == batch["labels"]
        assert found["perplexity"] == pytest.approx(math.exp(float(outputs.loss)), rel=1e-4)
        assert found["masked_accuracy"] == pytest.approx(float(right.sum()) / count)
        smoothed = MASKED.loss(outputs, batch, Training(label_smoothing=0.3), None)
        flat = outputs.logits.flatten(0, 1), batch["labels"].flatten()
        assert float(smoothed) == pytest.approx(
            float(torch.nn.functional.cross_entropy(*flat, reduction="sum", label_smoothing=0.3)), rel=1e-5
        )

    def test_texts_without_words(self, tiny_model):
        """Nothing can be hidden in them: no loss, and no complaint."""
        features = features_of(MASKED, tiny_model, ["", LINES[0]], {}, 16)
        batch = MASKED.collate(features[:1], 0)
        assert MASKED.counted(batch) == 0
        model = MASKED.load_model(str(tiny_model), {}, PLAIN)
        first, second = MASKED.decode(forward(MASKED, Packed(model), features), {}, features)
        assert first == {"loss": 0.0, "hidden": 0, "found": 0} and second["hidden"] > 0
        assert float(MASKED.loss(model(**batch), batch, PLAIN, None).detach()) == 0

    def test_nothing_measured_is_not_the_best(self, tiny_model, tmp_path):
        """Where nothing was hidden there is no perplexity, least of all the best one: who asks for it is told."""
        nothing = [{"loss": 0.0, "hidden": 0, "found": 0}]
        assert MASKED.metrics([None], nothing, {}) == {"masked_accuracy": 0.0}
        train, none = (
            written(MASKED, tiny_model, texts, {}, 16, tmp_path / str(len(texts))) for texts in (LINES, ["", ""])
        )
        how = {"folder": tmp_path / "run", "metric": "perplexity"}
        with pytest.raises(NightFailed, match="is undefined on the validation rows, got perplexity"):
            fit(MASKED, ModelReference(str(tiny_model)), {}, train, none, PLAIN, **how)

    def test_tokenizers_without_a_mask_are_refused(self):
        inner = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
        with pytest.raises(UserError, match="model → base: needs a tokenizer with a mask token"):
            MASKED.encode(tokenizer, {"text": ["a"]}, {}, 16)

    def test_learns_and_is_a_base(self, tiny_model, tmp_path):
        """Texts are learnt by heart; the finished folder answers as the engine measured, and other problems can
        start from it."""
        rows = written(MASKED, tiny_model, LINES * 8, {}, 32, tmp_path / "rows")
        training = Training(
            epochs=30, batch_size=8, learning_rate=1e-2, dropout=0.0, evaluations_per_epoch=1, precision="float32"
        )
        result = fit(
            MASKED, ModelReference(str(tiny_model)), {}, rows, rows, training,
            folder=tmp_path / "run", metric="masked_accuracy",
        )  # fmt: skip
        assert result["value"] > 0.8
        best = tmp_path / "run" / "best"
        finish_model_folder(best, Card("masked-lm", {}, 32, "masked_accuracy"), str(tiny_model))
        answers = Scorer(best).predict_texts([{"text": text} for text in LINES * 8])
        assert MASKED.metrics([None] * 32, answers, {}) == pytest.approx(result["metrics"])
        assert all(MASKED.same(one, other) for one, other in zip(answers[:4], answers[4:8], strict=True))
        above = problems.get("sequence-classification").load_model(str(best), {"labels": ["a", "b"]}, PLAIN)
        kept = AutoModelForMaskedLM.from_pretrained(best).bert.state_dict()
        assert all(torch.equal(above.bert.state_dict()[name], value) for name, value in kept.items())


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A new GPT-2 of one layer with a tokenizer of the lines, for inputs of 48 tokens."""
    folder = tmp_path_factory.mktemp("small") / "base"
    return make_base(folder, LINES, architecture="gpt2", layers=1, width=64, heads=2, vocabulary=300, length=48)


FACTS = {"generation": Generation(max_new_tokens=12).model_dump()}


@pytest.fixture(scope="module")
def learnt(small, tmp_path_factory):
    """What `fit` gives after a few lines, and the finished folder."""
    folder = tmp_path_factory.mktemp("learnt")
    rows = written(CAUSAL, small, LINES * 4, FACTS, 48, folder / "rows")
    training = Training(
        epochs=60, batch_size=8, learning_rate=5e-3, dropout=0.0, evaluations_per_epoch=1, precision="float32"
    )
    result = fit(
        CAUSAL, ModelReference(str(small)), FACTS, rows, rows, training,
        folder=folder / "run", metric="bits_per_byte",
    )  # fmt: skip
    best = folder / "run" / "best"
    finish_model_folder(best, Card("text-generation", FACTS, 48, "bits_per_byte"), str(small))
    return result, best


class TestTextGeneration:
    def test_windows(self, small):
        """All tokens of a text in their order, between the marks of begin and end; the bytes once; the last window
        is no crumb."""
        tokenizer = load_tokenizer(str(small))
        for count in (1, 3, 4, 7):
            texts = ["é" + " ".join(LINES * count), "", LINES[0]]
            features = features_of(CAUSAL, small, texts, FACTS, 20)
            mark = tokenizer.eos_token_id
            for row, text in enumerate(texts):
                own = [one for one in features if one["row"] == row]
                assert all(one["input_ids"][0] == mark and len(one["input_ids"]) <= 20 for one in own)
                ids = [id for one in own for id in one["input_ids"][1:]]
                assert ids == [*tokenizer(text)["input_ids"], mark]
                assert sum(one["bytes"] for one in own) == len(text.encode())
                assert [one["last"] for one in own] == [0] * (len(own) - 1) + [1]
                assert len(own) == math.ceil(len(ids) / 19) and len(own[-1]["input_ids"]) > min(9, len(ids))

    def test_loss_is_transformers(self, small):
        """The model's own mean over tokens, times the tokens; padding counts for nothing, and smoothing is torch's."""
        model = CAUSAL.load_model(str(small), FACTS, PLAIN).eval()
        features = features_of(CAUSAL, small, [LINES[0], "a", " ".join(LINES)], FACTS, 48)
        batch = CAUSAL.collate(features, 0)

        def whole(batch):  # transformers moves labels along by itself
            return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

        with torch.no_grad():
            outputs = model(**inputs(CAUSAL, batch), labels=whole(batch))
        count = CAUSAL.counted(batch)
        assert count == sum(len(one["input_ids"]) - 1 for one in features)
        assert float(CAUSAL.loss(outputs, batch, PLAIN, None)) == pytest.approx(float(outputs.loss) * count, rel=1e-5)
        alone = []
        for one in features:
            single = CAUSAL.collate([one], 0)
            with torch.no_grad():
                mean = model(**inputs(CAUSAL, single), labels=whole(single)).loss
            alone.append(float(mean) * CAUSAL.counted(single))
        measured = forward(CAUSAL, Packed(model), features, each=lambda outputs, batch: None)
        assert [one[0] for one in measured] == pytest.approx(alone, rel=1e-4)

    def test_bits_per_byte(self):
        """A model that finds all 256 bytes equally likely needs 8 bits for each; two tokens of it in one halve the
        perplexity's root, not the bits."""
        features = [{"row": 0, "bytes": 6}, {"row": 0, "bytes": 0}, {"row": 1, "bytes": 4}]
        each = math.log(256)
        outputs = [np.array([4 * each, 4]), np.array([2 * each, 2]), np.array([4 * each, 4])]
        predictions = CAUSAL.decode(outputs, FACTS, features)
        assert predictions == [
            {"output": "", "loss": pytest.approx(each), "tokens": 6, "bytes": 6},
            {"output": "", "loss": pytest.approx(each), "tokens": 4, "bytes": 4},
        ]
        found = CAUSAL.metrics([None] * 2, predictions, FACTS)
        assert found == {"bits_per_byte": pytest.approx(8), "perplexity": pytest.approx(256)}
        coarse = [np.array([2 * 2 * each, 2]), np.array([2 * each, 1]), np.array([2 * 2 * each, 2])]
        found = CAUSAL.metrics([None] * 2, CAUSAL.decode(coarse, FACTS, features), FACTS)
        assert found == {"bits_per_byte": pytest.approx(8), "perplexity": pytest.approx(256**2)}
        assert CAUSAL.better("bits_per_byte", 1.0, than=2.0) and not CAUSAL.better("perplexity", 3.0, than=2.0)

    def test_undefined_and_beyond_all_numbers(self):
        """A text of nothing has no metric; a perplexity that no number holds is none, in no record."""
        row = {"output": "", "loss": 0.0, "tokens": 0, "bytes": 0}
        assert CAUSAL.metrics([None], [row], FACTS) == {}
        hopeless = [row | {"loss": 2e3, "tokens": 3, "bytes": 9}] * 2
        assert [*CAUSAL.metrics([None] * 2, hopeless, FACTS)] == ["bits_per_byte"]
        found = evaluate(CAUSAL, FACTS, [None] * 2, hopeless, metric="perplexity", resamples=10)
        assert found["metrics"]["perplexity"]["value"] is None and found["metrics"]["bits_per_byte"]["value"] > 8
        json.dumps(found, allow_nan=False)

    def test_learns_and_serves(self, learnt):
        """A few lines are learnt by heart: they cost hardly a bit, the finished folder measures them alike, and goes
        on with a line as it was written."""
        result, best = learnt
        assert result["value"] < 0.3
        scorer = Scorer(best)
        answers = scorer.predict_texts([{"text": text} for text in LINES * 4])
        assert CAUSAL.metrics([None] * 16, answers, FACTS) == pytest.approx(result["metrics"], rel=1e-3)
        begun = [" ".join(text.split()[:4]) for text in LINES]
        for text, answer, whole in zip(begun, scorer.predict_texts([{"text": t} for t in begun]), LINES, strict=True):
            assert answer["output"] and whole.startswith(text + answer["output"])

    def test_output_does_not_depend_on_the_batch(self, learnt):
        """It is what the model alone writes after one text, also beside short and very long ones."""
        _, best = learnt
        model, tokenizer = AutoModelForCausalLM.from_pretrained(best).eval(), AutoTokenizer.from_pretrained(best)
        cut = " ".join(LINES[:2])[:70]
        texts = ["the", LINES[1][:20], "", " ".join(LINES), cut, "my bag my bag", " ".join(LINES * 5)]
        assert 38 < len(features_of(CAUSAL, best, [cut], FACTS, 48)[0]["input_ids"]) < 48
        answers = Scorer(best).predict_texts([{"text": text} for text in texts])
        for text, answer in zip(texts, answers, strict=True):
            # of a long text the last window, without the mark of its end, and no more than leaves room for the answer
            ids = torch.tensor([features_of(CAUSAL, best, [text], FACTS, 48)[-1]["input_ids"][:-1][-(48 - 12) :]])
            with torch.no_grad():
                alone = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
                    pad_token_id=tokenizer.pad_token_id,
                )  # fmt: skip
            assert answer["output"] == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
        assert len(answers) == len(texts) and answers[-1]["tokens"] > 100
        assert len({answer["output"] for answer in answers}) > 3
        windows = features_of(CAUSAL, best, texts, FACTS, 48)
        found = forward(CAUSAL, Packed(model), windows, facts=FACTS)
        assert len(windows) > len(texts) + 2
        assert [len(one) > 2 for one in found] == [bool(one["last"]) for one in windows], "no other is gone on with"

    def test_settings_reach_the_model(self, learnt):
        """The longest answer, beams and repetitions are what the config says; an answer never has more than half of
        what the model can read."""
        _, best = learnt
        scorer = Scorer(best)

        def written(**changes) -> list[int]:
            generation = FACTS["generation"] | changes
            features = features_of(CAUSAL, best, ["the crew", "monday"], FACTS, 48)
            found = forward(CAUSAL, scorer.model, features, facts={"generation": generation})
            return [len(one) - 2 for one in found]

        assert written(max_new_tokens=3) == [3, 3]
        assert max(written(max_new_tokens=4000)) <= 24
        assert max(written(num_beams=3, no_repeat_ngram_size=1)) <= 12

    def test_dropouts_reach_the_model(self, small):
        """By whatever names: those of GPT-2 are others."""
        training = Training(dropout=0.3, attention_dropout=0.2)
        model = CAUSAL.load_model(str(small), FACTS, training)
        found = {name: part.p for name, part in model.named_modules() if isinstance(part, torch.nn.Dropout)}
        assert {*found.values()} == {0.2, 0.3} and all((p == 0.2) == ("attn_dropout" in n) for n, p in found.items())

    def test_an_encoder_does_not_peek(self, tiny_model):
        """BERT, taken for a causal model, does not see the tokens that it is to foretell."""
        model = CAUSAL.load_model(str(tiny_model), FACTS, PLAIN).eval()
        ids = torch.arange(10, 22)[None]
        other = ids.clone()
        other[0, 6:] += 20
        with torch.no_grad():
            one, two = model(input_ids=ids).logits, model(input_ids=other).logits
        assert torch.allclose(one[:, :6], two[:, :6], atol=1e-6) and not torch.allclose(one[:, 6:], two[:, 6:])


READ = [*LINES, "Größe, naïve – 日本語 🙂", *make_rows(60).text]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A new model of each architecture."""
    size = {"layers": 2, "width": 16, "heads": 2, "vocabulary": 400, "length": 24}
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_base(folder / name, READ, architecture=name, **size) for name in ("bert", "gpt2")}


@pytest.fixture(scope="module")
def byte_pairs(bases):
    return AutoTokenizer.from_pretrained(bases["gpt2"])


class TestFromNothing:
    def test_reads_back(self, bases):
        """Both are folders as transformers writes them: the shape that was asked for, weights of their own, a
        tokenizer with marks that the model knows."""
        for name, kind in (("bert", AutoModelForMaskedLM), ("gpt2", AutoModelForCausalLM)):
            model, tokenizer = kind.from_pretrained(bases[name]), AutoTokenizer.from_pretrained(bases[name])
            config = model.config
            assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 16, 2)
            assert config.max_position_embeddings == 24
            assert 200 < len(tokenizer) == config.vocab_size <= 400
            assert tokenizer.is_fast and config.pad_token_id == tokenizer.pad_token_id is not None
            assert max(tokenizer(READ[0])["input_ids"]) < config.vocab_size
        tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
        assert tokenizer.mask_token_id is not None
        pair = tokenizer("crew", "bag")
        whole = ["[CLS]", *tokenizer.tokenize("crew"), "[SEP]", *tokenizer.tokenize("bag"), "[SEP]"]
        assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == whole
        assert pair["token_type_ids"] == [0] * (whole.index("[SEP]") + 1) + [1] * (len(tokenizer.tokenize("bag")) + 1)
        causal = AutoModelForCausalLM.from_pretrained(bases["gpt2"]).config
        assert causal.eos_token_id == causal.bos_token_id == AutoTokenizer.from_pretrained(bases["gpt2"]).eos_token_id
        AutoModelForSequenceClassification.from_pretrained(bases["bert"])

    def test_word_piece(self, bases):
        """Case and accents are kept, and words of the texts have no unknown tokens."""
        tokenizer = AutoTokenizer.from_pretrained(bases["bert"])
        for text in READ:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")

    @settings(
        max_examples=100,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    @given(st.text())
    def test_byte_pairs(self, byte_pairs, text):
        """Any text at all comes back as it was."""
        assert byte_pairs.decode(byte_pairs(text)["input_ids"]) == text

    @pytest.mark.parametrize("architecture", ["bert", "gpt2"])
    def test_never_more_tokens_than_asked_for(self, architecture, tmp_path):
        """Not even where the texts have more signs than that."""
        texts = ["".join(map(chr, range(0x4E00 + i, 0x4E00 + i + 40))) for i in range(0, 2000, 40)]
        size = {"layers": 1, "width": 8, "heads": 1, "vocabulary": 300, "length": 16}
        folder = make_base(tmp_path / "base", texts, architecture=architecture, **size)
        assert len(AutoTokenizer.from_pretrained(folder)) <= 300

    def test_thousands_of_signs(self, tmp_path):
        """Chinese needs more of them than 1,000, all but the rarest; texts that have fewer keep room for words."""
        draw = random.Random(3)
        signs = [chr(0x4E00 + i) for i in range(2500)]
        texts = ["".join(draw.choices(signs, k=40)) for _ in range(1500)] + ["齉"]
        size = {"architecture": "bert", "layers": 1, "width": 8, "heads": 1, "vocabulary": 6000, "length": 64}
        tokenizer = AutoTokenizer.from_pretrained(make_base(tmp_path / "base", texts, **size))
        unknown = [tokenizer(text)["input_ids"].count(tokenizer.unk_token_id) for text in texts]
        assert sum(unknown) < 0.001 * 1500 * 40 and unknown[-1] == 1
        assert len(tokenizer("".join(signs[:40]), add_special_tokens=False)["input_ids"]) == 40

    def test_made_once(self, bases, tmp_path):
        """What is there is left as it is; what was cut off while it was written is made again."""
        weights = bases["bert"] / "model.safetensors"
        before = weights.stat().st_mtime_ns
        size = {"layers": 3, "width": 16, "heads": 2, "vocabulary": 400, "length": 24}
        assert make_base(bases["bert"], [], architecture="bert", **size) == bases["bert"]
        assert weights.stat().st_mtime_ns == before
        torn = tmp_path / "torn"
        torn.mkdir()
        (torn / "model.safetensors").write_bytes(b"half")
        make_base(torn, READ, architecture="bert", **size)
        assert AutoModelForMaskedLM.from_pretrained(torn).config.num_hidden_layers == 3
        assert [path.name for path in tmp_path.iterdir()] == ["torn"]

    def test_of_a_config(self, tmp_path):
        """A base that is `new` is made of all texts of the training rows, as the config shapes it; another
        base stays what it is."""
        model = Model.model_validate(
            {"base": "new", "max_length": 16, "new": {"layers": 1, "width": 8, "heads": 1, "vocabulary": 300}}
        )
        write_table({"text": [*LINES, None], "second": [None, *LINES]}, tmp_path / "train.parquet")
        rows = {"train": str(tmp_path / "train.parquet"), "roles": ["text", "second"]}
        told = make(tmp_path, base=str(tmp_path / "base"), **rows, settings=settings_of(model))
        assert told == {"texts": 8}
        config = AutoModelForMaskedLM.from_pretrained(tmp_path / "base").config
        assert (config.max_position_embeddings, config.num_hidden_layers) == (16, 1)
        other = model.model_copy(update={"base": "other"})
        assert with_base(other, "nowhere", ("text",), tmp_path, "rows") == other
        assert settings_of(other) == settings_of(model) != settings_of(model.model_copy(update={"max_length": 32}))
