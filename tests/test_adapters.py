"""Training little of a model: what is trained, what stays, and that what is kept is a plain model."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import BERT, DISTIL, SIZES
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from overnight import problems
from overnight.config.sections import Generation
from overnight.errors import UserError
from overnight.settings import Training
from overnight.training import data
from overnight.training.adapters import merged, train_little
from overnight.training.card import Card, finish_model_folder
from overnight.training.files import save_best
from overnight.training.fit import fit
from overnight.training.frozen import compute
from overnight.training.layers import layer_stack
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.packing import Packed, Packing
from overnight.training.predict import Scorer

PROBLEM = problems.get("sequence-classification")
SHORT = Training(
    epochs=1,
    batch_size=16,
    learning_rate=5e-3,
    dropout=0.0,
    evaluations_per_epoch=2,
    precision="float32",
    method="lora",
    lora_rank=4,
)
LIVELY, DISTIL_LIVELY = (sizes | {"initializer_range": 0.2} for sizes in (BERT, DISTIL))
GPT2 = {"vocab_size": 60, "n_positions": 40, "n_embd": 16, "n_layer": 3, "n_head": 2}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "vocab_size": 60}
BART = {f"{half}_{what}": count for half in ("encoder", "decoder") for what, count in
        {"layers": 3, "attention_heads": 2, "ffn_dim": 24}.items()}  # fmt: skip
BART |= {"vocab_size": 60, "d_model": 16, "max_position_embeddings": 40}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
pytestmark = pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**LIVELY)),
    "tokens": lambda: BertForTokenClassification(BertConfig(**LIVELY)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**SIZES, **DISTIL_LIVELY)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "encoders": lambda: EncoderDecoderModel(
        encoder=BertModel(BertConfig(**LIVELY)),
        decoder=BertLMHeadModel(BertConfig(**LIVELY, is_decoder=True, add_cross_attention=True)),
    ),
}
TWO_STACKS = ("t5", "bart", "encoders")
INPUTS = {
    "input_ids": torch.tensor([[5, 9, 33, 7, 21, 8], [44, 3, 12, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}


def inputs_of(kind: str) -> dict[str, torch.Tensor]:
    return INPUTS | ({"labels": INPUTS["input_ids"]} if kind in TWO_STACKS else {})


def made(kind: str) -> torch.nn.Module:
    model = MODELS[kind]().eval()
    if kind == "encoders":
        model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    return model


def adapted(kind: str, **changes) -> torch.nn.Module:
    """A model with adapters that have learnt something."""
    torch.manual_seed(4)
    model = made(kind)
    train_little(model, dataclasses.replace(SHORT, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def rows(tiny_model, tiny_rows, tmp_path_factory):
    """facts, 128 rows to train on, 64 to validate on, and 32 to learn by heart."""
    tokenizer, facts = load_tokenizer(str(tiny_model)), PROBLEM.facts(tiny_rows)
    folder = tmp_path_factory.mktemp("rows")
    parts = {"train": tiny_rows[:128], "validation": tiny_rows[300:364], "few": tiny_rows[:32]}
    return {"facts": facts} | {
        name: data.write(folder / name, [PROBLEM.encode(tokenizer, part.to_dict("list"), facts, 64)], {})
        for name, part in parts.items()
    }


@pytest.fixture
def run(rows, tiny_model, tmp_path):
    """Runs `fit` in a folder of that name and returns its result, with its evaluations."""

    def call(name, training=SHORT, *, sides=("train", "validation"), on_evaluation=lambda record: None, **more):
        evaluations = []

        def evaluated(record):
            evaluations.append(record)
            on_evaluation(record)

        result = fit(
            PROBLEM,
            ModelReference(str(tiny_model)),
            rows["facts"],
            *(rows[side] for side in sides),
            training,
            folder=tmp_path / name,
            metric="macro_f1",
            on_evaluation=evaluated,
            **more,
        )
        return result | {"evaluations": evaluations}

    call.folder = tmp_path
    call.weights = lambda name: load_file(tmp_path / name / "best" / "model.safetensors")
    return call


def changed(base: dict, tuned: dict) -> set[str]:
    """Names of the base's weights that are others now, as the base calls them."""
    return {name for name, weight in base.items() if not torch.equal(weight, tuned[f"bert.{name}"])}


