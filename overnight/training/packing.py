"""Batches without padding: a model's layers see the tokens of a batch end to end, as one long row.

    packed = Packed(model)
    packing = Packing.of(batch["attention_mask"])
    outputs = packed(batch, packing)          # as model(**batch), without the work on padding

Padding is two fifths of all tokens in random batches of tweets. Here hidden states are packed where they enter the
first layer and unpacked where they leave the last, and attention looks at each sequence by itself, in a causal model at
what is before each token; what comes before (embeddings) and after (the head) is the model's own. Where the head reads
the first token alone, as BERT's classification heads do, the last layer computes no other; the matrix by which a
language model tells words, often as large as several layers, is given tokens alone too.

Whether a model can be run so is found out by running it: once, on a small batch, against the padded model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from overnight.problems.texts import IGNORED
from overnight.training.attention import packed_attention
from overnight.training.layers import embeddings_of, layer_stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "overnight_packed"
TOLERANCE = 1e-4
"""Largest difference to the padded model, as a share of the outputs' spread, that counts as rounding in float32."""


@dataclass(frozen=True)
class Packing:
    """How the tokens of one padded batch (rows × longest) lie end to end."""

    lengths: list[int]
    """Tokens of each row."""
    longest: int
    """Tokens of the longest row."""
    index: Tensor
    """For each token its place in rows × longest."""
    bounds: Tensor
    """Where each row's tokens start; one more entry at the end (int32)."""
    features: Tensor | None = None
    """Hidden states (tokens × width) at the freeze line; present: what is below it is not computed."""
    labelled: Tensor | None = None
    """Places, among all tokens, of those that have a label; for `Packed.flat`."""
    given: Tensor | None = None
    """For each token its place in the batch as the model is given it, where tokens were dropped; else it is `index`."""

    @classmethod
    def of(cls, attention_mask: Tensor, features: Tensor | None = None, labels: Tensor | None = None) -> Packing:
        """From a mask (and `labels`, of which it keeps where there are any) on the CPU, whose rows are ones, then
        zeros."""
        lengths = attention_mask.sum(1)
        index = attention_mask.reshape(-1).nonzero().squeeze(1)
        bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        labelled = None if labels is None else (labels.reshape(-1)[index] != IGNORED).nonzero().squeeze(1)
        return cls(lengths.tolist(), int(lengths.max()), index, bounds, features, labelled)

    def drop(self, share: float) -> Packing:
        """Without some of the tokens: of each row another share, from nothing to twice `share`; its first token, which
        the head reads, stays.

        Layers that see fewer tokens cost less. Those that are left keep their places, so that a model that was trained
        so reads whole texts. After PatchDropout (Liu et al. 2023), which does it to the patches of images.
        """
        lengths = torch.tensor(self.lengths)
        shares = 2 * share * torch.rand(len(lengths))
        stays = torch.rand(len(self.index)) >= shares.repeat_interleave(lengths)
        stays[self.bounds[:-1]] = True
        rows = torch.arange(len(lengths)).repeat_interleave(lengths)
        left = rows[stays].bincount(minlength=len(lengths))
        kept = Packing.of(torch.arange(int(left.max())) < left[:, None])
        return replace(kept, features=None if self.features is None else self.features[stays], given=self.index[stays])

    def to(self, device: torch.device) -> Packing:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = to_device(tensors, device)
        return replace(self, **moved)

    def enter(self, padded: Tensor) -> Tensor:
        """(rows, longest of the batch as it is given, …) → (tokens, …)."""
        return padded.flatten(0, 1).index_select(0, self.index if self.given is None else self.given)

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, longest, …) → (tokens, …)."""
        return padded.flatten(0, 1).index_select(0, self.index)

    def labels(self, padded: Tensor) -> Tensor:
        """(rows, longest) → (1, labelled): the labels that there are."""
        assert self.labelled is not None
        return self.pack(padded).index_select(0, self.labelled).unsqueeze(0)

    def pad(self, packed: Tensor) -> Tensor:
        """(tokens, …) → (rows, longest, …), zero where there is no token."""
        rows = len(self.bounds) - 1
        empty = packed.new_zeros(rows * self.longest, *packed.shape[1:])
        return empty.index_copy(0, self.index, packed).unflatten(0, (rows, self.longest))

    def mask(self) -> Tensor:
        """True where there is a token (rows × longest)."""
        return torch.arange(self.longest, device=self.bounds.device) < self.bounds.diff()[:, None]


class Packed:
    """A model that is called with padded batches and works on their tokens alone, as far as it can be made to.

    Args:
        model: any model of transformers, on any device, in float32.
        frozen: layers from the bottom that are not trained; with the embeddings they run as in evaluation, without
            dropout, so that what they give for a row is always the same.

    Attributes:
        way: "first" (packed, the last layer for the first token of a row only), "all" (packed) or "padded".
        takes_features: whether a `Packing` may bring the hidden states at the freeze line.
        tells_words: whether the model's outputs are what its last matrix says of tokens alone.
    """

    def __init__(self, model: PreTrainedModel, frozen: int = 0):
        self.model, self.frozen = model, frozen
        self.way, self.takes_features = "padded", False
        self._embeddings, self._layers = embeddings_of(model), layer_stack(model)
        self._packing: Packing | None = None
        self._asked: Tensor | None = None
        self.tells_words = False
        # keys and values are kept for who goes on writing; nobody does where a whole batch is read at once
        self._named = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        training = model.training
        model.eval()
        with torch.no_grad():
            self._find_way()
        self.train(training)

    def __call__(self, batch: Mapping[str, Tensor], packing: Packing) -> Any:
        """The model's outputs for a padded batch (without labels), both on its device."""
        if self.way == "padded":
            return self.model(**batch, **self._named)
        # without a mask a causal model would warn of padding; nothing comes of it, as attention goes by the packing
        given = {name: values for name, values in batch.items() if self._named or name != "attention_mask"}
        self._packing = packing
        try:
            return self.model(**given, **self._named, packing=packing)
        finally:
            self._packing = None

    def flat(self, batch: Mapping[str, Tensor], packing: Packing) -> Any:
        """The outputs of the labelled tokens alone as one row (1 × labelled × …), if the model `tells_words`."""
        self._asked = packing.labelled
        try:
            return self(batch, packing)
        finally:
            self._asked = None

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode; what is frozen stays in the latter."""
        self.model.train(mode)
        if self.frozen:
            for module in (self._embeddings, *self._layers[: self.frozen]):
                if module is not None:
                    module.eval()

    def trained_layers(self) -> list[nn.Module]:
        """Layers that are not frozen and see all tokens of a batch; none where it is padded."""
        if self.way == "padded":
            return []
        shortened = "forward" in vars(self._layers[-1])
        return list(self._layers[self.frozen : len(self._layers) - shortened])

    def features(self, batch: Mapping[str, Tensor], packing: Packing) -> Tensor:
        """Hidden states (tokens × width) at the freeze line, for batches to come; nothing above it is computed."""
        found: list[Tensor] = []

        def stop(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            found.append(given[0] if given else named["hidden_states"])
            raise _Enough

        hook = self._layers[self.frozen].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self(batch, packing)
        except _Enough:
            pass
        finally:
            hook.remove()
        return found[0].squeeze(0)

    def _find_way(self) -> None:
        """Sets `way` and `takes_features` to the fastest that give what the padded model gives."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        mixed = {*(getattr(self.model.config, "layer_types", None) or ())} - {"full_attention"}
        if not self._layers or self.model.config.is_encoder_decoder or mixed:
            return
        AttentionInterface.register(ATTENTION, packed_attention)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for calls that bring a mask
        model, attention = self.model, self.model.config._attn_implementation
        try:
            batch = example(model)
            packing = Packing.of(batch["attention_mask"].cpu()).to(model.device)
            expected = model(**batch, **self._named)
            model.set_attn_implementation(ATTENTION)
        except Exception:  # needs more than token ids, or has attention of its own
            return
        for self.way in ("first", "all"):
            undo = self._rewire()
            if self._agrees(batch, packing, expected):
                self._try_features(batch, packing, expected)
                return
            for step in undo:
                step()
        self.way, self.tells_words = "padded", False
        model.set_attn_implementation(attention)

    def _agrees(self, batch: Mapping[str, Tensor], packing: Packing, expected: Any) -> bool:
        """Whether the model, as it is now, gives what it should; a model that trips over it does not."""
        try:
            return _same(self(batch, packing), expected, batch)
        except Exception:
            return False

    def _rewire(self) -> list[Callable[[], None]]:
        """Packs before the first layer, unpacks after the last; returns what undoes it."""
        first, last = self._layers[0], self._layers[-1]
        undo = [
            first.register_forward_pre_hook(_enter, with_kwargs=True).remove,
            last.register_forward_hook(_leave_first if self.way == "first" else _leave, with_kwargs=True).remove,
            *(layer.register_forward_pre_hook(_turn, with_kwargs=True).remove for layer in self._layers),
        ]
        words = self.model.get_output_embeddings()
        self.tells_words = self.way == "all" and words is not None
        if words is not None and self.tells_words:
            undo += [
                words.register_forward_pre_hook(self._enter_words).remove,
                words.register_forward_hook(self._leave_words).remove,
            ]
        if self.way == "first":
            shorten = _first_token_only(last)
            if shorten is not None:
                last.forward = shorten
                undo.append(lambda: delattr(last, "forward"))
        return undo

    def _enter_words(self, module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor] | None:
        if self._packing is None:
            return None
        tokens = self._packing.pack(given[0])
        return (tokens if self._asked is None else tokens.index_select(0, self._asked),)

    def _leave_words(self, module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
        if self._packing is None:
            return output
        return self._packing.pad(output) if self._asked is None else output.unsqueeze(0)

    def _try_features(self, batch: Mapping[str, Tensor], packing: Packing, expected: Any) -> None:
        if self._embeddings is None or not 0 < self.frozen < len(self._layers):
            return
        features = self.features(batch, packing)
        skipped = [self._embeddings, *self._layers[: self.frozen]]
        self._embeddings.forward = self._embed_unless_skipped(self._embeddings.forward)
        for layer in self._layers[: self.frozen]:
            layer.forward = _pass_unless_needed(layer.forward)
        self.takes_features = self._agrees(batch, replace(packing, features=features), expected)
        if not self.takes_features:
            for module in skipped:
                del module.forward

    def _embed_unless_skipped(self, embed: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(*given: Any, **named: Any) -> Tensor:
            if self._packing is None or self._packing.features is None:
                return embed(*given, **named)
            ids = given[0] if given else named["input_ids"]
            return torch.zeros((1, 1, 1), device=ids.device).expand(*ids.shape, 1)

        return forward


class _Enough(Exception):
    """Ends a forward pass whose rest is not needed."""


def _enter(
    layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    packing: Packing | None = named.get("packing")
    if packing is None:
        return None
    padded = given[0] if given else named["hidden_states"]
    packed = (packing.enter(padded) if packing.features is None else packing.features).unsqueeze(0)
    return ((packed, *given[1:]), named) if given else (given, named | {"hidden_states": packed})


def _turn(
    layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Packs the sines and cosines of the places of tokens, where layers are given them (rotary embeddings)."""
    packing: Packing | None = named.get("packing")
    places = named.get("position_embeddings")
    if packing is None or places is None:
        return None
    rows = len(packing.lengths)
    return given, named | {
        "position_embeddings": tuple(packing.enter(part.expand(rows, -1, -1)).unsqueeze(0) for part in places)
    }


def _leave(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    packing: Packing | None = named.get("packing")
    return output if packing is None else packing.pad(output.squeeze(0))


def _leave_first(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    """(1 × tokens × width), or (1 × rows × width) from a layer of first tokens, → (rows × 1 × width)."""
    packing: Packing | None = named.get("packing")
    if packing is None:
        return output
    found = output.squeeze(0)
    return (found if len(found) == len(packing.lengths) else found.index_select(0, packing.bounds[:-1])).unsqueeze(1)


def _pass_unless_needed(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def passing(hidden: Tensor, *given: Any, packing: Packing | None = None, **named: Any) -> Tensor:
        if packing is not None and packing.features is not None:
            return hidden
        return forward(hidden, *given, packing=packing, **named)

    return passing


def _first_token_only(layer: Any) -> Callable[..., Tensor] | None:
    """A layer of the BERT kind, computed for the first token of each sequence only; None for other kinds.

    The first token attends to all; its own projection, output and feed-forward are one row in place of all tokens.
    """
    try:
        attention = layer.attention.self
        query, key, value = attention.query, attention.key, attention.value
        size, forward = attention.attention_head_size, layer.forward
    except AttributeError:
        return None

    def short(hidden: Tensor, *given: Any, packing: Packing | None = None, **named: Any) -> Tensor:
        if packing is None:
            return forward(hidden, *given, **named)
        tokens = hidden.squeeze(0)
        first = tokens.index_select(0, packing.bounds[:-1])
        q = query(first).unflatten(-1, (1, -1, size)).transpose(1, 2)
        k, v = (packing.pad(part(tokens)).unflatten(-1, (-1, size)).transpose(1, 2) for part in (key, value))
        mask = packing.mask()[:, None, None]
        dropout = attention.dropout.p if layer.training else 0.0
        out = scaled_dot_product_attention(q, k, v, mask, dropout, scale=attention.scaling)
        attended = layer.attention.output(out.transpose(1, 2).flatten(1), first)
        return layer.output(layer.intermediate(attended), attended).unsqueeze(0)

    return short


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors on the CPU, moved; a GPU need not have done its work before."""
    if device.type == "cuda":  # copied from pageable memory only after all that was asked of the GPU earlier
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def example(model: PreTrainedModel) -> dict[str, Tensor]:
    """A small padded batch; with a few rows, whose outputs do not all lie close together by chance."""
    lengths = torch.tensor([[9], [5], [7], [2]])
    mask = (torch.arange(9) < lengths).long()
    ids = (torch.arange(36).reshape(4, 9) * 7 + 11) % model.config.vocab_size
    ids = torch.where(mask.bool(), ids, getattr(model.config, "pad_token_id", None) or 0)
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _same(outputs: Any, expected: Any, batch: Mapping[str, Tensor]) -> bool:
    """Whether all tensors of two outputs agree up to rounding where there are tokens."""
    mask = batch["attention_mask"]

    def agree(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return False
        if a.shape[:2] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        spread = (b - b.mean(0)).abs().max()  # a bias makes values large and tells nothing of what was read
        return bool((a - b).abs().max() <= TOLERANCE * spread)

    found, wanted = outputs.to_tuple(), expected.to_tuple()
    return len(found) == len(wanted) > 0 and all(map(agree, found, wanted))
