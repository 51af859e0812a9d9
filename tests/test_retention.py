"""Cleaning: what is needed stays, all else goes from disk and databases; a killed command is finished by the next."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from overnight.cleaning import SHARED, clean, last_retention
from overnight.cli import run
from overnight.config import Config, Retention, Search
from overnight.home import Home, write_json
from overnight.nights import begin_night, night_records, no_night, one_night_at_a_time
from overnight.retention import NightFacts, VersionFacts, keep_and_let_go
from overnight.search.studies import old_studies, rewrite_journal
from overnight.search.study import Study
from overnight.services import _await_health, free_port
from overnight.tracking import ledger, purge, registry, runs, store
from overnight.tracking.night import night_run
from overnight.unused import disk_usage, remove

NAME = "tiny"
CONFIG = Config.model_validate({"name": NAME, "model": {"base": "b"}, "data": {"source": "s"}})
SEARCH = Search.model_validate({"trials": 2, "space": {"learning_rate": {"low": 1e-5, "high": 1e-3}}})

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


def make_night(home: Home, number: int, *, state: str = "kept", version: bool = True) -> str:
    """What a night leaves behind, without its hours: folder, rows, tokens, study, runs, a version."""
    night = begin_night(home, CONFIG, f"{number:016d}" + "0" * 48, forced=True)
    facts = {"started": 1000.0 * number, "state": state, "flow_runs": [f"00000000-0000-0000-0000-{number:012d}"]}
    night.update(**facts, lineage={"config": "tiny.yaml"})
    rows = home.data / NAME / night.record["fingerprint"][:16]
    tokens = home.data / NAME / "tokens" / f"{number:032d}"
    for folder in (rows, tokens, night.folder / "rows", night.folder / "data_docs"):
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(os.urandom(20_000))
    (night.folder / "clean.parquet").write_bytes(os.urandom(20_000))
    (night.folder / "report.html").write_text("the report")
    study = Study(home.study_storage, night.id, NAME, SEARCH, 1, "maximize")
    experiment, run_id = night_run(home, NAME, night.id)
    for trial in range(2):
        study.tell(study.ask().number, "finished", 0.5 + trial / 10 + number / 100)
        folder = night.folder / "trials" / f"{trial:04d}"
        job = {"train": str(tokens), "validation": str(tokens)}
        write_json(folder / "params.json", {"number": trial, "night": night.id, "study": night.id, "job": job})
        (folder / "metrics.jsonl").write_text(json.dumps({"kind": "log", "step": 1, "time": 1.0, "loss": 2.0}) + "\n")
        write_json(folder / "result.json", {"state": "finished", "value": 0.5})
        assert runs.sync_trial(home, experiment, run_id, folder)
    runs.log_night(home, run_id, tags={"overnight.state": state}, artifacts={night.folder / "report.html": "report"})
    if version:
        model = night.folder / "trials" / "0001" / "best"
        model.mkdir()
        (model / registry.WEIGHTS).write_bytes(os.urandom(100_000))
        facts = {"inputs": ("text",), "example": {"text": ["a"]}, "metrics": {"macro_f1": 0.5}}
        made = registry.register(home, NAME, model, run_id=run_id, tags={runs.NIGHT: night.id}, **facts)
        registry.set_alias(home, NAME, registry.CANDIDATE, made.number)
    runs.close_night(home, run_id, "FINISHED")
    return night.id


@pytest.fixture(scope="module")
def eight_nights(tmp_path_factory, empty_store) -> Path:
    """The root of a home with eight nights and versions 1 to 7: 2 was and 3 is champion; the fifth was refused."""
    root = tmp_path_factory.mktemp("eight") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    for number in range(1, 9):
        make_night(home, number, state="refused" if number == 5 else "kept", version=number != 5)
        if number in (2, 3):
            ledger.promote(home, NAME, number, reason="r", smoke=lambda folder: None)
    return root


@pytest.fixture
def home(eight_nights, tmp_path) -> Home:
    """A copy whose artifacts are its own."""
    root = tmp_path / "home"
    shutil.copytree(eight_nights, root)
    columns = ["experiments.artifact_location", "runs.artifact_uri", "logged_models.artifact_location"]
    columns += ["model_versions.source", "model_versions.storage_location"]
    with closing(sqlite3.connect(root / "mlflow" / "mlflow.db")) as database:
        for table, column in (place.split(".") for place in columns):
            database.execute(f"update {table} set {column} = replace({column}, ?, ?)", (str(eight_nights), str(root)))
        database.commit()
    return Home.from_environment({"OVERNIGHT_HOME": str(root)})


def files(home: Home) -> dict[str, int]:
    """Path → size of everything under the home but locks and what SQLite writes while it is asked."""
    return {
        str(path.relative_to(home.root)): path.stat().st_size
        for path in home.root.rglob("*")
        if path.is_file()
        and not path.name.endswith((".lock", "-wal", "-shm", "-journal"))
        and "locks" not in path.parts
    }


def left(home: Home) -> dict:
    """What there is of everything that is cleaned."""
    ids = [record["id"] for record in night_records(home)]
    order = {id: number for number, id in enumerate(sorted(ids), 1)}
    mlflow = store.client(home)
    experiment = mlflow.get_experiment_by_name(NAME).experiment_id
    with closing(sqlite3.connect(home.mlflow / "mlflow.db")) as database:
        counts = {
            table: database.execute(f"select count(*) from {table}").fetchone()[0]
            for table in (
                "runs",
                "params",
                "metrics",
                "tags",
                "latest_metrics",
                "logged_models",
                "logged_model_metrics",
            )
        }
        tags = database.execute("select count(*) from model_version_tags").fetchone()[0]
    artifacts = home.mlflow / "artifacts" / NAME
    return {
        "versions": [version.number for version in registry.versions(home, NAME)],
        "nights": len(order),
        "rows": len(list((home.data / NAME).glob("0*"))),
        "tokens": len(list((home.data / NAME / "tokens").glob("0*"))),
        "trials": len(list(home.nights.glob("*/trials/*"))),
        "reports": len(list(home.nights.glob("*/report.html"))),
        "parquet": len(list(home.nights.glob("*/*.parquet"))),
        "studies": len(old_studies(home.study_storage, {NAME: ()})),
        "active runs": len(mlflow.search_runs([experiment])),
        "weights": len(list(artifacts.glob("models/*/artifacts/artifacts/model/*.safetensors"))),
        "folders of models": len(list(artifacts.glob("models/*"))),
        "folders of runs": len(list(artifacts.glob("*"))) - 1,
        "version tags": tags,
        **counts,
    }


KEPT_TWO = {
    "versions": [2, 3, 6, 7],
    "nights": 4,
    "rows": 2,
    "tokens": 2,
    "trials": 4,
    "reports": 4,
    "parquet": 2,
    "studies": 2,
    "active runs": 2 * 3 + 2,
    "runs": 2 * 3 + 2,
    "weights": 4,
    "folders of models": 4,
    "folders of runs": 4,
    "logged_models": 4,
    "logged_model_metrics": 4,
}
"""Nights 7 and 8 whole, 2 and 3 shrunk to their champions, all else gone."""


def check_kept_two(home: Home, before: dict) -> None:
    with closing(sqlite3.connect(home.mlflow / "mlflow.db")) as database:
        assert not database.execute("pragma freelist_count").fetchone()[0], "free pages went back to the disk"
    after = left(home)
    assert {name: after[name] for name in KEPT_TWO} == KEPT_TWO
    assert (
        after["params"] <= before["params"] / 2
        and after["tags"] < before["tags"]
        and after["metrics"] < before["metrics"]
    )
    deleted = 3  # of each deleted version one tag stays, the night's name
    assert after["version tags"] == before["version tags"] / 7 * 4 + deleted
    assert registry.champion(home, NAME).number == 3
    assert registry.download(home, registry.version_of(home, NAME, 2)).is_dir()
    assert registry.version_of(home, NAME, 2).run_id in {r.info.run_id for r in all_runs(home)}
    assert ledger.rollback(home, NAME, reason="r", smoke=lambda folder: None).to_version == 2


def all_runs(home: Home) -> list:
    from mlflow.entities import ViewType

    experiment = store.client(home).get_experiment_by_name(NAME).experiment_id
    return store.client(home).search_runs([experiment], run_view_type=ViewType.ALL)


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


class Killed(BaseException):
    pass


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


def test_files_of_other_kinds(home):
    """Fetched versions that are behind no alias, old scored texts, hidden states, killed commands' rest."""
    for name in ("1", "2", "3", "7", ".8-being-fetched"):
        (home.root / "models" / NAME / name).mkdir(parents=True)
    today = datetime.now(UTC).date()
    days = [(today - timedelta(days=age)).isoformat() for age in (0, 5, 6, 7, 400)]
    scored, monitor = home.root / "scored" / NAME, home.root / "monitor" / NAME
    for folder in (scored, monitor):
        folder.mkdir(parents=True)
    for day in days:
        (scored / f"{day}.jsonl").write_text("{}\n")
    for number in (1, 7):
        (monitor / f"hidden-{number}.npy").write_bytes(b"x")
    (scored / "notes.jsonl").write_text("{}\n")
    killed, running = home.mlflow / "register-old", home.mlflow / "register-new"
    for folder in (killed, running):
        folder.mkdir()
    os.utime(killed, (time.time() - 100_000,) * 2)
    clean(home, {NAME: Retention(nights=2, scored_days=6)}, apply=True)
    assert {path.name for path in (home.root / "models" / NAME).iterdir()} == {"3", "7", ".8-being-fetched"}
    assert {path.stem for path in scored.iterdir()} == {*days[:3], "notes"}
    assert [path.name for path in monitor.iterdir()] == ["hidden-7.npy"]
    assert not killed.exists() and running.exists()


