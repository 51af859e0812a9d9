"""Extractive question answering: the span of a context that answers a question, or none."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from unicodedata import category

from overnight.problems.base import Cell, Facts, Prediction, Problem
from overnight.problems.texts import check_offsets, code_points, in_cleaned, text_of, without_padding
from overnight.writing import parts, unspaced

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from overnight.settings import Training
    from overnight.tally import Tally
    from overnight.training.data import TokenizedRows

BEST = 20
"""Starts and ends of a window that are looked at, as in the script of Hugging Face's examples."""
LONGEST = 30
"""Tokens of an answer."""
STRIDE = 1 / 6
"""Of the longest input, what a window repeats of the one before."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class QuestionAnswering(Problem):
    """`question`, `context` → `answer`, a span of the context in characters; "" where the context answers nothing.

    A cell of `answers` is a JSON list of {text, start}, or SQuAD's {"text": […], "answer_start": […]}; `[]`: there is
    no answer. All questions of one context fall on one side of the split.
    """

    name: ClassVar[str] = "question-answering"
    required_roles: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    text_roles: ClassVar[tuple[str, ...]] = ("question", "context")
    split_roles: ClassVar[tuple[str, ...]] = ("context",)
    target: ClassVar[str] = "answers"
    labelled: ClassVar[bool] = False
    points_into_text: ClassVar[bool] = True
    tunes: ClassVar[bool] = True
    default_metric: ClassVar[str] = "f1"

    def prepare(self, columns: dict[str, list[Cell]], clean: Callable[[str], Cell]) -> list[str | None]:
        """Answers become a JSON list of {text, start}, where they stand in the cleaned context."""
        reasons: list[str | None] = []
        for place, (context, cell) in enumerate(zip(columns["context"], columns["answers"], strict=True)):
            found: str | None = None
            reason = None
            if context is not None and cell is not None:
                try:
                    found = json.dumps(_answers(context, cell, clean), ensure_ascii=False)
                except ValueError as error:
                    reason = str(error)
            columns["answers"][place] = found
            reasons.append(reason)
        return reasons

    def facts(self, rows: Mapping[str, Iterable[Any]]) -> Facts:
        """Whether some questions have no answer, and by how much no answer must win to be given (SQuAD 2.0)."""
        return {"no_answer": any(not self.truth(cell) for cell in rows["answers"]), "threshold": 0.0}

    def truth(self, cell: str) -> list[str]:
        return [answer["text"] for answer in json.loads(cell)]

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, batch: Mapping[str, Sequence[str]], facts: Facts, max_length: int
    ) -> dict[str, list[Any]]:
        """See `Problem.encode`; a feature is the question with a window of the context.

        `labels`: first and last token of the first answer, 0 and 0 where the window does not hold it. `starts`, `ends`:
        where each token stands in the context, -1 for others. `context` (code points), and `gold` (start, end, …) where
        answers are known, are with the first window of a row.

        Raises:
            UserError: the tokenizer cannot say where a token stands, or questions leave no room for a context.
        """
        import numpy as np

        check_offsets(tokenizer)
        room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
        asked = _cut_questions(tokenizer, batch["question"], room // 2)
        encoded = tokenizer(
            asked,
            list(batch["context"]),
            truncation="only_second",
            max_length=max_length,
            stride=int(STRIDE * room),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        features: dict[str, list[Any]] = {name: [] for name in ("input_ids", "row", "starts", "ends", "context")}
        if "token_type_ids" in encoded:
            features["token_type_ids"] = list(encoded["token_type_ids"])
        known = "answers" in batch
        if known:
            features |= {"labels": [], "gold": []}
        last = -1
        for number, row in enumerate(encoded["overflow_to_sample_mapping"]):
            second = [part == 1 for part in encoded.sequence_ids(number)]
            offsets = zip(encoded["offset_mapping"][number], second, strict=True)
            places = [_without_blanks(batch["context"][row], *place) if own else (-1, -1) for place, own in offsets]
            features["input_ids"].append(encoded["input_ids"][number])
            features["row"].append(row)
            features["starts"].append([start for start, _ in places])
            features["ends"].append([end for _, end in places])
            first, last = row != last, row
            text = batch["context"][row] if first else ""
            features["context"].append(code_points(text))
            if known:
                spans = [(a["start"], a["start"] + len(a["text"])) for a in json.loads(batch["answers"][row])]
                features["labels"].append(_tokens_of(spans[0], places) if spans else [0, 0])
                gold = [number for span in spans for number in span] if first else []
                features["gold"].append(np.array(gold, dtype=np.int64))
        return features

    def load_model(self, base: str, facts: Facts, training: Training, revision: str | None = None) -> PreTrainedModel:
        from transformers import AutoModelForQuestionAnswering

        from overnight.training.models import load_pretrained

        return load_pretrained(AutoModelForQuestionAnswering, base, revision, training=training)

    def loss(self, outputs: Any, batch: Mapping[str, Tensor], training: Training, class_weights: Any) -> Tensor:
        """Cross-entropy of the first and the last token of the answer, averaged over the two."""
        from torch.nn.functional import cross_entropy

        padding = batch["attention_mask"] == 0
        sides = zip((outputs.start_logits, outputs.end_logits), batch["labels"].T, strict=True)
        losses = [
            cross_entropy(
                logits.float().masked_fill(padding, -1e4),
                place,
                label_smoothing=training.label_smoothing,
                reduction="sum",
            )
            for logits, place in sides
        ]
        return (losses[0] + losses[1]) / 2

    def outputs(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[np.ndarray]:
        """(tokens × 2) logits of start and end."""
        import torch

        return without_padding(torch.stack([outputs.start_logits, outputs.end_logits], dim=-1), batch)

    def decode(
        self, outputs: Sequence[np.ndarray], facts: Facts, features: Any = None, tokenizer: Any = None
    ) -> list[Prediction]:
        """One dict a row: `answer`, `start` and `end` in the context (null without an answer), and `score`: the
        probability of the answer among the best spans of all windows and no answer."""
        return [_choose(found, facts) for found in self._candidates(outputs, features)]

    def _candidates(self, outputs: Sequence[np.ndarray], features: Any) -> Iterator[dict[str, Any]]:
        """Of each row its context, the logit of no answer, and (logit, start, end) of the best spans."""
        row: dict[str, Any] | None = None
        for place, logits in enumerate(outputs):
            feature = features[place]
            if row is None or int(feature["row"]) != row["row"]:
                if row is not None:
                    yield row
                row = {"row": int(feature["row"]), "context": feature["context"], "none": None, "spans": []}
            none = float(logits[0].sum())
            row["none"] = none if row["none"] is None else min(row["none"], none)
            row["spans"] += _best_spans(logits, feature["starts"], feature["ends"])
        if row is not None:
            yield row

    def tuned(
        self, outputs: Sequence[np.ndarray], targets: Sequence[Any], facts: Facts, features: Any, metric: str
    ) -> Facts:
        """The threshold of no answer with the best F1 on the validation rows, as SQuAD 2.0's script finds it."""
        if not facts["no_answer"]:
            return facts
        margins: list[tuple[float, float]] = []  # by how much no answer wins, and what the answer would gain
        for found, target in zip(self._candidates(outputs, features), targets, strict=True):
            best = max(found["spans"], default=None)
            if best is None:
                continue
            answer = text_of(found["context"][best[1] : best[2]])
            margins.append((found["none"] - best[0], scores(answer, target)[1] - scores("", target)[1]))
        gained, top, threshold = 0.0, 0.0, -1e9
        margins.sort()
        for place, (margin, gain) in enumerate(margins):
            gained += gain
            following = margins[place + 1][0] if place + 1 < len(margins) else margin + 1.0
            if gained > top and following > margin:
                top, threshold = gained, (margin + following) / 2
        return facts | {"threshold": threshold}

    def targets(self, rows: TokenizedRows, facts: Facts) -> list[list[str]]:
        found: list[list[str]] = []
        for i in range(len(rows)):
            feature = rows[i]
            if int(feature["row"]) < len(found):
                continue
            spans = feature["gold"].reshape(-1, 2).tolist()
            found.append([text_of(feature["context"][start:end]) for start, end in spans])
        return found

    def tally(self, targets: Sequence[Sequence[str]], predictions: Sequence[Prediction], facts: Facts) -> Tally:
        """Exact match and F1 of words as SQuAD's official script counts them, the best over a question's answers; also
        of the questions that have an answer, and the share right of those that have none."""
        import numpy as np

        from overnight.tally import Tally

        adds = np.zeros((len(targets), 6))
        for row, (target, prediction) in enumerate(zip(targets, predictions, strict=True)):
            exact, f1 = scores(prediction["answer"], target)
            adds[row] = [1, exact, f1, bool(target), f1 * bool(target), exact * (not target)]
        cells, group = np.unique(adds, axis=0, return_inverse=True)
        return Tally(group.reshape(-1), cells, lambda sums: _metrics(sums, facts["no_answer"]))

    def metric_names(self, facts: Facts) -> list[str]:
        return ["f1", "exact_match", *(("answerable_f1", "no_answer_accuracy") if facts["no_answer"] else ())]

    def right(self, target: Sequence[str], prediction: Prediction, facts: Facts) -> bool:
        return bool(scores(prediction["answer"], target)[0])

    def same(self, one: Prediction, other: Prediction) -> bool:
        return (one["start"], one["end"], one["answer"]) == (other["start"], other["end"], other["answer"])

    def gist(self, prediction: Prediction) -> tuple[str, float]:
        return "answer" if prediction["answer"] else "none", float(prediction["score"])

    def columns(self, facts: Facts, scores: bool) -> dict[str, type]:
        return {"answer": str, "start": int, "end": int, "score": float}

    def cells(self, prediction: Prediction, facts: Facts, scores: bool) -> list[Any]:
        return [prediction[name] for name in ("answer", "start", "end", "score")]


