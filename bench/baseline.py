"""Is the candidate better than the cheapest serious model? TF-IDF + logistic regression on the same rows.

    python -m bench.baseline .overnight/nights/<id>

Trains on the night's training *and* validation rows (the baseline needs none to choose by), scores the same frozen
test rows, and prints both macro F1 with their 95 % bootstrap intervals and the paired difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from overnight import problems
from overnight.evaluation import compare, evaluate


def main(folder: Path) -> None:
    rows = {side: pd.read_parquet(folder / "rows" / f"{side}.parquet") for side in ("train", "validation", "test")}
    seen, test = pd.concat([rows["train"], rows["validation"]]), rows["test"]
    baseline = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), LogisticRegression(C=4, max_iter=1000)
    )
    baseline.fit(seen.text, seen.label)
    labels = sorted(seen.label.unique())
    scores = baseline.predict_proba(test.text)
    theirs = [
        {
            "label": baseline.classes_[row.argmax()],
            "score": float(row.max()),
            "scores": dict(zip(labels, row, strict=True)),
        }
        for row in scores
    ]
    ours = json.loads((folder / "evaluation" / "predictions.json").read_text())["candidate"]
    targets = test.label.tolist()
    problem, facts = problems.get("sequence-classification"), {"labels": labels}
    print(f"{len(seen):,} rows to learn from, {len(test):,} test rows")
    for name, predictions in (("TF-IDF + logistic regression", theirs), ("candidate", ours)):
        f1 = evaluate(problem, facts, targets, predictions, metric="macro_f1")["metrics"]["macro_f1"]
        print(f"{name:30} macro F1 {f1['value']:.4f} [{f1['low']:.4f}, {f1['high']:.4f}]")
    gain = compare(problem, facts, targets, ours, theirs, metric="macro_f1")["gain"]
    print(f"{'difference':30}          {gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