def test_disk_usage_counts_a_file_of_two_links_once(tmp_path):
    """The best checkpoint and what was registered may be the same bytes."""
    (tmp_path / "a").write_bytes(os.urandom(100_000))
    one = disk_usage([tmp_path])
    os.link(tmp_path / "a", tmp_path / "b")
    assert disk_usage([tmp_path]) == one >= 100_000
    assert disk_usage([tmp_path / "none"]) == 0


def test_the_record_of_a_night_goes_last(tmp_path, monkeypatch):
    """Killed while a night's folder is removed: the record is still there, so the next command sees the night."""
    folder = tmp_path / "night"
    (folder / "trials").mkdir(parents=True)
    write_json(folder / "night.json", {})
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            remove(folder)
    assert (folder / "night.json").exists()
    remove(folder)
    assert not folder.exists()
    remove(folder)


def test_the_journal_keeps_what_stays(tmp_path):
    """Studies of other models and kept nights are the same, trial by trial, in the new file, which is smaller."""
    storage = str(tmp_path / "studies.journal")
    for model in ("tiny", "other"):
        for night in range(6):
            study = Study(storage, f"{model}-{night}", model, SEARCH, 1, "maximize")
            for value in (0.25, 0.5):
                ask = study.ask()
                study.report(ask.number, 0, value)
                study.tell(ask.number, "finished", value, {"seconds": 3.0})
    before = {name: Study(storage, name, name[:-2], SEARCH, 1, "maximize").rows() for name in ("tiny-5", "other-0")}
    size = Path(storage).stat().st_size
    going = old_studies(storage, {"tiny": ["tiny-5"]})
    assert going == [f"tiny-{night}" for night in range(5)]
    Path(f"{storage}.new").write_text("of a killed command")
    rewrite_journal(storage, going)
    assert Path(storage).stat().st_size < size * 0.7 and [p.name for p in tmp_path.iterdir()] == ["studies.journal"]
    for name, rows in before.items():
        assert Study(storage, name, name[:-2], SEARCH, 1, "maximize").rows() == rows
    assert old_studies(storage, {"tiny": []}) == ["tiny-5"] and len(old_studies(storage, {"other": []})) == 6


