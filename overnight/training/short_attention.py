"""Attention for many short texts end to end, on a GPU: Triton kernels with a tile that holds a tweet.

The tiles of flash attention are of 128 tokens, for which texts of thirty are too short: it takes a quarter of a step.
Here one program does one head of one text, forward or backward, and a text that fits into a tile is read once. What is
kept for the backward pass is the same: outputs and the logarithm of each token's normaliser. After FlashAttention-2
(Dao 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

TILE = 64
LOG2_E = 1.4426950408889634


@triton.jit
def _places(first, start, length, head, heads, TILE: tl.constexpr, SIZE: tl.constexpr):
    """Of a tile's tokens: their number in the text, in all texts and heads, where they lie, and whether they exist."""
    tile = first + tl.arange(0, TILE)
    rows = (start + tile).to(tl.int64) * heads + head
    return tile, rows, rows[:, None] * SIZE + tl.arange(0, SIZE)[None, :], tile < length


@triton.jit
def _asked(key, value, at, there):
    """Keys and values of a tile."""
    there = there[:, None]
    return tl.load(key + at, mask=there, other=0.0), tl.load(value + at, mask=there, other=0.0)


@triton.jit
def _asking(query, out, slope, logs, rows, at, there):
    """Of a tile's tokens, as those that look: queries, outputs, the slopes and the logarithms of these."""
    q, o = _asked(query, out, at, there)
    d = tl.load(slope + at, mask=there[:, None], other=0.0)
    return q, o, d, tl.load(logs + rows, mask=there, other=0.0)


@triton.jit
def _seen(mine, there, others, are, CAUSAL: tl.constexpr):
    """Who looks at whom (tile × tile)."""
    seen = there[:, None] & are[None, :]
    if CAUSAL:
        seen = seen & (others[None, :] <= mine[:, None])
    return seen


@triton.jit
def _slopes(q, k, v, o, d, log, seen, SCALE: tl.constexpr):
    """Weights of a tile, and the gradient of its scores."""
    weights = tl.where(seen, tl.exp2(tl.dot(q, tl.trans(k)) * SCALE - log[:, None]), 0.0)
    delta = tl.sum(o.to(tl.float32) * d.to(tl.float32), 1)
    return weights, weights * (tl.dot(d, tl.trans(v)) - delta[:, None])


