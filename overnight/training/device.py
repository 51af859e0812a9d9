"""What the machine can do: number format, memory used, memory run out."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils.memory import should_reduce_batch_size

from overnight.errors import OvernightError


class OutOfMemory(OvernightError):
    """Not even one row fits."""


def choose_precision(wish: str, device: torch.device) -> str:
    """`bf16` or `float32`: the wish, or for `auto` bf16 where the hardware multiplies in it (asked, not timed)."""
    if wish != "auto":
        return wish
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        fast = False
    return "bf16" if fast else "float32"


def make_accelerator(wish: str) -> tuple[Accelerator, str]:
    """The one device of this process, and the precision chosen for it."""
    # texts have other lengths in each step, which would leave a GPU's memory in pieces; read at its first use
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, in which somebody may have chosen otherwise
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    precision = choose_precision(wish, Accelerator().device)
    # Accelerate keeps the first precision for the life of a process; a second run here may want the other one
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="bf16" if precision == "bf16" else "no"), precision


def is_out_of_memory(error: Exception) -> bool:
    """Whether fewer rows at a time could help."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, to use it again: new pages cost a CPU a fifteenth of a step.

    Of the C library of GNU alone; elsewhere nothing happens.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        trim_threshold, mmap_max = -1, -4  # malloc.h
        adjust(trim_threshold, 2**31 - 1)
        adjust(mmap_max, 0)


def device_busy(device: torch.device) -> float | None:
    """Share of the last moments in which a GPU ran anything, 0 to 1; None for other devices and without NVML."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.utilization(device) / 100
    except (ImportError, RuntimeError):
        return None


def device_memory_share(device: torch.device) -> float | None:
    """Most that this process took of a GPU's memory, 0 to 1; None for other devices."""
    if device.type != "cuda":
        return None
    context = 2**29  # what a process takes without a single tensor
    return (torch.cuda.max_memory_reserved(device) + context) / torch.cuda.get_device_properties(device).total_memory


def peak_memory_mb(device: torch.device) -> float:
    """Most memory that was in use, in MiB: the device's by tensors, on the CPU this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