class TestLora:
    def test_trains_adapters_and_head_alone(self, run, tiny_model):
        """Of the layers only matrices move, by a matrix of the rank that was asked for; embeddings, norms and biases
        are the base's to the last bit; what is counted as trained is that."""
        result = run("lora")
        base, tuned = load_file(tiny_model / "model.safetensors"), run.weights("lora")
        moved = changed(base, tuned)
        matrices = {name for name, weight in base.items() if "layer." in name and weight.ndim == 2}
        assert moved - {"pooler.dense.weight", "pooler.dense.bias"} == matrices and len(matrices) == 12
        for name in matrices:
            assert 1 <= torch.linalg.matrix_rank(tuned[f"bert.{name}"] - base[name], atol=1e-5) <= 4, name
        head = sum(weight.numel() for name, weight in tuned.items() if "pooler" in name or "classifier" in name)
        assert result["trainable_parameters"] == head + sum(4 * sum(base[name].shape) for name in matrices)
        wide = run("wide", dataclasses.replace(SHORT, lora_rank=8), should_stop=lambda: "budget")
        assert wide["trainable_parameters"] - head == 2 * (result["trainable_parameters"] - head)
        assert wide["packing"] == result["packing"] == "first"

    def test_what_is_kept_is_a_plain_model(self, run, rows, tiny_model, tiny_rows):
        """The same files and names of weights as of a model that was trained wholly; the finished folder gives the
        predictions that the adapted model gave."""
        training = dataclasses.replace(SHORT, epochs=20, batch_size=8, learning_rate=1e-2, evaluations_per_epoch=1)
        result = run("lora", training, sides=("few", "few"))
        whole = run("full", dataclasses.replace(SHORT, method="full", epochs=0.3))
        assert whole["parameters"] == sum(weight.numel() for weight in run.weights("full").values())
        best, other = (run.folder / name / "best" for name in ("lora", "full"))
        assert {name: w.shape for name, w in run.weights("lora").items()} == {
            name: w.shape for name, w in run.weights("full").items()
        }
        assert {path.name for path in best.iterdir()} == {path.name for path in other.iterdir()}
        assert json.loads((best / "config.json").read_text()) == json.loads((other / "config.json").read_text())
        assert result["value"] > 0.9
        finish_model_folder(best, Card(PROBLEM.name, rows["facts"], 64, "macro_f1"), str(tiny_model))
        answers = Scorer(best).predict_texts([{"text": text} for text in tiny_rows.text[:32]])
        found = PROBLEM.metrics(tiny_rows.label[:32].tolist(), answers, rows["facts"])
        assert found == pytest.approx(result["metrics"])

    @pytest.mark.parametrize("kind", MODELS)
    def test_merged_weights_are_the_adapted_model(self, kind, tmp_path):
        """Saved and loaded, without a trace of the adapters, every kind of model has the logits that it had."""
        model = adapted(kind)
        expected = model(**inputs_of(kind)).logits
        save_best(model, tmp_path / "best", {"value": 1})
        plain, about = type(model).from_pretrained(tmp_path / "best", output_loading_info=True)
        assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
        assert not any("lora" in name for name, _ in plain.named_parameters())
        found = plain.eval()(**inputs_of(kind)).logits
        assert torch.allclose(found, expected, atol=1e-5)
        torch.manual_seed(4)
        assert not torch.allclose(found, made(kind)(**inputs_of(kind)).logits, atol=1e-3)
        assert torch.equal(model(**inputs_of(kind)).logits, expected), "the model goes on with its adapters"
        assert merged(plain) is None

    @pytest.mark.parametrize("kind", TWO_STACKS)
    def test_both_stacks_have_adapters(self, kind):
        """Each matrix of encoder and decoder, but for a cross-attention that was drawn by chance: that is trained
        wholly. Frozen layers are counted from the bottom of the encoder on."""
        for frozen in (0, 4):
            model = made(kind)
            assert train_little(model, dataclasses.replace(SHORT, freeze_layers=frozen)) == frozen
            trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            layers = layer_stack(model)
            for number, layer in enumerate(layers):
                matrices = {name: m for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}
                adapters = {name for name in matrices if f"{name}.lora_A.default" in matrices}
                plain = {name for name in matrices if "lora" not in name and "base_layer" not in name}
                new = {name for name in plain if "crossattention" in name}
                assert adapters == (set() if number < frozen else plain - new)
                assert all(parameter.requires_grad for name in new for parameter in matrices[name].parameters())
            assert len(layers) == 6
            rest = {name for name in trained if "lora_" not in name}
            assert bool(rest) == (kind != "bart") and all("decoder" in name for name in rest)
            model.train()(**inputs_of(kind)).loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("kind", ["bert", "tokens", "distilbert"])
    def test_packed_equals_padded(self, kind):
        """Logits and the gradients of all adapters, with and without frozen layers below."""
        for frozen in (0, 1):
            model = adapted(kind, freeze_layers=frozen).train()
            plain = model(**INPUTS).logits
            found = []
            packed = Packed(model, frozen)
            assert packed.way != "padded"
            for logits in (plain, packed(INPUTS, Packing.of(INPUTS["attention_mask"])).logits):
                if logits.ndim == 3:
                    logits = logits * INPUTS["attention_mask"][:, :, None]
                model.zero_grad()
                (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
                found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
            expected, gradients = found
            assert gradients.keys() == expected.keys() and any("lora_A" in name for name in gradients)
            assert not [name for name in gradients if "base_layer" in name or "embeddings" in name]
            scale = max(float(value.abs().max()) for value in expected.values())
            for name, value in expected.items():
                assert float((gradients[name] - value).abs().max()) < 1e-5 * scale, name

    def test_frozen_layers_have_none(self, run, rows, tiny_model):
        """With `freeze_layers` the layers below stay as they are, also when their hidden states are computed once."""
        training = dataclasses.replace(SHORT, freeze_layers=1)
        run("frozen", training)
        base, tuned = load_file(tiny_model / "model.safetensors"), run.weights("frozen")
        moved = changed(base, tuned)
        assert not [name for name in moved if "layer.0." in name or "embeddings" in name]
        assert len([name for name in moved if "layer.1." in name]) == 6
        reference, sides = ModelReference(str(tiny_model)), {name: rows[name] for name in ("train", "validation")}
        made = compute(PROBLEM, reference, rows["facts"], training, sides, run.folder / "features")
        assert made["sides"] == ["train", "validation"]
        run("features", training, features=run.folder / "features")
        again = run.weights("features")
        assert all(torch.allclose(weight, again[name], atol=1e-5) for name, weight in tuned.items())
        with pytest.raises(UserError, match="training → method: this model has no layers that adapters are made for"):
            run("nothing", dataclasses.replace(SHORT, freeze_layers=2))

    def test_a_killed_run_continues(self, run):
        """Killed in its second evaluation, a run with dropout ends with the same bits and records."""
        training = dataclasses.replace(SHORT, dropout=0.1, epochs=2, checkpoint_minutes=1e-9)
        whole = run("whole", training)

        def dies(record):
            if record["evaluation"] == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run("killed", training, on_evaluation=dies)
        assert (run.folder / "killed" / "snapshot").exists()
        rest = run("killed", training)
        assert 0 < len(rest["evaluations"]) < len(whole["evaluations"])
        assert rest["evaluations"] == whole["evaluations"][-len(rest["evaluations"]) :]
        one, other = run.weights("whole"), run.weights("killed")
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    def test_gradient_checkpointing_changes_nothing(self, run):
        """Also where what enters the first layer needs no gradient."""
        training = dataclasses.replace(SHORT, epochs=0.5)
        run("kept", training)
        run("recomputed", dataclasses.replace(training, gradient_checkpointing=True))
        one, other = run.weights("kept"), run.weights("recomputed")
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


class TestFrozen:
    def test_trains_the_head_alone(self, run, tiny_model):
        """Layers and embeddings are the base's to the last bit; nothing is left of adapters."""
        training = dataclasses.replace(SHORT, method="frozen", epochs=15, batch_size=8, learning_rate=1e-2)
        result = run("head", training, sides=("few", "few"))
        base, tuned = load_file(tiny_model / "model.safetensors"), run.weights("head")
        assert changed(base, tuned) == {"pooler.dense.weight", "pooler.dense.bias"}
        assert result["trainable_parameters"] == 32 * 32 + 32 + 3 * 32 + 3
        losses = [record["validation_loss"] for record in result["evaluations"]]
        assert losses[-1] < losses[0]
        AutoModelForSequenceClassification.from_pretrained(run.folder / "head" / "best")

    def test_layers_run_without_dropout(self, tiny_model, rows):
        """What is not trained gives the same for a text each time."""
        training = dataclasses.replace(SHORT, method="frozen", dropout=0.5)
        model = PROBLEM.load_model(str(tiny_model), rows["facts"], training)
        assert train_little(model, training) == 2
        packed = Packed(model, 2)
        packed.train()
        states = [model.bert(**INPUTS).last_hidden_state for _ in range(2)]
        assert torch.equal(*states) and model.dropout.training

    @pytest.mark.parametrize("kind", MODELS)
    def test_every_kind_has_a_head(self, kind):
        """Something is left to be trained, and none of it is in a layer of the stack or an embedding."""
        model, training = made(kind), dataclasses.replace(SHORT, method="frozen")
        if kind == "bart":
            with pytest.raises(UserError, match="no head of its own.* did you mean lora"):
                train_little(model, training)
            return
        assert train_little(model, training) == len(layer_stack(model))
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        inside = {id(p) for layer in layer_stack(model) for p in layer.parameters()}
        within = {name for name, p in model.named_parameters() if p.requires_grad and id(p) in inside}
        assert names and not [name for name in names if "embed" in name]
        assert bool(within) == (kind == "encoders") and all(".crossattention." in name for name in within)

    def test_a_decoder_made_of_an_encoder_learns(self, tiny_model, tiny_rows, tmp_path):
        """What it reads the other half by, and the head, learn some pairs; all else is the base's to the last bit, also
        with layers frozen that reach into the decoder."""
        problem, facts = problems.get("translation"), {"generation": Generation(max_new_tokens=4).model_dump()}
        texts = {"text": tiny_rows.text[:16].tolist(), "target": [text.split()[0] for text in tiny_rows.text[:16]]}
        rows = data.write(tmp_path / "rows", [problem.encode(load_tokenizer(str(tiny_model)), texts, facts, 24)], {})
        reference, sides = ModelReference(str(tiny_model)), {"train": rows, "validation": rows}
        for method, frozen in (("frozen", 0), ("full", 3)):
            training = dataclasses.replace(SHORT, method=method, freeze_layers=frozen, epochs=10, batch_size=4)
            assert compute(problem, reference, facts, training, sides, tmp_path / "features")["sides"] == []
            losses = []
            fit(
                problem, reference, facts, rows, rows, training, folder=tmp_path / method, metric="chrf",
                on_evaluation=lambda record, into=losses: into.append(record["validation_loss"]),
            )  # fmt: skip
            assert losses[-1] < 0.8 * losses[0]
            base, tuned = (
                load_file(folder / "model.safetensors") for folder in (tiny_model, tmp_path / method / "best")
            )
            for half in ("encoder.", "decoder.bert."):
                ours = {name: weight for name, weight in base.items() if f"{half}{name}" in tuned}
                moved = {name for name, weight in ours.items() if not torch.equal(weight, tuned[f"{half}{name}"])}
                assert len(ours) > 30 and all("layer.1." in name for name in moved)
                assert bool(moved) == (method == "full" and half == "decoder.bert.")
