"""The contract of every problem in the registry."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import WORDS, make_rows

from overnight import problems
from overnight.config.sections import Generation
from overnight.errors import UserError
from overnight.evaluation import compare, evaluate
from overnight.settings import Training
from overnight.training import data
from overnight.training.card import Card, finish_model_folder
from overnight.training.fit import fit
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.packing import Packed, Packing
from overnight.training.predict import Scorer, forward, inputs

PLAIN = Training(dropout=0.0, attention_dropout=0.0)
TEXTS, KINDS = (make_rows(32)[name].tolist() for name in ("text", "label"))
SECOND, SECOND_KINDS = TEXTS[1:] + TEXTS[:1], KINDS[1:] + KINDS[:1]
TARGETS = [" ".join(WORDS[kind][:4]) for kind in KINDS]
REPEATED = [" ".join([WORDS["good"][place % 10]] * (5 + place % 12)) for place in range(32)]
"""Texts of which any word tells the others."""


def spans_of(text: str) -> list[dict]:
    """Good and bad words of a text, neighbours of a kind as one span."""
    found: list[dict] = []
    start = 0
    for word in text.split(" "):
        kind = next((kind for kind in ("good", "bad") if word in WORDS[kind]), None)
        end = start + len(word)
        if found and found[-1]["type"] == kind and found[-1]["end"] == start - 1:
            found[-1]["end"] = end
        elif kind:
            found.append({"start": start, "end": end, "type": kind})
        start = end + 1
    return found


def answers_of(text: str, kind: str) -> list[dict]:
    """The first word of that kind; none in plain texts."""
    word = next(word for word in text.split(" ") if word in WORDS[kind])
    return [] if kind == "plain" else [{"text": word, "start": f" {text} ".index(f" {word} ")}]


ROWS = {
    "sequence-classification": {"text": TEXTS, "label": KINDS},
    "pair-classification": {
        "text": TEXTS,
        "second": SECOND,
        "label": ["same" if one == other else "other" for one, other in zip(KINDS, SECOND_KINDS, strict=True)],
    },
    "multi-label-classification": {
        "text": [f"{one} {other}" for one, other in zip(TEXTS, SECOND, strict=True)],
        "labels": [json.dumps(sorted({*pair} - {"plain"})) for pair in zip(KINDS, SECOND_KINDS, strict=True)],
    },
    "regression": {
        "text": TEXTS,
        "value": [
            repr({"good": 4.5, "plain": 0.1, "bad": -3.0}[kind] + len(text) / 7)
            for kind, text in zip(KINDS, TEXTS, strict=True)
        ],
    },
    "masked-lm": {"text": REPEATED},
    "masked-lm-next-sentence": {
        "text": REPEATED,
        "second": REPEATED,
        "label": ["next" if len(text) % 2 else "other" for text in REPEATED],
    },
    "question-answering": {
        "question": [f"what was {kind}" for kind in KINDS],
        "context": TEXTS,
        "answers": [json.dumps(answers_of(text, kind)) for text, kind in zip(TEXTS, KINDS, strict=True)],
    },
    "token-classification": {"text": TEXTS, "entities": [json.dumps(spans_of(text)) for text in TEXTS]},
    "translation": {"text": TEXTS, "target": TARGETS},
    "summarization": {"text": TEXTS, "target": TARGETS},
    "text-generation": {"text": REPEATED},
}
"""Example rows of each problem, as `prepare` leaves them: a new problem adds its own, and how its model would answer
that knows the truth (`KNOWING`); the contract below runs on them."""


def one_label(batch, facts):
    return 20 * np.eye(len(facts["labels"]))[batch["labels"][0].clamp(min=0).numpy()]


def tokens(batch, facts):
    return batch["labels"][0].numpy()


KNOWING = {
    "sequence-classification": one_label,
    "pair-classification": one_label,
    "multi-label-classification": lambda batch, facts: 40 * batch["labels"][0].numpy() - 20,
    "regression": lambda batch, facts: batch["labels"].numpy(),
    "masked-lm": lambda batch, facts: np.array([0, *2 * [(batch["labels"] >= 0).sum()]]),
    "masked-lm-next-sentence": lambda batch, facts: np.array(
        [0, *2 * [(batch["labels"] >= 0).sum()], *20 * np.eye(2)[batch["next_sentence_label"][0]]]
    ),
    "question-answering": lambda batch, facts: 20 * np.eye(batch["input_ids"].shape[1])[batch["labels"][0]].T,
    "token-classification": one_label,
    "translation": tokens,
    "summarization": tokens,
    "text-generation": lambda batch, facts: np.array([0.0, (batch["labels"] >= 0).sum()]),
}
"""Problem → what `outputs`, or `generate`, would be for a batch of one feature."""
BEST = {"translation": 100.0, "text-generation": 0.0}
"""The default metric of a model that knows the truth, where that is not 1."""
LEAST_LOSS = {"text-generation": 0.5}
"""The first word of a text cannot be known, nor when it ends."""


def facts_of(problem) -> dict:
    """As a model's folder keeps them."""
    facts = problem.facts(ROWS[problem.name])
    if problem.generates:
        facts |= {"generation": Generation(max_new_tokens=12).model_dump()}
    return json.loads(json.dumps(facts))


