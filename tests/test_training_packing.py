"""Packed against padded: the same outputs and gradients, from every kind of model that can be packed."""

from __future__ import annotations

import dataclasses
import errno
import os

import numpy as np
import pytest
import torch
from conftest import BERT, DISTIL, SIZES
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from overnight import problems
from overnight.errors import UserError
from overnight.settings import Training
from overnight.training import data
from overnight.training.attention import one_by_one, padded
from overnight.training.dropout import CheapDropout, use_cheap_dropout
from overnight.training.files import forget
from overnight.training.fit import fit
from overnight.training.frozen import Features, compute
from overnight.training.layers import freeze
from overnight.training.models import ModelReference, load_tokenizer, start_at
from overnight.training.packing import Packed, Packing

PROBLEM = problems.get("sequence-classification")
GPT2 = {"vocab_size": 60, "n_positions": 40, "n_embd": 16, "n_layer": 3, "n_head": 2}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA = {name: BERT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40, "pad_token_id": 0}
LLAMA |= {"bos_token_id": 1, "eos_token_id": 2}
MARKS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
OPT = {name: BERT[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
OPT |= {"ffn_dim": 24, "dropout": 0.0, "word_embed_proj_dim": 16, "max_position_embeddings": 40, "pad_token_id": 0}
MODELS = {
    "bert": (lambda: BertForSequenceClassification(BertConfig(**BERT)), "first"),
    "roberta": (lambda: RobertaForSequenceClassification(RobertaConfig(**BERT)), "first"),
    "electra": (lambda: ElectraForSequenceClassification(ElectraConfig(**BERT, embedding_size=8)), "first"),
    "distilbert": (lambda: DistilBertForSequenceClassification(DistilBertConfig(**SIZES, **DISTIL)), "first"),
    "rotary": (
        lambda: ModernBertForSequenceClassification(ModernBertConfig(**BERT, **MARKS, global_attn_every_n_layers=1)),
        "first",
    ),
    "tokens": (lambda: BertForTokenClassification(BertConfig(**BERT)), "all"),
    "causal bert": (lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True)), "all"),
    "masked bert": (lambda: BertForMaskedLM(BertConfig(**BERT)), "all"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2)), "all"),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)), "all"),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)), "all"),
    "qwen2 by windows": (
        lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA, use_sliding_window=True, sliding_window=64, max_window_layers=1)),
        "padded",
    ),
    "mistral by windows": (lambda: MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=64)), "padded"),
    "modernbert by windows": (lambda: ModernBertForTokenClassification(ModernBertConfig(**BERT, **MARKS)), "padded"),
    "opt": (lambda: OPTForCausalLM(OPTConfig(**OPT)), "all"),
    "deberta": (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**BERT)), "padded"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_bias_of_a_new_head_is_found(name):
    """Every classifier starts at the prior that it is given; a model of language, whose head is none, as it was."""
    model = MODELS[name][0]()
    labels = model.config.num_labels
    prior = np.linspace(-2, 1, labels, dtype=np.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start_at(model, prior)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    if "Classification" not in type(model).__name__:
        assert not changed
        return
    (key,) = changed
    assert "classifier" in key and model.state_dict()[key].tolist() == prior.tolist()
    start_at(model, prior + 1)
    assert model.state_dict()[key].tolist() == prior.tolist(), "it has learned by now"


def test_a_bias_hides_no_difference():
    """However large the outputs are, a model that cannot be packed is found out by how they differ."""
    model = MODELS["deberta"][0]()
    torch.nn.init.constant_(model.classifier.bias, 10.0)
    assert Packed(model).way == "padded"


def batch_of(model, lengths=(9, 3, 6, 6, 1)):
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(3))
    return {"input_ids": torch.where(mask.bool(), ids, model.config.pad_token_id or 0), "attention_mask": mask}


def gradients(model, logits, mask):
    """Of a loss that every logit of a token takes part in."""
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    if logits.ndim == 3:
        weights = weights * mask[:, :, None]
    model.zero_grad()
    (logits * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(found, expected):
    """Largest difference relative to the largest value, over all tensors."""
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) for name, value in expected.items()) / scale


