"""Models at work: logits of tokenized rows, and predictions for texts from a finished model folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache

from overnight import problems
from overnight.errors import Complaint, UserError
from overnight.training.batches import bucket
from overnight.training.card import CARD, Card
from overnight.training.device import OutOfMemory, is_out_of_memory
from overnight.training.models import load_tokenizer
from overnight.training.packing import Packed, Packing, to_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from overnight.problems.base import Facts, Prediction, Problem
    from overnight.training.frozen import Features
    from overnight.training.team import Team

TOKENS = {"cpu": 2048, "other": 32768}
"""Padded tokens of one batch: on a CPU what its caches like, elsewhere what keeps the device busy."""


def forward(
    problem: Problem,
    packed: Packed,
    rows: Any,
    *,
    features: Features | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    each: Callable[[Any, dict[str, torch.Tensor]], None] | None = None,
    facts: Facts | None = None,
    team: Team | None = None,
) -> list[np.ndarray]:
    """`Problem.outputs`, or `generate`, of all features in their order; sorted by length inside, less memory when it
    runs out.

    Args:
        rows: `TokenizedRows` or a list of features; anything with a length and items.
        features: the rows' hidden states at the packed model's freeze line.
        precision: the context in which the model runs.
        each: is given the outputs and the batch of each step.
        facts: needed by a problem that generates.
        team: the processes that share the work; each gets all outputs.
    """
    lengths = getattr(rows, "lengths", None)
    if lengths is None:
        lengths = np.array([len(row["input_ids"]) for row in rows])
    model = packed.model
    budget = TOKENS.get(model.device.type, TOKENS["other"])
    waiting = bucket(lengths, budget)[::-1]
    if team is not None:
        waiting = waiting[team.rank :: team.size]
    found: list[Any] = [None] * len(lengths)
    training = model.training
    packed.train(False)

    def attempt(batch: np.ndarray) -> Sequence[np.ndarray] | None:
        try:
            tensors, packing = prepare(problem, model, rows, batch, features)
            with precision():
                if problem.generates and each is None:
                    return problem.generate(model, tensors, facts or {})
                outputs = packed(inputs(problem, tensors), packing)
                if each is not None:
                    each(outputs, tensors)
                if problem.generates == "always":
                    return problem.generate(model, tensors, facts or {})
            return problem.outputs(outputs, tensors)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    with torch.inference_mode():
        while waiting:
            batch = waiting.pop()
            computed = attempt(batch)
            if computed is not None:
                for row, values in zip(batch, computed, strict=True):
                    found[row] = values
                continue
            if len(batch) == 1:
                rule = f"one row of {lengths[batch[0]]} tokens does not fit into memory"
                raise OutOfMemory(Complaint("model → max_length", rule))
            clear_device_cache()
            waiting = [half for rows_of in (*waiting, batch) for half in np.array_split(rows_of, min(2, len(rows_of)))]
    packed.train(training)
    if team is not None and team.size > 1:
        for others in team.gather({row: values for row, values in enumerate(found) if values is not None}):
            for row, values in others.items():
                found[row] = values
    return found


def collate(problem: Problem, model: PreTrainedModel, rows: Any, batch: np.ndarray) -> dict[str, torch.Tensor]:
    """The rows of one batch as padded tensors on the CPU."""
    pad_token_id = getattr(model.config, "pad_token_id", None) or 0
    return problem.collate([rows[i] for i in batch], pad_token_id, training=model.training)


def prepare(
    problem: Problem, model: PreTrainedModel, rows: Any, batch: np.ndarray, features: Features | None, drop: float = 0.0
) -> tuple[dict[str, torch.Tensor], Packing]:
    """The rows of one batch as padded tensors, and how to pack them, on the model's device.

    Args:
        drop: share of the tokens that is left out of the packing.
    """
    tensors = collate(problem, model, rows, batch)
    labels = tensors["labels"] if problem.by_token else None  # looked at here: on a GPU it would wait for every step
    packing = Packing.of(tensors["attention_mask"], features.of(batch) if features else None, labels)
    if drop:
        packing = packing.drop(drop)
    return to_device(tensors, model.device), packing.to(model.device)


def inputs(problem: Problem, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model sees of a batch."""
    return {name: tensor for name, tensor in batch.items() if name not in problem.beside}


def load_finished(problem: Problem, folder: str | Path, facts: Facts) -> Packed:
    """The fine-tuned model of a folder, on the best device of this machine, ready to predict."""
    from accelerate import Accelerator

    from overnight.settings import Training

    packed = Packed(problem.load_model(str(folder), facts, Training()).eval())
    packed.model.to(Accelerator().device)
    return packed


def predict(problem: Problem, model_folder: str | Path, rows: Any, facts: Facts) -> list[np.ndarray]:
    """`Problem.outputs` of tokenized rows in their order, computed in float32 as the served model does."""
    return forward(problem, load_finished(problem, model_folder, facts), rows, facts=facts)


class Scorer:
    """A finished model folder, ready to score texts; needs torch, transformers and numpy only.

    Raises:
        UserError: when the folder is none of ours.
    """

    def __init__(self, folder: str | Path):
        path = Path(folder) / CARD
        if not path.is_file():
            raise UserError(Complaint(str(folder), f"not a finished model folder (it has no {CARD})"))
        self.card = Card(**json.loads(path.read_text()))
        self.problem = problems.get(self.card.problem)
        self.tokenizer = load_tokenizer(str(folder))
        self.model = load_finished(self.problem, folder, self.card.facts)

    def predict_texts(self, rows: Sequence[Mapping[str, str]]) -> list[Prediction]:
        """Predictions in the order of `rows` (role → text each)."""
        return self.predict(rows)[0]

    def predict(self, rows: Sequence[Mapping[str, str]]) -> tuple[list[Prediction], list[int]]:
        """Predictions in the order of `rows`, and how many tokens of each the model saw."""
        if not rows:
            return [], []
        features = self._features(rows)
        outputs = forward(self.problem, self.model, features, facts=self.card.facts)
        tokens = [0] * len(rows)
        for place, one in enumerate(features):
            tokens[one.get("row", place)] += len(one["input_ids"])
        return self.problem.decode(outputs, self.card.facts, features, self.tokenizer), tokens

    def token_ids(self, rows: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """What the model sees of each row; of a long text each window."""
        return [one["input_ids"] for one in self._features(rows)] if rows else []

    def hidden(self, rows: Sequence[Mapping[str, str]]) -> np.ndarray:
        """Last hidden states, averaged over the tokens of each row, of a long text of each window (× width, float32):
        for comparing texts."""
        model, features = self.model.model, self._features(rows)
        reader = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        lengths = np.array([len(row["input_ids"]) for row in features])
        found: list[Any] = [None] * len(features)
        with torch.inference_mode():
            for batch in bucket(lengths, TOKENS.get(model.device.type, TOKENS["other"])):
                tensors = to_device(collate(self.problem, model, features, batch), model.device)
                states = reader(**inputs(self.problem, tensors)).last_hidden_state
                mask = tensors["attention_mask"].unsqueeze(-1)
                for row, values in zip(
                    batch, ((states * mask).sum(1) / mask.sum(1)).float().cpu().numpy(), strict=True
                ):
                    found[row] = values
        return np.stack(found)

    def _features(self, rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        batch = {role: [row[role] for row in rows] for role in self.problem.text_roles}
        encoded = self.problem.encode(self.tokenizer, batch, self.card.facts, self.card.max_length)
        return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
