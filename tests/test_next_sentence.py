"""Masked language modelling with next-sentence prediction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import make_rows
from transformers import BertForPreTraining, RobertaConfig, RobertaForMaskedLM

from overnight import problems
from overnight.errors import UserError
from overnight.problems.texts import NEXT, OTHER
from overnight.settings import Training
from overnight.training.models import load_tokenizer

PROBLEM = problems.get("masked-lm-next-sentence")
PLAIN = Training(dropout=0.0, precision="float32")
TEXTS = make_rows(12).text.tolist()
ROWS = {"text": TEXTS, "second": TEXTS[3:] + TEXTS[:3], "label": [NEXT, OTHER] * 6}


@pytest.fixture(scope="module")
def features(tiny_model):
    encoded = PROBLEM.encode(load_tokenizer(str(tiny_model)), ROWS, {}, 40)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def test_words_of_both_texts_are_hidden(features):
    """Whole words, 15 % of both texts' words together; the same word at the same place of each is two words."""
    sides = set()
    for one in features:
        batch = PROBLEM.collate([one], 0, training=True)
        words, types = np.array(one["words"]), np.array(one["token_type_ids"])
        assert (batch["token_type_ids"][0].numpy() == types).all()
        hidden = batch["labels"][0].numpy() >= 0
        assert {*words[hidden]}.isdisjoint({*words[~hidden]}) and (words[hidden] >= 0).all()
        assert {*words[types == 0]} & {*words[types == 1]} <= {-1}
        assert len({*words[hidden]}) == max(1, round(0.15 * len({*words.tolist()} - {-1})))
        sides |= {*types[hidden].tolist()}
    assert sides == {0, 1}


def test_loss_is_that_of_transformers(features, tiny_model):
    """Of one row it is the reference's, which adds the means of both; of several it is their mean, weighted by hidden
    tokens."""
    torch.manual_seed(2)
    model = PROBLEM.load_model(str(tiny_model), {}, PLAIN).eval()
    assert isinstance(model, BertForPreTraining)
    sums = []
    for one in features:
        batch = PROBLEM.collate([one], 0)
        count = PROBLEM.counted(batch)
        loss = PROBLEM.loss(model(**{n: v for n, v in batch.items() if n != "labels"}), batch, PLAIN, None) / count
        assert float(loss.detach()) == pytest.approx(float(model(**batch).loss.detach()), rel=1e-5)
        sums.append((float(loss.detach()), count))
    batch = PROBLEM.collate(features, 0)
    whole = PROBLEM.loss(model(**{n: v for n, v in batch.items() if n != "labels"}), batch, PLAIN, None)
    assert float(whole.detach()) == pytest.approx(sum(loss * count for loss, count in sums), rel=1e-5)


def test_metrics():
    """Hidden tokens count as `masked-lm` counts them, labels by rows."""
    told = [
        PROBLEM.decode([np.array([loss, hidden, found, *logits], np.float32)], {})[0]
        for loss, hidden, found, logits in ((2.0, 4, 1, (3.0, 0.0)), (0.0, 1, 1, (0.0, 1.0)), (0.0, 0, 0, (0.0, 9.0)))
    ]
    assert [one["label"] for one in told] == [NEXT, OTHER, OTHER]
    found = PROBLEM.metrics([NEXT, NEXT, OTHER], told, {})
    assert found == pytest.approx(
        {
            "masked_accuracy": 2 / 5,
            "perplexity": np.exp(2 / 5),
            "next_sentence_accuracy": 2 / 3,
            "f1/next": 2 / 3,
            "f1/other": 2 / 3,
        }
    )
    assert [PROBLEM.right(target, one, {}) for target, one in zip([NEXT, NEXT, OTHER], told, strict=True)] == [
        False,
        False,
        True,
    ]


def test_other_labels_are_refused():
    columns = {"text": ["a"] * 4, "second": ["b"] * 4, "label": [NEXT, None, "entailment", OTHER]}
    assert PROBLEM.prepare(columns, str) == [None, None, "neither_next_nor_other", None]


def test_bases_without_the_head_are_refused(tmp_path):
    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    RobertaForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model → base: has no head that tells whether a sentence follows.*masked-lm"):
        PROBLEM.load_model(str(tmp_path), {}, PLAIN)
