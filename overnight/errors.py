"""What can go wrong, as a user meets it: no traceback, all complaints at once, an exit code.

    OvernightError
    ├── UserError        exit 2   the user's input: a config, a path, a name
    ├── DataRefused      exit 3   the data did not pass the validation of the config
    └── NightFailed      exit 4   the night could not finish; production is untouched

Every complaint reads `where: rule, got VALUE; did you mean NEAREST?`:

    configs/ner.yaml: search → space → lerning_rate: not a training parameter; did you mean learning_rate?
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Complaint:
    """One thing that is wrong: `where` it stands, the `rule` it breaks, what was `got`, the `nearest` right value."""

    where: str
    rule: str
    got: str | None = None
    nearest: str | None = None

    def __str__(self) -> str:
        text = f"{self.where}: {self.rule}" if self.where else self.rule
        if self.got is not None:
            text += f", got {self.got}"
        if self.nearest is not None:
            text += f"; did you mean {self.nearest}?"
        return text


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was most likely meant to be, or None when nothing is near."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


class OvernightError(Exception):
    """Base of all errors with a meaning to the user; `complaints` are printed one a line."""

    exit_code = 4

    def __init__(self, *complaints: Complaint | str):
        self.complaints = [c if isinstance(c, Complaint) else Complaint("", c) for c in complaints]
        super().__init__("\n".join(map(str, self.complaints)))

    def __reduce__(self):  # type: ignore[no-untyped-def]
        # exceptions cross process borders (trials, Prefect); the default would pass the message as a complaint
        return type(self), tuple(self.complaints)


class UserError(OvernightError):
    """The user's input is wrong; nothing was started."""

    exit_code = 2


class DataRefused(OvernightError):
    """The data did not pass the validation; the champion stays."""

    exit_code = 3


class NightFailed(OvernightError):
    """The night could not finish; the champion stays, and the next run continues where this one was."""

    exit_code = 4
