"""What training asks of a machine, and what the machine can give; needs torch and the engine alone."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np


def operations(model: Any, lengths: np.ndarray) -> float:
    """Operations a token, forward and backward, of texts of these lengths.

    6 a parameter of the layers, and for attention 12 a layer, unit of width and pair of tokens of one text.
    """
    from overnight.training.layers import layer_stack

    layers = layer_stack(model)
    parameters = sum(p.numel() for layer in layers for p in layer.parameters())
    tokens = lengths.astype(np.float64)
    pairs_a_token = float((tokens**2).sum() / tokens.sum())
    return float(6 * parameters + 12 * len(layers) * model.config.hidden_size * pairs_a_token)


def matrix_rate(precision: str) -> float:
    """Operations a second of large square matrix products on this machine's device, in the training's number format."""
    import torch

    from overnight.training.device import make_accelerator

    accelerator, precision = make_accelerator(precision)
    size = 2048 if accelerator.device.type == "cpu" else 8192
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=accelerator.device, dtype=dtype) for _ in range(2))
    rates = []
    for _ in range(12):
        began = time.perf_counter()
        found = a @ b
        float(found[0, 0])  # waits for the device
        rates.append(2 * size**3 / (time.perf_counter() - began))
    return median(rates[2:])
