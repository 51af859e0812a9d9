"""Text generation: a causal language model, which goes on with a text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from overnight.problems.base import Facts, Prediction, Problem
from overnight.problems.texts import IGNORED, generation_settings, labelled_tokens

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

METRICS = ("bits_per_byte", "perplexity")


class TextGeneration(Problem):
    """`text` → how well it is foretold, token by token, and in `output` how the model would go on.

    A long text is read in windows of `model.max_length`, each of which begins anew. Bits a byte compare models of
    different tokenizers, perplexity does not.
    """

    name: ClassVar[str] = "text-generation"
    required_roles: ClassVar[tuple[str, ...]] = ("text",)
    target: ClassVar[str] = "text"
    labelled: ClassVar[bool] = False
    generates: ClassVar[Literal["", "answering", "always"]] = "answering"
    by_token: ClassVar[bool] = True
    beside: ClassVar[frozenset[str]] = frozenset({"labels", "last"})
    default_metric: ClassVar[str] = "bits_per_byte"
    lower_is_better: ClassVar[frozenset[str]] = frozenset(METRICS)

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        return {}

    def truth(self, cell: str) -> None:
        """A text is its own truth: how well it was foretold is counted with the prediction."""

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """See `Problem.encode`; a text begins with the token that begins texts, if there is one, and ends with the one
        that ends them. The last window of a long text has at least half its length, so that there is something to go on
        with. `bytes` of a row are with its first window, and `last` is 1 for its last one."""
        begin, end = (
            [] if token is None else [token]
            for token in (
                tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id,
                tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id,
            )
        )
        encoded = tokenizer(list(batch["text"]), add_special_tokens=False, return_attention_mask=False, verbose=False)
        features: dict[str, list[Any]] = {"input_ids": [], "row": [], "bytes": [], "last": []}
        for row, ids in enumerate(encoded["input_ids"]):
            whole = [*ids, *end] or begin or [0]
            size = max_length - len(begin)
            starts = [*range(0, len(whole), size)]
            if len(starts) > 1:
                starts[-1] = min(starts[-1], len(whole) - size // 2)
            for start, stop in zip(starts, [*starts[1:], len(whole)], strict=True):
                features["input_ids"].append([*begin, *whole[start:stop]])
                features["row"].append(row)
                features["bytes"].append(0 if start else len(batch["text"][row].encode("utf-8", "surrogatepass")))
                features["last"].append(int(stop == len(whole)))
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        from overnight.training.models import load_pretrained

        # an encoder such as BERT must not see what it is to foretell
        return load_pretrained(AutoModelForCausalLM, base, revision, training=training, is_decoder=True)

    def collate(
        self, features: Sequence[Mapping[str, Any]], pad_token_id: int, training: bool = False
    ) -> dict[str, Tensor]:
        from overnight.training.data import pad

        batch = pad([{name: one[name] for name in ("input_ids", "last")} for one in features], pad_token_id)
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED).roll(-1, 1)
        batch["labels"][:, -1] = IGNORED  # nothing stands behind it, least of all its first token
        return batch

    def counted(self, batch: Mapping[str, Tensor]) -> int:
        return labelled_tokens(batch)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """Cross-entropy of each token's next one, which is its label."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            outputs.logits.float().flatten(0, 1),
            batch["labels"].flatten(),
            label_smoothing=training.label_smoothing,
            reduction="sum",
        )

    def outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Of each feature: summed cross-entropy and tokens foretold."""
        import torch
        from torch.nn.functional import cross_entropy

        wanted = batch["labels"]
        each = cross_entropy(outputs.logits.float().transpose(1, 2), wanted, reduction="none")
        sums: np.ndarray = torch.stack([each.sum(1), (wanted != IGNORED).sum(1)], dim=1).double().cpu().numpy()
        return list(sums)

    def generate(self, model: Any, batch: Mapping[str, Tensor], facts: Facts) -> list[np.ndarray]:
        """`outputs`, and behind them the tokens with which the model goes on after the last window of a text.

        Where it has a longest input, a text is cut in front to leave room for them, for half of that at most.
        """
        import numpy as np
        import torch

        mask, last = batch["attention_mask"], batch["last"].bool()
        found = self.outputs(model(input_ids=batch["input_ids"], attention_mask=mask), batch)
        if not last.any():
            return found
        settings = generation_settings(facts)
        room = getattr(model.config, "max_position_embeddings", None)
        most = mask.shape[1]
        if room:
            settings["max_new_tokens"] = min(settings["max_new_tokens"], room // 2)
            most = room - settings["max_new_tokens"]
        end = model.config.eos_token_id
        prompts = []
        for given, length in zip(batch["input_ids"][last], mask[last].sum(1).tolist(), strict=True):
            ended = length > 1 and int(given[length - 1]) == end
            prompts.append(given[: length - ended][-most:])
        # with the padding in front, where a decoder wants it
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=mask.device)
        asked = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = prompt
            asked[row, longest - len(prompt) :] = 1
        pad = model.config.pad_token_id if model.config.pad_token_id is not None else end
        whole = model.generate(input_ids=ids, attention_mask=asked, do_sample=False, pad_token_id=pad, **settings)
        for row, more in zip(last.nonzero().flatten().tolist(), whole[:, longest:].cpu().numpy(), strict=True):
            found[row] = np.concatenate([found[row], more])
        return found

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `output` (only where answers are asked for), `loss` (nats a token), `tokens` and `bytes`."""
        rows: list[Prediction] = []
        for place, found in enumerate(outputs):
            feature = features[place]
            while len(rows) <= int(feature["row"]):
                rows.append({"output": "", "loss": 0.0, "tokens": 0, "bytes": 0})
            row = rows[-1]
            row["loss"] += float(found[0])
            row["tokens"] += int(found[1])
            row["bytes"] += int(feature["bytes"])
            if tokenizer is not None:
                row["output"] = tokenizer.decode(found[2:].astype(int).tolist(), skip_special_tokens=True)
        for row in rows:
            row["loss"] = row["loss"] / row["tokens"] if row["tokens"] else 0.0
        return rows

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[None]:
        return [None] * (int(rows.column("row")[-1]) + 1)

    def tally(self, targets: Sequence[None], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """Bits a byte of the texts, and perplexity a token, over all of them."""
        import numpy as np

        from overnight.tally import Tally

        adds = np.array([[one["loss"] * one["tokens"], one["tokens"], one["bytes"]] for one in predictions], float)
        return Tally(np.arange(len(adds)), adds, _metrics)

    def metric_names(self, facts: Facts) -> list[str]:
        return list(METRICS)

    def right(self, target: None, prediction: Prediction, facts: Facts) -> bool:
        """No text is foretold wholly."""
        return False

    def same(self, one: Prediction, other: Prediction) -> bool:
        return math.isclose(one["loss"], other["loss"], rel_tol=1e-3)

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        return "text", float(prediction["loss"])

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        return {"output": str, "loss": float, "tokens": int}

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        return [prediction[name] for name in ("output", "loss", "tokens")]


def _metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(resamples, loss | tokens | bytes) → the metrics; NaN where there was nothing to foretell."""
    import numpy as np

    loss, tokens, size = sums.T
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return {"bits_per_byte": loss / math.log(2) / size, "perplexity": np.exp(loss / tokens)}
