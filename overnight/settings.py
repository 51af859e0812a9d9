"""The settings of one fine-tuning run (`training:` in the YAML), as a plain dataclass.

Standard library only: the training engine reads it on machines that have nothing but torch and transformers,
while `overnight.config` gives the same class to pydantic, which enforces the bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Bounds:
    """Limits of a number, enforced by pydantic when a config is read: `above` is exclusive, `low` and `high` not."""

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        schema = handler(source)
        limits = {"ge": self.low, "le": self.high, "gt": self.above}
        return schema | {key: value for key, value in limits.items() if value is not None}


Fraction = Annotated[float, Bounds(low=0, high=1)]
Positive = Annotated[float, Bounds(above=0)]
Count = Annotated[int, Bounds(low=0)]
AtLeastOne = Annotated[int, Bounds(low=1)]


@dataclass(frozen=True)
class Training:
    """How one model is fine-tuned. Every field can be searched over: `search: space: {learning_rate: …}`."""

    __pydantic_config__ = {"extra": "forbid", "use_attribute_docstrings": True, "allow_inf_nan": False}

    epochs: Positive = 3.0
    """Passes over the training rows; a fraction is allowed."""

    batch_size: AtLeastOne = 32
    """Rows per optimizer step; on average, for models that cannot be run without padding."""

    accumulation: AtLeastOne = 1
    """Micro-batches per optimizer step: more of them need less memory and give the same step."""

    learning_rate: Positive = 5e-5
    """Peak learning rate of the top layers and the head."""

    layer_decay: Annotated[float, Bounds(above=0, high=1)] = 1.0
    """Factor on the learning rate for each layer further down; 1 gives all layers the same rate."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Update rule."""

    weight_decay: Annotated[float, Bounds(low=0)] = 0.01
    """Weight decay of matrices (decoupled with AdamW, in the gradient with SGD); biases and norms never."""

    momentum: Fraction = 0.9
    """Momentum of SGD; AdamW ignores it."""

    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after the warm-up."""

    warmup: Fraction = 0.06
    """Share of all steps over which the learning rate rises from zero."""

    max_grad_norm: Annotated[float, Bounds(low=0)] = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""

    dropout: Annotated[float, Bounds(low=0, high=0.9)] | None = None
    """Dropout of hidden states and the head; absent: what the model's own configuration says."""

    attention_dropout: Annotated[float, Bounds(low=0, high=0.9)] | None = 0.0
    """Dropout of attention weights, which keeps the fast kernels from being used; null: the model's own."""

    token_dropout: Annotated[float, Bounds(low=0, high=0.5)] = 0.0
    """Share of the tokens that the trained layers do not see, other ones at each step, which saves a good part of the
    time spent on them; of one text more, of another less. For models whose head reads the first token alone, as BERT's
    classification heads do."""

    label_smoothing: Annotated[float, Bounds(low=0, high=0.5)] = 0.0
    """Share of the target's probability spread over all classes."""

    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights the loss of a class by the inverse of its share of the training rows."""

    method: Literal["full", "lora", "frozen"] = "full"
    """What is trained: all that is not frozen; low-rank adapters beside it, merged at the end; or the head alone."""

    lora_rank: AtLeastOne = 8
    """Width of the adapters of `method: lora`; they count with twice that as their scale (alpha)."""

    freeze_layers: Count = 0
    """Number of layers, counted from the bottom (of an encoder-decoder the encoder's first), that are not trained."""

    freeze_embeddings: bool = False
    """Whether the embeddings are left as they are (always so when layers are frozen)."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""

    devices: AtLeastOne = 1
    """GPUs that train one model together, each with its share of a step's rows; without GPUs, processes."""

    evaluations_per_epoch: AtLeastOne = 2
    """Evaluations on the validation rows in each epoch: the moments at which a trial can be pruned."""

    patience: Count = 0
    """Evaluations without improvement after which the run stops early; 0 never stops early."""

    precision: Literal["auto", "bf16", "float32"] = "auto"
    """Number format of the matrix products; `auto` takes bf16 where the machine has it."""

    compile: Literal["auto", "on", "off"] = "auto"
    """Whether a GPU's many small operations are fused (torch.compile), which makes steps faster and takes half a minute
    first; `auto`: in runs that are long enough to earn it back."""

    checkpoint_minutes: Positive = 5.0
    """Time between two snapshots from which a killed run continues."""

    seed: Count = 17
    """Seed of head initialisation, dropout and the order of rows."""
