"""Cleaning: what is needed stays, all else goes from disk and databases; a killed command is finished by the next."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import cleaned_home
import pytest
from cleaned_home import CONFIG, NAME, SEARCH, Killed, check_kept_two, files, left
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overnight.cleaning import SHARED, clean
from overnight.config import Config, Retention
from overnight.nights import begin_night, night_records, no_night, one_night_at_a_time
from overnight.retention import NightFacts, VersionFacts, keep_and_let_go
from overnight.search.study import Study
from overnight.tracking import ledger, purge, registry, store
from overnight.unused import disk_usage, remove

eight_nights, home = cleaned_home.eight_nights, cleaned_home.home

nights = st.builds(
    NightFacts,
    id=st.integers(0, 30).map(lambda n: f"night-{n}"),
    started=st.floats(0, 1e6),
    open=st.booleans(),
    decided=st.booleans(),
)
versions = st.builds(
    lambda number, night, named: VersionFacts(number, night and f"night-{night}", float(night or 0), named),
    number=st.integers(1, 20),
    night=st.none() | st.integers(1, 35),
    named=st.booleans(),
)

patiently = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@patiently
@given(
    st.lists(nights, unique_by=lambda night: night.id),
    st.lists(versions, unique_by=lambda version: version.number),
    st.sets(st.integers(1, 20)),
    st.integers(1, 8),
)
def test_what_is_needed_stays(nights, versions, champions, keep):
    """Whatever happened: no champion, alias, open night or recent night is ever let go, and nothing is forgotten."""
    found = keep_and_let_go(nights, versions, champions, keep)
    whole, shrunk, gone = set(found.whole), set(found.shrunk), set(found.gone)
    known = {night.id for night in nights} | {version.night for version in versions if version.night}
    assert whole | shrunk | gone == known and len(whole) + len(shrunk) + len(gone) == len(known)
    recent = sorted(nights, key=lambda night: (night.started, night.id))
    unseen = {version.night for version in versions if version.night} - {night.id for night in nights}
    if not unseen:
        assert {night.id for night in recent[-keep:]} <= whole
    assert len(whole) <= keep + sum(night.open for night in nights) + 1
    assert {night.id for night in nights if night.open} <= whole
    decided = [night.id for night in recent if night.decided]
    assert not decided or decided[-1] in whole
    for version in versions:
        stays = version.number not in found.versions
        must = version.named or version.number in champions or version.night is None or version.night in whole
        assert stays == must
        assert not stays or version.night is None or version.night in whole | shrunk
    assert all(any(v.night == night and v.number not in found.versions for v in versions) for night in shrunk)
    again = keep_and_let_go(
        [night for night in nights if night.id not in gone],
        [version for version in versions if version.number not in found.versions],
        champions,
        keep,
    )
    assert (again.whole, again.shrunk, again.gone, again.versions) == (found.whole, found.shrunk, (), ())


@patiently
@given(st.lists(nights, unique_by=lambda night: night.id), st.integers(1, 8))
def test_a_longer_retention_never_lets_more_go(nights, keep):
    assert set(keep_and_let_go(nights, (), (), keep + 1).gone) <= set(keep_and_let_go(nights, (), (), keep).gone)


def test_a_look_changes_nothing(home):
    """The dry run says what would go, with bytes, and leaves every file as it is."""
    before = files(home)
    done = clean(home, {NAME: Retention(nights=2)}, apply=False)
    assert files(home) == before
    counts = {item.what: item.count for cleaned in done.values() for item in cleaned.items}
    assert counts["versions"] == 3 and counts["nights"] == 4 and counts["studies"] == 6
    assert counts["runs and models in MLflow"] == 4 * 3 + 2 * 2 + 3
    assert counts["folders of ingested rows"] == counts["folders of token ids"] == 6
    assert all(item.bytes or not item.count for item in done[NAME].items if item.what != "versions")


def test_what_goes_is_gone_from_the_disk(home):
    """Rows, runs, weights, studies and their bytes; the measured difference is what the look had promised, or more."""
    before, size = left(home), disk_usage([home.root])
    promised = sum(
        item.bytes or 0
        for cleaned in clean(home, {NAME: Retention(nights=2)}, apply=False).values()
        for item in cleaned.items
    )
    done = clean(home, {NAME: Retention(nights=2)}, apply=True)
    freed = size - disk_usage([home.root])
    assert freed >= promised > 4 * 200_000
    assert len(done[NAME].whole) == 2 and any("no Prefect server" in note for note in done[NAME].notes)
    again = clean(home, {NAME: Retention(nights=2)}, apply=True)
    assert [item for cleaned in again.values() for item in cleaned.items if item.count] == [], "nothing is left to do"
    check_kept_two(home, before)


def test_the_next_night_finds_what_it_needs(home):
    """After the strictest cleaning: the last decision, its data facts, last nights' best parameters, the way back."""
    from overnight.nights import unchanged

    clean(home, {NAME: Retention(nights=1)}, apply=True)
    record = night_records(home)[-1]
    assert "version" not in record and unchanged(home, CONFIG, record["fingerprint"], lambda: None)
    study = Study(home.study_storage, "next", NAME, SEARCH, 1, "maximize")
    best = max(trial["value"] for trial in Study(home.study_storage, record["id"], NAME, SEARCH, 1, "maximize").rows())
    assert best and study._study.trials[0].state.name == "WAITING", "a warm start is waiting"


