"""Is the candidate better than the cheapest serious models? TF-IDF of words, or of runs of up to four signs, + logistic
regression on the same rows.

    python -m bench.baseline .overnight/nights/<id>

Trains on the night's training *and* validation rows (the baseline needs none to choose by), scores the same frozen
test rows, and prints each macro F1 with its 95 % bootstrap interval and the paired difference to the candidate's. Of
texts without spaces between words only the signs mean anything.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from overnight import problems
from overnight.evaluation import compare, evaluate

BASELINES = {
    "words": TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True),
    "signs": TfidfVectorizer(analyzer="char", ngram_range=(1, 4), min_df=2, sublinear_tf=True, lowercase=False),
}


def main(folder: Path) -> None:
    rows = {side: pd.read_parquet(folder / "rows" / f"{side}.parquet") for side in ("train", "validation", "test")}
    seen, test = pd.concat([rows["train"], rows["validation"]]), rows["test"]
    labels = sorted(seen.label.unique())
    ours = json.loads((folder / "evaluation" / "predictions.json").read_text())["candidate"]
    targets = test.label.tolist()
    problem, facts = problems.get("sequence-classification"), {"labels": labels}

    def say(name: str, measured: dict[str, float], sign: str = "") -> None:
        value, low, high = (f"{measured[part]:{sign}.4f}" for part in ("value", "low", "high"))
        print(f"{name:30} {value} [{low}, {high}]")

    def f1(predictions: list[dict[str, Any]]) -> dict[str, float]:
        return evaluate(problem, facts, targets, predictions, metric="macro_f1")["metrics"]["macro_f1"]

    print(f"{len(seen):,} rows to learn from, {len(test):,} test rows; macro F1")
    say("candidate", f1(ours))
    for name, features in BASELINES.items():
        baseline = make_pipeline(features, LogisticRegression(C=4, max_iter=1000)).fit(seen.text, seen.label)
        scores = baseline.predict_proba(test.text)
        theirs = [
            {
                "label": baseline.classes_[row.argmax()],
                "score": float(row.max()),
                "scores": dict(zip(labels, row, strict=True)),
            }
            for row in scores
        ]
        say(f"logistic regression of {name}", f1(theirs))
        say("  candidate ahead by", compare(problem, facts, targets, ours, theirs, metric="macro_f1")["gain"], "+")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
