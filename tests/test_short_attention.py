"""The kernels for short texts on a GPU, run by Triton's interpreter on the CPU; `test_gpu.py` runs them compiled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
PROGRAM = """
import sys
import torch
from torch.nn.functional import scaled_dot_product_attention
from overnight.training.short_attention import TILE, backward, forward

torch.manual_seed(0)
causal = sys.argv[1] == "causal"
lengths = [5, TILE, 1, TILE + 1, 2 * TILE + 6]
total = sum(lengths)
bounds = torch.tensor([0, *lengths]).cumsum(0).int()
given = [torch.randn(total, 2, 16, requires_grad=True) for _ in range(3)]
parts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in given))
own = [scaled_dot_product_attention(*part, is_causal=causal, scale=0.3) for part in parts]
expected = torch.cat(own, dim=1).transpose(0, 1)
slope = torch.randn(expected.shape)
gradients = torch.autograd.grad(expected, given, slope)
with torch.no_grad():
    out, logs = forward(*given, bounds, 0.3, causal)
    found = backward(*given, out, logs, slope, bounds, 0.3, causal)
for a, b in zip((out, *found), (expected, *gradients)):
    print(float((a - b).abs().max() / b.abs().max()))
"""


@pytest.mark.parametrize("kind", ["both ways", "causal"])
def test_outputs_and_gradients_are_those_of_torch(kind):
    """Texts of one token, of a tile and one more, of several tiles; float32, up to rounding."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, kind],
        env=environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    differences = [float(line) for line in done.stdout.split()]
    assert len(differences) == 4 and max(differences) < 1e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_kernels_compile_without_a_gpu(name, causal):
    """To machine code for an H100, which the interpreter does not need to."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from overnight.training import short_attention

    kernel = getattr(short_attention, name)
    constants = {"SCALE": 0.2, "FACTOR": 0.1, "CAUSAL": causal, "SIZE": 64, "TILE": short_attention.TILE}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    kinds = {"logs": "*fp32", "bounds": "*i32", "heads": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {key: kinds.get(key, "*bf16") for key in kernel.arg_names}, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert made.asm["cubin"]