def test_studies_in_a_database(tmp_path):
    """A shared study storage loses the studies one by one."""
    storage = f"sqlite:///{tmp_path / 'studies.db'}"
    from overnight.search.studies import drop_studies

    for night in range(3):
        Study(storage, f"tiny-{night}", "tiny", SEARCH, 1, "maximize").ask()
    drop_studies(storage, old_studies(storage, {"tiny": ["tiny-2"]}))
    assert old_studies(storage, {"tiny": []}) == ["tiny-2"]


@pytest.mark.parametrize(
    ("config", "nights"), [({"retention": {"nights": 3}}, 3), ({}, 14), ({"retention": {"weeks": 3}}, 14), (None, 14)]
)
def test_retention_of_the_last_night(tmp_path, config, nights):
    """The config that the last night ran with; without one, or with keys of another version, the default."""
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path)})
    for number in range(2):
        night = begin_night(home, CONFIG, f"f{number}", forced=True)
        night.update(started=float(number))
        if config is None:
            (night.folder / "config.json").unlink()
        else:
            write_json(night.folder / "config.json", config)
    assert last_retention(home, NAME).nights == nights


def test_the_command(home, monkeypatch, capsys, tmp_path):
    """A table of what would go; with --apply what went and the measured difference; wrong names in one line."""
    monkeypatch.setenv("OVERNIGHT_HOME", str(home.root))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    assert run(["clean"]) == 0
    assert "nothing to clean" in capsys.readouterr().out, "eight nights are fewer than fourteen"
    assert run(["clean", "--nights", "2"]) == 0
    said = capsys.readouterr().out
    assert "what goes" in said and "tables of nights" in said and "--apply does it" in said
    config = tmp_path / "tiny.yaml"
    config.write_text("name: tiny\nmodel: {base: b}\ndata: {source: s}\nretention: {nights: 3}\n")
    assert run(["clean", "--config", str(config), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["nights"] == {"tiny": 3} and not facts["applied"] and facts["before"] == facts["after"]
    assert run(["clean", "tiny", "--nights", "2", "--apply"]) == 0
    said = capsys.readouterr().out
    assert "what went" in said and "freed" in said and left(home)["versions"] == [2, 3, 6, 7]
    assert run(["clean", "tinny"]) == 2
    assert "did you mean tiny?" in capsys.readouterr().err
    assert run(["clean", "other", "--config", str(config)]) == 2
    assert run(["clean", "--nights", "0"]) == 2


def test_an_empty_home(tmp_path, monkeypatch, capsys):
    """Nothing has run: nothing is made, nothing goes."""
    monkeypatch.setenv("OVERNIGHT_HOME", str(tmp_path / "none"))
    assert run(["clean"]) == 0
    assert "nothing to clean" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_flow_runs_are_forgotten(prefect_api):
    """A flow run goes with its task runs, logs and artifacts; one that is gone already is no error."""
    import httpx
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_api}), httpx.Client(base_url=prefect_api) as http:
        from tasks.history import delete_flow_runs

        flow = http.post("/flows/", json={"name": "retrain"}).json()["id"]
        ids = [http.post("/flow_runs/", json={"flow_id": flow, "name": f"n{n}"}).json()["id"] for n in range(2)]
        for id in ids:
            task = {"flow_run_id": id, "task_key": "a", "dynamic_key": "0"}
            assert http.post("/task_runs/", json=task).is_success
            artifact = {"key": "report", "type": "markdown", "data": "x" * 1000, "flow_run_id": id}
            for _ in range(3):
                assert http.post("/artifacts/", json=artifact).is_success
        delete_flow_runs([ids[0], "00000000-0000-0000-0000-000000000001"])
        delete_flow_runs([ids[0]])
        wanted = {"flow_runs": {"id": {"any_": ids}}}
        assert [run["id"] for run in http.post("/flow_runs/filter", json=wanted).json()] == [ids[1]]
        assert {run["flow_run_id"] for run in http.post("/task_runs/filter", json=wanted).json()} == {ids[1]}
        mine = {"artifacts": {"flow_run_id": {"any_": ids}}}
        assert {a["flow_run_id"] for a in http.post("/artifacts/filter", json=mine).json()} == {ids[1]}
        delete_flow_runs([ids[1]])


