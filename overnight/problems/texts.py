"""What several problems do alike with texts, tokens and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from overnight.errors import Complaint, UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from overnight.problems.base import Cell, Facts

SCORES = ("precision", "recall", "f1")
IGNORED = -100
"""The label of a token that the loss leaves out."""
NEXT, OTHER = "next", "other"
"""The labels of a pair of sentences: the second follows the first, or is from elsewhere."""
MANY = 100
"""Texts from which a batch is encoded the fast way."""
LONG = 8
"""Characters a token from which a text is looked at before it is paired."""


def encode_texts(tokenizer: PreTrainedTokenizerBase, *texts: Sequence[str], max_length: int) -> dict[str, list[Any]]:
    """Features of texts, or of pairs of texts, cut at `max_length` tokens; without types that are 0 for any text."""
    sides = [list(side) for side in texts]
    options: dict[str, Any] = {"truncation": True, "max_length": max_length, "padding": False}
    options["return_attention_mask"] = False
    many = len(sides[0]) >= MANY and getattr(tokenizer, "is_fast", False)
    first = dict(tokenizer(*(side[:1] if many else side for side in sides), **options))
    if len(sides) == 1 and not any(map(any, first.get("token_type_ids", ())[:1])):
        first.pop("token_type_ids", None)
    if many:
        # what the call above set up, asked directly: a third faster than all that is made around it
        found = tokenizer.backend_tokenizer.encode_batch_fast(
            sides[0] if len(sides) == 1 else list(zip(*sides, strict=True))
        )
        features = {"input_ids": [one.ids for one in found], "token_type_ids": [one.type_ids for one in found]}
        features = {name: features[name] for name in first if name in features}
        if {name: values[:1] for name, values in features.items()} == first:
            return features
        encoded = tokenizer(*sides, **options)
        return {name: encoded[name] for name in first}
    return first


def cut(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> str:
    """A very long text without what no input has room for.

    A fast tokenizer makes every combination of what it cuts off two texts: of two long ones, gigabytes.
    """
    if len(text) <= LONG * max_length or not tokenizer.is_fast:
        return text
    encoded = tokenizer(
        text, add_special_tokens=False, truncation=True, max_length=max_length, return_offsets_mapping=True
    )
    return text[: encoded["offset_mapping"][-1][1]] if encoded["offset_mapping"] else text


def label_settings(labels: Sequence[str]) -> dict[str, Any]:
    """The part of a model's configuration that names its labels."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: code for code, label in enumerate(labels)},
    }


def occurrences(found: Iterable[str], known: Sequence[str]) -> dict[str, int]:
    """How often each occurs: the known ones in their order, then those that are found only."""
    counts = Counter(found)
    return {label: counts[label] for label in (*known, *sorted(set(counts) - set(known)))}


def check_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError when the tokenizer cannot say where in the text a token stands."""
    if not getattr(tokenizer, "is_fast", False):
        rule = "its tokenizer does not know where a token stands in the text (it is not a fast one)"
        raise UserError(Complaint("model → base", rule))


def in_cleaned(text: str, start: int, end: int, clean: Callable[[str], Cell]) -> tuple[int, str | None]:
    """Where a part of a text stands once all of it is cleaned, and the part then; None: nothing is left of it."""
    part = text[start:end]
    start += len(part) - len(part.lstrip())
    # what is before it is cleaned too: a letter behind that keeps the space in between
    return len(clean(text[:start] + "x") or "x") - 1, clean(part)


def code_points(text: str) -> np.ndarray:
    """A text as tokenized rows can keep it; `text_of` reads it."""
    import numpy as np

    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.int32)


def text_of(points: Any) -> str:
    """The text of code points."""
    import numpy as np

    return bytes(np.asarray(points, dtype="<i4")).decode("utf-32-le", "surrogatepass")


def without_padding(logits: Tensor, batch: Mapping[str, Tensor]) -> list[np.ndarray]:
    """(rows × longest × …) → an array (tokens × …, float32) for each row."""
    values, lengths = logits.float().cpu().numpy(), batch["attention_mask"].sum(1).tolist()
    return [row[:length].copy() for row, length in zip(values, lengths, strict=True)]


def labelled_tokens(batch: Mapping[str, Tensor]) -> int:
    """Tokens of a batch that the loss counts."""
    return int((batch["labels"] != IGNORED).sum())


def generation_settings(facts: Facts) -> dict[str, Any]:
    """What transformers' `generate` takes of the section `model.generation`."""
    return {name: value for name, value in facts["generation"].items() if name != "prefix"}
