"""Optimizer, its parameter groups, and the course of the learning rate."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from overnight.training.layers import depths, layer_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from overnight.settings import Training

FUSED = ("cpu", "cuda")
"""Devices on which torch has one kernel for the whole update of both optimizers."""


def parameter_groups(model: PreTrainedModel, training: Training) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay, deepest first; `peak` is a group's highest rate.

    The head, whatever else is above the layers, and the top layer take `learning_rate`; each layer below takes
    `layer_decay` times the rate of the one above it, the embeddings come last. Biases and normalisation weights have
    no weight decay.
    """
    place, top = depths(model), len(layer_stack(model))
    norms = {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in norms
            peak = training.learning_rate * training.layer_decay ** (top - min(place[name], top))
            groups.setdefault((peak, decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "peak": peak,
            "weight_decay": training.weight_decay if decayed else 0.0,
        }
        for (peak, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def make_optimizer(model: PreTrainedModel, training: Training) -> torch.optim.Optimizer:
    """AdamW (decoupled weight decay) or SGD (decay in the gradient) over what is trained, fused where possible."""
    groups = parameter_groups(model, training)
    fused = next(model.parameters()).device.type in FUSED
    if training.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=training.learning_rate, momentum=training.momentum, fused=fused)
    return torch.optim.AdamW(groups, lr=training.learning_rate, fused=fused)


def schedule(step: int, steps: int, training: Training) -> float:
    """Factor on the peak learning rate at `step` (0-based) of `steps`; above 0 at every one of them."""
    warm = round(training.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(1, steps - warm)
    if training.schedule == "linear":
        return 1 - progress
    if training.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Gives each group `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]
