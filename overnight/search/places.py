"""Where trials run: on which cores and which GPUs each of them, and how many at a time.

places = Places(machine, search.parallel, trials=10, devices=1)
place = places.take()          # None while all are taken
places.give_back(place)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from overnight.processes import cores

MEMORY_OF_TRIAL = 4 * 2**30
"""Main memory that a trial on a CPU is taken to need: what a base-size model takes with texts of middling length."""
FULL = 0.9
"""Share of a GPU's memory that its trials may take together."""


@dataclass(frozen=True)
class Machine:
    """What there is to run trials on."""

    device: str
    """Kind of device that training takes: "cpu", "cuda", or another name of torch's."""
    gpus: int
    """Number of CUDA devices."""
    cores: tuple[int, ...]
    """Processor numbers that this process may use."""
    memory: int
    """Bytes of main memory."""
    bf16: bool
    """Whether the hardware multiplies in bf16."""


@dataclass(frozen=True)
class Place:
    """What one trial gets."""

    cores: tuple[int, ...]
    gpus: tuple[int, ...] = ()

    @property
    def threads(self) -> int:
        return len(self.cores)


def look_around(folder: Path) -> dict[str, Any]:
    """In a child, since it wakes the GPUs: the facts of this machine that only torch knows."""
    import torch
    from accelerate import Accelerator

    from overnight.training.device import choose_precision

    device = Accelerator().device
    bf16 = choose_precision("auto", device) == "bf16"
    return {"device": device.type, "gpus": torch.cuda.device_count() if device.type == "cuda" else 0, "bf16": bf16}


def this_machine(looked: Mapping[str, Any]) -> Machine:
    """The machine, with what `look_around` found."""
    return Machine(looked["device"], looked["gpus"], cores(), _memory(), looked["bf16"])


def _memory() -> int:
    """Bytes of main memory that this process may use: the machine's, or its container's."""
    import psutil

    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    total = psutil.virtual_memory().total
    return min(total, int(limit)) if limit.isdigit() else total


class Places:
    """The places of one search.

    Args:
        parallel: trials at a time; "auto": one a GPU, and more of them once a trial has shown that they fit, or on a
            CPU as many as there are cores, as long as each has the memory it needs and the sampler still learns from
            trial to trial (no more than half of the trials at a time).
        trials: how many the search will run.
        devices: GPUs that train one model together; on a CPU, processes.
    """

    def __init__(self, machine: Machine, parallel: int | Literal["auto"], *, trials: int, devices: int = 1):
        self.machine = machine
        self._auto = parallel == "auto"
        groups = [tuple(range(i, i + devices)) for i in range(0, machine.gpus - devices + 1, devices)]
        self._groups = groups or ([tuple(range(machine.gpus))] if machine.gpus else [])
        if parallel != "auto":
            number = parallel
        elif self._groups:
            number = len(self._groups)
        elif machine.device == "cpu":
            fitting = machine.memory // (MEMORY_OF_TRIAL * devices)
            number = max(1, min(len(machine.cores) // devices, fitting, math.ceil(trials / 2)))
        else:
            number = 1
        self.all = self._laid_out(number)
        self._free = list(self.all)

    def take(self) -> Place | None:
        return self._free.pop(0) if self._free else None

    def give_back(self, place: Place) -> None:
        self._free.append(place)

    def learn(self, result: Mapping[str, Any]) -> int:
        """Makes room for more trials a GPU, as the first one that tells allows; returns how many places were added.

        A GPU takes no more trials than its memory holds, and no more than leave it something to do: kernels of
        different processes take turns.
        """
        busy, memory = result.get("device_busy"), result.get("device_memory_share")
        if not self._auto or not self._groups or not busy or not memory:
            return 0
        self._auto = False
        more = max(1, min(int(FULL / memory), int(1 / busy))) - 1
        added = [place for place in self.all for _ in range(more)]
        self._free += added
        self.all += added
        return len(added)

    def __str__(self) -> str:
        machine, number = self.machine, len(self.all)
        trials = "one trial at a time" if number == 1 else f"{number} trials at a time"
        threads = sorted({place.threads for place in self.all})
        each = f"{'–'.join(map(str, dict.fromkeys((threads[0], threads[-1]))))} of {len(machine.cores)} cores"
        on = f"{machine.gpus} GPUs" if machine.gpus > 1 else "the GPU" if machine.gpus else "no GPU here"
        if not machine.gpus and machine.device != "cpu":
            on = machine.device
        return f"{trials}, {each} each; {on}{'' if machine.bf16 else ', no bf16 in hardware'}"

    def _laid_out(self, number: int) -> list[Place]:
        """Shares of the cores as even as can be; beyond one trial a core, cores are shared."""
        every = self.machine.cores
        shares = min(number, len(every))
        cuts = [round(i * len(every) / shares) for i in range(shares + 1)]
        blocks = [every[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        groups = self._groups or [()]
        return [Place(blocks[i % shares], groups[i % len(groups)]) for i in range(number)]
