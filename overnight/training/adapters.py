"""Training little of a model: low-rank adapters beside its layers, or its head alone.

LoRA (Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models): a layer's weights stay as they are, and two
small matrices whose product is added to them are trained. What is kept of a run has them merged, so that it is a model
like any other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from overnight.errors import Complaint, UserError
from overnight.training.layers import depths, is_new, layer_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from overnight.settings import Training

ADAPTER = "default"


def train_little(model: PreTrainedModel, training: Training) -> int:
    """Leaves the head to be trained, and with `lora` adapters of all matrices in the layers that are not frozen.

    What `layers.is_new` is trained wholly, since nothing can be learnt beside weights drawn by chance.

    Returns:
        How many layers from the bottom are not trained at all.

    Raises:
        UserError: the layers hold no matrices that adapters are made for, or the model has no head of its own.
    """
    place, stack = depths(model), layer_stack(model)
    kept = {name for name, depth in place.items() if depth > len(stack) or is_new(name)}
    if training.method == "lora":
        _inject(model, stack[training.freeze_layers :], training.lora_rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in kept or "lora_" in name)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        rule = "this model has no head of its own: the embeddings are its last matrix too"
        raise UserError(Complaint("training → method", rule, repr(training.method), "lora"))
    return training.freeze_layers if training.method == "lora" else len(stack)


def merged(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """The weights of a model with its adapters added, under the names they have without; None for one that has none."""
    if not any("lora_" in name for name, _ in model.named_parameters()):
        return None
    from peft.tuners.lora import LoraLayer

    weights = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if "lora_" not in name
    }
    adapted: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
    for name, layer in adapted.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight(ADAPTER)
    return weights


def _inject(model: PreTrainedModel, layers: list[nn.Module], rank: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    inside = {module for layer in layers for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)}
    names = [name for name, module in model.named_modules() if module in inside and not is_new(name)]
    if not names:
        raise UserError(Complaint("training → method", "this model has no layers that adapters are made for", "'lora'"))
    transposed = any(isinstance(module, Conv1D) for module in inside)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=transposed)
    inject_adapter_in_model(config, model, ADAPTER)
