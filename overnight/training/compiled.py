"""Layers whose small operations are fused by `torch.compile`, on a GPU that has work for long enough.

Between its matrix products a layer adds, normalises, drops out and changes number formats: each by itself reads and
writes all hidden states. Fused they take a fraction of the time, but it takes long to compile them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from overnight.training.packing import Packed, Packing, example

if TYPE_CHECKING:
    from overnight.settings import Training

log = logging.getLogger(__name__)

ENOUGH = 5e16
"""Operations of a run (6 a parameter and token) from which on it earns back the time that compiling takes."""


def wanted(training: Training, model: nn.Module, tokens: int) -> bool:
    """Whether to compile for a run over so many tokens in all."""
    if next(model.parameters()).device.type != "cuda" or training.gradient_checkpointing:
        return False
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return training.compile == "on" or (training.compile == "auto" and 6 * parameters * tokens >= ENOUGH)


def compile_layers(packed: Packed, precision: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Compiles the layers that are trained, for steps that learn; evaluations run as before.

    Found out by doing it, on a small batch: where a compiler is missing or trips over the model, it stays as it is and
    a line in the log says so.
    """
    layers = packed.trained_layers()
    before = [layer.forward for layer in layers]
    for layer, plain in zip(layers, before, strict=True):
        layer.forward = _compiled(plain)
    model = packed.model
    batch = example(model)
    packing = Packing.of(batch["attention_mask"].cpu()).to(model.device)
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            with precision():
                outputs = packed(batch, packing)
            outputs.to_tuple()[0].float().sum().backward()
    except Exception as error:
        for layer, plain in zip(layers, before, strict=True):
            layer.forward = plain
        log.warning("layers are not compiled: %s", (str(error).strip() or type(error).__name__).splitlines()[0])
        return False
    finally:
        model.zero_grad(set_to_none=True)
    return bool(layers)


def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(plain, dynamic=True)

    @functools.wraps(plain)
    def forward(*given: Any, **named: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*given, **named)

    return forward
