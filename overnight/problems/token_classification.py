"""Token classification: named entities and other spans of a text, each with a type."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from unicodedata import category

from overnight.errors import Complaint, DataRefused, nearest
from overnight.problems.base import Cell, Facts, Prediction, Problem
from overnight.problems.tags import OUTSIDE, bio, chunks
from overnight.problems.texts import (
    IGNORED,
    SCORES,
    check_offsets,
    in_cleaned,
    label_settings,
    labelled_tokens,
    occurrences,
    without_padding,
)
from overnight.writing import unspaced

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

CONTEXT = 8
"""A window of a long text sees its eighth more on either side than it answers for."""

Span = tuple[int, int, str]
"""Start and end in characters of the text, and type."""


class TokenClassification(Problem):
    """`text` → its `entities`: spans in characters, each with a type and a score.

    A row may also come as `tokens` and `tags` (BIO, BIOES, BILOU, IO), JSON lists of one length; its text is then the
    tokens with spaces between. A word has the tag of its first sub-word. Texts longer than the model reads are read in
    windows that share context, and every word is answered for by one of them.
    """

    name: ClassVar[str] = "token-classification"
    required_roles: ClassVar[tuple[str, ...]] = ("text", "entities")
    sources: ClassVar[tuple[tuple[str, ...], ...]] = (("tokens", "tags"),)
    target: ClassVar[str] = "entities"
    labelled: ClassVar[bool] = False
    points_into_text: ClassVar[bool] = True
    default_metric: ClassVar[str] = "f1"

    def prepare(self, columns: dict[str, list[Cell]], clean: Callable[[str], Cell]) -> list[str | None]:
        """Both forms become `text` and `entities`, a JSON list of {start, end, type} in order."""
        reasons: list[str | None] = []
        rows = zip(*(columns[name] for name in ("text", "entities", "tokens", "tags")), strict=True)
        texts: list[Cell] = []
        found: list[Cell] = []
        for text, entities, tokens, tags in rows:
            row: tuple[Cell, list[Span] | None] = (text, None)
            reason = None
            try:
                if tokens is not None and tags is not None:
                    row = _of_tags(_listed(tokens), _listed(tags), clean)
                elif text is not None and entities is not None:
                    row = _of_spans(text, entities, clean)
            except Unusable as error:
                reason = str(error)
            reasons.append(reason)
            texts.append(row[0])
            found.append(None if row[1] is None else write_spans(row[1]))
        columns |= {"text": texts, "entities": found}
        del columns["tokens"], columns["tags"]
        return reasons

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        types = sorted({kind for cell in rows["entities"] for _, _, kind in self.truth(cell)})
        if not types:
            raise DataRefused(Complaint("entities", "no row to train on has any"))
        return {"types": types, "labels": [OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]}

    def truth(self, cell: str) -> list[Span]:
        return [(span["start"], span["end"], span["type"]) for span in json.loads(cell)]

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """See `Problem.encode`; a feature is a window. `starts` and `ends` are those of a word at its first token, if
        this window answers for it, and -1 elsewhere; `gold` (start, end, type, …) of a row is with its first window.

        Raises:
            UserError: the tokenizer cannot say where a token stands in the text.
            DataRefused: for a type that the training rows did not have.
        """
        import numpy as np

        check_offsets(tokenizer)
        front, back = _around(tokenizer)
        encoded = tokenizer(
            list(batch["text"]),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        features: dict[str, list[Any]] = {name: [] for name in ("input_ids", "row", "starts", "ends")}
        known = "entities" in batch
        if known:
            features |= {"labels": [], "gold": []}
        codes = {label: code for code, label in enumerate(facts["labels"])}
        types = {kind: code for code, kind in enumerate(facts["types"])}
        for row, (text, ids, offsets) in enumerate(
            zip(batch["text"], encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ):
            words = _words(text, encoded.word_ids(row), offsets)
            tags: list[int] = []
            gold: list[int] = []
            if known:
                spans = self.truth(batch["entities"][row])
                for kind in (kind for _, _, kind in spans if kind not in types):
                    rule = "not a type of the training rows"
                    raise DataRefused(Complaint("entities", rule, repr(kind), nearest(kind, types)))
                tags = [codes[tag] for tag in bio([(start, end) for _, start, end in words], spans)]
                gold = [number for start, end, kind in spans for number in (start, end, types[kind])]
            for number, window in enumerate(_windows(words, len(ids), max(1, max_length - len(front) - len(back)))):
                first, last, own = window
                size = last - first
                starts, ends, labels = ([fill] * size for fill in (-1, -1, IGNORED))
                for word in own:
                    token, start, end = words[word]
                    starts[token - first], ends[token - first] = start, end
                    if known:
                        labels[token - first] = tags[word]
                features["row"].append(row)
                features["input_ids"].append([*front, *ids[first:last], *back])
                for name, values, fill in (("starts", starts, -1), ("ends", ends, -1), ("labels", labels, IGNORED)):
                    if name in features:
                        features[name].append([*[fill] * len(front), *values, *[fill] * len(back)])
                if known:
                    features["gold"].append(np.array(gold if number == 0 else [], dtype=np.int64))
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForTokenClassification

        from overnight.training.models import load_pretrained

        settings = label_settings(facts["labels"])
        return load_pretrained(AutoModelForTokenClassification, base, revision, training=training, **settings)

    def counted(self, batch: Mapping[str, Tensor]) -> int:
        return labelled_tokens(batch)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """Cross-entropy of the words, each at its first token."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            outputs.logits.float().flatten(0, 1),
            batch["labels"].flatten(),
            weight=class_weights,
            label_smoothing=training.label_smoothing,
            ignore_index=IGNORED,
            reduction="sum",
        )

    def class_weights(self, rows: TokenizedRows, facts: Facts) -> np.ndarray:
        import numpy as np

        counts = _counts(rows, facts)
        return (counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))).astype(np.float32)

    def prior(self, rows: TokenizedRows, facts: Facts) -> np.ndarray:
        """See `Problem.prior`; the log-share of each tag among the words."""
        import numpy as np

        counts = _counts(rows, facts) + 1
        return np.log(counts / counts.sum()).astype(np.float32)

    def outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[np.ndarray]:
        return without_padding(outputs.logits, batch)

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `entities`, each with `type`, `start`, `end` (characters) and the `score` of its least sure
        word."""
        import numpy as np

        from overnight.problems.labels import softmax

        rows: list[list[tuple[int, int, str, float]]] = []
        for place, logits in enumerate(outputs):
            feature = features[place]
            starts, ends = np.asarray(feature["starts"]), np.asarray(feature["ends"])
            while len(rows) <= int(feature["row"]):
                rows.append([])
            own = np.flatnonzero(starts >= 0)
            shares = softmax(logits[own])
            # a word whose scores are no numbers is said to be something, for `broken` to find
            best = np.where(np.isnan(shares).any(axis=-1), 1, shares.argmax(axis=-1))
            rows[-1] += [
                (int(starts[at]), int(ends[at]), facts["labels"][label], float(share[label]))
                for at, label, share in zip(own, best, shares, strict=True)
            ]
        return [{"entities": list(_entities(words))} for words in rows]

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[list[Span]]:
        found: list[list[Span]] = []
        for i in range(len(rows)):
            feature = rows[i]
            while len(found) <= int(feature["row"]):
                found.append([])
            gold = feature["gold"].reshape(-1, 3).tolist()
            found[-1] += [(start, end, facts["types"][code]) for start, end, code in gold]
        return found

    def tally(self, targets: Sequence[Sequence[Span]], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """Strict precision, recall and F1: a span counts when start, end and type are right (as in seqeval); over all
        spans, averaged over types (macro), and of each type."""
        import numpy as np

        from overnight.tally import Tally

        types = list(self.classes(targets, facts))
        code = {kind: i for i, kind in enumerate(types)}
        adds = np.zeros((len(targets), 3 * len(types) + 1))
        adds[:, -1] = np.array([self._rest(one, code) for one in predictions])
        for row, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
            gold, guess = {tuple(span) for span in target}, _spans(prediction)
            for part, spans in enumerate((gold, guess, gold & guess)):
                for _, _, kind in spans:
                    if kind in code:
                        adds[row, part * len(types) + code[kind]] += 1
        cells, group = np.unique(adds, axis=0, return_inverse=True)
        return Tally(group.reshape(-1), cells, lambda sums: _metrics(sums, types))

    @staticmethod
    def _rest(prediction: Prediction, known: Mapping[str, int]) -> int:
        """Spans of types that neither the model nor the rows have: a champion's that was trained on others."""
        return sum(kind not in known for _, _, kind in _spans(prediction))

    def metric_names(self, facts: Facts) -> list[str]:
        return [*SCORES, "macro_f1", *(f"{score}/{kind}" for score in SCORES for kind in facts["types"])]

    def classes(self, targets: Sequence[Sequence[Span]], facts: Facts) -> dict[str, int]:
        return occurrences((kind for row in targets for _, _, kind in row), facts["types"])

    def right(self, target: Sequence[Span], prediction: Prediction, facts: Facts) -> bool:
        return {tuple(span) for span in target} == _spans(prediction)

    def same(self, one: Prediction, other: Prediction) -> bool:
        return _spans(one) == _spans(other)

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        """The types that occur, and the least sure score."""
        entities = prediction["entities"]
        kinds = ", ".join(sorted({entity["type"] for entity in entities})) or "none"
        return kinds, min((entity["score"] for entity in entities), default=1.0)

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        return {"entities": str}

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        return [json.dumps(prediction["entities"], ensure_ascii=False)]


