"""Masked language modelling: a model reads texts of a domain, and becomes a base for other problems."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from overnight.errors import Complaint, UserError
from overnight.problems.base import Facts, Prediction, Problem
from overnight.problems.texts import IGNORED, labelled_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

SHARE = 0.15
"""Of a text's words, those that are hidden (Devlin et al. 2019, BERT)."""
MASKED, RANDOM = 0.8, 0.1
"""Of the hidden words, those shown as the mask, and as other words; the rest is shown as it is."""
METRICS = ("masked_accuracy", "perplexity")


class MaskedLM(Problem):
    """`text` → its hidden words. Whole words are hidden, anew each time a text is seen; in an evaluation always the
    same ones of a text. A long text is read in windows of `model.max_length`."""

    name: ClassVar[str] = "masked-lm"
    required_roles: ClassVar[tuple[str, ...]] = ("text",)
    target: ClassVar[str] = "text"
    labelled: ClassVar[bool] = False
    draws_inputs: ClassVar[bool] = True
    by_token: ClassVar[bool] = True
    default_metric: ClassVar[str] = "masked_accuracy"
    lower_is_better: ClassVar[frozenset[str]] = frozenset({"perplexity"})

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        return {}

    def truth(self, cell: str) -> None:
        """A text is its own truth: what was hidden in it is counted with the prediction."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """See `Problem.encode`; `words` numbers the word of each token, -1 for special ones; `mask` and `vocabulary`
        are those of the tokenizer.

        Raises:
            UserError: the tokenizer has no mask, or does not know words.
        """
        check_tokenizer(tokenizer)
        encoded = tokenizer(
            list(batch["text"]),
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        count = len(encoded["input_ids"])
        words = [[-1 if word is None else word for word in encoded.word_ids(number)] for number in range(count)]
        return {
            "input_ids": list(encoded["input_ids"]),
            "row": list(encoded["overflow_to_sample_mapping"]),
            "words": words,
            "mask": [tokenizer.mask_token_id] * count,
            "vocabulary": [len(tokenizer)] * count,
        }

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForMaskedLM

        from overnight.training.models import load_pretrained

        return load_pretrained(AutoModelForMaskedLM, base, revision, training=training)

    def collate(
        self, features: Sequence[Mapping[str, Any]], pad_token_id: int, training: bool = False
    ) -> dict[str, Tensor]:
        """Hides words by torch's random numbers while training, else by numbers that depend on the text alone."""
        from overnight.training.data import pad

        return pad([hide(feature, training) for feature in features], pad_token_id)

    def counted(self, batch: Mapping[str, Tensor]) -> int:
        return labelled_tokens(batch)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """Cross-entropy of the hidden tokens."""
        from torch.nn.functional import cross_entropy

        hidden = batch["labels"] != IGNORED
        logits, wanted = outputs.logits[hidden].float(), batch["labels"][hidden]
        return cross_entropy(logits, wanted, label_smoothing=training.label_smoothing, reduction="sum")

    def outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Of each feature: summed cross-entropy, hidden tokens, those that were found."""
        return list(found(outputs.logits, batch["labels"]))

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `loss` (nats a hidden token), `hidden` tokens, and those `found`."""
        rows: list[list[float]] = []
        for place, numbers in enumerate(outputs):
            while len(rows) <= int(features[place]["row"]):
                rows.append([0.0, 0.0, 0.0])
            rows[-1] = [have + float(more) for have, more in zip(rows[-1], numbers, strict=True)]
        return [prediction(row) for row in rows]

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[None]:
        return [None] * (int(rows.column("row")[-1]) + 1)

    def tally(self, targets: Sequence[None], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """Share of the hidden tokens that were found, and perplexity over all of them."""
        import numpy as np

        from overnight.tally import Tally

        adds = np.array(
            [[one["loss"] * one["hidden"], one["hidden"], one["found"]] for one in predictions], dtype=float
        )
        return Tally(np.arange(len(adds)), adds, metrics)

    def metric_names(self, facts: Facts) -> list[str]:
        return list(METRICS)

    def right(self, target: None, prediction: Prediction, facts: Facts) -> bool:
        """Whether all hidden tokens of a text were found."""
        return bool(prediction["found"] == prediction["hidden"])

    def same(self, one: Prediction, other: Prediction) -> bool:
        return bool(one["found"] == other["found"]) and math.isclose(one["loss"], other["loss"], rel_tol=1e-3)

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        return "text", float(prediction["loss"])

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        return {"loss": float, "hidden": int, "found": int}

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        return [prediction[name] for name in ("loss", "hidden", "found")]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a tokenizer without a mask, or that does not know words."""
    if tokenizer.mask_token_id is None or not getattr(tokenizer, "is_fast", False):
        rule = "needs a tokenizer with a mask token that knows which tokens make a word (a fast one)"
        raise UserError(Complaint("model → base", rule))


def hide(feature: Mapping[str, Any], training: bool) -> dict[str, Any]:
    """Token ids with some words hidden, and as labels what they were."""
    import numpy as np
    import torch

    ids, words = np.array(feature["input_ids"], dtype=np.int64), np.asarray(feature["words"])
    labels = np.full_like(ids, IGNORED)
    if training:
        seed = int(torch.randint(2**62, ()))
    else:
        seed = zlib.crc32(ids.astype("<i4").tobytes())
    draw = np.random.default_rng(seed)
    known = np.unique(words[words >= 0])
    if len(known):
        chosen = draw.permutation(known)[: max(1, round(SHARE * len(known)))]
        for word in chosen:
            place = np.flatnonzero(words == word)
            labels[place] = ids[place]
            way = draw.random()
            if way < MASKED:
                ids[place] = int(feature["mask"])
            elif way < MASKED + RANDOM:
                ids[place] = draw.integers(0, int(feature["vocabulary"]), len(place))
    return {"input_ids": ids, "labels": labels}


def found(logits: Tensor, labels: Tensor) -> np.ndarray:
    """Of each row of a padded batch: summed cross-entropy, hidden tokens, those that were found (float32)."""
    import torch
    from torch.nn.functional import cross_entropy

    hidden = labels != IGNORED
    guesses, wanted = logits[hidden].float(), labels[hidden]
    numbers = torch.stack([cross_entropy(guesses, wanted, reduction="none"), (guesses.argmax(-1) == wanted).float()])
    each = torch.zeros(3, *labels.shape, device=labels.device)
    each[1] = hidden
    each[0, hidden], each[2, hidden] = numbers[0], numbers[1]
    sums: np.ndarray = each.sum(-1).T.cpu().numpy()
    return sums


def prediction(numbers: Iterable[float]) -> Prediction:
    """What a caller gets of the three numbers of `found`."""
    loss, hidden, right = map(float, numbers)
    return {"loss": loss / hidden if hidden else 0.0, "hidden": int(hidden), "found": int(right)}


def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(resamples, loss | hidden | found) → the metrics; NaN where nothing was hidden."""
    import numpy as np

    loss, hidden, found = sums.T
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return {"masked_accuracy": found / hidden, "perplexity": np.exp(loss / hidden)}
