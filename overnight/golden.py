"""The golden set: texts that are nobody's, and what the model answered to them on the night it was made.

    write_golden(folder, scorer)        # golden.json beside the weights, before the model is registered
    check_golden(folder, scorer)        # NightFailed when the model no longer answers like that

The texts are drawn by a fixed seed from the vocabulary of the model's own tokenizer, so they exist in every language
and for every problem, and quote no text of the data. Four tokens or more drawn by chance are no sentence of anybody's.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight.errors import Complaint, NightFailed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from overnight.training.predict import Scorer

GOLDEN = "golden.json"
SEED = 17
LENGTHS = (4, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64)
"""Tokens of the texts; one more text is longer than the model reads."""
TOLERANCE = 1e-3
"""Largest difference of a score that is still the same answer. In float32 another number of threads or another batch
moved the scores of a MiniLM by 2e-7 at most; rounding its weights to bf16 moved them by 5e-3. So 1e-3 is far above the
noise and below every real change, and whoever reads scores reads two or three digits."""


def write_golden(folder: Path, scorer: Scorer) -> None:
    """Adds `golden.json` to a finished model folder, replacing an earlier one."""
    tokenizer, roles = scorer.tokenizer, scorer.problem.text_roles
    texts = golden_texts(tokenizer, roles, scorer.card.max_length)
    facts = {"texts": texts, "predictions": scorer.predict_texts(texts), "computed": _computed(scorer)}
    (folder / GOLDEN).write_text(json.dumps(facts, indent=1, ensure_ascii=False), encoding="utf-8")


def check_golden(folder: Path, scorer: Scorer) -> int:
    """Asks the model of a folder its golden texts again; returns how many there are: 0 for a model without a set.

    Raises:
        NightFailed: an answer is not the one that was written down; says how many are not, and by how much.
    """
    path = folder / GOLDEN
    if not path.exists():
        return 0  # registered by a version of overnight that wrote none
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        texts, expected, computed = facts["texts"], facts["predictions"], facts["computed"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NightFailed(Complaint("smoke test", f"{path} cannot be read ({error})")) from None
    wrong, furthest = compare(expected, scorer.predict_texts(texts))
    # written token by token, an answer can go another way from one rounding on
    if wrong > (len(texts) // 4 if scorer.problem.generates else 0):
        then, now = (", ".join(map(str, made.values())) for made in (computed, _computed(scorer)))
        rule = f"{wrong} of {len(texts)} golden texts are answered otherwise than when the model was made"
        how = f"scores up to {furthest:.3g} away where {TOLERANCE:g} is allowed (made with {then}; here {now})"
        raise NightFailed(Complaint("smoke test", rule, how))
    return len(texts)


def golden_texts(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str], max_length: int) -> list[dict[str, str]]:
    """Texts for every role, the same ones for the same tokenizer; all but the last are short."""
    draw = random.Random(SEED)
    codes = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    return [
        {role: _text(draw, codes, tokenizer, length) for role in roles} for length in (*LENGTHS, max_length * 5 // 4)
    ]


def compare(expected: Sequence[Any], got: Sequence[Any]) -> tuple[int, float]:
    """How many predictions differ, and the largest difference of a number in them.

    A prediction is what a problem's `decode` gives: numbers may be `TOLERANCE` apart (large ones that share of their
    size), all else must be equal. A label may change where the two labels' scores are so close that the tolerance alone
    can swap them.
    """
    wrong, furthest = abs(len(expected) - len(got)), 0.0
    for ours, theirs in zip(expected, got, strict=False):
        numbers: tuple[list[float], list[float]] = [], []
        same = _skeleton(ours, numbers[0]) == _skeleton(_swapped_back(ours, theirs), numbers[1])
        alike = len(numbers[0]) == len(numbers[1])
        apart = max((_apart(*pair) for pair in zip(*numbers, strict=True)), default=0.0) if alike else 0.0
        wrong += not same or apart > TOLERANCE
        furthest = max(furthest, apart)
    return wrong, furthest


def _text(draw: random.Random, codes: list[int], tokenizer: PreTrainedTokenizerBase, length: int) -> str:
    return str(tokenizer.decode([_code(draw, codes, tokenizer) for _ in range(length)], skip_special_tokens=True))


def _code(draw: random.Random, codes: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """A piece with letters in it; of a vocabulary that has hardly any, whatever comes."""
    for _ in range(50):
        code = draw.choice(codes)
        piece = str(tokenizer.decode([code]))
        # not half a character of a byte-level vocabulary, nor the inside of a word or a spare place, as [unused7]
        if any(map(str.isalpha, piece)) and not set(piece) & set("\ufffd#[]<>"):
            break
    return code


def _skeleton(value: Any, numbers: list[float]) -> Any:
    """The value with a 0 for each number with a fraction; those are added to `numbers` in their order."""
    if isinstance(value, Mapping):
        return {key: _skeleton(value[key], numbers) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [_skeleton(one, numbers) for one in value]
    if isinstance(value, float):
        numbers.append(value)
        return 0.0
    return value


def _swapped_back(ours: Any, theirs: Any) -> Any:
    """`theirs` with our label, when the two labels are too close to tell apart."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping) and ours.get("label") != theirs.get("label"):
        scores = ours.get("scores")
        if isinstance(scores, Mapping) and ours.get("label") in scores and theirs.get("label") in scores:
            if scores[ours["label"]] - scores[theirs["label"]] <= 2 * TOLERANCE:
                return {**theirs, "label": ours["label"]}
    return theirs


def _apart(ours: float, theirs: float) -> float:
    apart = abs(ours - theirs) / max(1.0, abs(ours))
    return apart if math.isfinite(apart) else 0.0 if ours == theirs else math.inf


def _computed(scorer: Scorer) -> dict[str, str]:
    """What the numbers were computed with, for whoever has to find out why they changed."""
    model = scorer.model.model
    kind = {"device": model.device.type, "dtype": str(model.dtype).removeprefix("torch.")}
    return kind | {name: f"{name} {version(name)}" for name in ("torch", "transformers")}
