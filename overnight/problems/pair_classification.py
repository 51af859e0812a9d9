"""Pair classification: one label for two texts that are read together, as in paraphrase, entailment, next sentence."""

from __future__ import annotations

from typing import ClassVar

from overnight.problems.sequence_classification import SequenceClassification


class PairClassification(SequenceClassification):
    """`text` and `second` → one of the labels of the training rows, with a score for each."""

    name: ClassVar[str] = "pair-classification"
    required_roles: ClassVar[tuple[str, ...]] = ("text", "second", "label")
    text_roles: ClassVar[tuple[str, ...]] = ("text", "second")