@triton.jit
def forward_kernel(
    query, key, value, out, logs, bounds, heads,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Outputs (tokens × heads × size) and, in base 2, the logarithms of the normalisers (tokens × heads)."""
    text, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(bounds + text)
    length = tl.load(bounds + text + 1) - start
    for i in range(0, length, TILE):
        mine, rows, at, there = _places(i, start, length, head, heads, TILE, SIZE)
        q = tl.load(query + at, mask=there[:, None], other=0.0)
        top = tl.full([TILE], -1e30, tl.float32)
        total = tl.zeros([TILE], tl.float32)
        found = tl.zeros([TILE, SIZE], tl.float32)
        for j in range(0, length, TILE):
            others, _, of, are = _places(j, start, length, head, heads, TILE, SIZE)
            k, v = _asked(key, value, of, are)
            seen = _seen(mine, there, others, are, CAUSAL)
            scores = tl.where(seen, tl.dot(q, tl.trans(k)) * SCALE, -1e30)
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.where(seen, tl.exp2(scores - higher[:, None]), 0.0)
            fade = tl.exp2(top - higher)
            total = total * fade + tl.sum(weights, 1)
            found = found * fade[:, None] + tl.dot(weights.to(v.dtype), v)
            top = higher
        tl.store(out + at, (found / total[:, None]).to(out.dtype.element_ty), mask=there[:, None])
        tl.store(logs + rows, top + tl.log2(total), mask=there)


@triton.jit
def backward_kernel(
    query, key, value, out, logs, slope, bounds, to_query, to_key, to_value, heads,
    SCALE: tl.constexpr, FACTOR: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradients of all three: of a text in one tile at once, else of each tile of keys over all queries, and back."""
    text, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(bounds + text)
    length = tl.load(bounds + text + 1) - start
    for j in range(0, length, TILE):
        others, _, of, are = _places(j, start, length, head, heads, TILE, SIZE)
        k, v = _asked(key, value, of, are)
        of_key = tl.zeros([TILE, SIZE], tl.float32)
        of_value = tl.zeros([TILE, SIZE], tl.float32)
        for i in range(0, length, TILE):
            mine, rows, at, there = _places(i, start, length, head, heads, TILE, SIZE)
            q, o, d, log = _asking(query, out, slope, logs, rows, at, there)
            weights, slopes = _slopes(q, k, v, o, d, log, _seen(mine, there, others, are, CAUSAL), SCALE)
            of_value += tl.dot(tl.trans(weights.to(d.dtype)), d)
            of_key += tl.dot(tl.trans(slopes.to(q.dtype)), q)
            if length <= TILE:
                of_query = tl.dot(slopes.to(k.dtype), k) * FACTOR
                tl.store(to_query + at, of_query.to(to_query.dtype.element_ty), mask=there[:, None])
        tl.store(to_key + of, (of_key * FACTOR).to(to_key.dtype.element_ty), mask=are[:, None])
        tl.store(to_value + of, of_value.to(to_value.dtype.element_ty), mask=are[:, None])
    if length > TILE:
        for i in range(0, length, TILE):
            mine, rows, at, there = _places(i, start, length, head, heads, TILE, SIZE)
            q, o, d, log = _asking(query, out, slope, logs, rows, at, there)
            sum_ = tl.zeros([TILE, SIZE], tl.float32)
            for j in range(0, length, TILE):
                others, _, of, are = _places(j, start, length, head, heads, TILE, SIZE)
                k, v = _asked(key, value, of, are)
                _, slopes = _slopes(q, k, v, o, d, log, _seen(mine, there, others, are, CAUSAL), SCALE)
                sum_ += tl.dot(slopes.to(k.dtype), k)
            tl.store(to_query + at, (sum_ * FACTOR).to(to_query.dtype.element_ty), mask=there[:, None])


def _plain(kernel: Any) -> Any:
    return kernel


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, causal: bool, wrap: Callable[[Any], Any] = _plain
) -> tuple[Tensor, Tensor]:
    """Outputs, and what the backward pass needs beside them."""
    heads, size = q.shape[1:]
    out, logs = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    grid = (bounds.shape[0] - 1, heads)
    wrap(forward_kernel)[grid](q, k, v, out, logs, bounds, heads, scale * LOG2_E, causal, size, TILE, num_warps=4)
    return out, logs


def backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, slope: Tensor, bounds: Tensor, scale: float,
    causal: bool, wrap: Callable[[Any], Any] = _plain,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values, from that of the outputs (`slope`)."""
    heads, size = q.shape[1:]
    found = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    grid = (bounds.shape[0] - 1, heads)
    wrap(backward_kernel)[grid](
        q, k, v, out, logs, slope, bounds, *found, heads, scale * LOG2_E, scale, causal, size, TILE, num_warps=4
    )
    return found


@torch.library.triton_op("overnight::short_attention", mutates_args={})
def _attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    return forward(q, k, v, bounds, scale, causal, torch.library.wrap_triton)


@torch.library.triton_op("overnight::short_attention_backward", mutates_args={})
def _attention_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, logs: Tensor, slope: Tensor, bounds: Tensor, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return backward(q, k, v, out, logs, slope, bounds, scale, causal, torch.library.wrap_triton)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)


def _go_back(ctx: Any, slope: Tensor, unused: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, bounds, out, logs = ctx.saved_tensors
    found = _attention_backward(q, k, v, out, logs, slope.contiguous(), bounds, ctx.scale, ctx.causal)
    return *found, None, None, None


_attention.register_autograd(_go_back, setup_context=_keep)


def short_attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, causal: bool) -> Tensor:
    """Attention of each text to itself, in a causal model to what is before each token.

    Args:
        q, k, v: tokens × heads × size, contiguous, bfloat16 or float16, on a GPU; size a power of two from 16.
        bounds: where each text starts, and the end (int32).

    Returns:
        tokens × heads × size.
    """
    return _attention(q, k, v, bounds, scale, causal)[0]
