"""Attention of packed texts, each to itself: on a CPU one by one, on a GPU in one call and, if it can be, unpadded."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from overnight.training.packing import Packing

UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias")
"""What some models ask of attention, and packing does not do."""
SHORT = 128
"""Tokens of the longest text of a batch up to which a GPU reads them in small tiles."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """Attention (1 × heads × tokens × size) of each sequence to itself; without a packing, as transformers does it.

    Raises:
        ValueError: the attention is of a kind that is not known here, which a small example would not tell.
    """
    if packing is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **named)
    if any(named.get(name) is not None for name in UNKNOWN):
        raise ValueError(f"cannot be packed with {' or '.join(UNKNOWN)}")
    causal = named.get("is_causal")
    how = (packing, dropout, scaling, bool(getattr(module, "is_causal", True) if causal is None else causal))
    # rotary embeddings may have left them in float32; several heads may share keys and values
    query, key, shared = query.to(value.dtype), key.to(value.dtype), query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (part.repeat_interleave(shared, dim=1) for part in (key, value))
    if not query.is_cuda:
        return one_by_one(query, key, value, *how), None
    q, k, v = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if dropout == 0:
        for name, longest in (("short", SHORT), ("varlen", math.inf)):
            if packing.longest <= longest and works(name, query.dtype, query.shape[-1], how[-1]):
                return KERNELS[name](q, k, v, packing, scaling, how[-1]), None
    return padded(q, k, v, *how), None


def _short(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, causal: bool) -> Tensor:
    """One call for all sequences, in tiles of the size of a short text: on a GPU only."""
    from overnight.training.short_attention import short_attention

    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    return short_attention(q.contiguous(), k.contiguous(), v.contiguous(), packing.bounds, scale, causal).unsqueeze(0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, packing: Packing, scaling: float | None, causal: bool) -> Tensor:
    """One call for all sequences (tokens × heads × size each), without padding: flash attention, on a GPU only."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (packing.bounds, packing.bounds, packing.longest, packing.longest)
    window = (-1, 0 if causal else -1)
    found: Any = varlen_attn(
        q.contiguous(), k.contiguous(), v.contiguous(), *lengths, scale=scaling, window_size=window
    )
    return found.unsqueeze(0)


KERNELS = {"short": _short, "varlen": _varlen}


@functools.cache
@torch.compiler.assume_constant_result
def works(name: str, dtype: torch.dtype, size: int, causal: bool) -> bool:
    """Whether this machine has that kernel for heads of that type and size: found out by using it."""
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    from overnight.training.packing import Packing

    packing = Packing.of(torch.tensor([[1, 1, 1], [1, 1, 0]])).to(torch.device("cuda"))
    q, k, v = given = [torch.randn(5, 2, size, dtype=dtype, device="cuda", requires_grad=True) for _ in range(3)]
    how = (packing, None, causal)
    try:
        with torch.enable_grad():
            found, expected = KERNELS[name](q, k, v, *how), padded(q, k, v, packing, 0.0, None, causal)
            gradients = [torch.autograd.grad(out.float().square().sum(), given) for out in (found, expected)]
    except Exception:
        return False
    pairs = [(found, expected), *zip(*gradients, strict=True)]
    return all(bool(torch.allclose(a, b, rtol=0.1, atol=0.05)) for a, b in pairs)


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, dropout: float, scaling: float | None, causal: bool
) -> Tensor:
    """A call a sequence: on a CPU faster than padding, since the kernel is not kept waiting by short calls."""
    parts = (tensor.split(packing.lengths, dim=2) for tensor in (query, key, value))
    own = [
        scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling, is_causal=causal)
        for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(own, dim=2).transpose(1, 2).contiguous()


def padded(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, dropout: float, scaling: float | None, causal: bool
) -> Tensor:
    """One call for all sequences (tokens × heads × size each), padded for it alone."""
    q, k, v = (packing.pad(tensor).transpose(1, 2) for tensor in (q, k, v))
    # padding is behind all that a causal model's tokens look at
    mask = None if causal else packing.mask()[:, None, None]
    out = scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scaling)
    return packing.pack(out.transpose(1, 2)).unsqueeze(0)
