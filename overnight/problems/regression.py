"""Regression: a number for each text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from overnight.problems.base import Cell, Facts, Prediction, Problem
from overnight.problems.texts import encode_texts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

METRICS = ("pearson", "spearman", "r2", "rmse", "mae")


class Regression(Problem):
    """`text` → a number. The model learns it in standard deviations from the mean of the training rows."""

    name: ClassVar[str] = "regression"
    required_roles: ClassVar[tuple[str, ...]] = ("text", "value")
    target: ClassVar[str] = "value"
    labelled: ClassVar[bool] = False
    default_metric: ClassVar[str] = "pearson"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"rmse", "mae"})

    def prepare(self, columns: dict[str, list[Cell]], clean: Callable[[str], Cell]) -> list[str | None]:
        """A value must be a finite number; it is kept as Python writes it, so that 4 and 4.0 are one."""
        reasons: list[str | None] = []
        for place, cell in enumerate(columns["value"]):
            number = None if cell is None else _number(cell)
            reasons.append("not_a_number" if cell is not None and number is None else None)
            columns["value"][place] = None if number is None else repr(number)
        return reasons

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        from statistics import fmean, pstdev

        values = [float(cell) for cell in rows["value"]]
        return {"mean": fmean(values), "std": pstdev(values) or 1.0}

    def truth(self, cell: str) -> float:
        return float(cell)

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        features = encode_texts(tokenizer, batch["text"], max_length=max_length)
        if "value" in batch:
            features["labels"] = [(float(cell) - facts["mean"]) / facts["std"] for cell in batch["value"]]
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        from overnight.training.models import load_pretrained

        settings: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
        return load_pretrained(AutoModelForSequenceClassification, base, revision, training=training, **settings)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        from torch.nn.functional import mse_loss

        return mse_loss(outputs.logits.float().squeeze(-1), batch["labels"].float(), reduction="sum")

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `value`."""
        return [{"value": float(one[0]) * facts["std"] + facts["mean"]} for one in outputs]

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[float]:
        return [float(value) * facts["std"] + facts["mean"] for value in rows.column("labels")]

    def tally(self, targets: Sequence[float], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """Pearson's and Spearman's correlation, share of the variance explained, errors in the unit of the values.

        Spearman's is Pearson's of the ranks that the values have among all rows; a resample keeps these ranks.
        """
        import numpy as np

        from overnight.tally import Tally

        truth = np.asarray(targets, dtype=np.float64)
        guess = np.array([one["value"] for one in predictions], dtype=np.float64)
        error = guess - truth
        # shifted, which changes no metric, so that large values with a small spread keep their digits
        pairs = ((truth - truth.mean(), guess - guess.mean()), (_ranks(truth), _ranks(guess)))
        adds = [np.ones(len(truth)), np.abs(error), error**2]
        for one, other in pairs:
            adds += [one, other, one**2, other**2, one * other]
        return Tally(np.arange(len(truth)), np.stack(adds, axis=1), _metrics)

    def metric_names(self, facts: Facts) -> list[str]:
        return list(METRICS)

    def right(self, target: float, prediction: Prediction, facts: Facts) -> bool:
        """Whether it is within half a standard deviation of the training values."""
        return bool(abs(prediction["value"] - target) <= facts["std"] / 2)

    def same(self, one: Prediction, other: Prediction) -> bool:
        return math.isclose(one["value"], other["value"], rel_tol=1e-3, abs_tol=1e-6)

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        return "number", float(prediction["value"])

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        return {"value": float}

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        return [prediction["value"]]


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from -0.5 to 0.5, equal values sharing the mean of theirs."""
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - (counts - 1) / 2)[place] - 1) / max(1, len(values) - 1) - 0.5


def _spread(rows: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Sum of squared differences from the mean; NaN where it is no more than what rounding leaves of equal values."""
    import numpy as np

    found = squares - total**2 / rows
    return np.where(found > rows * np.finfo(float).eps * squares, found, np.nan)


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(resamples, 13 sums) → the metrics, NaN where values do not differ."""
    import numpy as np

    rows, absolute, squared = sums[:, 0], sums[:, 1], sums[:, 2]
    found: dict[str, np.ndarray] = {}
    spread = np.zeros_like(rows)
    with np.errstate(invalid="ignore"):
        for name, start in (("spearman", 8), ("pearson", 3)):
            one, other, one2, other2, product = sums[:, start : start + 5].T
            spread, theirs = _spread(rows, one, one2), _spread(rows, other, other2)
            found[name] = (product - one * other / rows) / np.sqrt(spread * theirs)
        found["r2"] = 1 - squared / spread
        found |= {"rmse": np.sqrt(squared / rows), "mae": absolute / rows}
    return {name: found[name] for name in METRICS}
