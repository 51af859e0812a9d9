"""The sections that say how a model is lived with: when its nights start, who is told, what is kept, what is watched.

Nothing here decides what a trained model is, so none of it enters the hash of a config.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from zoneinfo import available_timezones

from pydantic import Field, field_validator, model_validator

from overnight.config.section import Section

Event = Literal["promoted", "kept", "waiting", "skipped", "refused", "failed"]


class Schedule(Section):
    """When the nights start; `overnight up` and `overnight deploy` read it."""

    cron: str
    """Cron expression of five fields, as `0 2 * * *` (every night at two)."""

    timezone: str = "UTC"
    """IANA name of the time zone in which the expression is read, as `Europe/Berlin`."""

    deadline_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after its scheduled time by which a night should have decided: the search ends early enough for that, and
    a night that would start later is missed; absent: no deadline."""

    missed: Literal["once", "skip"] = "once"
    """What happens after nights were missed because nothing ran: one night at once, or none until the next time."""

    @field_validator("cron")
    @classmethod
    def _is_cron(cls, cron: str) -> str:
        from datetime import UTC, datetime

        from cronsim import CronSim, CronSimError

        try:
            next(CronSim(cron, datetime.now(UTC)))
        except (CronSimError, StopIteration) as error:
            raise ValueError(f"must be a cron expression of five fields that occurs, got {cron!r}") from error
        return cron

    @field_validator("timezone")
    @classmethod
    def _is_timezone(cls, timezone: str) -> str:
        if timezone not in available_timezones():
            raise ValueError(f"must be the IANA name of a time zone, got {timezone!r}")
        return timezone


class Notification(Section):
    """One address that is told how a night ended. Addresses hold secrets, so the config names a variable."""

    to_env: str
    """Name of the environment variable that holds the address, an Apprise URL: `json://host/path` for a webhook,
    `slack://…` or any Slack-compatible hook, `mailto://…` for SMTP."""

    on: Annotated[tuple[Event, ...], Field(min_length=1)] = ("promoted", "waiting", "refused", "failed")
    """The ends of a night that are told."""

    @field_validator("to_env")
    @classmethod
    def _is_a_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("must be the name of an environment variable; the address itself may hold a secret")
        return name


class Retention(Section):
    """What `overnight clean` leaves of a model: versions behind an alias, and those that were ever champion, always."""

    nights: Annotated[int, Field(ge=1)] = 14
    """Nights that are kept with all that belongs to them: folders, runs, versions, studies."""

    scored_days: Annotated[int, Field(ge=1)] = 90
    """Days of which the logged scores stay, from which the monitor reads."""

    auto: bool = False
    """Whether each night cleans at its end; else `overnight clean --apply` does."""


class Monitor(Section):
    """When scored texts count as drifted: the rule `k of the last n windows`.

    A window has drifted when one of its statistics reaches its limit and chance hardly explains it.
    """

    window: Annotated[int, Field(ge=20)] = 500
    """Rows of one window."""

    windows: Annotated[int, Field(ge=1)] = 5
    """n: windows that the rule looks back on."""

    drifted: Annotated[int, Field(ge=1)] = 3
    """k: drifted windows among them from which a retraining night is asked for."""

    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Chance that, without drift, any statistic of any of the n windows is unusual; shared out over all of them."""

    label_share: Annotated[float, Field(gt=0, le=1)] = 0.10
    """Change of a predicted label's share (0.10 = ten points) from which the labels drift."""

    confidence: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Gap of the distributions of the scores (Kolmogorov-Smirnov, 0 to 1) from which confidence drifts."""

    length: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Gap of the distributions of the texts' characters from which their length drifts."""

    rare_tokens: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Growth of the average text's share of tokens that training hardly met (0.03 = three points) that is drift."""

    token_frequencies: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Jensen-Shannon distance of token frequencies, beyond the usual one, from which the vocabulary drifts."""

    embedding: Annotated[float, Field(gt=0.5, le=1)] = 0.65
    """Area under the ROC curve of a classifier that tells hidden states apart from which they drift; 0.5: it cannot."""

    quality: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Loss of the metric against the test rows from which quality drifts, where labels are known."""

    @model_validator(mode="after")
    def _can_fire(self) -> Monitor:
        if self.drifted > self.windows:
            raise ValueError(f"drifted must not be above windows, got {self.drifted} of {self.windows}")
        return self
