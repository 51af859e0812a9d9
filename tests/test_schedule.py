"""When nights are due: for any schedule and any clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from overnight.config.operations import Schedule
from overnight.schedule import LEAST, Turn, decide, latest, minutes_for_search, patience, upcoming

CRONS = ["0 2 * * *", "*/15 * * * *", "30 1 * * 1-5", "0 */6 * * *", "0 3 1 * *", "59 23 28 2 *", "* * * * *"]
ZONES = ["UTC", "Europe/Berlin", "America/New_York", "Asia/Kathmandu", "Australia/Lord_Howe"]


def later(time: datetime, by: timedelta) -> datetime:
    """Real time: added to a time of a zone, it would be what the zone's clock says."""
    return time.astimezone(UTC) + by


relaxed = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TURNS = [datetime(2026, 3, 8, 7), datetime(2026, 4, 4, 15), datetime(2026, 10, 25, 1), datetime(2027, 3, 28, 1)]
"""When clocks of these zones are turned: New York, Lord Howe (by half an hour), Berlin."""
moments = st.one_of(
    st.datetimes(datetime(2024, 1, 1), datetime(2031, 1, 1)),
    st.builds(datetime.__add__, st.sampled_from(TURNS), st.timedeltas(timedelta(hours=-7), timedelta(hours=7))),
).map(lambda moment: moment.replace(tzinfo=UTC))
minutes = st.floats(1, 3000)
schedules = st.builds(
    lambda cron, zone, deadline, missed: Schedule(cron=cron, timezone=zone, deadline_minutes=deadline, missed=missed),
    st.sampled_from(CRONS),
    st.sampled_from(ZONES),
    st.none() | minutes,
    st.sampled_from(["once", "skip"]),
    # CronSim loses a time of this one where the clock is turned by half an hour
).filter(lambda schedule: (schedule.timezone, schedule.cron) != ("Australia/Lord_Howe", "0 */6 * * *"))


@relaxed
@given(schedules, moments)
def test_any_moment_lies_between_two_times(schedule, moment):
    """The latest time is not after the moment, the next one is, and no time lies between the two."""
    before, after = latest(schedule, moment), upcoming(schedule, moment)[0]
    assert before <= moment < after
    for within in (before, later(after, timedelta(minutes=-1))):
        assert latest(schedule, within).timestamp() == before.timestamp()


@relaxed
@given(schedules, moments, st.timedeltas(timedelta(), timedelta(days=40)))
def test_a_backlog_is_one_night(schedule, scheduled, late):
    """Whichever of the missed runs starts first answers for the newest; all others then have nothing to do."""
    scheduled, now = latest(schedule, scheduled), scheduled + late
    first = decide(schedule, scheduled, now)
    assert first.due.timestamp() == latest(schedule, now).timestamp() >= scheduled.timestamp()
    second = decide(schedule, first.due, now + timedelta(seconds=20), started=[now])
    assume(second.due == first.due)  # not another night since
    assert second.why and "already" in second.why


@relaxed
@given(schedules, moments, st.timedeltas(timedelta(), timedelta(seconds=59)), st.timedeltas(timedelta(), LEAST * 99))
def test_a_night_on_time_always_runs(schedule, moment, delay, needed):
    """Also with a deadline shorter than what the stages took, and when a worker starts it some seconds early."""
    due = upcoming(schedule, moment)[0]
    assume(delay < patience(schedule, due, needed))
    for now in (later(due, delay), later(due, timedelta(seconds=-10))):
        turn = decide(schedule, due, now, started=[later(due, timedelta(hours=-1))], needed=needed)
        assert turn.due == due and turn.why is None
        if schedule.deadline_minutes:
            assert turn.until == later(due, timedelta(minutes=schedule.deadline_minutes))
        else:
            assert turn.until is None


@relaxed
@given(schedules, moments, st.timedeltas(timedelta(), timedelta(days=40)))
def test_missed_nights_are_made_up_for_or_not(schedule, moment, late):
    """`skip` never starts beyond the patience, `once` always does, with as much time as a night on time has."""
    due = latest(schedule, moment)
    now = moment + late
    turn = decide(schedule, due, now)
    assert turn.due == latest(schedule, now)
    if now - turn.due.astimezone(UTC) <= patience(schedule, turn.due):
        assert turn.why is None
    elif schedule.missed == "skip":
        assert turn.why and turn.why.startswith("missed")
    else:
        assert turn.why is None
        whole = schedule.deadline_minutes and timedelta(minutes=schedule.deadline_minutes)
        assert turn.until == (now + whole if whole else None)


def test_missed_by_the_clock():
    """Due at two, four hours' deadline, the machine came up at nine."""
    zone = ZoneInfo("Europe/Berlin")
    due, nine = datetime(2026, 11, 23, 2, tzinfo=zone), datetime(2026, 11, 23, 9, tzinfo=zone)
    skip = Schedule(cron="0 2 * * *", timezone="Europe/Berlin", deadline_minutes=240, missed="skip")
    assert decide(skip, due, nine).why == (
        "missed: due at 2026-11-23 02:00 CET, could start only now; the next one is at 2026-11-24 02:00 CET"
    )
    once = skip.model_copy(update={"missed": "once"})
    assert decide(once, due, nine) == Turn(due, None, nine + timedelta(hours=4))
    # half an hour is needed besides the search: from half past five on it would be too late
    needed = timedelta(minutes=29)
    assert decide(skip, due, due + timedelta(minutes=210), needed=needed).why is None
    assert decide(skip, due, due + timedelta(minutes=211), needed=needed).why


