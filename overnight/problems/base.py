"""What a problem has to say, so that data, training, evaluation and serving need no case distinctions.

A problem is stateless. What it learns from the data (the labels) are its *facts*: a JSON-able dict made once from the
training rows, handed to every method, and kept beside the weights in the model folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from overnight.errors import Complaint, UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.training.data import TokenizedRows

Facts = dict[str, Any]
Prediction = dict[str, Any]


class Problem(ABC):
    """One kind of NLP problem. Modules of problems import torch and transformers inside functions."""

    name: ClassVar[str]
    required_roles: ClassVar[tuple[str, ...]] = ("text", "label")
    optional_roles: ClassVar[tuple[str, ...]] = ()
    text_roles: ClassVar[tuple[str, ...]] = ("text",)
    target: ClassVar[str] = "label"
    default_metric: ClassVar[str]
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def facts(self, rows: Mapping[str, Sequence[Any]]) -> Facts:
        """What has to be known of the training rows (role → values) before a model can be built; JSON-able."""

    @abstractmethod
    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """Features of a batch of rows (role → values), one entry a row, not padded.

        Always `input_ids` (lists of int), with `labels` where the target is in the batch.
        """

    @abstractmethod
    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        """The base model with this problem's head, in float32, on the CPU.

        Raises:
            UserError: when there is no such model, or it cannot be used for this problem.
        """

    @abstractmethod
    def collate(self, features: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
        """One padded batch: `input_ids`, `attention_mask` (rows × longest) and the rest of the features."""

    def counted(self, batch: Mapping[str, Tensor]) -> int:
        """How many terms `loss` sums up in this batch: its rows, unless a problem counts tokens."""
        return len(batch["input_ids"])

    @abstractmethod
    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """The loss *summed* over the batch: the engine divides by `counted` of the whole step, micro-batches and all.

        `class_weights` is the tensor of `class_weights()` on the batch's device, or None.
        """

    def class_weights(self, rows: TokenizedRows, facts: Facts) -> np.ndarray | None:
        """Weight of each class, inverse to its share of the rows, 1 on average over the rows; None without classes."""
        return None

    @abstractmethod
    def targets(self, rows: TokenizedRows, facts: Facts) -> list[Any]:
        """What `metrics` compares predictions with, from the tokenized rows, in their order."""

    @abstractmethod
    def decode(self, logits: np.ndarray, facts: Facts) -> list[Prediction]:
        """Predictions as a caller gets them (JSON-able), one for each row of logits."""

    @abstractmethod
    def metrics(self, targets: Sequence[Any], predictions: Sequence[Prediction], facts: Facts) -> dict[str, float]:
        """All metrics of the problem; greater is better except for those in `lower_is_better`."""

    @abstractmethod
    def metric_names(self, facts: Facts) -> list[str]:
        """Names of what `metrics` returns for these facts."""

    def check_metric(self, metric: str, facts: Facts) -> str:
        """The metric, when the problem has it.

        Raises:
            UserError: when it has no such metric.
        """
        names = self.metric_names(facts)
        if metric not in names:
            where = "evaluation → metric"
            raise UserError(Complaint(where, f"not a metric of {self.name}", repr(metric), nearest(metric, names)))
        return metric

    def better(self, metric: str, value: float, than: float | None) -> bool:
        """Whether `value` of the metric is an improvement over `than` (None: over nothing)."""
        if than is None:
            return True
        return value < than if metric in self.lower_is_better else value > than
