"""The contract of every problem in the registry, and what sequence classification promises beyond it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch.nn.functional import cross_entropy

from overnight import problems
from overnight.errors import DataRefused, UserError
from overnight.settings import Training
from overnight.training import data
from overnight.training.models import load_tokenizer

ROWS = {"sequence-classification": {"text": ["good day", "bad", "the plain train"], "label": ["x", "y", "x"]}}
"""Example rows of each problem: a new problem adds its own, and the contract below runs on them."""


@pytest.mark.parametrize("name", problems.PROBLEMS)
class TestContract:
    """What data, training, evaluation and serving rely on, whatever the problem."""

    @pytest.fixture
    def parts(self, name, tiny_model, tmp_path):
        problem = problems.get(name)
        facts = json.loads(json.dumps(problem.facts(ROWS[name])))
        features = problem.encode(load_tokenizer(str(tiny_model)), ROWS[name], facts, 32)
        return problem, facts, data.write(tmp_path, [features], {})

    def test_name_and_roles(self, name):
        """A problem is found under its own name and its texts and target are among its columns."""
        problem = problems.get(name)
        assert problem.name == name
        assert {*problem.text_roles, problem.target} <= {*problem.required_roles, *problem.optional_roles}
        assert problems.roles()[name] == (*problem.required_roles, *problem.optional_roles)

    def test_encode_cuts_and_works_without_targets(self, name, tiny_model):
        """Serving encodes texts alone; no row is longer than max_length."""
        problem = problems.get(name)
        facts = problem.facts(ROWS[name])
        texts = {role: ["word " * 50] * 2 for role in problem.text_roles}
        features = problem.encode(load_tokenizer(str(tiny_model)), texts, facts, 16)
        assert "labels" not in features
        assert [len(ids) for ids in features["input_ids"]] == [16, 16]

    def test_collate_pads(self, parts, name):
        """A batch is as wide as its longest row, and the attention mask tells tokens from padding."""
        problem, _, rows = parts
        batch = problem.collate([rows[i] for i in range(len(rows))], pad_token_id=7)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), rows.lengths.max())
        assert batch["attention_mask"].sum(1).tolist() == rows.lengths.tolist()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()

    def test_loss_is_a_sum(self, parts, name, tiny_model):
        """The loss of a batch is the sum of the losses of its rows, as accumulation needs it."""
        problem, facts, rows = parts
        model = problem.load_model(str(tiny_model), facts, Training()).eval()
        whole, single = 0.0, 0.0
        for groups in ([list(range(len(rows)))], [[i] for i in range(len(rows))]):
            total = 0.0
            for group in groups:
                batch = problem.collate([rows[i] for i in group], 0)
                outputs = model(**{k: v for k, v in batch.items() if k != "labels"})
                total += float(problem.loss(outputs, batch, Training(), None).detach())
            whole, single = single, total
        assert whole == pytest.approx(single, rel=1e-4)
        assert whole > 0

    def test_predictions_and_metrics(self, parts, name, tiny_model):
        """Predictions are JSON; metrics are numbers under the promised names, the default one among them."""
        from overnight.training.packing import Packed
        from overnight.training.predict import forward

        problem, facts, rows = parts
        model = problem.load_model(str(tiny_model), facts, Training())
        predictions = problem.decode(forward(problem, Packed(model), rows), facts)
        json.dumps(predictions)
        metrics = problem.metrics(problem.targets(rows, facts), predictions, facts)
        assert len(predictions) == len(rows)
        assert sorted(metrics) == sorted(problem.metric_names(facts))
        assert problem.default_metric in metrics
        assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())

    def test_load_model_refuses_what_is_not_there(self, name, tmp_path):
        """An unknown model is the user's error, in one line."""
        problem = problems.get(name)
        facts = problem.facts(ROWS[name])
        for base in ("no-such/model", str(tmp_path / "nothing"), "pkg://no_such_package/model", str(tmp_path)):
            with pytest.raises(UserError, match=r"^model → base: ") as caught:
                problem.load_model(base, facts, Training())
            assert "\n" not in str(caught.value)


def test_registry_is_light():
    """The command line asks for names and roles: that imports neither torch nor transformers nor numpy."""
    heavy = "{'torch', 'transformers', 'numpy'}"
    code = f"import sys; from overnight import problems; problems.roles(); print({heavy} & {{*sys.modules}})"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_unknown_problem_is_a_user_error():
    with pytest.raises(UserError, match="did you mean sequence-classification"):
        problems.get("sequence-clasification")


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