def test_without_a_deadline_half_the_way_counts():
    """A night that starts nearer to the next one is missed."""
    skip = Schedule(cron="0 2 * * *", missed="skip")
    due = datetime(2026, 11, 23, 2, tzinfo=UTC)
    assert decide(skip, due, due + timedelta(hours=12)).why is None
    assert decide(skip, due, due + timedelta(hours=12, seconds=1)).why


@pytest.mark.parametrize("zone", ZONES)
def test_days_of_23_and_25_hours(zone):
    """One night a day, whatever the clock does."""
    schedule = Schedule(cron="30 2 * * *", timezone=zone)
    times = upcoming(schedule, datetime(2026, 1, 1, tzinfo=UTC), 365)
    assert len({time.date() for time in times}) == 365
    assert all(latest(schedule, time) == time for time in times)


BERLIN = ZoneInfo("Europe/Berlin")


@pytest.mark.parametrize(
    ("due", "day"), [(datetime(2027, 3, 28, tzinfo=BERLIN), 23), (datetime(2026, 10, 25, tzinfo=BERLIN), 25)]
)
def test_six_hours_are_six_hours(due, day):
    """A deadline and half the way to the next night are real time, also while the clock is turned."""
    schedule = Schedule(cron="0 0 * * *", timezone="Europe/Berlin", deadline_minutes=360, missed="skip")
    assert decide(schedule, due, due).until.timestamp() - due.timestamp() == 6 * 3600
    assert patience(schedule.model_copy(update={"deadline_minutes": None}), due) == timedelta(hours=day / 2)
    for zone in (UTC, BERLIN):
        just, late = (later(due, timedelta(minutes=minutes)).astimezone(zone) for minutes in (359, 360))
        assert decide(schedule, due, just).why is None and decide(schedule, due, late).why


def test_the_hour_that_comes_twice():
    """A run of its first round starts in the second: it answers for the newest time, although clocks went back."""
    first, second = datetime(2026, 10, 25, 0, 30, tzinfo=UTC), datetime(2026, 10, 25, 1, tzinfo=UTC)
    now = later(second, timedelta(minutes=10))
    halves = Schedule(cron="*/30 * * * *", timezone="Europe/Berlin")
    assert decide(halves, first, now).due.timestamp() == second.timestamp()
    daily = Schedule(cron="30 2 * * *", timezone="Europe/Berlin")  # in the first round
    assert latest(daily, now).timestamp() == first.timestamp()
    assert upcoming(daily, now)[0].date() == datetime(2026, 10, 26).date()


@relaxed
@given(moments, st.timedeltas(timedelta(), timedelta(days=2)), st.none() | st.floats(0, 40_000))
def test_the_search_leaves_time_for_the_rest(now, left, others):
    """At least a minute; what the other stages took last time, and a quarter more, is kept; never beyond the end."""
    stages = None if others is None else {"search": 9e9, "evaluate": others / 2, "report": others / 2}
    given_minutes = minutes_for_search(now + left, now, stages)
    if given_minutes > 1:
        kept = left.total_seconds() / 60 - given_minutes
        assert kept * 60 == pytest.approx(left.total_seconds() / 4 if others is None else 1.25 * others, abs=1e-3)
    assert given_minutes >= 1
    assert minutes_for_search(now - left, now, stages) == 1


def test_the_deadline_bounds_the_search(tmp_path):
    """With what the last decided night took for the rest; the smaller of both budgets counts, the config stays."""
    from flows.turns import within
    from overnight.config import Search
    from overnight.home import Home, write_json

    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path)})
    now = datetime.now(UTC)
    search, in_an_hour = Search(minutes=50), Turn(now, until=now + timedelta(minutes=60))
    assert within(search, None, home, "m") == within(search, Turn(now), home, "m") == search
    assert within(search, in_an_hour, home, "m").minutes == pytest.approx(45, abs=0.1)
    facts = {"model": "m", "stages": {"search": 9000.0, "evaluate": 300.0, "report": 180.0}}
    for number, state in enumerate(("kept", "failed")):
        write_json(
            home.nights / str(number) / "night.json", {"id": str(number), "state": state, "started": number, **facts}
        )
        facts["stages"] = {"search": 1.0}
    assert within(search, in_an_hour, home, "m").minutes == pytest.approx(50, abs=0.1)
    assert within(Search(minutes=40), in_an_hour, home, "m").minutes == 40
    soon = Turn(now, until=now + timedelta(minutes=30))
    assert within(search, soon, home, "m").minutes == pytest.approx(20, abs=0.1)
    assert within(Search(), soon, home, "m").minutes == pytest.approx(20, abs=0.1)
    assert search.minutes == 50
