"""Compiled layers, traced on the CPU; `test_gpu.py` runs what a GPU makes of them."""

from __future__ import annotations

import functools
import logging
from contextlib import nullcontext

import pytest
import torch
from conftest import BERT
from transformers import BertConfig, BertForSequenceClassification

from overnight.settings import Training
from overnight.training import attention
from overnight.training.compiled import compile_layers, wanted
from overnight.training.packing import Packed, Packing


@pytest.fixture
def packed(monkeypatch):
    """With attention as on a GPU without kernels for it, since a call a text would be traced anew for each batch."""

    def as_on_a_gpu(q, k, v, *how):
        return attention.padded(*(tensor.squeeze(0).transpose(0, 1) for tensor in (q, k, v)), *how)

    monkeypatch.setattr(attention, "one_by_one", as_on_a_gpu)
    torch.manual_seed(1)
    return Packed(BertForSequenceClassification(BertConfig(**BERT)).train())


def gradients(packed, lengths):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask.bool(), torch.arange(mask.numel()).view_as(mask) % 50 + 5, 0)
    packed.model.zero_grad()
    packed({"input_ids": ids, "attention_mask": mask}, Packing.of(mask)).logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in packed.model.named_parameters() if p.grad is not None}


def test_gradients_stay_and_batches_of_other_lengths_are_not_compiled_again(packed, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    batches = [(9, 3, 6), (4, 12, 2, 5), (7, 7)]
    expected = [gradients(packed, lengths) for lengths in batches]
    draws = torch.get_rng_state()
    assert compile_layers(packed, nullcontext)
    assert torch.equal(draws, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in packed.model.parameters())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for lengths, wish in zip(batches, expected, strict=True):
        found = gradients(packed, lengths)
        assert found.keys() == wish.keys()
        assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in wish.items())
    with torch.no_grad():  # evaluations run as before
        mask = torch.ones(2, 4, dtype=torch.long)
        packed({"input_ids": mask * 7, "attention_mask": mask}, Packing.of(mask))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs > 0
    assert not torch._dynamo.utils.counters["graph_break"]


def test_where_it_cannot_be_done_a_line_says_so(packed, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda plain, dynamic: fail)
    expected = gradients(packed, (5, 3))
    with caplog.at_level(logging.WARNING):
        assert not compile_layers(packed, nullcontext)
    assert caplog.messages == ["layers are not compiled: no compiler"]
    assert all(torch.equal(value, expected[name]) for name, value in gradients(packed, (5, 3)).items())


def test_a_cpu_compiles_nothing(packed):
    assert not wanted(Training(compile="on"), packed.model, 10**12)