def test_flow_runs_go_with_their_nights(home):
    """Each old night's flow runs are handed over once, also those of a night whose record stays."""
    forgotten: list[str] = []
    clean(home, {NAME: Retention(nights=2)}, apply=False, forget_flow_runs=forgotten.extend)
    assert not forgotten
    done = clean(home, {NAME: Retention(nights=2)}, apply=True, forget_flow_runs=forgotten.extend)
    assert sorted(int(id[-12:]) for id in forgotten) == [1, 2, 3, 4, 5, 6]
    assert {item.what: item.count for item in done[NAME].items}["flow runs in Prefect"] == 6
    clean(home, {NAME: Retention(nights=2)}, apply=True, forget_flow_runs=forgotten.extend)
    assert len(forgotten) == 6


@pytest.mark.slow
def test_a_shared_mlflow_server(tmp_path):
    """Behind a server: the bytes on its disk go, its rows are marked, and it is said who removes them."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/art"]
    server = subprocess.Popen(command, env=os.environ | store.QUIET, cwd=tmp_path, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        _await_health(f"{address}/health", server, None, 120)
        environment = {"OVERNIGHT_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": address}
        shared = Home.from_environment(environment)
        for number in range(1, 5):
            make_night(shared, number)
            if number < 3:
                ledger.promote(shared, NAME, number, reason="r", smoke=lambda folder: None)
        before = disk_usage([tmp_path / "art"])
        done = clean(shared, {NAME: Retention(nights=1)}, apply=True)
        assert before - disk_usage([tmp_path / "art"]) > 100_000
        assert [version.number for version in registry.versions(shared, NAME)] == [1, 2, 4]
        assert len(list((tmp_path / "art").rglob("*.safetensors"))) == 3 and len(all_runs(shared)) == 4 * 3
        assert "`mlflow gc` there" in done[NAME].notes[0]
        again = clean(shared, {NAME: Retention(nights=1)}, apply=True)
        assert not sum(item.count for cleaned in again.values() for item in cleaned.items)
        assert registry.download(shared, registry.champion(shared, NAME)).is_dir()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
