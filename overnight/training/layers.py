"""Where a parameter sits in a model, found without knowing the model's family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from overnight.errors import Complaint, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_stack(model: PreTrainedModel) -> list[nn.Module]:
    """The layers from the bottom: the longest `ModuleList` of the base model; [] where there is none.

    Of an encoder-decoder those of the encoder, and above them those of the decoder.
    """
    halves = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model.base_model]
    return [layer for half in halves for layer in _layers(half)]


def is_new(name: str) -> bool:
    """Whether a part is in no base: that by which a decoder made of an encoder reads the other half's states."""
    return ".crossattention." in name


def embeddings_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes the first hidden states from token ids; None where that is the base model itself."""
    names = {module: name for name, module in model.named_modules()}
    holder = names[model.get_input_embeddings()].rpartition(".")[0]
    return None if not holder or holder == names[model.base_model] else model.get_submodule(holder)


def depths(model: PreTrainedModel) -> dict[str, int]:
    """Parameter name → depth: 0 embeddings, 1 … n the layers from the bottom, n + 1 all that is above.

    The layers are `layer_stack`'s; what else an encoder below a decoder has belongs to its highest. Embeddings are what
    shares a module with the input embeddings, every `nn.Embedding` outside of the layers (position tables that the
    encoder holds), and projections and normalisations named after them.
    """
    names = {module: name for name, module in model.named_modules()}
    place: dict[str, int] = {}
    stack = layer_stack(model)
    encoder: nn.Module | None = model.get_encoder() if model.config.is_encoder_decoder else None
    for depth, layer in enumerate(stack, start=1):
        place |= {f"{names[layer]}.{name}": depth for name, _ in layer.named_parameters()}
    embeddings = embeddings_of(model)
    holder = "" if embeddings is None else names[embeddings]
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, _ in model.named_parameters():
        if name not in place:
            lowest = name in tables or (holder and name.startswith(f"{holder}.")) or "embedding" in name
            above = len(stack) + 1
            if encoder is not None and name.startswith(f"{names[encoder]}."):
                above = len(_layers(encoder))
            place[name] = 0 if lowest else above
    return place


def freeze(model: PreTrainedModel, layers: int, embeddings: bool) -> None:
    """Excludes the lowest `layers` (and with them the embeddings), or the embeddings alone, from training.

    What `is_new` is trained wherever it stands.

    Raises:
        UserError: when the model has fewer layers.
    """
    place, count = depths(model), len(layer_stack(model))
    if layers > count:
        raise UserError(Complaint("training → freeze_layers", f"the model has {count} layers", str(layers)))
    lowest = layers if layers else 0 if embeddings else -1
    for name, parameter in model.named_parameters():
        if place[name] <= lowest and not is_new(name):
            parameter.requires_grad_(False)


def narrow_norms(model: PreTrainedModel) -> None:
    """Has the normalisations of embeddings and layers give bf16, for steps in which matrix products are in bf16.

    They would give float32, which makes what is between two products read and write twice as much.
    """
    for part in (embeddings_of(model), *layer_stack(model)):
        for module in () if part is None else part.modules():
            if isinstance(module, nn.LayerNorm):
                module.register_forward_hook(lambda norm, given, found: found.bfloat16())


def _layers(half: nn.Module) -> list[nn.Module]:
    stacks = [module for module in half.modules() if isinstance(module, nn.ModuleList)]
    return max((list(stack) for stack in stacks), key=len, default=[])