class Unusable(ValueError):
    """Why nothing can be made of a row, as one_word."""


def write_spans(spans: Sequence[Span]) -> str:
    """Spans as a cell holds them."""
    return json.dumps([{"start": a, "end": b, "type": kind} for a, b, kind in spans], ensure_ascii=False)


def _listed(cell: str) -> list[str]:
    """A JSON list of words; or words with spaces between."""
    if not cell.lstrip().startswith("["):
        return cell.split()
    try:
        return [str(word) for word in json.loads(cell)]
    except (ValueError, RecursionError):
        return cell.split()  # a text that begins with a bracket


def _of_tags(tokens: list[str], tags: list[str], clean: Callable[[str], Cell]) -> tuple[Cell, list[Span]]:
    if len(tokens) != len(tags):
        raise Unusable("tokens_and_tags_of_unequal_length")
    kept = [(token, tag) for token, tag in zip(tokens, tags, strict=True) if token.strip()]
    places, length = [], 0
    for token, _ in kept:
        places.append((length, length + len(token)))
        length += len(token) + 1
    spans = [(places[a][0], places[b - 1][1], kind) for a, b, kind in chunks([tag for _, tag in kept])]
    return _cleaned(" ".join(token for token, _ in kept), spans, clean)


def _of_spans(text: str, cell: str, clean: Callable[[str], Cell]) -> tuple[Cell, list[Span]]:
    try:
        given = [_span(one) for one in json.loads(cell)]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Unusable("unreadable_entities") from None
    before = 0
    for start, end, _ in sorted(given):
        if not 0 <= start < end <= len(text):
            raise Unusable("span_outside_of_text")
        if start < before:
            raise Unusable("overlapping_spans")
        before = end
    return _cleaned(text, sorted(given), clean)


