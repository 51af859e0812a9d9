"""How far a window lies from the champion's own rows: an effect that can be read, and the chance of it without drift.

Large windows make every chance small, small ones every effect large; so a window drifts in something when its effect
reaches the limit of the config *and* chance alone hardly explains it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from overnight.tally import Tally

RARE = 1
"""Occurrences in the training rows up to which a token counts as rare."""
DRAWS = 200
"""Windows drawn from the champion's own rows, to see how far token frequencies lie apart without drift."""
FOLDS = 5


@dataclass(frozen=True)
class Finding:
    """One statistic of one window."""

    effect: float
    p: float
    """Chance of such an effect without drift."""
    text: str
    """What was seen, for people."""


def label_share(reference: Sequence[str], window: Sequence[str]) -> Finding:
    """Predicted labels. Effect: the largest change of a label's share, 0 to 1; chance: chi-squared."""
    from scipy.stats import chi2_contingency

    labels = sorted({*reference, *window})
    counts = np.array([[list(side).count(label) for label in labels] for side in (reference, window)])
    shares = counts / counts.sum(1, keepdims=True)
    change = shares[1] - shares[0]
    most = int(np.abs(change).argmax())
    p = float(chi2_contingency(counts).pvalue) if len(labels) > 1 else 1.0
    text = f"{labels[most]} {shares[0, most]:.0%} → {shares[1, most]:.0%}"
    return Finding(float(np.abs(change[most])), p, text)


def distribution(reference: Sequence[float], window: Sequence[float]) -> Finding:
    """A number of each row. Effect and chance: Kolmogorov-Smirnov, the largest gap of the two distributions, 0 to 1.

    Scores of a broken model may be no numbers. They count as below all others, so that such a model drifts.
    """
    from scipy.stats import ks_2samp

    sides = [np.asarray(side, dtype=float) for side in (reference, window)]
    found = ks_2samp(*(np.where(np.isfinite(side), side, -np.inf) for side in sides), method="asymp")
    numbers = [side[np.isfinite(side)] for side in sides]
    text = f"median {' → '.join(f'{np.median(side):.3g}' if len(side) else 'none' for side in numbers)}"
    if broken := len(sides[1]) - len(numbers[1]):
        text += f"; {broken:,} are no numbers"
    return Finding(float(found.statistic), float(found.pvalue), text)


class Vocabulary:
    """Token counts of the training rows, and what windows of rows that were not trained on look like beside them.

    Those windows are drawn from the held-out rows, at most half of them at once: more would be nearly the same rows
    each time, and lie apart far less than windows of new rows do.
    """

    def __init__(self, training: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], size: int):
        self._size = size
        counts = count_tokens(training, size).sum(0)
        self._shares = counts / counts.sum()
        self._rare = counts <= RARE
        self._held_out = count_tokens(held_out, size)
        self._usual_of: dict[int, tuple[float, float]] = {}

    def rare_tokens(self, window: csr_array) -> Finding:
        """Effect: how much larger the share of rare tokens in a text is on average; chance: Mann-Whitney."""
        from scipy.stats import mannwhitneyu

        before, now = (self._rare_shares(rows) for rows in (self._held_out, window))
        p = float(mannwhitneyu(now, before, alternative="greater").pvalue)
        return Finding(float(now.mean() - before.mean()), p, f"{before.mean():.1%} → {now.mean():.1%} of a text")

    def token_frequencies(self, window: csr_array) -> Finding:
        """Effect: Jensen-Shannon distance to the training rows, beyond that of windows of as many rows without drift.

        Chance: by the normal distribution that those windows follow. Of a window that is larger than those that can be
        drawn, parts of their size are looked at: the distance of fewer rows is larger, drift or not.
        """
        from scipy.stats import norm

        rows, own = window.shape[0], self._held_out.shape[0]
        size = min(rows, own // 2)
        if size not in self._usual_of:
            self._usual_of[size] = self._distances(self._held_out, size)
        mean, deviation = self._usual_of[size]
        distance = self._distances(window, size)[0]
        # draws from a finite number of rows lie closer together than new rows would; the error of the mean comes on top
        error = deviation * np.sqrt((size / rows + size / own) / (1 - size / own))
        p = float(norm.sf(distance, mean, max(error, 1e-9)))
        return Finding(distance - mean, p, f"distance {mean:.3f} → {distance:.3f}")

    def _distances(self, texts: csr_array, size: int) -> tuple[float, float]:
        """Mean and standard deviation of the distance over draws of so many of these texts."""
        rows, draw = texts.shape[0], np.random.default_rng(17)
        draws = 1 if size == rows else DRAWS
        found = [self._distance(texts[draw.choice(rows, size, replace=False)].sum(0)) for _ in range(draws)]
        return float(np.mean(found)), float(np.std(found))

    def _distance(self, counts: np.ndarray) -> float:
        from scipy.spatial.distance import jensenshannon

        return float(jensenshannon(counts / counts.sum(), self._shares, base=2))

    def _rare_shares(self, rows: csr_array) -> np.ndarray:
        return np.asarray(rows @ self._rare.astype(float) / np.maximum(rows.sum(1), 1))


def count_tokens(texts: Sequence[Sequence[int]], size: int) -> csr_array:
    """(texts × vocabulary) how often each token occurs."""
    from scipy.sparse import csr_array

    bounds = np.concatenate([[0], np.cumsum([len(text) for text in texts])])
    ids = np.concatenate([np.asarray(text, dtype=np.int64) for text in texts])
    return csr_array((np.ones(len(ids)), ids, bounds), shape=(len(texts), size))


def embedding(reference: np.ndarray, window: np.ndarray, seed: int = 17) -> Finding:
    """Hidden states (rows × width). Effect: how well a classifier tells the two apart; chance: Mann-Whitney.

    As the area under the ROC curve, 0.5 when it cannot, on rows that it was not fitted on.
    """
    from scipy.stats import mannwhitneyu
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows = np.concatenate([reference, window])
    numbers = np.isfinite(rows)
    # the states of a broken model may be no numbers, which tells them apart
    rows = np.column_stack([np.where(numbers, rows, 0.0), ~numbers.all(1)])
    side = np.repeat([0, 1], [len(reference), len(window)])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500))
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    scores = cross_val_predict(classifier, rows, side, cv=folds, method="decision_function")
    found = mannwhitneyu(scores[side == 1], scores[side == 0], alternative="greater")
    area = float(found.statistic) / (len(reference) * len(window))
    return Finding(area, float(found.pvalue), f"told apart with an area of {area:.2f}")


def quality(
    before: Tally | float, now: Tally, metric: str, *, lower_is_better: bool, resamples: int, seed: int = 17
) -> Finding:
    """Labelled rows. Effect: how much worse the metric is than `before`; chance: by the bootstrap's standard error.

    Args:
        before: the champion's test rows, or their metric alone.
        now: the rows of the window.
    """
    from scipy.stats import norm

    from overnight.evaluation.bootstrap import resample

    sides = [now] if isinstance(before, float) else [now, before]
    was = before if isinstance(before, float) else before.values()[metric]
    value = now.values()[metric]
    drawn = [resample(tally, resamples, seed + place)[metric] for place, tally in enumerate(sides)]
    error = float(np.linalg.norm([np.nanstd(values) for values in drawn]))
    drop = (value - was) if lower_is_better else (was - value)
    return Finding(drop, float(norm.sf(drop / max(error, 1e-9))), f"{metric} {was:.3f} → {value:.3f}")
