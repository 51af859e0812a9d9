"""Sequence to sequence: a text for a text, as in translation and summarisation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from overnight.problems.base import Facts, Prediction, Problem
from overnight.problems.texts import IGNORED, code_points, generation_settings, labelled_tokens, text_of
from overnight.writing import parts, unspaced, words

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

ROUGE = ("rouge1", "rouge2", "rougeL")


class SequenceToSequence(Problem):
    """`text` → `output`, which is compared with `target`.

    Any encoder-decoder (T5, Marian, BART) can be the base; of an encoder such as BERT two are put together, the second
    as the decoder (Rothe et al. 2020, Leveraging Pre-trained Checkpoints for Sequence Generation Tasks).
    """

    required_roles: ClassVar[tuple[str, ...]] = ("text", "target")
    target: ClassVar[str] = "target"
    labelled: ClassVar[bool] = False
    generates: ClassVar[Literal["", "answering", "always"]] = "always"
    beside: ClassVar[frozenset[str]] = frozenset()  # of the labels the model makes what its decoder reads

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        return {}

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """See `Problem.encode`; `labels` are the target's tokens, `reference` its code points."""
        prefix = facts["generation"]["prefix"]
        limits: dict[str, Any] = {"truncation": True, "max_length": max_length, "return_attention_mask": False}
        encoded = tokenizer([prefix + text for text in batch["text"]], return_token_type_ids=False, **limits)
        features: dict[str, list[Any]] = {"input_ids": list(encoded["input_ids"])}
        if "target" in batch:
            wanted = tokenizer(text_target=list(batch["target"]), return_token_type_ids=False, **limits)
            features["labels"] = list(wanted["input_ids"])
            features["reference"] = list(map(code_points, batch["target"]))
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForSeq2SeqLM

        from overnight.training.models import load_pretrained, quiet, resolve_base

        # given labels, an encoder-decoder put together of two models tells of a change years ago
        warnings.filterwarnings("ignore", "Version v4.12.0 introduces a better way to train", FutureWarning)
        folder = resolve_base(base)
        with quiet():
            try:
                config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
            except (OSError, ValueError):
                config = None  # told by what loads the model
        if config is None or config.is_encoder_decoder:
            return load_pretrained(AutoModelForSeq2SeqLM, base, revision, training=training)
        return _of_encoders(base, revision, training)

    def counted(self, batch: Mapping[str, Tensor]) -> int:
        return labelled_tokens(batch)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """Cross-entropy of the target's tokens, each given those before it (teacher forcing)."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            outputs.logits.float().flatten(0, 1),
            batch["labels"].flatten(),
            label_smoothing=training.label_smoothing,
            ignore_index=IGNORED,
            reduction="sum",
        )

    def generate(self, model: Any, batch: Mapping[str, Tensor], facts: Facts) -> list[np.ndarray]:
        """Token ids of an output for each feature; none where the model's numbers were none."""
        import torch

        asked = {name: batch[name] for name in ("input_ids", "attention_mask")}
        unsound = torch.zeros(len(batch["input_ids"]), dtype=torch.bool, device=model.device)

        def watch(ids: Tensor, scores: Tensor) -> Tensor:
            unsound.logical_or_(scores.isnan().view(len(unsound), -1).any(1))  # of all beams of a row
            return scores

        found = model.generate(**asked, do_sample=False, logits_processor=[watch], **generation_settings(facts))
        return [ids[:0] if bad else ids for ids, bad in zip(found.cpu().numpy(), unsound.tolist(), strict=True)]

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `output`; None where nothing sound was written."""
        texts = tokenizer.batch_decode([one.tolist() for one in outputs], skip_special_tokens=True)
        return [
            {"output": " ".join(text.split()) if len(ids) else None} for ids, text in zip(outputs, texts, strict=True)
        ]

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[str]:
        return [text_of(rows[i]["reference"]) for i in range(len(rows))]

    def right(self, target: str, prediction: Prediction, facts: Facts) -> bool:
        return bool(prediction["output"] == target)

    def same(self, one: Prediction, other: Prediction) -> bool:
        return bool(one["output"] == other["output"])

    def broken(self, prediction: Prediction) -> str | None:
        return "it was written by numbers that are none" if prediction["output"] is None else None

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        """How long it is, in characters."""
        return "text" if prediction["output"] else "nothing", float(len(prediction["output"] or ""))

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        return {"output": str}

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        return [prediction["output"]]


class Translation(SequenceToSequence):
    """Judged by chrF (Popović 2015) and BLEU (Papineni et al. 2002) as sacrebleu computes them, from 0 to 100.

    To BLEU, each sign of a script without spaces between words is a word, as to sacrebleu's tokenizer for Chinese.
    """

    name: ClassVar[str] = "translation"
    default_metric: ClassVar[str] = "chrf"

    def tally(self, targets: Sequence[str], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        import numpy as np
        from sacrebleu.metrics import BLEU, CHRF

        from overnight.tally import Tally

        scorers: dict[str, Any] = {"chrf": CHRF(), "bleu": BLEU(force=True)}
        outputs = [one["output"] or "" for one in predictions]
        texts = {"chrf": (outputs, list(targets)), "bleu": (_spaced(outputs), _spaced(targets))}
        # what a segment adds to the sums of which sacrebleu makes the score of a corpus
        sums = [
            np.array(one._extract_corpus_statistics(texts[name][0], [texts[name][1]]), float)
            for name, one in scorers.items()
        ]
        cut = sums[0].shape[1]

        def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
            sides = zip(scorers.items(), (sums[:, :cut], sums[:, cut:]), strict=True)
            return {
                name: np.array([scorer._compute_score_from_stats(row.tolist()).score for row in side])
                for (name, scorer), side in sides
            }

        return Tally(np.arange(len(outputs)), np.concatenate(sums, axis=1), metrics)

    def metric_names(self, facts: Facts) -> list[str]:
        return ["chrf", "bleu"]


class Summarization(SequenceToSequence):
    """Judged by ROUGE-1, -2 and -L (Lin 2004): F1 of words, pairs of words and the longest common subsequence, averaged
    over rows; lower case, without stemming."""

    name: ClassVar[str] = "summarization"
    default_metric: ClassVar[str] = "rougeL"

    def tally(self, targets: Sequence[str], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        import numpy as np

        from overnight.tally import Tally

        adds = np.array([[*rouge(p["output"] or "", t), 1.0] for t, p in zip(targets, predictions, strict=True)])
        return Tally(
            np.arange(len(adds)), adds, lambda sums: {n: sums[:, i] / sums[:, -1] for i, n in enumerate(ROUGE)}
        )

    def metric_names(self, facts: Facts) -> list[str]:
        return list(ROUGE)


def rouge(output: str, target: str) -> tuple[float, float, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F1, 0 to 1) of one text; without spaces between words each sign is one."""
    ours, theirs = words(output.lower()), words(target.lower())
    found = []
    for size in (1, 2):
        one, other = (Counter(zip(*(side[i:] for i in range(size)), strict=False)) for side in (ours, theirs))
        found.append(_f1((one & other).total(), one.total(), other.total()))
    return found[0], found[1], _f1(_longest_common(ours, theirs), len(ours), len(theirs))


def _spaced(texts: Sequence[str]) -> list[str]:
    return [" ".join(parts(text)) if unspaced(text) else text for text in texts]


def _f1(shared: int, ours: int, theirs: int) -> float:
    return 2 * shared / (ours + theirs) if ours + theirs else 0.0


def _longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, mark in enumerate(other, start=1):
            above = row[place]
            row[place] = before + 1 if word == mark else max(above, row[place - 1])
            before = above
    return row[-1]


def _of_encoders(base: str, revision: str | None, training: Training) -> PreTrainedModel:
    """Two copies of an encoder, the second reading what was written before and the first's states."""
    from transformers import AutoModel, AutoModelForCausalLM, EncoderDecoderModel

    from overnight.training.models import load_pretrained, load_tokenizer

    encoder = load_pretrained(AutoModel, base, revision, training=training)
    decoder = load_pretrained(
        AutoModelForCausalLM, base, revision, training=training, is_decoder=True, add_cross_attention=True
    )
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    tokenizer = load_tokenizer(base, revision)
    begin = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = begin, end, tokenizer.pad_token_id
    return model
