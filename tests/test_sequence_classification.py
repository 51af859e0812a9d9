"""Sequence and pair classification: what they promise beyond the contract of every problem."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy

from overnight import problems
from overnight.errors import DataRefused
from overnight.settings import Training
from overnight.training import data
from overnight.training.models import load_tokenizer


class TestSequenceClassification:
    problem = problems.get("sequence-classification")
    facts = {"labels": ["a", "b", "c"]}

    def batch(self, rows=8):
        torch.manual_seed(3)
        outputs = type("Outputs", (), {"logits": torch.randn(rows, 3)})
        return outputs, {"labels": torch.randint(0, 3, (rows,)), "input_ids": torch.zeros(rows, 2)}

    @pytest.mark.parametrize("smoothing", [0.0, 0.2])
    def test_loss_is_torchs(self, smoothing):
        """Label smoothing and class weights mean what they mean in torch."""
        outputs, batch = self.batch()
        weights = torch.tensor([0.5, 1.0, 2.0])
        got = self.problem.loss(outputs, batch, Training(label_smoothing=smoothing), weights)
        each = cross_entropy(outputs.logits, batch["labels"], weights, label_smoothing=smoothing, reduction="none")
        assert float(got) == pytest.approx(float(each.sum()), rel=1e-6)
        if smoothing == 0:
            chosen = torch.log_softmax(outputs.logits, 1)[torch.arange(8), batch["labels"]]
            assert float(got) == pytest.approx(float(-(chosen * weights[batch["labels"]]).sum()), rel=1e-6)

    def test_class_weights(self, tmp_path):
        """Balanced weights: inverse to the class's share, and 1 on average over the rows; an absent class is no zero
        division."""
        rows = data.write(tmp_path, [{"input_ids": [[1]] * 8, "labels": [0, 0, 0, 0, 0, 0, 1, 1]}], {})
        weights = self.problem.class_weights(rows, self.facts)
        assert weights[1] == pytest.approx(3 * weights[0])
        two = self.problem.class_weights(rows, {"labels": ["a", "b"]})
        assert two[rows.column("labels")].mean() == pytest.approx(1)
        assert np.isfinite(weights).all()

    def test_decode(self):
        """Scores are the softmax, also for logits whose exponential overflows."""
        (first, second) = self.problem.decode(
            np.array([[1.0, 2.0, 0.0], [1e4, 0.0, 0.0]], dtype=np.float32), self.facts
        )
        assert first["label"] == "b" and first["score"] == first["scores"]["b"]
        assert sum(first["scores"].values()) == pytest.approx(1)
        assert first["scores"]["a"] / first["scores"]["c"] == pytest.approx(np.e)
        assert second["scores"] == {"a": 1.0, "b": 0.0, "c": 0.0}

    def test_metrics(self):
        """Known values; a class without rows counts in the macro average with 0 and warns of nothing."""
        predictions = [{"label": label} for label in "aabb"]
        metrics = self.problem.metrics(list("aaab"), predictions, self.facts)
        assert metrics["accuracy"] == 0.75
        assert metrics["f1/a"] == pytest.approx(0.8)
        assert metrics["precision/b"] == 0.5 and metrics["recall/b"] == 1.0
        assert metrics["f1/c"] == 0
        assert metrics["macro_f1"] == pytest.approx(
            f1_score(list("aaab"), list("aabb"), labels=["a", "b", "c"], average="macro", zero_division=0)
        )
        assert metrics["weighted_f1"] == pytest.approx(0.75 * 0.8 + 0.25 * 2 / 3)

    def test_unknown_label_is_refused(self, tiny_model):
        """A label that the training rows never had cannot be learnt or scored: the data is refused, by name."""
        tokenizer = load_tokenizer(str(tiny_model))
        with pytest.raises(DataRefused, match="'negativ'.*did you mean negative"):
            self.problem.encode(tokenizer, {"text": ["x"], "label": ["negativ"]}, {"labels": ["negative"]}, 16)

    def test_model_knows_its_labels(self, tiny_model):
        """A saved model serves label names, not LABEL_0."""
        training = Training(dropout=0.3, attention_dropout=0.2)
        config = self.problem.load_model(str(tiny_model), self.facts, training).config
        assert config.id2label == {0: "a", 1: "b", 2: "c"}
        assert config.label2id == {"a": 0, "b": 1, "c": 2}
        assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.2)
        own = self.problem.load_model(str(tiny_model), self.facts, Training(attention_dropout=None)).config
        assert (own.hidden_dropout_prob, own.attention_probs_dropout_prob) == (0.1, 0.1)

    def test_better(self):
        """Greater is better, except where a problem says otherwise."""
        assert self.problem.better("macro_f1", 0.5, None)
        assert self.problem.better("macro_f1", 0.6, 0.5) and not self.problem.better("macro_f1", 0.5, 0.5)
        lower = type("Lower", (type(self.problem),), {"lower_is_better": frozenset({"error"})})()
        assert lower.better("error", 0.4, 0.5) and not lower.better("error", 0.6, 0.5)


def test_two_very_long_texts_are_one_pair(tiny_model):
    """Neither memory nor time go with the product of their lengths, and what is cut is what would be cut anyway."""
    problem, tokenizer = problems.get("pair-classification"), load_tokenizer(str(tiny_model))
    long, other = "a lovely flight " * 3000, "the crew was late " * 3000
    for text, second in ((long, other), (long, "late"), ("late", other)):
        (ids,) = problem.encode(tokenizer, {"text": [text], "second": [second]}, {"labels": ["a"]}, 24)["input_ids"]
        expected = tokenizer(text[:200], second[:200], truncation=True, max_length=24)["input_ids"]
        assert ids == expected and len(ids) == 24
