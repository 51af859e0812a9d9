"""The engine on a real GPU; `tests/gpu.sh` names the few libraries that this needs.

python -m pytest -m gpu tests/test_gpu.py
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from overnight import problems
from overnight.settings import Training
from overnight.training import data
from overnight.training.attention import KERNELS, padded, works
from overnight.training.compiled import compile_layers
from overnight.training.fit import fit
from overnight.training.frozen import compute
from overnight.training.models import ModelReference, load_tokenizer
from overnight.training.packing import Packed, Packing
from overnight.training.predict import predict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROBLEM = problems.get("sequence-classification")
TRAINING = Training(epochs=5, batch_size=16, learning_rate=4e-3, warmup=0.2, dropout=0.0)


def model_and_batch():
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=96,
        max_position_embeddings=40,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config).train().to("cuda")
    lengths = (9, 3, 6, 6, 1)
    mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask.bool(), torch.randint(5, 60, mask.shape), 0)
    return model, {"input_ids": ids.to("cuda"), "attention_mask": mask.to("cuda")}


def gradients(model, logits):
    model.zero_grad()
    (logits.float() * torch.arange(logits.numel(), device="cuda").view_as(logits)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(found, expected):
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) for name, value in expected.items()) / scale


def causal_model_and_batch():
    """Heads that share keys and values, and rotary embeddings."""
    _, batch = model_and_batch()
    sizes = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0)).train().to("cuda")
    return model, batch


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bf16", 3e-2)])
@pytest.mark.parametrize(("make", "way"), [(model_and_batch, "first"), (causal_model_and_batch, "all")])
def test_packed_equals_padded(precision, tolerance, make, way):
    """Outputs and gradients of the packed model are the padded one's in float32, up to rounding."""
    model, batch = make()
    mask = 1 if way == "first" else batch["attention_mask"][:, :, None]
    plain = model(**batch).logits * mask
    expected = gradients(model, plain)
    packed = Packed(model)
    assert packed.way == way
    packing = Packing.of(batch["attention_mask"].cpu()).to(model.device)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        logits = packed(batch, packing).logits * mask
    assert float((logits - plain).abs().max() / plain.abs().max()) < tolerance
    assert worst(gradients(model, logits), expected) < tolerance


@pytest.mark.parametrize("kernel", ["short", "varlen"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_without_padding_is_used(kernel, causal):
    """This GPU has the kernels; without them the engine works, but pads."""
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs an Ampere GPU or a newer one")
    for size in (32, 64):
        assert works(kernel, torch.bfloat16, size, causal) and not works(kernel, torch.float32, size, causal)


@pytest.mark.parametrize("kernel", ["short", "varlen"])
@pytest.mark.parametrize("causal", [False, True])
def test_kernels_agree_with_padding(kernel, causal):
    """Outputs and gradients for texts of one token up to four tiles, within the rounding of bf16."""
    torch.manual_seed(3)
    lengths = torch.tensor([1, 31, 32, 33, 128, 7, 64, 100])
    packing = Packing.of(torch.arange(128) < lengths[:, None]).to(torch.device("cuda"))
    given = [torch.randn(int(lengths.sum()), 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    exact = [tensor.double().requires_grad_() for tensor in given]
    given = [tensor.requires_grad_() for tensor in given]
    found = KERNELS[kernel](*given, packing, None, causal)
    expected = padded(*exact, packing, 0.0, None, causal)
    slope = torch.randn_like(expected)
    pairs = [(found, expected)]
    pairs += zip(
        torch.autograd.grad(found, given, slope.bfloat16()), torch.autograd.grad(expected, exact, slope), strict=True
    )
    for a, b in pairs:
        assert float((a - b).abs().max() / b.abs().max()) < 2e-2


def test_compiled_equals_plain():
    """Gradients in float32 are those of the layers as they were."""
    model, batch = model_and_batch()
    packed, packing = Packed(model), Packing.of(batch["attention_mask"].cpu()).to(model.device)
    expected = gradients(model, packed(batch, packing).logits)
    assert compile_layers(packed, nullcontext)
    assert worst(gradients(model, packed(batch, packing).logits), expected) < 1e-5


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_learns(tmp_path, tiny_model, tiny_rows, precision, frozen):
    """Texts it has not seen are labelled right, and the finished folder scores them as the engine did."""
    tokenizer, columns = load_tokenizer(str(tiny_model)), tiny_rows.to_dict("list")
    facts = PROBLEM.facts(columns)
    sides = {
        side: data.write(
            tmp_path / side, [PROBLEM.encode(tokenizer, {k: v[part] for k, v in columns.items()}, facts, 64)], {}
        )
        for side, part in (("train", slice(0, 280)), ("validation", slice(280, 400)))
    }
    training = dataclasses.replace(TRAINING, precision=precision, freeze_layers=frozen, epochs=5 if not frozen else 15)
    reference = ModelReference(str(tiny_model))
    written = compute(PROBLEM, reference, facts, training, sides, tmp_path / "features")
    assert written["sides"] == (["train", "validation"] if frozen else [])
    result = fit(
        PROBLEM,
        reference,
        facts,
        *sides.values(),
        training,
        folder=tmp_path / "run",
        metric="macro_f1",
        features=tmp_path / "features",
    )
    assert result["precision"] == precision and result["value"] > 0.8 and result["peak_memory_mb"] > 0
    assert 0 < result["device_memory_share"] < 1
    outputs = predict(PROBLEM, tmp_path / "run" / "best", sides["validation"], facts)
    metrics = PROBLEM.metrics(PROBLEM.targets(sides["validation"], facts), PROBLEM.decode(outputs, facts), facts)
    assert metrics["macro_f1"] == pytest.approx(result["value"], abs=0.03)


def test_memory_that_runs_out_halves_the_micro_batch(tmp_path, tiny_model, tiny_rows):
    """A step that does not fit is made of smaller parts; the run ends and says so."""
    tokenizer, columns = load_tokenizer(str(tiny_model)), tiny_rows.to_dict("list")
    facts = PROBLEM.facts(columns)
    rows = data.write(tmp_path / "rows", [PROBLEM.encode(tokenizer, columns, facts, 64)], {})
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(24 * 2**20 / total)
    try:
        training = dataclasses.replace(TRAINING, epochs=1, batch_size=400, precision="float32")
        result = fit(
            PROBLEM, ModelReference(str(tiny_model)), facts, rows, rows, training, folder=tmp_path / "run",
            metric="macro_f1",
        )  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert result["micro_batch_halvings"] > 0 and result["steps"] == 1
