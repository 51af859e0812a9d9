"""Is the candidate better than something cheap? A naive baseline on the night's own split.

    python -m bench.baseline .overnight/nights/<id>

The baseline may learn from the night's training *and* validation rows (it needs none to choose by) and answers the same
frozen test rows; printed are both values of the night's metric with their 95 % bootstrap intervals, and the paired
difference. Baselines by problem: `BASELINES`.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from overnight import problems
from overnight.evaluation import compare, evaluate
from overnight.problems.base import Prediction

WORD = re.compile(r"\w+")


def main(folder: Path) -> None:
    record = json.loads((folder / "night.json").read_text())
    record["model"] = json.loads((folder / "config.json").read_text())["model"]
    rows = {side: pd.read_parquet(folder / "rows" / f"{side}.parquet") for side in ("train", "validation", "test")}
    seen, test = pd.concat([rows["train"], rows["validation"]], ignore_index=True), rows["test"]
    problem, facts, metric = problems.get(record["config"]["problem"]), record["facts"], record["metric"]
    ours = json.loads((folder / "evaluation" / "predictions.json").read_text())["candidate"]
    targets = [problem.truth(cell) for cell in test[problem.target]]
    print(f"{record['id']}: {len(seen):,} rows to learn from, {len(test):,} test rows")
    options: dict[str, Any] = {"metric": metric}
    _say("candidate", evaluate(problem, facts, targets, ours, **options)["metrics"])
    for name, baseline in BASELINES[problem.name].items():
        theirs = baseline(seen, test, record)
        _say(name, evaluate(problem, facts, targets, theirs, **options)["metrics"])
        worse = metric in problem.lower_is_better
        gain = compare(problem, facts, targets, ours, theirs, lower_is_better=worse, **options)["gain"]
        print(f"{'':12}candidate better by {gain['value']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}] {metric}")


def _say(name: str, metrics: dict[str, Any]) -> None:
    print(name)
    for metric, found in metrics.items():
        if "/" not in metric and found["value"] is not None and found["low"] is not None:
            print(f"{'':12}{metric:22} {found['value']:.4f} [{found['low']:.4f}, {found['high']:.4f}]")


def _texts(rows: pd.DataFrame) -> list[str]:
    return [" \n ".join(cells) for cells in zip(*(rows[c] for c in ("text", "second") if c in rows), strict=True)]


def tf_idf(
    seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any], characters: bool = False
) -> list[Prediction]:
    """Words and pairs of words, or one to four characters; logistic regression on them."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    kind: dict[str, Any] = (
        {"ngram_range": (1, 4), "analyzer": "char", "lowercase": False} if characters else {"ngram_range": (1, 2)}
    )
    model = make_pipeline(TfidfVectorizer(min_df=2, sublinear_tf=True, **kind), LogisticRegression(C=4, max_iter=1000))
    model.fit(_texts(seen), seen.label)
    return _labels(model.classes_, model.predict_proba(_texts(test)))


def _labels(classes: Any, shares: np.ndarray) -> list[Prediction]:
    return [
        {
            "label": classes[row.argmax()],
            "score": float(row.max()),
            "scores": dict(zip(classes, row.tolist(), strict=True)),
        }
        for row in shares
    ]