@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_padded(kind):
    """Logits and the gradients of all weights, to 1e-5; what cannot be packed is found out and run as it is."""
    torch.manual_seed(1)
    build, way = MODELS[kind]
    model = build().train()
    batch = batch_of(model)
    plain = model(**batch).logits
    expected = gradients(model, plain, batch["attention_mask"])
    packed = Packed(model)
    assert packed.way == way and model.training
    logits = packed(batch, Packing.of(batch["attention_mask"])).logits
    if logits.ndim == 3:
        plain, logits = (values * batch["attention_mask"][:, :, None] for values in (plain, logits))
    assert torch.allclose(logits, plain, rtol=1e-5, atol=1e-6)
    assert (
        worst(
            gradients(model, packed(batch, Packing.of(batch["attention_mask"])).logits, batch["attention_mask"]),
            expected,
        )
        < 1e-5
    )
    assert torch.allclose(model(**batch).logits, model(**batch).logits), "the model itself still takes padded batches"


def drops(kind):
    """A model, a batch, its packing without a third of the tokens, and the padded batch of those that are left."""
    torch.manual_seed(1)
    build, _ = MODELS[kind]
    model = build().train()
    batch = batch_of(model)
    packing = Packing.of(batch["attention_mask"]).drop(0.4)
    assert sum(packing.lengths) < batch["attention_mask"].sum() and min(packing.lengths) == 1
    places = packing.pad(packing.given) % batch["input_ids"].shape[1]
    mask = packing.mask().long()
    assert not places[:, 0].any(), "the first token of each row stays"
    left = {"input_ids": batch["input_ids"].gather(1, places) * mask, "attention_mask": mask, "position_ids": places}
    return model, batch, packing, left


@pytest.mark.parametrize("kind", ["bert", "electra", "rotary"])
def test_dropped_tokens_are_as_if_cut_out(kind):
    """The other tokens keep their places: logits and gradients of a padded batch that says so."""
    model, batch, packing, left = drops(kind)
    plain = model(**left).logits
    expected = gradients(model, plain, None)
    packed = Packed(model)
    assert packed.way == "first"
    logits = packed(batch, packing).logits
    assert torch.allclose(logits, plain, rtol=1e-5, atol=1e-6)
    assert worst(gradients(model, logits, None), expected) < 1e-5


def test_dropped_tokens_are_dropped_from_features_too():
    """From the hidden states at the freeze line: the same logits, whether tokens are dropped before or after."""
    model, batch, _, _ = drops("bert")
    freeze(model, 1, False)
    packed = Packed(model, 1)
    packing = Packing.of(batch["attention_mask"])
    packing = dataclasses.replace(packing, features=packed.features(batch, packing).detach())
    torch.manual_seed(7)
    dropped = packing.drop(0.5)
    rows = torch.zeros(len(packing.lengths) * max(packing.lengths), packing.features.shape[1])
    rows[packing.index] = packing.features
    assert torch.equal(dropped.features, rows[dropped.given])
    assert len(dropped.features) == sum(dropped.lengths) < len(packing.features)
    torch.manual_seed(7)
    assert torch.equal(packing.drop(0.5).given, dropped.given), "the same for a seed"
    assert torch.isfinite(packed(batch, dropped).logits).all()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_features_stand_for_the_frozen_layers(kind):
    """From the hidden states at the freeze line: the same logits and gradients as from the first layer."""
    torch.manual_seed(1)
    model = MODELS[kind][0]().train()
    freeze(model, 2, False)
    packed = Packed(model, 2)
    assert packed.takes_features
    batch = batch_of(model)
    packing = Packing.of(batch["attention_mask"])
    whole = gradients(model, packed(batch, packing).logits, None)
    assert not [name for name in whole if ".0." in name or ".1." in name or "embeddings" in name]
    features = packed.features(batch, packing).detach()
    short = gradients(model, packed(batch, dataclasses.replace(packing, features=features)).logits, None)
    assert worst(short, whole) < 1e-6


