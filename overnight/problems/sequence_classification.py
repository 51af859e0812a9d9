"""Sequence classification: one label for each text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from overnight.errors import Complaint, DataRefused, nearest
from overnight.problems.base import Facts, Prediction, Problem
from overnight.problems.texts import SCORES, cut, encode_texts, label_settings, occurrences

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

AVERAGES = ("macro", "weighted")


class SequenceClassification(Problem):
    """`text` → one of the labels of the training rows, with a score for each."""

    name: ClassVar[str] = "sequence-classification"
    default_metric: ClassVar[str] = "macro_f1"

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        return {"labels": sorted(set(rows["label"]))}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """See `Problem.encode`.

        Raises:
            DataRefused: for a label that the training rows did not have.
        """
        texts = [list(batch[role]) for role in self.text_roles]
        if len(texts) > 1:
            texts = [[cut(tokenizer, text, max_length) for text in side] for side in texts]
        features = encode_texts(tokenizer, *texts, max_length=max_length)
        if "label" in batch:
            codes = {label: code for code, label in enumerate(facts["labels"])}
            for label in batch["label"]:
                if label not in codes:
                    rule = "not a label of the training rows"
                    raise DataRefused(Complaint("label", rule, repr(label), nearest(label, codes)))
            features["labels"] = [codes[label] for label in batch["label"]]
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        from overnight.training.models import load_pretrained

        settings = label_settings(facts["labels"]) | {"problem_type": "single_label_classification"}
        return load_pretrained(AutoModelForSequenceClassification, base, revision, training=training, **settings)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            outputs.logits.float(),
            batch["labels"],
            weight=class_weights,
            label_smoothing=training.label_smoothing,
            reduction="sum",
        )

    def class_weights(self, rows: TokenizedRows, facts: Facts) -> np.ndarray:
        import numpy as np

        counts = np.bincount(rows.column("labels"), minlength=len(facts["labels"]))
        return (len(rows) / (len(counts) * np.maximum(counts, 1))).astype(np.float32)

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[str]:
        return [facts["labels"][code] for code in rows.column("labels")]

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `label`, its `score`, and `scores` (label → probability, summing to 1)."""
        import numpy as np

        from overnight.problems.labels import softmax

        labels, shares = facts["labels"], softmax(np.stack(outputs))
        rows = zip(shares.argmax(axis=-1).tolist(), shares.tolist(), strict=True)
        return [
            {"label": labels[best], "score": row[best], "scores": dict(zip(labels, row, strict=True))}
            for best, row in rows
        ]

    def tally(self, targets: Sequence[str], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        from overnight.problems.labels import label_tally

        return label_tally(targets, [one["label"] for one in predictions], list(self.classes(targets, facts)))

    def classes(self, targets: Sequence[str], facts: Facts) -> dict[str, int]:
        """The labels of the model, in their order, then those that only the rows have."""
        return occurrences(targets, facts["labels"])

    def broken(self, prediction: Prediction) -> str | None:
        said = super().broken(prediction)
        whole = abs(sum(prediction["scores"].values()) - 1) <= 1e-3
        return said or (None if whole else "the scores are no probabilities that sum to 1")

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        more = {f"score_{label}": float for label in facts["labels"]} if scores else {}
        return {"label": str, "score": float} | more

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        more = prediction["scores"].values() if scores else ()
        return [prediction["label"], prediction["score"], *more]

    def metrics(self, targets: Sequence[str], predictions: Sequence[Prediction], facts: Facts) -> dict[str, float]:
        """Accuracy; precision, recall and F1 as macro and weighted averages and of each class (`f1/<label>`).

        A class without rows or predictions scores 0 and counts in the macro average, so that the number of classes
        is the same in every sample.
        """
        from sklearn.metrics import accuracy_score, precision_recall_fscore_support

        labels = facts["labels"]
        guesses = [prediction["label"] for prediction in predictions]
        found = {"accuracy": float(accuracy_score(targets, guesses))}
        for average in AVERAGES:
            values = precision_recall_fscore_support(targets, guesses, labels=labels, average=average, zero_division=0)
            found |= {f"{average}_{score}": float(value) for score, value in zip(SCORES, values, strict=False)}
        values = precision_recall_fscore_support(targets, guesses, labels=labels, average=None, zero_division=0)
        for score, of_class in zip(SCORES, values, strict=False):
            found |= {f"{score}/{label}": float(value) for label, value in zip(labels, of_class, strict=True)}
        return found

    def metric_names(self, facts: Facts) -> list[str]:
        averages = [f"{average}_{score}" for average in AVERAGES for score in SCORES]
        return ["accuracy", *averages, *(f"{score}/{label}" for score in SCORES for label in facts["labels"])]