def answer_tokens(text: str) -> list[str]:
    """As SQuAD's official script: words in lower case, without punctuation and articles.

    In scripts without spaces between words each sign is one, and their punctuation goes too, as in MLQA's script.
    """
    bare = text.lower().translate(_PUNCTUATION)
    if unspaced(bare):
        bare = "".join(sign for sign in bare if category(sign)[0] != "P")
    return parts(_ARTICLES.sub(" ", bare))


def scores(answer: str, targets: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 (0 to 1) against the closest of the targets; no target: right when there is no answer."""
    ours = answer_tokens(answer)
    # the script leaves out targets of which nothing is left, and takes them for no answer when all are
    wanted = [tokens for tokens in map(answer_tokens, targets) if tokens] or [[]]
    return max(float(ours == theirs) for theirs in wanted), max(_f1(ours, theirs) for theirs in wanted)


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def _answers(context: str, cell: str, clean: Callable[[str], Cell]) -> list[dict[str, Any]]:
    """The answers of a cell; a ValueError says what is wrong, as one_word."""
    try:
        given = json.loads(cell)
        if isinstance(given, Mapping):
            pairs = list(zip(given["text"], given["answer_start"], strict=True))
        else:
            pairs = [(one["text"], one["start"] if "start" in one else one["answer_start"]) for one in given]
        if not all(isinstance(text, str) and isinstance(start, int) for text, start in pairs):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError("unreadable_answers") from None
    whole = clean(context) or ""
    found: list[dict[str, Any]] = []
    for text, start in pairs:
        own = clean(text)
        if own is None:
            raise ValueError("empty_answer")
        if context[start : start + len(text)] != text or start < 0:
            raise ValueError("answer_not_in_context")
        at, _ = in_cleaned(context, start, start + len(text), clean)
        if whole[at : at + len(own)] != own:
            raise ValueError("answer_lost_in_cleaning")
        found.append({"text": own, "start": at})
    return found


def _cut_questions(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], room: int) -> list[str]:
    """Questions of more than `room` tokens are cut there, so that a context always finds room."""
    encoded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        question if len(offsets) <= room else question[: offsets[room - 1][1]]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def _without_blanks(context: str, start: int, end: int) -> tuple[int, int]:
    """Where a token stands, without the blanks in front that some tokenizers count in."""
    while start < end and context[start].isspace():
        start += 1
    return start, end


def _tokens_of(span: tuple[int, int], places: Sequence[tuple[int, int]]) -> list[int]:
    """First and last token of a span; 0 and 0 when the window does not hold all of it."""
    inside = [token for token, (start, end) in enumerate(places) if 0 <= start < span[1] and end > span[0]]
    if not inside or places[inside[0]][0] > span[0] or places[inside[-1]][1] < span[1]:
        return [0, 0]
    return [inside[0], inside[-1]]


def _best_spans(logits: np.ndarray, starts: Any, ends: Any) -> list[tuple[float, int, int]]:
    """(logit, start, end in characters) of the best spans of a window that are none too long."""
    import numpy as np

    where = np.asarray(starts)
    inside = np.flatnonzero((where >= 0) & (np.asarray(ends) > where))
    first, last = (inside[np.argsort(-logits[inside, side], kind="stable")[:BEST]] for side in (0, 1))
    found = [
        (float(logits[a, 0] + logits[b, 1]), int(starts[a]), int(ends[b]))
        for a in first
        for b in last
        if a <= b < a + LONGEST
    ]
    return sorted(found, reverse=True)[:BEST]


def _choose(found: Mapping[str, Any], facts: Facts) -> Prediction:
    import math

    places: dict[tuple[int, int], float] = {}  # a span that two windows show is one
    for logit, start, end in sorted(found["spans"], reverse=True):
        places.setdefault((start, end), logit)
    spans = [(logit, start, end) for (start, end), logit in places.items()][:BEST]
    logits = [*(logit for logit, _, _ in spans), *([found["none"]] if facts["no_answer"] or not spans else [])]
    top = max(logits)
    whole = sum(math.exp(logit - top) for logit in logits)
    if not spans or facts["no_answer"] and found["none"] - spans[0][0] > facts["threshold"]:
        return {"answer": "", "start": None, "end": None, "score": math.exp(found["none"] - top) / whole}
    logit, start, end = spans[0]
    answer = text_of(found["context"][start:end])
    return {"answer": answer, "start": start, "end": end, "score": math.exp(logit - top) / whole}


def _metrics(sums: np.ndarray, no_answer: bool) -> dict[str, np.ndarray]:
    """(resamples, rows | exact | f1 | answerable | f1 of answerable | exact of others) → the metrics."""
    import numpy as np

    rows, exact, f1, answerable, answerable_f1, others = sums.T
    found = {"f1": f1 / rows, "exact_match": exact / rows}
    if no_answer:
        with np.errstate(invalid="ignore"):  # none of a kind: NaN
            found["answerable_f1"] = answerable_f1 / answerable
            found["no_answer_accuracy"] = others / (rows - answerable)
    return found
