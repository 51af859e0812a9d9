"""Where a parameter sits in an encoder, found without knowing the model's family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from overnight.errors import Complaint, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layer_stack(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the encoder from the bottom: the longest `ModuleList` of the base model; [] where there is none."""
    stacks = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    return max((list(stack) for stack in stacks), key=len, default=[])


def embeddings_of(model: PreTrainedModel) -> nn.Module | None:
    """The module that makes the first hidden states from token ids; None where that is the base model itself."""
    names = {module: name for name, module in model.named_modules()}
    holder = names[model.get_input_embeddings()].rpartition(".")[0]
    return None if not holder or holder == names[model.base_model] else model.get_submodule(holder)


def depths(model: PreTrainedModel) -> dict[str, int]:
    """Parameter name → depth: 0 embeddings, 1 … n the encoder's layers from the bottom, n + 1 all that is above.

    The layers are `layer_stack`'s (the encoder's, where a decoder has as many). Embeddings
    are what shares a module with the input embeddings, every `nn.Embedding` outside of the layers (position tables
    that the encoder holds), and projections named after them.
    """
    names = {module: name for name, module in model.named_modules()}
    place: dict[str, int] = {}
    stack = layer_stack(model)
    count = len(stack)
    for depth, layer in enumerate(stack, start=1):
        place |= {f"{names[layer]}.{name}": depth for name, _ in layer.named_parameters()}
    embeddings = embeddings_of(model)
    holder = "" if embeddings is None else names[embeddings]
    tables = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    for name, _ in model.named_parameters():
        if name not in place:
            lowest = name in tables or (holder and name.startswith(f"{holder}.")) or "embeddings" in name
            place[name] = 0 if lowest else count + 1
    return place


def freeze(model: PreTrainedModel, layers: int, embeddings: bool) -> None:
    """Excludes the lowest `layers` (and with them the embeddings), or the embeddings alone, from training.

    Raises:
        UserError: when the model has fewer layers.
    """
    place = depths(model)
    count = max(place.values()) - 1
    if layers > count:
        raise UserError(Complaint("training → freeze_layers", f"the model has {count} layers", str(layers)))
    lowest = layers if layers else 0 if embeddings else -1
    for name, parameter in model.named_parameters():
        if place[name] <= lowest:
            parameter.requires_grad_(False)
