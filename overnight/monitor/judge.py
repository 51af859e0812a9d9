"""One window beside the champion's own rows."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from overnight import problems
from overnight.bulk.inputs import look
from overnight.config.operations import Monitor
from overnight.data import files
from overnight.data.normalise import labels_as_text, normalise, repair
from overnight.errors import Complaint, UserError, nearest
from overnight.evaluation import evaluate
from overnight.home import Home
from overnight.monitor import drift
from overnight.monitor.drift import Finding
from overnight.monitor.reference import Reference, reference_of
from overnight.monitor.state import Record
from overnight.monitor.traffic import Window, traffic
from overnight.tally import Tally

if TYPE_CHECKING:
    from overnight.problems.base import Facts, Prediction, Problem
    from overnight.tracking.registry import Version
    from overnight.training.predict import Scorer

SMALLEST = 20
"""Rows that a window needs, and rows with a label that quality needs."""
RESAMPLES = 2000


@dataclass(frozen=True)
class File:
    """A new file with texts, and labels where they are known."""

    path: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    """Role → column, where the names differ."""
    encoding: str = "auto"


class Judge:
    """Windows beside the champion's own rows; the model is loaded when texts ask for it."""

    def __init__(self, home: Home, version: Version, folder: Path, settings: Monitor):
        self.home, self.version, self.folder, self.settings = home, version, folder, settings
        card = json.loads((folder / "overnight.json").read_text())
        self.problem: Problem = problems.get(card["problem"])
        self.metric: str = card["metric"]
        self.facts: Facts = card["facts"]
        self.reference: Reference | str = reference_of(home, version, self.problem)

    @cached_property
    def scorer(self) -> Scorer:
        from overnight.training.predict import Scorer

        return Scorer(self.folder)

    @cached_property
    def vocabulary(self) -> drift.Vocabulary:
        assert isinstance(self.reference, Reference)
        return self.reference.vocabulary(self.scorer)

    @cached_property
    def hidden(self) -> np.ndarray:
        assert isinstance(self.reference, Reference)
        return self.reference.hidden(self.scorer)

    def traffic(self, history: list[Record]) -> Iterator[Window]:
        """Windows of scored traffic that have not been judged yet; the last may be smaller."""
        seen = [tuple(r["cursor"]) for r in history if r["version"] == self.version.number and r.get("cursor")]
        folder = self.home.root / "scored" / self.version.name
        after = max(seen, default=None)
        return traffic(folder, self.version.number, self.settings.window, self.problem.text_roles, after)

    def windows_of(self, file: File) -> Iterator[Window]:
        """Windows of about the usual size of all rows of a file that have a text, scored now.

        Raises:
            UserError: it cannot be read, lacks a column or is too small.
        """
        roles, target = self.problem.text_roles, self.problem.target
        wrong = [name for name in file.columns if name not in (*roles, target)]
        if wrong:
            rule = f"must be one of {', '.join((*roles, target))}"
            raise UserError(*(Complaint("--column", rule, repr(name)) for name in wrong))
        columns = {role: file.columns.get(role, role) for role in roles}
        source = look(file.path, file.encoding, columns, exact=self.problem.points_into_text)
        truth = file.columns.get(target, target)
        if target in file.columns and truth not in source.schema.names:
            rule = f"no such column in {file.path.name}"
            raise UserError(Complaint("--column", rule, repr(truth), nearest(truth, source.schema.names)))
        rows: list[tuple[dict[str, str], str | None]] = []
        for chunk in source.chunks(0, 512, 65_536):
            cells = chunk.records() if truth in source.schema.names else [{}] * len(chunk)
            rows += [
                (text, files.as_text(row.get(truth))) for text, row in zip(chunk.texts, cells, strict=True) if text
            ]
        if len(rows) < SMALLEST:
            rule = f"needs at least {SMALLEST} rows with a text"
            raise UserError(Complaint(str(file.path), rule, f"{len(rows)}"))
        with open(file.path, "rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()[:16]
        for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // self.settings.window)):
            given, targets = zip(*(rows[i] for i in part), strict=True)
            texts = [{role: _clean(text) or "" for role, text in row.items()} for row in given]
            answers = self.scorer.predict_texts(texts)
            yield Window(
                file.path.name,
                f"{digest} {part[0]}",
                *self._gist(answers),
                [sum(map(len, text.values())) for text in texts],
                answers=answers,
                texts=texts,
                targets=truths(self.problem, given, targets),
            )

    def _gist(self, answers: Sequence[Prediction]) -> tuple[list[str], list[float]]:
        found = [self.problem.gist(answer) for answer in answers]
        return [label for label, _ in found], [score for _, score in found]

    def record(self, window: Window) -> Record:
        """A window as it is remembered: every statistic with its limit, and whether any of them drifted."""
        found = self._findings(window)
        quality = self._quality(window)
        if quality is not None:
            found["quality"] = quality[0]
        # a false alarm is as rare over all statistics of the windows that the rule looks at
        chance = self.settings.false_alarms / (len(found) * self.settings.windows) if found else 0.0
        findings: dict[str, Any] = {}
        for name, one in found.items():
            limit = getattr(self.settings, name)
            drifted = bool(one.effect >= limit and one.p <= chance)
            findings[name] = {"effect": one.effect, "limit": limit, "p": one.p, "drifted": drifted, "text": one.text}
        return {
            "key": f"{self.version.number} {window.key}",
            "version": self.version.number,
            "source": window.source,
            "rows": len(window),
            "since": window.since,
            "until": window.until,
            "cursor": window.cursor,
            "judged": time.time(),
            "drifted": any(one["drifted"] for one in findings.values()),
            "findings": findings,
            "quality": None if quality is None else quality[1],
        }

    def _findings(self, window: Window) -> dict[str, Finding]:
        found: dict[str, Finding] = {}
        if isinstance(self.reference, Reference):
            found["label_share"] = drift.label_share(self.reference.labels, window.labels)
            found["confidence"] = drift.distribution(self.reference.scores, window.scores)
            found["length"] = drift.distribution(self.reference.characters, window.characters)
            if window.texts:
                tokens = drift.count_tokens(self.scorer.token_ids(window.texts), len(self.scorer.tokenizer))
                found["rare_tokens"] = self.vocabulary.rare_tokens(tokens)
                found["token_frequencies"] = self.vocabulary.token_frequencies(tokens)
                found["embedding"] = drift.embedding(self.hidden, self.scorer.hidden(window.texts))
        return found

    def _quality(self, window: Window) -> tuple[Finding, dict[str, Any]] | None:
        """How much worse the metric is than on the champion's test rows, and the metric with its interval."""
        answered = zip(window.targets, window.answers, strict=True)
        known = [(true, answer) for true, answer in answered if true is not None]
        if len(known) < SMALLEST:
            return None
        targets, answers = zip(*known, strict=True)
        live = evaluate(self.problem, self.facts, targets, answers, metric=self.metric, resamples=RESAMPLES)
        if live["metrics"][self.metric]["value"] is None:  # the F1 of a label that no row has
            return None
        worse = self.metric in self.problem.lower_is_better
        own = self.reference
        if isinstance(own, Reference):
            before: Tally | float = self.problem.tally(own.targets, own.answers, self.facts)
        else:
            before = self.version.metrics[self.metric]
        now = self.problem.tally(targets, answers, self.facts)
        found = drift.quality(before, now, self.metric, lower_is_better=worse, resamples=RESAMPLES)
        return found, {"metric": self.metric, "rows": len(known), **live["metrics"][self.metric]}


def truths(problem: Problem, texts: Sequence[Mapping[str, str]], cells: Sequence[str | None]) -> list[Any]:
    """The targets of rows as the problem compares them, read as a night reads them; None where there is none.

    Places in a text are those of the texts as they are given, and become those of the cleaned ones.
    """
    columns: dict[str, list[str | None]] = {role: [None] * len(cells) for role in problem.roles()}
    columns |= {role: [row[role] for row in texts] for role in problem.text_roles}
    columns[problem.target] = list(cells)
    problem.prepare(columns, _clean)
    found = [cell and normalise(cell) for cell in columns[problem.target]]
    if problem.labelled:
        found = labels_as_text(found)
    return [None if cell is None else problem.truth(cell) for cell in found]


def _clean(text: str) -> str | None:
    return normalise(repair(text))
