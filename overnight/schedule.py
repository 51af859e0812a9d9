"""When nights are due, and what one does that starts late: pure functions of the schedule and the clock.

turn = decide(schedule, scheduled, now)     # turn.why: it does nothing; turn.until: it should have decided by then
minutes = minutes_for_search(turn.until, now, stages)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

from overnight.config.operations import Schedule

AFTERWARDS = ("evaluate", "register", "gate", "promote", "report")
"""Stages that a night still has before it when its search ends."""
SPARE = 1.25
"""How much longer than last time the other stages may take."""
UNKNOWN = 0.25
"""Share of the time left that is kept for the stages after the search while no night has measured them."""
LEAST = timedelta(minutes=1)
"""A search is given this much even where nothing is left: a late model is worth more than none."""


@dataclass(frozen=True)
class Turn:
    """What a night is to do that starts now. Times bear a zone."""

    due: datetime
    """The newest time at which a night was due: the one this start answers for, also where several were missed."""
    why: str | None = None
    """Why it does nothing; None: it runs."""
    until: datetime | None = None
    """By when it should have decided; None: no deadline."""


def upcoming(schedule: Schedule, moment: datetime, count: int = 1) -> list[datetime]:
    """The next times after `moment`, in the schedule's zone."""
    from cronsim import CronSim

    times = CronSim(schedule.cron, moment.astimezone(ZoneInfo(schedule.timezone)))
    # going by the clock, it also names a time of the first round of an hour that comes twice
    return list(islice((time for time in times if time.timestamp() > moment.timestamp()), count))


def latest(schedule: Schedule, moment: datetime) -> datetime:
    """The newest time that is not after `moment`, in the schedule's zone."""
    from cronsim import CronSim

    # from behind the hour that comes twice: from within, it would miss a time of its first round
    after = moment.astimezone(UTC).replace(second=0, microsecond=0) + timedelta(hours=2)
    times = CronSim(schedule.cron, after.astimezone(ZoneInfo(schedule.timezone)), reverse=True)
    return next(time for time in times if time.timestamp() <= moment.timestamp())


def patience(schedule: Schedule, due: datetime, needed: timedelta = timedelta()) -> timedelta:
    """How late a night may start before it counts as missed.

    With a deadline: as long as what it `needed` last time besides the search still fits. Without: half the way to the
    next time, after which the next night is the nearer one.
    """
    if schedule.deadline_minutes is None:
        return (upcoming(schedule, due)[0].astimezone(UTC) - due.astimezone(UTC)) / 2
    deadline = timedelta(minutes=schedule.deadline_minutes)
    return max(deadline - needed - LEAST, deadline / 2)


def decide(
    schedule: Schedule,
    scheduled: datetime,
    now: datetime,
    started: Iterable[datetime] = (),
    needed: timedelta = timedelta(),
) -> Turn:
    """Whether a night that was scheduled for then and starts now runs, and by when it should have decided.

    However many were missed, the newest is the one that counts: its start answers for all before it.

    Args:
        started: when the other nights of this schedule that ran, or run, were started.
        needed: what last night's stages took, the search aside.
    """
    # two times of one zone are compared and subtracted by what its clock says: wrong where it is turned
    now = now.astimezone(UTC)
    due = max(scheduled.astimezone(ZoneInfo(schedule.timezone)), latest(schedule, now), key=datetime.timestamp)
    deadline = None if schedule.deadline_minutes is None else timedelta(minutes=schedule.deadline_minutes)
    other = max((start for start in started if start >= due), default=None)
    if other is not None:
        return Turn(due, f"the night of {_said(due)} was started at {_said(other.astimezone(due.tzinfo))} already")
    if now - due <= patience(schedule, due, needed):
        return Turn(due, until=due.astimezone(UTC) + deadline if deadline else None)
    if schedule.missed == "skip":
        following = _said(upcoming(schedule, now)[0])
        return Turn(due, f"missed: due at {_said(due)}, could start only now; the next one is at {following}")
    return Turn(due, until=now + deadline if deadline else None)


def minutes_for_search(until: datetime, now: datetime, stages: Mapping[str, float] | None = None) -> float:
    """Minutes that the search may take so that the night has decided by `until`.

    Args:
        stages: seconds of each stage of the last night that got to the end; None: none has.
    """
    left = max(until - now, timedelta())
    kept = SPARE * seconds(stages, AFTERWARDS) if stages else UNKNOWN * left.total_seconds()
    return max(left - timedelta(seconds=kept), LEAST).total_seconds() / 60


def seconds(stages: Mapping[str, float], names: Iterable[str]) -> float:
    """What these stages took together."""
    return sum(stages.get(name, 0.0) for name in names)


def _said(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M %Z}"
