"""What a problem has to say, so that data, training, evaluation and serving need no case distinctions.

A problem is stateless. What it learns from the data (the labels) are its *facts*: a JSON-able dict made once from the
training rows, handed to every method, and kept beside the weights in the model folder.

A row's cells are text everywhere; what is more than a text (spans, a list of labels) is JSON in a cell. One row may
become several features (windows of a long text): each then carries `row`, the number of its row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from overnight.errors import Complaint, UserError, nearest

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

Cell = str | None
Facts = dict[str, Any]
Prediction = dict[str, Any]


class Problem(ABC):
    """One kind of NLP problem. Modules of problems import numpy, torch and transformers inside functions."""

    name: ClassVar[str]
    required_roles: ClassVar[tuple[str, ...]] = ("text", "label")
    optional_roles: ClassVar[tuple[str, ...]] = ()
    sources: ClassVar[tuple[tuple[str, ...], ...]] = ()
    """Other sets of columns that a source may have instead, which `prepare` turns into the required ones."""
    text_roles: ClassVar[tuple[str, ...]] = ("text",)
    split_roles: ClassVar[tuple[str, ...]] = ()
    """Columns by which rows are put on a side; none: the texts. Rows that share these stay together."""
    target: ClassVar[str] = "label"
    labelled: ClassVar[bool] = True
    """Whether the target is one label of a set: sampling, validation and split then keep an eye on each of them, and
    predictions have `label`, `score` and `scores`."""
    points_into_text: ClassVar[bool] = False
    """Whether predictions name places in the text, which a service then must leave as its client sent it."""
    generates: ClassVar[Literal["", "answering", "always"]] = ""
    """When `generate` writes, token by token: never, for answers alone, or also when a trial is evaluated. Facts then
    hold `generation`, the settings of the config."""
    by_token: ClassVar[bool] = False
    """Whether `loss` is a sum over the tokens that have a label, whatever row they are in: where it saves work, it is
    given these alone as one row, and outputs alike."""
    beside: ClassVar[frozenset[str]] = frozenset({"labels"})
    """What `collate` adds for the problem alone, and no model is given."""
    draws_inputs: ClassVar[bool] = False
    """Whether chance has its part in what the model is shown of a row, so that nothing computed of it can be kept."""
    tunes: ClassVar[bool] = False
    """Whether `tuned` does anything."""
    default_metric: ClassVar[str]
    without_interval: ClassVar[frozenset[str]] = frozenset()
    """Metrics that are no functions of sums over rows: they are told, and nothing is decided by them."""
    lower_is_better: ClassVar[frozenset[str]] = frozenset()

    # -- rows ---------------------------------------------------------------------------------------------------------

    def roles(self) -> tuple[str, ...]:
        """All roles that a column may have, the required ones first."""
        others = (role for roles in (*self.sources, self.optional_roles) for role in roles)
        return tuple(dict.fromkeys((*self.required_roles, *others)))

    def prepare(self, columns: dict[str, list[Cell]], clean: Callable[[str], Cell]) -> list[str | None]:
        """Turns a source's cells (role → cells) into the problem's own form, in place, before anything else is done.

        It is called for some rows at a time, so nothing of a row may depend on the others.

        Args:
            clean: what a text becomes, so that places in it can be moved along.

        Returns:
            what is wrong with each row, as one_word; None where nothing is; [] for no row at all.
        """
        return []

    @abstractmethod
    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        """What has to be known of the training rows (role → cells) before a model can be built; JSON-able.

        Cells can be gone through once.
        """

    def truth(self, cell: str) -> Any:
        """A target's cell as `metrics` and `tally` compare it."""
        return cell

    # -- training -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """Features of a batch of rows (role → cells), not padded.

        Always `input_ids` (lists of int), with `labels` where the target is in the batch, and `row` (counted from 0
        within the batch, in order) where rows have several.
        """

    @abstractmethod
    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        """The base model with this problem's head, in float32, on the CPU.

        Raises:
            UserError: when there is no such model, or it cannot be used for this problem.
        """

    def collate(
        self, features: Sequence[Mapping[str, Any]], pad_token_id: int, training: bool = False
    ) -> dict[str, Tensor]:
        """One padded batch: `input_ids`, `attention_mask` (rows × longest), what else the model takes, and `beside`.

        `training`: the model is to learn from it, so chance may have its part.
        """
        from overnight.training.data import pad

        kept = ("input_ids", "token_type_ids", "labels")
        return pad([{name: one[name] for name in kept if name in one} for one in features], pad_token_id)

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

    def prior(self, rows: TokenizedRows, facts: Facts) -> np.ndarray | None:
        """(outputs,) The bias with which a new head says what is common, before it has learned to read; None: zero.

        For problems most of whose answers are "no": a head that begins at zero spends the first steps on unlearning
        the rest, in all layers at once (Lin et al. 2017, Focal Loss for Dense Object Detection, section 4.1).
        """
        return None

    # -- predictions --------------------------------------------------------------------------------------------------

    def outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[np.ndarray]:
        """What `decode` needs of a model's outputs: an array (float32) for each feature of the batch."""
        return list(outputs.logits.float().cpu().numpy())

    def generate(self, model: PreTrainedModel, batch: Mapping[str, Tensor], facts: Facts) -> Sequence[np.ndarray]:
        """What `decode` needs of each feature, instead of `outputs`, where the problem `generates`."""
        raise NotImplementedError(self.name)

    @abstractmethod
    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """Predictions as a caller gets them (JSON-able), one for each row.

        Args:
            outputs: of each feature, as `outputs` or `generate` gives them.
            tokenizer: the model's, where the problem `generates`.
            features: those that `encode` made, or the tokenized rows; for problems that need more than the outputs.
        """

    def tuned(
        self, outputs: Sequence[np.ndarray], targets: Sequence[Any], facts: Facts, features: Any, metric: str
    ) -> Facts:
        """The facts with what is best set by the validation rows of a trained model, for `metric`, if `tunes`."""
        return facts

    @abstractmethod
    def targets(self, rows: TokenizedRows, facts: Facts) -> list[Any]:
        """What `metrics` compares predictions with, from the tokenized rows; equal to `truth` of each row's cell."""

    @abstractmethod
    def tally(self, targets: Sequence[Any], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """The sums over rows that the metrics are made of, but for those `without_interval`; NaN where undefined."""

    def metrics(self, targets: Sequence[Any], predictions: Sequence[Prediction], facts: Facts) -> dict[str, float]:
        """All metrics of the problem; greater is better except for those in `lower_is_better`.

        One that is undefined is 0, or left out where less is better: 0 would be the best that there is.
        """
        values = self.tally(targets, predictions, facts).values()
        return {
            name: value if math.isfinite(value) else 0.0
            for name, value in values.items()
            if math.isfinite(value) or name not in self.lower_is_better
        }

    @abstractmethod
    def metric_names(self, facts: Facts) -> list[str]:
        """Names of what `metrics` returns for these facts, where all are defined."""

    def classes(self, targets: Sequence[Any], facts: Facts) -> dict[str, int]:
        """What has an F1 of its own (`f1/<class>`) → how often the targets have it, also what the facts do not know."""
        return {}

    def right(self, target: Any, prediction: Prediction, facts: Facts) -> bool:
        """Whether a prediction is wholly right."""
        return bool(prediction[self.target] == target)

    def same(self, one: Prediction, other: Prediction) -> bool:
        """Whether two predictions say the same, however sure they are."""
        return bool(one[self.target] == other[self.target])

    def broken(self, prediction: Prediction) -> str | None:
        """Why a prediction is none: its numbers are not finite."""
        return None if all(map(math.isfinite, _numbers(prediction))) else "the scores are no finite numbers"

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        """The label and the number by which the monitor sees answers drift."""
        return str(prediction["label"]), float(prediction["score"])

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        """Name → kind (str or float) of the columns that bulk scoring adds; `scores`: with those of every label."""
        return {"label": str, "score": float}

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        """The values of these columns."""
        return [prediction[name] for name in ("label", "score")]

    # -- the same for all ---------------------------------------------------------------------------------------------

    def check_metric(self, metric: str, facts: Facts) -> str:
        """The metric, when the problem has it.

        Raises:
            UserError: when it has no such metric.
        """
        names = [name for name in self.metric_names(facts) if name not in self.without_interval]
        if metric not in names:
            where = "evaluation → metric"
            raise UserError(Complaint(where, f"not a metric of {self.name}", repr(metric), nearest(metric, names)))
        return metric

    def better(self, metric: str, value: float, than: float | None) -> bool:
        """Whether `value` of the metric is an improvement over `than` (None: over nothing)."""
        if than is None:
            return True
        return value < than if metric in self.lower_is_better else value > than


def _numbers(value: Any) -> list[float]:
    if isinstance(value, Mapping):
        return [number for one in value.values() for number in _numbers(one)]
    if isinstance(value, list | tuple):
        return [number for one in value for number in _numbers(one)]
    return [value] if isinstance(value, float) else []