def _cleaned(text: str, given: Sequence[Span], clean: Callable[[str], Cell]) -> tuple[Cell, list[Span]]:
    """The text as it will be, and where the spans stand then."""
    whole = clean(text) or ""
    spans: list[Span] = []
    for start, end, kind in given:
        at, own = in_cleaned(text, start, end, clean)
        if own is None or whole[at : at + len(own)] != own:
            raise Unusable("span_lost_in_cleaning")
        spans.append((at, at + len(own), kind))
    if spans and clean(whole) != whole:  # it will be cleaned once more, as all texts are
        raise Unusable("span_lost_in_cleaning")
    return whole or None, spans


def _span(given: Any) -> Span:
    """{start, end, type or label}, or a list of the three."""
    if isinstance(given, Mapping):
        given = [given["start"], given["end"], given["type"] if "type" in given else given["label"]]
    start, end, kind = given
    if not (isinstance(start, int) and isinstance(end, int) and isinstance(kind, str) and kind.strip()):
        raise ValueError
    return start, end, kind.strip()


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens in front of a text and behind it."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return [], []


def _words(text: str, word_of: Sequence[int | None], offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(first token, start, end) of each word; start and end in characters, without the space that some count in.

    Tokenizers of the SentencePiece kind take everything between two spaces for a word. A span can end before a comma,
    and anywhere in scripts without spaces, so words are parted there too, as BERT's tokenizer does.
    """
    words: list[tuple[int, int, int]] = []
    last: int | None = None
    for token, (word, (start, end)) in enumerate(zip(word_of, offsets, strict=True)):
        while start < end and text[start].isspace():
            start += 1
        if word is None or start == end:
            continue
        while end < len(text) and category(text[end])[0] == "M":  # accents that a tokenizer leaves out
            end += 1
        if words and (start < words[-1][2] or word == last and not _parts(text, start)):
            words[-1] = (*words[-1][:2], max(end, words[-1][2]))
        else:
            words.append((token, start, end))
        last = word
    return words


def _parts(text: str, place: int) -> bool:
    """Whether a word can end before this character: beside punctuation and signs, and in scripts without spaces."""
    return any(category(sign)[0] not in "LMN" or unspaced(sign) for sign in text[place - 1 : place + 1])


def _windows(words: Sequence[tuple[int, int, int]], tokens: int, room: int) -> Iterator[tuple[int, int, list[int]]]:
    """(first token, token after the last, words it answers for) of each window; every word is in one of them."""
    if tokens <= room or not words:
        yield 0, min(tokens, room), list(range(len(words)))
        return
    context = room // CONTEXT
    own: list[int] = []
    for place, (token, _, _) in enumerate(words):
        following = words[place + 1][0] if place + 1 < len(words) else tokens
        if own and following - words[own[0]][0] > room - 2 * context:
            yield _window(words[own[0]][0], token, context, tokens, room, own)
            own = []
        own.append(place)
    if own:
        yield _window(words[own[0]][0], tokens, context, tokens, room, own)


def _window(start: int, end: int, context: int, tokens: int, room: int, own: list[int]) -> tuple[int, int, list[int]]:
    first = max(0, start - context)
    return first, min(tokens, end + context, first + room), own


def _entities(words: Sequence[tuple[int, int, str, float]]) -> Iterator[dict[str, Any]]:
    for first, after, kind in chunks([tag for _, _, tag, _ in words]):
        part = words[first:after]
        yield {"type": kind, "start": part[0][0], "end": part[-1][1], "score": min(score for *_, score in part)}


def _spans(prediction: Prediction) -> set[tuple[Any, ...]]:
    return {(one["start"], one["end"], one["type"]) for one in prediction["entities"]}


def _metrics(sums: np.ndarray, types: Sequence[str]) -> dict[str, np.ndarray]:
    """(resamples, gold | predicted | right | predicted of other types) → the metrics.

    A type without a span in the rows has no metrics (NaN) and is left out of the macro mean.
    """
    from overnight.problems.labels import scores_of_counts, scores_of_each

    k = len(types)
    gold, predicted, right = sums[:, :k], sums[:, k : 2 * k], sums[:, 2 * k : 3 * k]
    whole = scores_of_counts(gold.sum(axis=1), predicted.sum(axis=1) + sums[:, -1], right.sum(axis=1))
    means, each = scores_of_each(gold, predicted, right, types)
    return dict(zip(SCORES, whole, strict=True)) | {"macro_f1": means["macro_f1"]} | each


def _counts(rows: TokenizedRows, facts: Facts) -> np.ndarray:
    """How many words have each tag."""
    import numpy as np

    labels, counts = rows.values("labels"), np.zeros(len(facts["labels"]), dtype=np.int64)
    for start in range(0, len(labels), 1_000_000):  # the array may be larger than memory
        part = labels[start : start + 1_000_000]
        counts += np.bincount(part[part != IGNORED], minlength=len(counts))
    return counts
