"""What users get wrong: one clear line each, the right exit code, champion and ledger as they were."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import Project, make_rows


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model, prefect_api) -> Project:
    """A project with a champion that no mistake may touch."""
    project = Project(tmp_path_factory.mktemp("bad-input"), tiny_model, prefect_api)
    assert project.facts("run", str(project.config))["state"] == "promoted"
    return project


@pytest.fixture(autouse=True)
def production_is_untouched(project):
    """Holds for every test of this file: the champion and the ledger are the same afterwards."""
    before = _ledger(project)
    yield
    assert _ledger(project) == before


def _ledger(project: Project) -> str:
    return (project.home / "ledger" / "tiny.jsonl").read_text()


def _csv(path: Path, **columns) -> None:
    rows = make_rows(300)
    for name, values in columns.items():
        rows[name] = values
    rows.to_csv(path, index=False)


def missing(folder: Path) -> dict:
    return {"data.source": folder / "row.csv"}


def empty(folder: Path) -> dict:
    (folder / "empty.csv").write_text("")
    return {"data.source": folder / "empty.csv"}


def header_only(folder: Path) -> dict:
    (folder / "header.csv").write_text("text,label\n")
    return {"data.source": folder / "header.csv"}


def wrong_column(folder: Path) -> dict:
    return {"data.columns": "{text: txt}"}


def one_class(folder: Path) -> dict:
    _csv(folder / "one.csv", label="good")
    return {"data.source": folder / "one.csv"}


def binary(folder: Path) -> dict:
    (folder / "binary.csv").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 20)
    return {"data.source": folder / "binary.csv"}


def broken_rows(folder: Path) -> dict:
    lines = ["text,label", *(f"text number {i},good,too,many" for i in range(50)), "fine text,bad"]
    (folder / "broken.csv").write_text("\n".join(lines))
    return {"data.source": folder / "broken.csv"}


def unknown_model(folder: Path) -> dict:
    return {"model.base": folder / "no-model"}


def unknown_hub_model(folder: Path) -> dict:
    return {"model.base": "nobody/no-such-model"}


def unknown_package(folder: Path) -> dict:
    return {"model.base": "pkg://no_such_package/model"}


def unknown_metric(folder: Path) -> dict:
    return {"evaluation.metric": "macro_f2"}


CASES = {
    missing: (2, "row.csv", "rows.csv"),
    empty: (2, "empty.csv", "empty"),
    header_only: (2, "header.csv", "row"),
    wrong_column: (2, "txt", "text"),
    one_class: (2, "one.csv", "label"),
    binary: (2, "binary.csv", ""),
    broken_rows: (2, "broken.csv", "2"),
    unknown_model: (2, "no-model", ""),
    unknown_hub_model: (2, "nobody/no-such-model", ""),
    unknown_package: (2, "no_such_package", ""),
    unknown_metric: (2, "macro_f2", "macro_f1"),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_wrong_input_is_told_in_one_line(project, case):
    """Exit 2; the complaint names the place, what was got and, where there is one, the nearest right value."""
    code, got, near = CASES[case]
    sets = [part for key, value in case(project.folder).items() for part in ("--set", f"{key}={value}")]
    done = project.run("run", str(project.config), *sets, code=code)
    complaint = done.stderr.strip().splitlines()[-1]
    assert got in complaint and near in complaint, done.stderr


def test_unknown_labels_refuse_the_data(project):
    """Exit 3: labels that the config does not know are more than may go to quarantine."""
    _csv(project.folder / "labels.csv", label=["good", "bad", "ugly"] * 100)
    source = f"data.source={project.folder / 'labels.csv'}"
    assert "labels" in project.run("run", str(project.config), "--set", source, code=3).stderr


def test_a_config_with_three_mistakes_reports_all_three(project):
    """Every mistake with its place and the nearest right word, before anything is read or started."""
    facts = yaml.safe_load(project.config.read_text())
    facts["trainig"] = {}
    facts["search"]["space"] = {"lerning_rate": {"low": 1, "high": 2}}
    facts["promotion"]["mode"] = "automatic"
    path = project.folder / "three.yaml"
    path.write_text(yaml.safe_dump(facts))
    said = project.run("run", str(path), code=2).stderr.strip().splitlines()
    assert len(said) == 3
    assert f"{path}: search → space → lerning_rate: not a training parameter; did you mean learning_rate?" in said
    assert any("trainig" in line and "training" in line for line in said)
    assert any("promotion → mode" in line and "auto" in line for line in said)


def test_unwritable_home(project, tmp_path):
    """A home that cannot be made is the user's mistake, told before any work."""
    (tmp_path / "file").write_text("")
    project.environment["OVERNIGHT_HOME"] = str(tmp_path / "file" / "home")
    try:
        assert "home" in project.run("run", str(project.config), code=2).stderr
    finally:
        project.environment["OVERNIGHT_HOME"] = str(project.home)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 120 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_before_the_night(project, small_disk, tmp_path):
    """With less space than a night needs, nothing begins."""
    (small_disk / "ballast").write_bytes(bytes(100_000_000))
    other = Project(tmp_path, Path(yaml.safe_load(project.config.read_text())["model"]["base"]), "")
    other.environment = project.environment | {"OVERNIGHT_HOME": str(small_disk / "home")}
    assert "MB of disk" in other.run("run", str(other.config), code=4).stderr


def test_a_disk_that_fills_up_ends_the_night_and_the_next_continues(project, small_disk, tmp_path):
    """Full in the middle of the search: exit 4, said plainly; with space again, the same night goes on."""
    other = Project(tmp_path, Path(yaml.safe_load(project.config.read_text())["model"]["base"]), "")
    other.home = small_disk / "home"
    other.environment = project.environment | {"OVERNIGHT_HOME": str(other.home)}
    night = other.start("run", str(other.config)).until("✓ tokenize")
    ballast = small_disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while file.write(bytes(100_000)):
                pass
        except OSError:
            pass
    assert night.wait() == 4, night.stderr
    said = night.stderr
    assert "full" in said and "Traceback" not in said
    ballast.unlink()
    record = other.facts("run", str(other.config))
    assert record["state"] == "promoted" and record["continued"] == 1


@pytest.mark.parametrize(
    "after",
    ["reconcile", "ingest", "validate", "split", "tokenize", "search", "evaluate", "register"],
)
def test_interrupted_in_each_stage(project, after):
    """By ctrl-c, or the signal of a service manager: exit 130, one line, no traceback. (In a trial: test_flow.py.)"""
    _csv(project.folder / "other.csv", text=make_rows(300, seed=9).text)
    night = project.start("run", str(project.config), "--set", f"data.source={project.folder / 'other.csv'}")
    night.until(f"✓ {after}").signal(signal.SIGTERM if after == "ingest" else signal.SIGINT)
    assert night.wait(60) == 130, night.stderr
    assert "interrupted" in night.stderr and "Traceback" not in night.stderr
