"""Files that survive a kill at any moment: a model folder that is whole or absent, a snapshot that is one file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from overnight.training.adapters import merged
from overnight.training.models import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVALUATION = "evaluation.json"
SNAPSHOT = Path("snapshot") / "state.safetensors"


def save_best(model: PreTrainedModel, folder: Path, evaluation: Mapping[str, Any]) -> None:
    """Makes `folder` hold this model and the evaluation it was kept for; the one before stays until then."""
    temporary, old = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.old")
    forget(temporary)
    with _os_errors(folder), quiet():
        model.save_pretrained(temporary, state_dict=merged(model))
        (temporary / EVALUATION).write_text(json.dumps(dict(evaluation), indent=2))
    read_best(folder)
    if folder.exists():
        forget(old)
        os.rename(folder, old)
    os.rename(temporary, folder)
    forget(old)


def read_best(folder: Path) -> dict[str, Any] | None:
    """The evaluation of the model in `folder`; None when there is none yet. Ends a `save_best` that was killed."""
    old = folder.with_name(f"{folder.name}.old")
    if not folder.exists() and old.exists():
        os.rename(old, folder)
    path = folder / EVALUATION
    return json.loads(path.read_text()) if path.is_file() else None


def save_snapshot(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Writes all that a killed run needs to continue: trained weights, optimizer, random numbers, counters.

    One safetensors file with the counters as JSON in its header, so that replacing it is atomic.
    """
    tensors = {f"weight/{name}": p.data for name, p in model.named_parameters() if p.requires_grad}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": v for key, v in values.items() if isinstance(v, torch.Tensor)}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    path = folder / SNAPSHOT
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with _os_errors(path):
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"state": json.dumps(dict(state))})
    os.replace(temporary, path)


def load_snapshot(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, run: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Puts model, optimizer and random numbers back to the snapshot and returns its state.

    None, and nothing is changed, when there is no snapshot, or it is of another run than the one that `run` tells
    (state["run"]).
    """
    path = folder / SNAPSHOT
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        state: dict[str, Any] = json.loads(file.metadata()["state"])
        if state["run"] != json.loads(json.dumps(dict(run))):
            return None
        weights = dict(model.named_parameters())
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name in file.keys():
            kind, _, rest = name.partition("/")
            tensor = file.get_tensor(name)
            if kind == "weight":
                weights[rest].data.copy_(tensor)
            elif kind == "optimizer":
                index, _, key = rest.partition("/")
                moments.setdefault(int(index), {})[key] = tensor
            elif rest == "cpu":
                torch.set_rng_state(tensor)
            elif torch.cuda.is_available():
                torch.cuda.set_rng_state(tensor)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def forget_snapshot(folder: Path) -> None:
    """Removes the snapshot of a finished run."""
    forget((folder / SNAPSHOT).parent)


def forget(folder: Path) -> None:
    """Removes a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    """safetensors reports a full disk as an error of its own; callers know OSError."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from None
