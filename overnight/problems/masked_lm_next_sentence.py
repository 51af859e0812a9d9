"""Masked language modelling of two sentences, and whether the second follows the first: how BERT itself was made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from overnight.errors import Complaint, UserError
from overnight.problems import masked_lm
from overnight.problems.base import Cell, Facts, Prediction
from overnight.problems.masked_lm import MaskedLM
from overnight.problems.texts import IGNORED, NEXT, OTHER, cut, occurrences

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

LABELS = (NEXT, OTHER)
"""In the order of the head of transformers' BERT."""
NEITHER = "neither_next_nor_other"


class MaskedLMNextSentence(MaskedLM):
    """`text` and `second` → their hidden words, as `masked-lm`, and a label: `next` or `other` (Devlin et al. 2019,
    BERT, 3.1). A pair is cut at `model.max_length`, the longer text first."""

    name: ClassVar[str] = "masked-lm-next-sentence"
    required_roles: ClassVar[tuple[str, ...]] = ("text", "second", "label")
    text_roles: ClassVar[tuple[str, ...]] = ("text", "second")
    target: ClassVar[str] = "label"
    labelled: ClassVar[bool] = True
    by_token: ClassVar[bool] = False

    def prepare(self, columns: dict[str, list[Cell]], clean: Callable[[str], Cell]) -> list[str | None]:
        """Refuses rows with other labels than `next` and `other`."""
        return [None if cell is None or cell.strip() in LABELS else NEITHER for cell in columns["label"]]

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        return {"labels": list(LABELS)}

    def truth(self, cell: str) -> Any:
        return cell

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """As `MaskedLM.encode`, with the words of both texts numbered through; a row is one feature."""
        masked_lm.check_tokenizer(tokenizer)
        sides = [[cut(tokenizer, text, max_length) for text in batch[role]] for role in self.text_roles]
        encoded = tokenizer(*sides, truncation=True, max_length=max_length, return_attention_mask=False, verbose=False)
        count = len(encoded["input_ids"])
        words = []
        for number in range(count):
            of_token = zip(encoded.word_ids(number), encoded.sequence_ids(number), strict=True)
            words.append([-1 if word is None else 2 * word + int(side or 0) for word, side in of_token])
        features = dict(encoded) | {
            "words": words,
            "mask": [tokenizer.mask_token_id] * count,
            "vocabulary": [len(tokenizer)] * count,
        }
        if "label" in batch:
            features["next_sentence_label"] = [LABELS.index(label) for label in batch["label"]]
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForPreTraining

        from overnight.training.models import load_pretrained

        model = load_pretrained(AutoModelForPreTraining, base, revision, training=training)
        if not hasattr(getattr(model, "cls", None), "seq_relationship"):
            rule = "has no head that tells whether a sentence follows: BERT and its like only"
            raise UserError(Complaint("model → base", rule, repr(base), "problem: masked-lm"))
        return model

    def collate(
        self, features: Sequence[Mapping[str, Any]], pad_token_id: int, training: bool = False
    ) -> dict[str, Tensor]:
        from overnight.training.data import pad

        kept = ("token_type_ids", "next_sentence_label")
        shown = [
            masked_lm.hide(feature, training) | {name: feature[name] for name in kept if name in feature}
            for feature in features
        ]
        return pad(shown, pad_token_id)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """Cross-entropy of the hidden tokens, and that of the label, which weighs as much as all hidden tokens of its
        row: over the batch, a mean of the first plus a mean of the second, however the batch is divided."""
        from torch.nn.functional import cross_entropy

        hidden = batch["labels"] != IGNORED
        wanted = batch["labels"][hidden]
        smooth: dict[str, Any] = {"label_smoothing": training.label_smoothing, "reduction": "none"}
        words = cross_entropy(outputs.prediction_logits[hidden].float(), wanted, **smooth)
        follows = cross_entropy(outputs.seq_relationship_logits.float(), batch["next_sentence_label"], **smooth)
        return words.sum() + (follows * hidden.sum(1)).sum()

    def outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Of each row what `MaskedLM.outputs` has, then the two logits of the label."""
        import numpy as np

        words = masked_lm.found(outputs.prediction_logits, batch["labels"])
        follows = outputs.seq_relationship_logits.float().cpu().numpy()
        return list(np.concatenate([words, follows], axis=1))

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `label`, its `score`, `scores` of both, and `loss`, `hidden`, `found` of the words."""
        import numpy as np

        from overnight.problems.labels import softmax

        shares = softmax(np.stack(outputs)[:, 3:])
        return [
            {
                "label": LABELS[int(share.argmax())],
                "score": float(share.max()),
                "scores": dict(zip(LABELS, share.tolist(), strict=True)),
                **masked_lm.prediction(numbers[:3]),
            }
            for share, numbers in zip(shares, outputs, strict=True)
        ]

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[Any]:
        return [LABELS[code] for code in rows.column("next_sentence_label")]

    def tally(self, targets: Sequence[Any], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """As `MaskedLM.tally`, and of the labels accuracy and F1 of each."""
        import numpy as np

        from overnight.tally import Tally

        truth, said = (
            np.array([[label == one for one in LABELS] for label in labels], dtype=float)
            for labels in (targets, [one["label"] for one in predictions])
        )
        words = super().tally(targets, predictions, facts).adds
        adds = np.concatenate([words, truth, said, truth * said], axis=1)
        return Tally(np.arange(len(adds)), adds, _metrics)

    def metric_names(self, facts: Facts) -> list[str]:
        return [*super().metric_names(facts), "next_sentence_accuracy", *(f"f1/{label}" for label in LABELS)]

    def classes(self, targets: Sequence[Any], facts: Facts) -> dict[str, int]:
        return occurrences(targets, LABELS)

    def right(self, target: Any, prediction: Prediction, facts: Facts) -> bool:
        """Whether the label is right, and all hidden tokens were found."""
        return bool(prediction["label"] == target) and super().right(None, prediction, facts)

    def same(self, one: Prediction, other: Prediction) -> bool:
        return bool(one["label"] == other["label"]) and super().same(one, other)

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        return str(prediction["label"]), float(prediction["score"])

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        more = {f"score_{label}": float for label in LABELS} if scores else {}
        return {"label": str, "score": float} | super().columns(facts, scores) | more

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        more = prediction["scores"].values() if scores else ()
        return [prediction["label"], prediction["score"], *super().cells(prediction, facts, scores), *more]


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(resamples, loss | hidden | found | true labels | said ones | right ones) → the metrics; NaN where undefined."""
    import numpy as np

    true, said, right = np.split(sums[:, 3:], 3, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {"next_sentence_accuracy": right.sum(1) / true.sum(1)}
        f1 = 2 * right / (true + said)
    return masked_lm.metrics(sums[:, :3]) | found | {f"f1/{label}": f1[:, i] for i, label in enumerate(LABELS)}