@pytest.mark.parametrize(
    "moment", [35, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (1, 8, 16, 24, 45, 55, 65, 75, 85, 96))]
)
def test_killed_half_way_and_run_again(home, monkeypatch, moment):
    """After any of its 96 steps the process is gone: the next command ends where an unbroken one would have."""
    before = left(home)
    steps = 0

    def counted(call):
        def step(*arguments, **options):
            nonlocal steps
            steps += 1
            if steps == moment:
                raise Killed
            return call(*arguments, **options)

        return step

    kind = type(purge._store(home))
    client = type(store.client(home))
    with monkeypatch.context() as patch:
        for place, name in (
            (kind, "delete_run"),
            (kind, "_hard_delete_run"),
            (kind, "delete_logged_model"),
            (kind, "_hard_delete_logged_model"),
            (client, "delete_model_version_tag"),
            (client, "delete_model_version"),
            (shutil, "rmtree"),
            (os, "replace"),
        ):
            patch.setattr(place, name, counted(getattr(place, name)))
        with pytest.raises(Killed):
            clean(home, {NAME: Retention(nights=2)}, apply=True)
    clean(home, {NAME: Retention(nights=2)}, apply=True)
    check_kept_two(home, before)


def test_a_running_night_is_left_alone(home):
    """Nothing of its model is touched, nothing that all models share, and it is said; other models are cleaned."""
    other = Config.model_validate({"name": "other", "model": {"base": "b"}, "data": {"source": "s"}})
    for number in range(3):
        begin_night(home, other, f"f{number}", forced=True).update(state="kept", started=float(number))
    script = (
        "import sys\nfrom overnight.home import Home\nfrom overnight.nights import one_night_at_a_time\n"
        f"with one_night_at_a_time(Home.from_environment(), {NAME!r}):\n"
        "    print(1, flush=True); sys.stdin.readline()\n"
    )
    night = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {"OVERNIGHT_HOME": str(home.root)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert night.stdout.readline()
    before = left(home)
    done = clean(home, {NAME: Retention(nights=1), "other": Retention(nights=1)}, apply=True)
    assert done[NAME].notes == ["tiny: its night is running; left alone"] and not done[NAME].items
    assert "a night is running" in done[SHARED].notes[0]
    assert left(home) == {**before, "nights": 9} and len(night_records(home, "other")) == 1
    night.communicate(b"\n")
    done = clean(home, {NAME: Retention(nights=2), "other": Retention(nights=1)}, apply=True)
    assert {item.what: item.count for item in done[SHARED].items}["studies"] == 6


def test_no_night_begins_while_the_shared_things_are_cleaned(home):
    """The lock of all nights: held by a night, cleaning waits for another time; held by cleaning, a night waits."""
    with no_night(home) as alone:
        assert alone
    with one_night_at_a_time(home, NAME), no_night(home) as alone:
        assert not alone


def test_a_night_that_can_be_continued_stays(home):
    """The latest night, interrupted: its trials, its study with the running trial, its rows, also when one is kept."""
    night = begin_night(home, CONFIG, "f" * 64, forced=True)
    study = Study(home.study_storage, night.id, NAME, SEARCH, 1, "maximize")
    first, second = study.ask(), study.ask()
    study.report(second.number, 0, 0.25)
    study.tell(first.number, "finished", 0.5)
    night.update(state="interrupted", started=9000.0)
    (night.folder / "trials" / "0000").mkdir(parents=True)
    clean(home, {NAME: Retention(nights=1)}, apply=True)
    assert (night.folder / "trials" / "0000").is_dir()
    again = Study(home.study_storage, night.id, NAME, SEARCH, 1, "maximize")
    assert again.counts["finished"] == 1 and again.remaining == 0
    again.continue_running()
    assert again.ask() == second
    assert again.rows()[second.number]["evaluations"] == {"0": 0.25}


def test_versions_stay_while_the_ledger_has_gaps(home):
    """Which versions were champion is not known then, so none is deleted."""
    entry = ledger.read(home, NAME)[0]
    (home.root / "ledger" / f"{NAME}.jsonl").unlink()
    store.client(home).delete_registered_model_tag(NAME, entry.key)
    done = clean(home, {NAME: Retention(nights=2)}, apply=True)
    assert left(home)["versions"] == [1, 2, 3, 4, 5, 6, 7] == list(range(1, 8)) and left(home)["weights"] == 7
    assert any("its ledger has gaps" in note for note in done[NAME].notes)


def test_a_version_that_waits_for_a_person_stays(home):
    """Asked for and not answered yet, it may still become champion, however many nights came after it."""
    ledger.record(home, NAME, "keep", from_version=3, to_version=4, reason="r", gate={"outcome": "wait"})
    clean(home, {NAME: Retention(nights=2)}, apply=True)
    assert left(home)["versions"] == [2, 3, 4, 6, 7] and left(home)["weights"] == 5
    ledger.promote(home, NAME, 4, reason="r", smoke=lambda folder: None)


def test_a_version_promoted_while_it_is_cleaned_stays(home, monkeypatch):
    """Between the plan and the deletion somebody promotes what was to go: it stays, with its bytes and its alias."""
    import overnight.cleaning

    def meanwhile(path: Path) -> None:
        monkeypatch.undo()
        ledger.promote(home, NAME, 4, reason="r", smoke=lambda folder: None)
        remove(path)

    monkeypatch.setattr(overnight.cleaning, "remove", meanwhile)
    clean(home, {NAME: Retention(nights=2)}, apply=True)
    assert registry.champion(home, NAME).number == 4 and left(home)["versions"] == [2, 3, 4, 6, 7]
    assert registry.download(home, registry.version_of(home, NAME, 4)).is_dir()


def test_the_monitor_finds_the_rows_of_the_champion(home):
    """Of the night behind an alias rows and predictions stay, of that of an earlier champion they go."""
    clean(home, {NAME: Retention(nights=2)}, apply=True)
    folders = [{part.name for part in (home.nights / r["id"]).iterdir() if part.is_dir()} for r in night_records(home)]
    assert [names & {"rows", "data_docs"} for names in folders] == [set(), {"rows"}, *[{"rows", "data_docs"}] * 2]


def test_a_version_that_others_were_copied_from_stays(home):
    """A copy under another name, as teams make for their production registry, lives on the bytes of the first."""
    mlflow = store.client(home)
    with store.globally(home):
        mlflow.copy_model_version(f"models:/{NAME}/4", "served")
        logged = mlflow.get_model_version(NAME, "5").source
        mlflow.create_model_version("served", logged, model_id=logged.removeprefix("models:/"))
    clean(home, {NAME: Retention(nights=2)}, apply=True)
    assert left(home)["versions"] == [2, 3, 4, 6, 7]
    for number in ("1", "2"):
        folder = Path(mlflow.get_model_version_download_uri("served", number).removeprefix("file://"))
        assert list(folder.rglob("*.safetensors"))
