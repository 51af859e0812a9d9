"""Models by reference: a folder, `pkg://package/folder`, a hub name; loaded quietly, safely, with clear complaints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.errors import Complaint, UserError, nearest
from overnight.references import resolve_package_path

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training

WHERE = "model → base"


@dataclass(frozen=True)
class ModelReference:
    """Where a run starts: `base` as in the YAML, and the `revision` of a hub name."""

    base: str
    revision: str | None = None


def resolve_base(base: str) -> str:
    """The folder behind `pkg://…` or a path, or the hub name as it is; nothing is loaded or downloaded.

    Raises:
        UserError: when a package or a path does not exist, or the folder holds no model.
    """
    if base.startswith("pkg://"):
        folder = resolve_package_path(base, WHERE)
    else:
        folder = Path(base).expanduser()
        looks_like_path = base.startswith((".", "/", "~")) or base.count("/") > 1 or not base
        if not folder.exists() and not looks_like_path:
            return base
    if not folder.exists():
        siblings = [str(p) for p in sorted(folder.parent.iterdir())] if folder.parent.is_dir() else []
        raise UserError(Complaint(WHERE, "no such folder", repr(base), nearest(str(folder), siblings)))
    if not (folder / "config.json").is_file():
        inner = [str(p.parent) for p in sorted(folder.glob("*/config.json"))] if folder.is_dir() else []
        hint = inner[0] if inner else None
        raise UserError(Complaint(WHERE, "needs a model's folder, with a config.json in it", repr(base), hint))
    return str(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without load reports, progress bars and advice, for the time of the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(
    auto_class: Any, base: str, revision: str | None = None, *, training: Training, **settings: Any
) -> PreTrainedModel:
    """A model in float32 on the CPU, with the dropouts of `training`; `settings` go into its configuration.

    Only safetensors are read, and code that comes with a model is never run. A head whose shape does not fit is made
    anew.

    Raises:
        UserError: when there is no such model or it cannot be used.
    """
    import torch
    from transformers import AutoConfig, PreTrainedConfig

    folder = resolve_base(base)
    with quiet(), _complaints(base):
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False, **settings)
        # an encoder-decoder that was put together of two models keeps theirs apart
        for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
            for key, value in part.to_dict().items():
                wish = training.attention_dropout if "attention" in key or "attn" in key else training.dropout
                number = isinstance(value, int | float) and not isinstance(value, bool)
                if ("dropout" in key or "pdrop" in key) and number and wish is not None:  # GPT-2 calls it attn_pdrop
                    setattr(part, key, wish)
        return auto_class.from_pretrained(
            folder,
            revision=revision,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
        )


def start_at(model: PreTrainedModel, prior: np.ndarray) -> None:
    """Gives the bias of a new head the values of `prior`; a head that has learned, or has no bias, stays as it is."""
    import torch

    name, bias = list(model.named_parameters())[-1]
    if name.endswith("bias") and bias.shape == prior.shape and not bias.any():
        with torch.no_grad():
            bias.copy_(torch.from_numpy(prior))


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        UserError: when there is no such model or it has none.
    """
    from transformers import AutoTokenizer

    folder = resolve_base(base)
    with quiet(), _complaints(base):
        return AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False)


@contextmanager
def _complaints(base: str) -> Iterator[None]:
    """Turns what transformers raises for a model that is not there, or not usable, into a complaint of one line."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if "couldn't connect" in text or "offline mode" in text or "local cache" in text:
            rule = "neither a folder nor a model in the local cache, and the hub cannot be reached"
        elif "trust_remote_code" in text:
            rule = "needs code of its own, which is never run; take a model that transformers itself knows"
        elif "no file named model.safetensors" in text:
            rule = "holds no model.safetensors (weights in other formats are not read)"
        elif "for this kind of AutoModel" in text:
            rule = "this kind of model cannot be used for the problem"
        elif isinstance(error, SafetensorError):
            rule = f"its weights cannot be read ({text})"
        else:
            rule = f"cannot be loaded ({text[:200]})"
        raise UserError(Complaint(WHERE, rule, repr(base))) from None
