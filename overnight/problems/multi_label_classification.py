"""Multi-label classification: any number of labels for each text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from overnight.errors import Complaint, DataRefused, nearest
from overnight.problems.base import Cell, Facts, Prediction, Problem
from overnight.problems.texts import SCORES, encode_texts, label_settings, occurrences

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

AVERAGES = ("micro", "macro")
ENOUGH = 20
"""Validation rows with a label from which it gets a threshold of its own."""
SEPARATOR = re.compile(r"[;|]")


class MultiLabelClassification(Problem):
    """`text` → those of the labels of the training rows that it has, and a score for each label.

    A cell of `labels` is a JSON list, or labels with `;` or `|` between them; `[]` is a text without any.
    """

    name: ClassVar[str] = "multi-label-classification"
    required_roles: ClassVar[tuple[str, ...]] = ("text", "labels")
    target: ClassVar[str] = "labels"
    labelled: ClassVar[bool] = False
    tunes: ClassVar[bool] = True
    default_metric: ClassVar[str] = "micro_f1"
    without_interval: ClassVar[frozenset[str]] = frozenset({"average_precision"})

    def prepare(self, columns: dict[str, list[Cell]], clean: Callable[[str], Cell]) -> list[str | None]:
        """Labels as a sorted JSON list, each of them once."""
        reasons: list[str | None] = []
        for place, cell in enumerate(columns["labels"]):
            found = None if cell is None else _labels(cell, clean)
            reasons.append("unreadable_labels" if cell is not None and found is None else None)
            columns["labels"][place] = None if found is None else json.dumps(found, ensure_ascii=False)
        return reasons

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        """The labels, and the probability from which each is said."""
        labels = sorted({label for cell in rows["labels"] for label in self.truth(cell)})
        if not labels:
            raise DataRefused(Complaint("labels", "no row to train on has a label"))
        return {"labels": labels, "thresholds": [0.5] * len(labels)}

    def truth(self, cell: str) -> list[str]:
        return list(json.loads(cell))

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """See `Problem.encode`; `labels` are zeros and ones, one for each label.

        Raises:
            DataRefused: for a label that the training rows did not have.
        """
        features = encode_texts(tokenizer, batch["text"], max_length=max_length)
        if "labels" in batch:
            known = facts["labels"]
            rows = [self.truth(cell) for cell in batch["labels"]]
            for label in (label for row in rows for label in row if label not in known):
                rule = "not a label of the training rows"
                raise DataRefused(Complaint("labels", rule, repr(label), nearest(label, known)))
            features["labels"] = [[int(label in row) for label in known] for row in map(set, rows)]
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        from overnight.training.models import load_pretrained

        settings = label_settings(facts["labels"]) | {"problem_type": "multi_label_classification"}
        return load_pretrained(AutoModelForSequenceClassification, base, revision, training=training, **settings)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """Binary cross-entropy, averaged over the labels of a row."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        smooth = training.label_smoothing
        wanted = batch["labels"].float() * (1 - smooth) + smooth / 2
        logits = outputs.logits.float()
        return binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / logits.shape[-1]

    def prior(self, rows: TokenizedRows, facts: Facts) -> np.ndarray:
        """See `Problem.prior`; each label's log-odds."""
        import numpy as np

        having = rows.values("labels").reshape(len(rows), -1).sum(axis=0)
        return np.log((having + 1) / (len(rows) - having + 1)).astype(np.float32)

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `labels` (those whose probability reaches their threshold) and `scores` (of all labels)."""
        labels, thresholds = facts["labels"], facts["thresholds"]
        shares = _probabilities(outputs)
        return [
            {
                "labels": [label for label, x, limit in zip(labels, row, thresholds, strict=True) if x >= limit],
                "scores": dict(zip(labels, row, strict=True)),
            }
            for row in shares.tolist()
        ]

    def tuned(
        self, outputs: Sequence[np.ndarray], targets: Sequence[list[str]], facts: Facts, features: Any, metric: str
    ) -> Facts:
        """Thresholds with the best F1 on the validation rows: one for all labels together, or one of its own for each
        label that enough of the rows have, whichever is better by the metric (Yang 2001, A Study on Thresholding
        Strategies for Text Categorization: SCut, which overfits rare labels). What is best for each label is not best
        for all together: rare labels are said too often then."""
        labels = facts["labels"]
        truth = _marks(targets, labels)
        shares = _probabilities(outputs)
        together = best_threshold(shares.reshape(-1), truth.reshape(-1))
        own = [
            best_threshold(shares[:, i], truth[:, i]) if truth[:, i].sum() >= ENOUGH else together
            for i in range(len(labels))
        ]
        options = [facts | {"thresholds": thresholds} for thresholds in ([together] * len(labels), own)]

        def value(those: Facts) -> float:
            return self.metrics(targets, self.decode(outputs, those), those).get(metric, 0.0)

        return max(options, key=value)

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[list[str]]:
        labels = facts["labels"]
        return [[label for label, has in zip(labels, rows[i]["labels"], strict=True) if has] for i in range(len(rows))]

    def tally(self, targets: Sequence[list[str]], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """Precision, recall and F1 over all labels (micro), averaged over labels (macro), and of each; the share of
        rows whose labels are exactly right (`accuracy`)."""
        import numpy as np

        from overnight.tally import Tally

        labels = list(self.classes(targets, facts))
        truth = _marks(targets, labels)
        guess = _marks([one["labels"] for one in predictions], labels)
        exact = [set(row) == set(one["labels"]) for row, one in zip(targets, predictions, strict=True)]
        adds = np.concatenate(
            [truth, guess, truth * guess, np.array(exact, float)[:, None], np.ones((len(truth), 1))], 1
        )
        cells, group = np.unique(adds, axis=0, return_inverse=True)
        return Tally(group.reshape(-1), cells, lambda sums: _metrics(sums, labels))

    def metrics(
        self, targets: Sequence[list[str]], predictions: Sequence[Prediction], facts: Facts
    ) -> dict[str, float]:
        """Those of `tally`, and the mean over labels of the area under precision and recall (`average_precision`)."""
        import numpy as np
        from sklearn.metrics import average_precision_score

        labels = [label for label, count in self.classes(targets, facts).items() if count]
        truth = _marks(targets, labels)
        shares = np.nan_to_num([[one["scores"].get(label, 0.0) for label in labels] for one in predictions])
        areas = [average_precision_score(truth[:, place], shares[:, place]) for place in range(len(labels))]
        mean = float(sum(areas) / len(areas)) if areas else 0.0
        return super().metrics(targets, predictions, facts) | {"average_precision": mean}

    def metric_names(self, facts: Facts) -> list[str]:
        averages = [f"{average}_{score}" for average in AVERAGES for score in SCORES]
        each = [f"{score}/{label}" for score in SCORES for label in facts["labels"]]
        return ["accuracy", *averages, "average_precision", *each]

    def classes(self, targets: Sequence[list[str]], facts: Facts) -> dict[str, int]:
        return occurrences((label for row in targets for label in row), facts["labels"])

    def right(self, target: list[str], prediction: Prediction, facts: Facts) -> bool:
        return set(prediction["labels"]) == set(target)

    def same(self, one: Prediction, other: Prediction) -> bool:
        return set(one["labels"]) == set(other["labels"])

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        """The labels, and the probability of the least sure yes or no."""
        sure = min((max(score, 1 - score) for score in prediction["scores"].values()), default=1.0)
        return ", ".join(prediction["labels"]) or "none", sure

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        return {"labels": str} | ({f"score_{label}": float for label in facts["labels"]} if scores else {})

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        more = prediction["scores"].values() if scores else ()
        return [json.dumps(prediction["labels"], ensure_ascii=False), *more]


def _probabilities(outputs: Sequence[np.ndarray]) -> np.ndarray:
    import numpy as np

    found: np.ndarray = 1 / (1 + np.exp(-np.stack(outputs).astype(np.float64)))
    return found


def best_threshold(scores: np.ndarray, truth: np.ndarray) -> float:
    """Half-way between the two neighbouring scores that part with the best F1; 0.5 when nothing is true."""
    import numpy as np

    if not truth.any():
        return 0.5
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(truth[order])
    f1 = 2 * hits / (np.arange(1, len(order) + 1) + truth.sum())
    f1[:-1][ordered[:-1] == ordered[1:]] = -1  # equal scores cannot be parted
    best = int(f1.argmax())
    below = ordered[best + 1] if best + 1 < len(ordered) else 0.0
    between = (ordered[best] + below) / 2
    return float(between if between > below else ordered[best])  # there is no number between two neighbours


def _labels(cell: str, clean: Callable[[str], Cell]) -> list[str] | None:
    """The labels of a cell; None when it does not read like some."""
    found: Any = SEPARATOR.split(cell)
    if cell.lstrip().startswith("["):
        try:
            found = json.loads(cell)
        except (ValueError, RecursionError):
            return None
    if not isinstance(found, list) or any(isinstance(label, bool | list | dict | None) for label in found):
        return None
    return sorted({label for one in found if (label := clean(str(one)))})


def _marks(rows: Sequence[Sequence[str]], labels: Sequence[str]) -> np.ndarray:
    """(rows × labels) 1.0 where a row has a label; labels that are not asked for are left out."""
    import numpy as np

    place = {label: i for i, label in enumerate(labels)}
    found = np.zeros((len(rows), len(labels)))
    for i, row in enumerate(rows):
        for label in row:
            if label in place:
                found[i, place[label]] = 1
    return found


def _metrics(sums: np.ndarray, labels: Sequence[str]) -> dict[str, np.ndarray]:
    """(resamples, actual | predicted | hits | exact | rows) → the metrics.

    A label that no row has, has no metrics (NaN) and is left out of the macro mean; one that is never predicted has
    precision 0. Where every label has rows this is scikit-learn's result with zero_division=0.
    """
    from overnight.problems.labels import scores_of_counts, scores_of_each

    k = len(labels)
    counts = sums[:, :k], sums[:, k : 2 * k], sums[:, 2 * k : 3 * k]
    whole = scores_of_counts(*(part.sum(axis=1) for part in counts))
    micro = {f"micro_{name}": values for name, values in zip(SCORES, whole, strict=True)}
    means, each = scores_of_each(*counts, labels)
    return {"accuracy": sums[:, 3 * k] / sums[:, 3 * k + 1], **micro, **means, **each}
