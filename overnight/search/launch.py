"""One model on several devices: a process each, started within a trial's own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from overnight.processes import die_with_parent, write_error


def launch(devices: int, folder: Path, train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Calls `train` in this process and in helpers, one process a device; returns what it gives here, in the leader.

    With fewer GPUs than `devices` it takes those there are; without any it takes that many processes on the CPU. Must
    be called before anything wakes a GPU. When a helper fails, its error is written as this process's and all end.
    """
    if devices > 1:
        gpus = torch.cuda.device_count()  # unlike `is_available`, asks without waking them
        devices = min(devices, gpus or devices)
    if devices == 1:
        return train()
    if not gpus:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(devices)}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # all processes are on this machine
    torch.set_num_threads(max(1, torch.get_num_threads() // devices))
    context = multiprocessing.get_context("fork")  # nothing has woken a GPU or a pool of threads yet
    helpers = [context.Process(target=_help, args=(rank, folder, train), daemon=True) for rank in range(1, devices)]
    watchers = [threading.Thread(target=_end_when_failed, args=(helper,), daemon=True) for helper in helpers]
    for helper in helpers:
        helper.start()
    for watcher in watchers:  # after the last fork
        watcher.start()
    _take_rank(0)
    try:
        result = train()
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
    for watcher in watchers:
        watcher.join()
    return result


def _take_rank(rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def _help(rank: int, folder: Path, train: Callable[[], dict[str, Any]]) -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    _take_rank(rank)
    try:
        train()
    except Exception as error:
        write_error(folder, error)
        os._exit(1)
    distributed.destroy_process_group()


def _end_when_failed(helper: Any) -> None:
    helper.join()
    if helper.exitcode:
        os.killpg(os.getpgrp(), signal.SIGKILL)  # else the others would wait for it for ever