def test_frozen_layers_have_no_dropout():
    """What is below the freeze line gives the same each time, in training too; what is above it does not."""
    model = BertForSequenceClassification(BertConfig(**BERT | {"hidden_dropout_prob": 0.5})).train()
    packed = Packed(model, 2)
    packed.train()
    batch = batch_of(model)
    packing = Packing.of(batch["attention_mask"])
    assert torch.equal(packed.features(batch, packing), packed.features(batch, packing))
    assert not torch.equal(packed(batch, packing).logits, packed(batch, packing).logits)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_arrangements_agree(causal):
    """One call a sequence and one padded call: the same output and gradients."""
    lengths = torch.tensor([4, 7, 1])
    mask = (torch.arange(7) < lengths[:, None]).long()
    packing = Packing.of(mask)
    q, k, v = (torch.randn(1, 2, 12, 8, requires_grad=True) for _ in range(3))
    own = one_by_one(q, k, v, packing, 0.0, 0.3, causal)
    flat = [tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, v)]
    expected = padded(*flat, packing, 0.0, 0.3, causal)
    assert torch.allclose(own, expected, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad((x * x).sum(), (q, k, v)) for x in (own, expected)), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_cheap_dropout_is_dropout():
    """The share dropped, the scale of what is kept, the gradient; nothing in evaluation; the same for a seed."""
    drop, x = CheapDropout(0.1).train(), torch.ones(401, 997, requires_grad=True)
    torch.manual_seed(2)
    out = drop(x)
    dropped = float((out == 0).float().mean())
    assert abs(dropped - 0.1) < 0.003, "five standard deviations of 400,000 draws"
    assert torch.allclose(out[out > 0], torch.tensor(1 / 0.9))
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    torch.manual_seed(2)
    assert torch.equal(drop(x), out)
    assert drop.eval()(x) is x
    model = BertForSequenceClassification(BertConfig(**BERT))
    use_cheap_dropout(model)
    assert not [m for m in model.modules() if type(m) is torch.nn.Dropout]


@pytest.fixture
def rows(tmp_path, tiny_model, tiny_rows):
    """Tokenized rows of two sides, and their facts."""
    columns = tiny_rows.to_dict("list")
    facts = PROBLEM.facts(columns)
    tokenizer = load_tokenizer(str(tiny_model))
    return facts, {
        side: data.write(
            tmp_path / side, [PROBLEM.encode(tokenizer, {k: v[part] for k, v in columns.items()}, facts, 32)], {}
        )
        for side, part in (("train", slice(0, 96)), ("validation", slice(96, 160)))
    }


FROZEN = Training(epochs=2, batch_size=16, learning_rate=3e-3, freeze_layers=1)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_run_with_features_is_the_run_without(tmp_path, tiny_model, rows, share):
    """Computed beforehand or as they are needed, the frozen layers' part of a run is the same."""
    facts, rows = rows
    training = dataclasses.replace(FROZEN, token_dropout=share)
    reference = ModelReference(str(tiny_model))
    written = compute(PROBLEM, reference, facts, training, rows, tmp_path / "features")
    assert written["sides"] == ["train", "validation"]
    results = {}
    for features in (None, tmp_path / "features"):
        folder = tmp_path / "run"
        forget(folder)
        result = fit(
            PROBLEM, reference, facts, *rows.values(), training, folder=folder, metric="macro_f1", features=features
        )
        results[features is None] = [result["value"], result["metrics"]["accuracy"], result["steps"]]
    assert results[True] == pytest.approx(results[False], abs=0.02)
    assert Features.open(tmp_path / "features", "train", rows["validation"]) is None, "features of other rows"
    none = compute(PROBLEM, reference, facts, Training(), rows, tmp_path / "none")
    assert none["sides"] == [], "nothing is frozen"


def test_full_disk_leaves_features_to_the_trials(tmp_path, tiny_model, rows, monkeypatch):
    """Hidden states that do not fit are not written, and nothing fails for it."""
    facts, rows = rows

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    written = compute(PROBLEM, ModelReference(str(tiny_model)), facts, FROZEN, rows, tmp_path / "features")
    assert written == {"sides": [], "bytes": 0} and not list((tmp_path / "features").iterdir())


def test_tokens_that_the_head_reads_are_not_dropped(tmp_path, rows):
    """A model that cannot be given some of the tokens is not trained as if it could."""
    facts, rows = rows
    DebertaV2Model(DebertaV2Config(**BERT)).save_pretrained(tmp_path / "base")
    training = Training(token_dropout=0.3)
    with pytest.raises(UserError, match="token_dropout: .*first token of a text alone, got DebertaV2For"):
        fit(
            PROBLEM,
            ModelReference(str(tmp_path / "base")),
            facts,
            *rows.values(),
            training,
            folder=tmp_path / "run",
            metric="macro_f1",
        )
