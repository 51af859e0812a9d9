"""The monitor: how many windows drift that should not, and how many that should.

    overnight run configs/sentiment.yaml
    python -m bench.drift sentiment [--windows 100] [--pool 6000]

Windows are drawn from rows of the source that the champion's night did not sample, as they are; in some of them a share
of the rows comes from somewhere else (first sentences of news articles), or one label is made more frequent. Everything
is judged by the code and the default limits of `overnight monitor`, with the texts and without them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import texts
from bench.results import record
from overnight.config.operations import Monitor
from overnight.home import Home
from overnight.intake import read_rows
from overnight.monitor.judge import Judge
from overnight.monitor.traffic import Window
from overnight.tracking import registry, store

SIZES = (100, 500)
Draw = Callable[[np.random.Generator, int], np.ndarray]
"""Rows of the pool that make a window of this size."""


class Pool:
    """Texts scored once, in place of a scorer: windows drawn from them need no model."""

    def __init__(self, scorer: Any, rows: Sequence[dict[str, str]]):
        self.tokenizer, self.rows = scorer.tokenizer, rows
        self.answers = scorer.predict_texts(rows)
        self._tokens, self._hidden = scorer.token_ids(rows), scorer.hidden(rows)
        self._place = {row["text"]: place for place, row in enumerate(rows)}

    def token_ids(self, rows: Sequence[dict[str, str]]) -> list[list[int]]:
        return [self._tokens[self._place[row["text"]]] for row in rows]

    def hidden(self, rows: Sequence[dict[str, str]]) -> np.ndarray:
        return np.stack([self._hidden[self._place[row["text"]]] for row in rows])

    def window(self, places: np.ndarray, with_texts: bool) -> Window:
        rows, answers = [self.rows[i] for i in places], [self.answers[i] for i in places]
        return Window(
            "traffic",
            labels=[answer["label"] for answer in answers],
            scores=[answer["score"] for answer in answers],
            characters=[len(row["text"]) for row in rows],
            texts=rows if with_texts else [],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the model that configs/sentiment.yaml made")
    parser.add_argument("--windows", type=int, default=100, help="of each kind and size")
    parser.add_argument("--pool", type=int, default=6000, help="rows that they are drawn from")
    arguments = parser.parse_args()
    home = Home.from_environment()
    store.prepare(home)
    version = registry.champion(home, arguments.name)
    assert version is not None, "no champion"
    judge = Judge(home, version, registry.download(home, version), Monitor())
    assert not isinstance(judge.reference, str), judge.reference
    known = {row["text"] for side in ("training", "validation", "test") for row in getattr(judge.reference, side)}
    fresh = unseen(known).sample(arguments.pool, random_state=0)
    news = sorted(set(first_sentences()) - set(fresh.text))[::2]
    print(f"{len(known):,} rows of the night, {len(fresh):,} others, {len(news):,} sentences of news", file=sys.stderr)
    judge.vocabulary, judge.hidden  # noqa: B018  (made by the model itself, before the pool stands in for it)
    pool = Pool(judge.scorer, [{"text": text} for text in (*fresh.text, *news)])
    judge.__dict__["scorer"] = pool
    kinds: dict[str, Draw] = {"the same source": lambda draw, size: draw.choice(len(fresh), size, replace=False)}
    for share in (0.05, 0.1, 0.25):
        kinds[f"{share:.0%} news"] = mixed(len(fresh), len(news), share)
    for points in (0.1, 0.2):
        kinds[f"positive +{100 * points:.0f} points"] = tilted(fresh.label.to_numpy() == "positive", points)
    table = []
    for kind, draw in kinds.items():
        cells = [shares(judge, pool, draw, size, arguments.windows, both) for both in (True, False) for size in SIZES]
        table.append([kind, *cells])
        print(table[-1], file=sys.stderr)
    header = ["rows", *(f"{size} rows, {what}" for what in ("with texts", "without") for size in SIZES)]
    notes = (
        f"Share of {arguments.windows} windows a kind and size that drift at the default limits, and what drifts in "
        f"a tenth of them or more. Drawn from {len(fresh):,} tweets; a champion of {len(known):,} tweets in all."
    )
    record("drift", "Drift", header, table, notes)


def unseen(known: set[str]) -> pd.DataFrame:
    """All rows of the source but those that the night read."""
    config = texts.config("short")
    with tempfile.TemporaryDirectory() as place:
        data = config.data.model_copy(update={"sample": None})
        rows = pd.read_parquet(read_rows(data, config.problem, Path(place), "sentiment").path)
    rows = rows.dropna(subset=["text", "label"]).drop_duplicates("text")
    return rows[~rows.text.isin(known)]


def first_sentences() -> list[str]:
    config = texts.config("long")
    with tempfile.TemporaryDirectory() as place:
        rows = pd.read_parquet(read_rows(config.data, config.problem, Path(place), "topics").path)
    return [text.partition(". ")[0][:280] for text in rows.text]


def mixed(fresh: int, news: int, share: float) -> Draw:
    def rows(draw: np.random.Generator, size: int) -> np.ndarray:
        other = round(size * share)
        places = draw.choice(fresh, size - other, replace=False), fresh + draw.choice(news, other, replace=False)
        return np.concatenate(places)

    return rows


def tilted(mine: np.ndarray, points: float) -> Draw:
    def rows(draw: np.random.Generator, size: int) -> np.ndarray:
        count = round(size * (mine.mean() + points))
        sides = (np.flatnonzero(mine), count), (np.flatnonzero(~mine), size - count)
        return np.concatenate([draw.choice(places, number, replace=False) for places, number in sides])

    return rows


def shares(judge: Judge, pool: Pool, draw: Draw, size: int, windows: int, with_texts: bool) -> str:
    drawn, drifted, names = np.random.default_rng(size), 0, Counter[str]()
    for _ in range(windows):
        found = judge.record(pool.window(draw(drawn, size), with_texts))
        drifted += found["drifted"]
        names.update(name for name, one in found["findings"].items() if one["drifted"])
    often = [name for name, count in names.most_common() if count >= windows / 10]
    return f"{drifted / windows:.0%}" + (f" ({', '.join(often)})" if often else "")


if __name__ == "__main__":
    main()
