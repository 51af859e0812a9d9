"""The problems that can be retrained. A new one is a file in this folder and a line in `PROBLEMS`.

Importing this package, or any problem's module, imports neither torch nor transformers: the command line asks
`roles()` before anything heavy is needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from overnight.errors import Complaint, UserError, nearest

if TYPE_CHECKING:
    from overnight.problems.base import Problem

PROBLEMS: dict[str, str] = {
    "sequence-classification": "overnight.problems.sequence_classification:SequenceClassification",
    "pair-classification": "overnight.problems.pair_classification:PairClassification",
    "multi-label-classification": "overnight.problems.multi_label_classification:MultiLabelClassification",
    "regression": "overnight.problems.regression:Regression",
    "masked-lm": "overnight.problems.masked_lm:MaskedLM",
    "masked-lm-next-sentence": "overnight.problems.masked_lm_next_sentence:MaskedLMNextSentence",
    "question-answering": "overnight.problems.question_answering:QuestionAnswering",
    "text-generation": "overnight.problems.text_generation:TextGeneration",
    "summarization": "overnight.problems.sequence_to_sequence:Summarization",
    "translation": "overnight.problems.sequence_to_sequence:Translation",
    "token-classification": "overnight.problems.token_classification:TokenClassification",
}


def get(name: str) -> Problem:
    """The problem of that name.

    Raises:
        UserError: when there is none.
    """
    if name not in PROBLEMS:
        raise UserError(Complaint("problem", "not a known problem", repr(name), nearest(name, PROBLEMS)))
    module, _, attribute = PROBLEMS[name].partition(":")
    return getattr(import_module(module), attribute)()


def roles() -> dict[str, tuple[str, ...]]:
    """Problem names → the roles of their columns, required ones first."""
    return {name: get(name).roles() for name in PROBLEMS}