def tf_idf_labels(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """As `tf_idf`, one regression a label; said from the probability on that is best for rows left out in turn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MultiLabelBinarizer

    from overnight.problems.multi_label_classification import best_threshold

    problem, labels = problems.get("multi-label-classification"), record["facts"]["labels"]
    marks = MultiLabelBinarizer(classes=labels).fit_transform([problem.truth(cell) for cell in seen.labels])
    words = TfidfVectorizer(min_df=2, sublinear_tf=True, ngram_range=(1, 2))
    model = make_pipeline(words, OneVsRestClassifier(LogisticRegression(C=4, max_iter=1000)))
    left_out = cross_val_predict(model, _texts(seen), marks, cv=3, method="predict_proba")
    limit = best_threshold(left_out.reshape(-1), marks.reshape(-1))
    return [
        {
            "labels": [label for label, x in zip(labels, row, strict=True) if x >= limit],
            "scores": dict(zip(labels, row, strict=True)),
        }
        for row in model.fit(_texts(seen), marks).predict_proba(_texts(test)).tolist()
    ]


def commonest_labels(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """The same for every text: each label's share, the commonest said."""
    problem, labels = problems.get("multi-label-classification"), record["facts"]["labels"]
    counts = Counter(label for cell in seen.labels for label in problem.truth(cell))
    scores = {label: counts[label] / len(seen) for label in labels}
    return [{"labels": [max(labels, key=lambda label: scores[label])], "scores": scores} for _ in range(len(test))]


def tf_idf_characters(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """As `tf_idf`, of characters."""
    return tf_idf(seen, test, record, characters=True)


def overlap(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """Words that two texts share, how alike their TF-IDF is, their lengths; logistic regression on these four."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(sublinear_tf=True, stop_words="english").fit([*seen.text, *seen.second])

    def features(rows: pd.DataFrame) -> np.ndarray:
        one, other = vectors.transform(rows.text), vectors.transform(rows.second)
        alike = np.asarray(one.multiply(other).sum(1)).ravel()
        words = [[set(WORD.findall(text.lower())) for text in rows[column]] for column in ("text", "second")]
        shared = [len(a & b) / max(1, len(a | b)) for a, b in zip(*words, strict=True)]
        return np.column_stack([alike, shared, rows.text.str.len() / 100, rows.second.str.len() / 100])

    model = LogisticRegression(max_iter=1000).fit(features(seen), seen.label)
    return _labels(model.classes_, model.predict_proba(features(test)))


def ridge(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """TF-IDF of words and pairs of words, ridge regression."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True), Ridge())
    model.fit(seen.text, seen.value.astype(float))
    return [{"value": float(value)} for value in model.predict(test.text)]


def gazetteer(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """Every entity of the rows to learn from, wherever its words stand, if they are an entity more often than not."""
    kinds: dict[tuple[str, ...], Counter[str]] = defaultdict(Counter)
    for cell, text in zip(seen.entities, seen.text, strict=True):
        for span in json.loads(cell):
            kinds[_words(text[span["start"] : span["end"]])][span["type"]] += 1
    longest = max(map(len, kinds))
    met: Counter[tuple[str, ...]] = Counter()
    for text in seen.text:
        words = _words(text)
        met.update(words[i : i + n] for n in range(1, longest + 1) for i in range(len(words) - n + 1))
    known = {name: types.most_common(1)[0][0] for name, types in kinds.items() if 2 * types.total() > met[name]}
    found: list[Prediction] = []
    for text in test.text:
        places = [(match.start(), match.end(), match.group().lower()) for match in WORD.finditer(text)]
        spans, at = [], 0
        while at < len(places):
            for size in range(min(longest, len(places) - at), 0, -1):
                kind = known.get(tuple(word for _, _, word in places[at : at + size]))
                if kind:
                    span = {"start": places[at][0], "end": places[at + size - 1][1]}
                    spans.append({"type": kind, "score": 1.0, **span})
                    break
            at += size if kind else 1
        found.append({"entities": spans})
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(match.lower() for match in WORD.findall(text))


def likest_sentence(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """The words between those of the question, in the sentence of the context that shares most of them."""
    rare = Counter(word for text in {*seen.context, *test.context} for word in {*_words(text)})
    found: list[Prediction] = []
    for question, context in zip(test.question, test.context, strict=True):
        asked = {*_words(question)}
        sentences = [match.span() for match in re.finditer(r"[^.!?]+[.!?]?", context)]
        start, end = max(
            sentences, key=lambda at: sum(1 / rare[word] for word in {*_words(context[at[0] : at[1]])} & asked)
        )
        runs: list[list[re.Match[str]]] = [[]]
        for match in WORD.finditer(context, start, end):
            runs[-1:] = [runs[-1], []] if match.group().lower() in asked else [[*runs[-1], match]]
        longest = max(runs, key=len)
        start, end = (longest[0].start(), longest[-1].end()) if longest else (start, end)
        found.append({"answer": context[start:end], "start": start, "end": end, "score": 1.0})
    return found


def no_answer(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """Never an answer."""
    return [{"answer": "", "start": None, "end": None, "score": 1.0}] * len(test)


def copied(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """The text itself."""
    return [{"output": text} for text in test.text]


def lead(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """The first sentence of the text."""
    return [{"output": re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]} for text in test.text]


def translation_memory(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """The target of the most alike text, by TF-IDF of characters."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True).fit(seen.text)
    alike = vectors.transform(test.text) @ vectors.transform(seen.text).T
    return [{"output": seen.target.iloc[row]} for row in np.asarray(alike.argmax(1)).ravel()]


def compressed(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """The bytes that LZMA needs for a text more, having seen all others."""
    known = "\n".join(seen.text).encode()

    def size(more: bytes) -> int:
        packer = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 3}])
        return len(packer.compress(known + b"\n" + more)) + len(packer.flush())

    alone, found = size(b""), []
    for text in test.text:
        raw = text.encode()
        nats = 8 * math.log(2) * max(1, size(raw) - alone)
        found.append({"output": "", "loss": nats / len(raw), "tokens": len(raw), "bytes": len(raw)})
    return found


def commonest(seen: pd.DataFrame, test: pd.DataFrame, record: dict[str, Any]) -> list[Prediction]:
    """For the hidden tokens of each text, which are those that the night hid: the commonest token; as probabilities,
    how often each token was seen."""
    from overnight.problems import masked_lm
    from overnight.training.models import load_tokenizer

    problem = problems.get("masked-lm")
    model = record["model"]
    tokenizer = load_tokenizer(model["base"], model.get("revision"))
    counts = np.ones(len(tokenizer))
    for ids in problem.encode(tokenizer, {"text": list(seen.text)}, {}, model["max_length"])["input_ids"]:
        np.add.at(counts, ids[1:-1], 1)
    top, nats = int(counts.argmax()), -np.log(counts / counts.sum())
    found: list[Prediction] = []
    for text in test.text:
        encoded = problem.encode(tokenizer, {"text": [text]}, {}, model["max_length"])
        windows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        labels = np.concatenate([masked_lm.hide(one, training=False)["labels"] for one in windows])
        hidden = labels[labels >= 0]
        found.append(masked_lm.prediction([nats[hidden].sum(), len(hidden), (hidden == top).sum()]))
    return found


Baseline = Callable[[pd.DataFrame, pd.DataFrame, dict[str, Any]], list[Prediction]]
LABELS: dict[str, Baseline] = {
    "TF-IDF of words, logistic regression": tf_idf,
    "TF-IDF of characters, logistic regression": tf_idf_characters,
}
BASELINES: dict[str, dict[str, Baseline]] = {
    "sequence-classification": LABELS,
    "pair-classification": {**LABELS, "overlap of words, logistic regression": overlap},
    "multi-label-classification": {
        "TF-IDF of words, a logistic regression a label": tf_idf_labels,
        "the commonest label": commonest_labels,
    },
    "regression": {"TF-IDF of words, ridge regression": ridge},
    "token-classification": {"gazetteer": gazetteer},
    "question-answering": {"words beside the question's": likest_sentence, "no answer": no_answer},
    "translation": {"copied": copied, "translation memory": translation_memory},
    "summarization": {"the first sentence": lead},
    "text-generation": {"LZMA": compressed},
    "masked-lm": {"the commonest tokens": commonest},
}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
