"""What cleaning finds in each place: other files, journals and databases of studies, flow runs, shared servers."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import cleaned_home
import pytest
from cleaned_home import CONFIG, NAME, SEARCH, Killed, all_runs, left, make_night

from overnight.cleaning import clean, last_retention
from overnight.cli import run
from overnight.config import Retention
from overnight.home import Home, write_json
from overnight.nights import begin_night
from overnight.search.studies import old_studies, rewrite_journal
from overnight.search.study import Study
from overnight.tracking import ledger, registry
from overnight.unused import disk_usage, remove

eight_nights, home = cleaned_home.eight_nights, cleaned_home.home


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
    from prefect.client.base import PrefectHttpxSyncClient
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: prefect_api}), PrefectHttpxSyncClient(base_url=prefect_api) as http:
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
def test_a_shared_mlflow_server(tmp_path, mlflow_address):
    """Behind a server: the bytes on its disk go, its rows are marked, and it is said who removes them."""
    environment = {"OVERNIGHT_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": mlflow_address}
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
