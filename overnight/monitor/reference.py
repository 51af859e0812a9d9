"""What a window is compared with: the champion's own rows, as the night that made it left them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from overnight.home import Home, read_json
from overnight.monitor.drift import Vocabulary
from overnight.scoring import PREDICTIONS

if TYPE_CHECKING:
    from overnight.problems.base import Prediction, Problem
    from overnight.tracking.registry import Version
    from overnight.training.predict import Scorer

MOST = 1000
"""Test rows whose hidden states are compared with those of a window: more say little more, and cost time."""


@dataclass
class Reference:
    """The champion's test rows with its predictions, and the texts of all its rows."""

    night: str
    labels: list[str]
    """What the monitor counts of the predictions of the test rows (`Problem.gist`); `scores` too."""
    scores: list[float]
    targets: list[Any]
    answers: list[Prediction]
    test: list[dict[str, str]]
    """Role → text of the test rows."""
    validation: list[dict[str, str]]
    training: list[dict[str, str]]
    hidden_file: Path
    """Keeps the hidden states of the test rows."""

    @cached_property
    def characters(self) -> list[int]:
        return [sum(map(len, row.values())) for row in (*self.test, *self.validation, *self.training)]

    def vocabulary(self, scorer: Scorer) -> Vocabulary:
        """Token frequencies of the rows that were trained on, beside those that were not."""
        return Vocabulary(
            scorer.token_ids(self.training), scorer.token_ids([*self.test, *self.validation]), len(scorer.tokenizer)
        )

    def hidden(self, scorer: Scorer) -> np.ndarray:
        """Hidden states of test rows (at most `MOST` × width): of rows that the champion was not fitted to."""
        rows = self.test[:MOST]
        if self.hidden_file.exists():
            found: np.ndarray = np.load(self.hidden_file, allow_pickle=False)
            if len(found) == len(rows):
                return found
        found = scorer.hidden(rows)
        self.hidden_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.hidden_file.with_name(f".{self.hidden_file.name}.{os.getpid()}")
        with open(temporary, "wb") as file:
            np.save(file, found)
        os.replace(temporary, self.hidden_file)  # half a file could not be read again
        return found


def reference_of(home: Home, version: Version, problem: Problem) -> Reference | str:
    """The rows of the version's night, or one line that says why there are none."""
    import pyarrow.parquet as parquet

    night = version.tags.get("overnight.night")
    if night is None:
        return f"version {version.number} names no night, so there are no rows to compare with"
    folder = home.nights / night
    sides: dict[str, list[dict[str, Any]]] = {}
    columns = [*problem.text_roles, problem.target]
    try:
        for side in ("train", "validation", "test"):
            sides[side] = parquet.read_table(folder / "rows" / f"{side}.parquet", columns=columns).to_pylist()
    except FileNotFoundError:
        return f"the rows of night {night} are gone from this home, so drift cannot be told until the next promotion"
    answers = (read_json(folder / "evaluation" / PREDICTIONS) or {}).get("candidate")
    if answers is None or len(answers) != len(sides["test"]):
        return f"the predictions of night {night} are gone from this home, so drift cannot be told"

    def texts(side: str) -> list[dict[str, str]]:
        return [{role: str(row[role]) for role in problem.text_roles} for row in sides[side]]

    gists = [problem.gist(answer) for answer in answers]
    return Reference(
        night,
        [label for label, _ in gists],
        [score for _, score in gists],
        [problem.truth(row[problem.target]) for row in sides["test"]],
        answers,
        texts("test"),
        texts("validation"),
        texts("train"),
        home.root / "monitor" / version.name / f"hidden-{version.number}.npy",
    )
