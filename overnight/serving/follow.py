"""The version that answers is the one behind an alias: asked for every few seconds, loaded beside the old, switched to.

    follower = Follower(home, options, metrics)
    follower.start()
    follower.current            # Served or None; read it once a request, it may be another one the next moment

All of it happens in a thread of its own. A switch is one assignment: requests that hold the old version finish on it.
The version before stays loaded, so that a rollback switches at once.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from overnight.errors import Complaint, NightFailed, OvernightError, UserError, nearest
from overnight.home import Home
from overnight.serving.batching import Row, Scored
from overnight.serving.metrics import Metrics
from overnight.serving.options import Options
from overnight.tracking import registry
from overnight.tracking.registry import CANDIDATE, Version
from overnight.tracking.store import TrackingUnavailable

if TYPE_CHECKING:
    from overnight.problems.base import Problem
    from overnight.training.predict import Scorer

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""Until a version that could not be loaded is tried again: its files may have been repaired, memory freed."""


@dataclass(frozen=True, eq=False)
class Served:
    """A version that is loaded and has passed the smoke test."""

    version: Version
    scorer: Scorer

    @property
    def problem(self) -> Problem:
        return self.scorer.problem

    def score(self, rows: Sequence[Row]) -> list[Scored]:
        """A prediction a row, and the tokens that the model saw of it."""
        return list(zip(*self.scorer.predict(rows), strict=True))

    def is_version(self, version: Version) -> bool:
        # a number alone could be that of a model that was deleted and registered anew
        return (self.version.number, self.version.created) == (version.number, version.created)


class Follower:
    """Follows one alias, and in shadow mode the candidate.

    Attributes:
        current: what answers now; None until a version is loaded.
        previous: what answered before, still loaded.
        shadow: the candidate, when it is asked too and is another version.
        problem: why the registry's version does not serve, or None.
        looked: when the registry last answered (epoch seconds).
    """

    def __init__(self, home: Home, options: Options, metrics: Metrics):
        self.home, self.options, self.metrics = home, options, metrics
        self.current: Served | None = None
        self.previous: Served | None = None
        self.shadow: Served | None = None
        self.problem: str | None = None
        self.looked: float | None = None
        self._failed: tuple[tuple[int, float], float, Complaint] | None = None
        self._told: tuple[type[Exception], str] | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        """Looks at once and then again and again, in a thread that does not keep the process alive."""
        threading.Thread(target=self._run, daemon=True, name="follow").start()

    def stop(self) -> None:
        """No look begins any more."""
        self._ended.set()

    def look(self) -> None:
        """Asks the registry once and does what it says; raises nothing."""
        behind = 1
        try:
            self._switch(self._load(self._wanted(self.options.alias)))
            behind = 0
            if self.options.shadow:
                self._shadow()
        except Exception as error:
            self._complain(error)
        else:
            self.problem = self._told = None
        self.metrics.behind.set(behind)

    def _run(self) -> None:
        while not self._ended.is_set():
            self.look()
            self._ended.wait(self.options.follow_seconds)

    def _wanted(self, alias: str) -> Version:
        version = registry.by_alias(self.home, self.options.name, alias)
        self.looked = time.time()
        if version is None:
            raise NightFailed(Complaint(f"{self.options.name}@{alias}", "no version is behind this alias any more"))
        return version

    def _load(self, version: Version) -> Served:
        for loaded in (self.current, self.previous, self.shadow):
            if loaded is not None and loaded.is_version(version):
                return loaded
        key = (version.number, version.created)
        if self._failed is not None and self._failed[0] == key and time.monotonic() < self._failed[1]:
            raise NightFailed(self._failed[2])
        try:
            return self._loaded(version)
        except TrackingUnavailable:
            raise
        except Exception as error:  # a broken model raises anything
            text = str(error) if isinstance(error, OvernightError) else f"{type(error).__name__}: {error}"
        complaint = Complaint(f"version {version.number}", f"cannot be served: {text}")
        # the words alone, and none raised while the error is handled: its traceback holds the loaded model
        self._failed = (key, time.monotonic() + RETRY_SECONDS, complaint)
        self.metrics.failed.inc()
        raise NightFailed(complaint)

    def _loaded(self, version: Version) -> Served:
        from overnight.scoring import examine
        from overnight.training.predict import Scorer

        folder = registry.download(self.home, version)
        scorer = Scorer(folder)
        examine(scorer, folder)
        return Served(version, scorer)

    def _switch(self, served: Served) -> None:
        if served is self.current:
            return
        before, self.previous, self.current = self.current, self.current, served
        self.metrics.served.set(served.version.number)
        if before is not None:
            self.metrics.switches.inc()
        was = "none" if before is None else f"version {before.version.number}"
        log.info("version %d answers (was %s)", served.version.number, was)

    def _shadow(self) -> None:
        version = registry.by_alias(self.home, self.options.name, CANDIDATE)
        if version is None or self.current is None or self.current.is_version(version):
            self.shadow = None
            return
        before, self.shadow = self.shadow, self._load(version)
        if self.shadow is not before:
            log.info("version %d is asked too, as the candidate", version.number)

    def _complain(self, error: Exception) -> None:
        """Once: an outage of hours is one line of the log."""
        where = error.complaints[0].where if isinstance(error, OvernightError) else str(error)
        self.problem = str(error) if isinstance(error, OvernightError) else f"{type(error).__name__}: {error}"
        if self._told != (type(error), where):
            self._told = (type(error), where)
            serving = f"; version {self.current.version.number} goes on answering" if self.current else ""
            log.warning("%s%s", self.problem, serving)


def check_alias(home: Home, name: str, alias: str) -> None:
    """Before a server starts: what only its user can put right. A registry that is away is waited for.

    Raises:
        UserError: no such model, or nothing behind the alias; says what there is.
    """
    try:
        if registry.by_alias(home, name, alias) is not None:
            return
        aliases = sorted({alias for version in registry.versions(home, name) for alias in version.aliases})
    except TrackingUnavailable:
        return
    have = f"it has {', '.join(aliases)}" if aliases else "it has none"
    raise UserError(Complaint(name, f"no version is behind this alias ({have})", alias, nearest(alias, aliases)))