@pytest.mark.parametrize("name", problems.PROBLEMS)
class TestContract:
    """What data, training, evaluation and serving rely on, whatever the problem."""

    @pytest.fixture
    def parts(self, name, tiny_model, tmp_path):
        """The problem, its facts as a model's folder keeps them, and its rows, cut or in windows."""
        problem = problems.get(name)
        facts = facts_of(problem)
        features = problem.encode(load_tokenizer(str(tiny_model)), ROWS[name], facts, 16)
        return problem, facts, data.write(tmp_path, [features], {})

    @pytest.fixture
    def answers(self, parts, name, tiny_model):
        """The truth of each row, and the predictions of: a model that knows it, one with a new head, one of NaN."""
        problem, facts, rows = parts
        tokenizer = load_tokenizer(str(tiny_model))
        knowing = [KNOWING[name](problem.collate([rows[i]], 0), facts) for i in range(len(rows))]
        model = problem.load_model(str(tiny_model), facts, PLAIN)
        outputs = [knowing, forward(problem, Packed(model), rows, facts=facts)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        outputs.append(forward(problem, Packed(model), rows, facts=facts))
        truth = [problem.truth(cell) for cell in ROWS[name][problem.target]]
        return truth, *(problem.decode(one, facts, rows, tokenizer) for one in outputs)

    def test_name_and_roles(self, name):
        """A problem is found under its own name and its texts and target are among its columns."""
        problem = problems.get(name)
        assert problem.name == name
        assert {*problem.text_roles, problem.target} <= {*problem.required_roles, *problem.optional_roles}
        assert {*problem.required_roles, *problem.optional_roles, *sum(problem.sources, ())} == {*problem.roles()}
        assert problems.roles()[name] == problem.roles()
        assert {*ROWS[name]} == {*problem.required_roles}

    def test_what_is_prepared_stays(self, name):
        """Rows in the problem's own form are not changed or refused; absent cells stay absent."""
        problem = problems.get(name)
        columns = {role: [*ROWS[name].get(role, [None] * 32), None] for role in problem.roles()}
        reasons = problem.prepare(columns, lambda text: text)
        assert reasons in ([], [None] * 33)
        assert {role: columns[role] for role in ROWS[name]} == {role: [*c, None] for role, c in ROWS[name].items()}

    @pytest.mark.parametrize("max_length", [12, 40])
    def test_encode_cuts_and_works_without_targets(self, name, tiny_model, max_length):
        """Serving encodes texts alone, in the order they came; nothing is longer than max_length."""
        problem = problems.get(name)
        facts = facts_of(problem)
        texts = {role: ["word " * 50, "good day"] for role in problem.text_roles}
        features = problem.encode(load_tokenizer(str(tiny_model)), texts, facts, max_length)
        assert "labels" not in features
        assert {len(values) for values in features.values()} == {len(features["input_ids"])}
        lengths = [len(ids) for ids in features["input_ids"]]
        assert max_length / 2 < lengths[0] <= max(lengths) <= max_length
        rows = features.get("row", [0, 1])
        assert rows == sorted(rows) and {*rows} == {0, 1}

    def test_collate_pads(self, parts, name):
        """A batch is as wide as its longest row, and the attention mask tells tokens from padding."""
        problem, _, rows = parts
        batch = problem.collate([rows[i] for i in range(len(rows))], pad_token_id=7)
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (len(rows), rows.lengths.max())
        assert batch["attention_mask"].sum(1).tolist() == rows.lengths.tolist()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()

    def test_loss_is_a_sum(self, parts, name, tiny_model):
        """The loss of a batch and its terms are the sums of those of its rows, as accumulation needs it."""
        problem, facts, rows = parts
        model = problem.load_model(str(tiny_model), facts, Training()).eval()
        found = []
        for groups in ([list(range(len(rows)))], [[i] for i in range(len(rows))]):
            total, counted = 0.0, 0
            for group in groups:
                batch = problem.collate([rows[i] for i in group], 0)
                outputs = model(**inputs(problem, batch))
                total += float(problem.loss(outputs, batch, Training(), None).detach())
                counted += problem.counted(batch)
            found.append((total, counted))
        assert found[0] == (pytest.approx(found[1][0], rel=1e-4), found[1][1])
        assert min(found[0]) > 0

    def test_class_weights(self, parts, name, tiny_model):
        """A problem has none, or such that its loss can take."""
        problem, facts, rows = parts
        weights = problem.class_weights(rows, facts)
        if weights is None:
            return
        assert weights.dtype == np.float32 and len(weights) == len(facts["labels"])
        model = problem.load_model(str(tiny_model), facts, Training()).eval()
        batch = problem.collate([rows[i] for i in range(len(rows))], 0)
        losses = [
            float(
                problem.loss(
                    model(**inputs(problem, batch)), batch, Training(label_smoothing=smoothing), given
                ).detach()
            )
            for smoothing, given in ((0.0, None), (0.0, torch.from_numpy(weights)), (0.1, torch.from_numpy(weights)))
        ]
        assert np.isfinite(losses).all() and len({*losses}) == 3

    def test_prior(self, parts, name, tiny_model):
        """A problem has none, or one that no other constant betters: said of every row, its loss has no slope."""
        problem, facts, rows = parts
        prior = problem.prior(rows, facts)
        if prior is None:
            return
        batch = problem.collate([rows[i] for i in range(len(rows))], 0)
        shape = problem.load_model(str(tiny_model), facts, PLAIN)(**inputs(problem, batch)).logits.shape
        bias = torch.from_numpy(prior).requires_grad_()
        problem.loss(SimpleNamespace(logits=bias.expand(shape)), batch, PLAIN, None).backward()
        assert bias.dtype == torch.float32 and bias.grad.abs().max() <= len(prior), "each class had one row more"

    def test_packed_trains_as_padded(self, parts, name, tiny_model):
        """Without padding, the loss and the gradients of all weights are those of the padded batch."""
        problem, facts, _ = parts
        model = problem.load_model(str(tiny_model), facts, PLAIN).train()
        features = problem.encode(load_tokenizer(str(tiny_model)), ROWS[name], facts, 64)
        rows = [dict(zip(features, values, strict=True)) for values in zip(*features.values(), strict=True)]
        batch = problem.collate(rows, 0)
        assert not batch["attention_mask"].all()
        labels = batch["labels"] if problem.by_token else None
        packing, shown = Packing.of(batch["attention_mask"], labels=labels), inputs(problem, batch)

        def trained(outputs, batch):
            loss = problem.loss(outputs, batch, PLAIN, None)
            model.zero_grad()
            loss.backward()
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            return float(loss.detach()), gradients

        loss, expected = trained(model(**shown), batch)
        packed = Packed(model)
        assert packed.way != "padded" or problem.generates == "always"
        found = [trained(packed(shown, packing), batch)]
        if problem.by_token:
            assert packed.tells_words
            row = batch | {"labels": packing.labels(batch["labels"])}
            assert row["labels"].shape == (1, problem.counted(batch))
            found.append(trained(packed.flat(shown, packing), row))
        scale = max(float(value.abs().max()) for value in expected.values())
        for packed_loss, gradients in found:
            assert packed_loss == pytest.approx(loss, rel=1e-5)
            assert gradients.keys() == expected.keys()
            assert max(float((gradients[n] - value).abs().max()) for n, value in expected.items()) < 1e-5 * scale

    def test_targets_are_the_truth_of_the_cells(self, parts, name):
        """The search is judged by the tokenized rows, the gate by the cells: they tell the same."""
        problem, facts, rows = parts
        truth = [problem.truth(cell) for cell in ROWS[name][problem.target]]
        assert problem.targets(rows, facts) == [
            pytest.approx(t, rel=1e-6) if isinstance(t, float) else t for t in truth
        ]

    def test_predictions(self, parts, answers):
        """One for each row, sound, JSON, and the same as itself after a round trip."""
        problem, facts, _ = parts
        truth, knowing, real, _ = answers
        for predictions in (knowing, real):
            assert len(predictions) == len(truth)
            assert [problem.broken(one) for one in predictions] == [None] * len(truth)
            again = json.loads(json.dumps(predictions, allow_nan=False))
            assert again == predictions
            assert all(problem.same(one, other) for one, other in zip(predictions, again, strict=True))
        assert not all(problem.same(one, other) for one, other in zip(knowing, real, strict=True))

    def test_metrics(self, parts, answers, name):
        """Numbers under the promised names; what is right is right, and nothing beats it."""
        problem, facts, rows = parts
        truth, knowing, real, _ = answers
        best, metrics = (problem.metrics(truth, predictions, facts) for predictions in (knowing, real))
        names = problem.metric_names(facts)
        assert sorted(best) == sorted(metrics) == sorted(names)
        counted = problem.tally(truth, real, facts).values()
        assert {*counted} == {*names} - problem.without_interval
        assert {name: value for name, value in metrics.items() if name in counted} == pytest.approx(counted)
        assert all(isinstance(value, float) and np.isfinite(value) for value in metrics.values())
        if name != "text-generation":  # no text is foretold wholly
            assert all(problem.right(one, other, facts) for one, other in zip(truth, knowing, strict=True))
        assert not all(problem.right(one, other, facts) for one, other in zip(truth, real, strict=True))
        assert best[problem.default_metric] == pytest.approx(BEST.get(name, 1.0))
        for metric in names:
            assert not problem.better(
                metric, metrics[metric], best[metric] - 1e-6 * (metric in problem.lower_is_better)
            )
        assert problem.check_metric(problem.default_metric, facts) == problem.default_metric
        for metric in (*problem.without_interval, "f1core"):
            with pytest.raises(UserError, match="not a metric of"):
                problem.check_metric(metric, facts)

    def test_what_is_told_of_predictions(self, parts, answers):
        """The monitor's gist is a name and a number; bulk scoring's cells fit its columns."""
        problem, facts, _ = parts
        for prediction in answers[1] + answers[2]:
            label, number = problem.gist(prediction)
            assert isinstance(label, str) and label and isinstance(number, float) and np.isfinite(number)
            for scores in (False, True):
                columns, cells = problem.columns(facts, scores), problem.cells(prediction, facts, scores)
                assert len(columns) == len(cells)
                for kind, cell in zip(columns.values(), cells, strict=True):
                    assert cell is None or type(cell) is kind
        assert {*problem.columns(facts, False)} <= {*problem.columns(facts, True)}

    def test_tuned_facts_are_facts(self, parts, answers, name, tiny_model):
        """What is set by the validation rows can be kept in JSON, and answers as soundly as before."""
        problem, facts, rows = parts
        outputs = [KNOWING[name](problem.collate([rows[i]], 0), facts) for i in range(len(rows))]
        tuned = problem.tuned(outputs, answers[0], facts, rows, problem.default_metric)
        assert json.loads(json.dumps(tuned, allow_nan=False)) == tuned and tuned.keys() == facts.keys()
        assert problem.tunes or tuned == facts
        decoded = problem.decode(outputs, tuned, rows, load_tokenizer(str(tiny_model)))
        assert all(problem.same(one, other) for one, other in zip(decoded, answers[1], strict=True))

    def test_evaluation(self, parts, answers):
        """The record of a model on the test rows: JSON, every metric in its interval, every class counted."""
        problem, facts, _ = parts
        truth, knowing, real, _ = answers
        for predictions in (knowing, real):
            found = evaluate(
                problem,
                facts,
                truth,
                predictions,
                metric=problem.default_metric,
                slices={"half": ["a"] * 20 + ["b"] * 12},
                resamples=100,
            )
            assert json.loads(json.dumps(found, allow_nan=False)) == found
            assert {*found["metrics"]} == {*problem.metric_names(facts)}
            assert found["broken_predictions"] == 0
            values = [m for name, m in found["metrics"].items() if name not in problem.without_interval]
            assert all(m["value"] is None or m["low"] <= m["high"] for m in values)
            assert all(f"f1/{label}" in found["metrics"] for label in found["labels"])
            assert [part["rows"] for part in found["slices"]] == [20, 12]

    def test_comparison(self, parts, answers, name):
        """A model that knows the truth gains on one that does not, and nothing on itself; the record is JSON."""
        problem, facts, _ = parts
        truth, knowing, real, _ = answers
        for metric in problem.metric_names(facts):
            if metric in problem.without_interval:
                continue
            how = {"metric": metric, "lower_is_better": metric in problem.lower_is_better, "resamples": 50}
            found = compare(problem, facts, truth, knowing, real, champion_facts=facts, **how)
            assert json.loads(json.dumps(found, allow_nan=False)) == found
            gain = found["gain"]
            assert gain["value"] is None or gain["value"] >= 0 and gain["low"] <= gain["high"]
            if metric == problem.default_metric:
                assert gain["low"] > 0 and found["probability"] == 1
                right = name != "text-generation"
                assert found["changed"] >= found["fixed"] >= right and found["changed"] > 0 == found["broken"]
            none = compare(problem, facts, truth, real, real, **how)
            assert all(m["value"] in (0, None) for m in none["differences"].values())
            assert (none["probability"], none["changed"], none["fixed"], none["broken"]) == (0, 0, 0, 0)

    def test_model_of_nan(self, parts, answers):
        """Weights that are no numbers are found out by the predictions, and stop no evaluation or comparison."""
        problem, facts, _ = parts
        truth, knowing, _, broken = answers
        assert all(isinstance(problem.broken(one), str) for one in broken)
        how = {"metric": problem.default_metric, "resamples": 50}
        found = evaluate(problem, facts, truth, broken, **how)
        assert found["broken_predictions"] == len(truth)
        compared = compare(problem, facts, truth, broken, knowing, **how)
        assert compared["probability"] == 0
        json.dumps([found, compared], allow_nan=False)

    def test_learns_by_heart(self, name, tiny_model, tmp_path):
        """Thirty-two examples are learnt until hardly any loss is left; the finished folder answers them rightly."""
        problem, reference = problems.get(name), ModelReference(str(tiny_model))
        facts = facts_of(problem)
        features = problem.encode(load_tokenizer(str(tiny_model)), ROWS[name], facts, 64)
        rows, often = (data.write(tmp_path / str(count), [features] * count, {}) for count in (1, 8))
        least, losses = LEAST_LOSS.get(name, 0.02), []
        fit(
            problem,
            reference,
            facts,
            often,
            rows,
            Training(epochs=16, batch_size=16, learning_rate=4e-3, dropout=0.0, evaluations_per_epoch=1),
            folder=tmp_path / "run",
            metric=problem.default_metric,
            on_evaluation=lambda record: losses.append(record["validation_loss"]),
            should_stop=lambda: "budget" if losses and losses[-1] < least else None,
        )
        assert losses[-1] < least < losses[0]
        best = tmp_path / "run" / "best"
        finish_model_folder(best, Card(name, facts, 64, problem.default_metric), reference.base)
        texts = [dict(zip(ROWS[name], row, strict=True)) for row in zip(*ROWS[name].values(), strict=True)]
        answers = Scorer(best).predict_texts([{role: row[role] for role in problem.text_roles} for row in texts])
        right = [
            problem.right(problem.truth(row[problem.target]), a, facts) for row, a in zip(texts, answers, strict=True)
        ]
        assert sum(right) >= 31 or name in LEAST_LOSS

    def test_load_model_refuses_what_is_not_there(self, name, tmp_path):
        """An unknown model is the user's error, in one line."""
        problem = problems.get(name)
        facts = facts_of(problem)
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
