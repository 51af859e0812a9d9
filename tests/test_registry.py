"""The registry: versions that load, serve and are what was registered; aliases and half-made versions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from overnight.errors import NightFailed, UserError
from overnight.home import Home
from overnight.services import free_port
from overnight.tracking import registry, runs, store

LABELS = ["bad", "good", "plain"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tiny_model) -> Path:
    """A finished model folder: a real two-layer BERT with a head, its tokenizer, its card and its golden set."""
    from overnight import problems
    from overnight.golden import write_golden
    from overnight.settings import Training
    from overnight.training.card import Card, finish_model_folder
    from overnight.training.predict import Scorer

    folder = tmp_path_factory.mktemp("finished") / "best"
    facts = {"labels": LABELS}
    problem = problems.get("sequence-classification")
    problem.load_model(str(tiny_model), facts, Training()).save_pretrained(folder)
    finish_model_folder(folder, Card(problem.name, facts, 64, "macro_f1"), str(tiny_model))
    write_golden(folder, Scorer(folder))
    return folder


def register(home: Home, folder: Path, night: str = "night-1", **changes) -> registry.Version:
    run_id = runs.open_night(home, store.experiment(home, "sentiment"), night)
    facts = {
        "run_id": run_id,
        "inputs": ("text",),
        "example": {"text": ["a lovely flight"]},
        "tags": {"overnight.night": night, "overnight.commit": None},
        "metrics": {"macro_f1": 0.7, "f1/good": 0.6, "accuracy": float("nan")},
        "description": "What people think",
    }
    return registry.register(home, "sentiment", folder, **facts | changes)


@pytest.fixture(scope="module")
def registered(tmp_path_factory, empty_store, model_folder) -> tuple[Home, registry.Version]:
    """A home with one version that the tests of this module only read."""
    root = tmp_path_factory.mktemp("registered") / "home"
    shutil.copytree(empty_store, root)
    home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
    version = register(home, model_folder)
    registry.set_alias(home, "sentiment", registry.CHAMPION, version.number)
    return home, registry.version_of(home, "sentiment", 1)


def test_version_tells_where_it_comes_from(registered, model_folder):
    """Number, run, tags, metrics, aliases and description come back from MLflow as they were given."""
    home, version = registered
    assert (version.name, version.number, version.model_uri) == ("sentiment", 1, "models:/sentiment/1")
    assert version.aliases == ("champion",) and version.complete and version.description == "What people think"
    assert version.metrics == {"macro_f1": 0.7, "f1/good": 0.6}, "what is no number is left out"
    assert version.tags["overnight.night"] == "night-1" and "overnight.commit" not in version.tags
    assert version.tags["overnight.weights_sha256"] == registry.sha256(model_folder / "model.safetensors")
    assert abs(version.created - time.time()) < 3600
    assert registry.versions(home, "sentiment") == [version] == [registry.champion(home, "sentiment")]
    run = store.client(home).get_run(version.run_id)
    assert run.outputs.model_outputs and run.data.metrics["test/macro_f1"] == 0.7


def test_pyfunc_answers_like_the_model_folder(registered, model_folder, monkeypatch):
    """`mlflow.pyfunc.load_model("models:/sentiment@champion")`, no pickle allowed: the same labels and scores."""
    import mlflow
    import pandas as pd

    from overnight.training.predict import Scorer

    home, _ = registered
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setattr(sys, "path", list(sys.path))  # MLflow leaves the model's code folder there
    rows = [{"text": "a lovely flight"}, {"text": "the rude crew was late"}, {"text": ""}]
    with store.globally(home):
        model = mlflow.pyfunc.load_model("models:/sentiment@champion")
        found = model.predict(pd.DataFrame(rows, index=[5, 3, 9]))
        same = model.predict(rows)
    expected = Scorer(model_folder).predict_texts(rows)
    assert found.index.tolist() == [5, 3, 9]
    assert found.to_dict("records") == same.to_dict("records") == expected
    assert all(set(row["scores"]) == set(LABELS) and row["score"] == row["scores"][row["label"]] for row in expected)
    assert [column.name for column in model.metadata.signature.inputs] == ["text"]
    assert [column.name for column in model.metadata.signature.outputs] == ["label", "score", "scores"]


def test_signature_refuses_what_has_no_text(registered, monkeypatch):
    """A frame without the text column is refused by MLflow, not answered with nonsense."""
    import mlflow
    import pandas as pd
    from mlflow.exceptions import MlflowException

    monkeypatch.setattr(sys, "path", list(sys.path))
    with store.globally(registered[0]):
        model = mlflow.pyfunc.load_model("models:/sentiment/1")
        with pytest.raises(MlflowException, match="missing inputs"):
            model.predict(pd.DataFrame({"body": ["late"]}))


def test_artifacts_are_a_transformers_folder(registered):
    """`transformers.pipeline` works on the artifacts: plain files, safetensors, nothing pickled."""
    from transformers import pipeline

    home, version = registered
    folder = registry.download(home, version)
    found = pipeline("text-classification", model=str(folder), top_k=None)(["what a lovely flight"])[0]
    assert {row["label"] for row in found} == set(LABELS)


def test_artifacts_hold_no_pickle_and_nothing_compiled(tmp_path, empty_store, model_folder):
    """As they are registered: a Python that loads the model may put its own cache beside the code later."""
    shutil.copytree(empty_store, tmp_path / "home")
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})
    root = registry.download(home, register(home, model_folder)).parents[1]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".bin", ".pt", ".pyc", ".so")]
    assert (root / "code" / "overnight" / "training" / "predict.py").is_file()


def test_requirements_are_exact_and_public(registered):
    """The model names the versions it was made with, none with a local suffix such as +cpu."""
    home, version = registered
    pins = (registry.download(home, version).parents[1] / "requirements.txt").read_text().split()
    assert {pin.partition("==")[0] for pin in pins} == set(registry.REQUIREMENTS)
    assert all(pin.partition("==")[2] and "+" not in pin for pin in pins)


@pytest.mark.slow
def test_model_runs_without_overnight_installed(registered, tmp_path):
    """The code that travels with the model suffices: a process that cannot import our package loads and predicts."""
    home, version = registered
    path = registry.download(home, version).parents[1]
    code = f"""
import importlib.machinery, importlib.util, sys
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
sys.path = [p for p in sys.path if p not in ("", {str(Path(registry.__file__).parents[2])!r})]
assert importlib.util.find_spec("overnight") is None, "the test must not see the package"
import mlflow
model = mlflow.pyfunc.load_model({str(path)!r})
print(model.predict([{{"text": "late again"}}]).label[0])
import overnight
assert overnight.__file__.startswith({str(path)!r}), overnight.__file__
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in LABELS
    assert "Warning" not in done.stderr, done.stderr


def test_register_says_nothing(home, model_folder, capfd, recwarn):
    """No progress bar, no warning, no hint about pip, licences or type annotations."""
    register(home, model_folder)
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "") and not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_registering_again_is_no_second_version(home, model_folder, tmp_path):
    """A task that is retried does not double the version; another night's model is the next number."""
    first = register(home, model_folder)
    assert register(home, model_folder) == first
    assert register(home, model_folder, night="night-2").number == 2
    assert not list(home.mlflow.glob("register-*")), "nothing temporary stays"


def test_nothing_of_the_current_folder_travels(home, model_folder, tmp_path, monkeypatch):
    """The uv.lock and pyproject.toml of the folder we run in are no business of the model."""
    monkeypatch.chdir(tmp_path)
    for name in ("uv.lock", "pyproject.toml", ".python-version"):
        (tmp_path / name).write_text("")
    folder = registry.download(home, register(home, model_folder)).parents[1]
    assert not {"uv.lock", "pyproject.toml", ".python-version"} & set(os.listdir(folder))


def test_damaged_weights_are_not_handed_out(home, model_folder):
    """One changed byte in the artifact store: an error that names the version, instead of wrong predictions."""
    version = register(home, model_folder)
    weights = registry.download(home, version) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(NightFailed, match="models:/sentiment/1: its weights are not those"):
        registry.download(home, version)
    shutil.rmtree(weights.parent)
    with pytest.raises(NightFailed, match="its weights are gone"):
        registry.download(home, version)


def test_the_original_is_not_touched_by_damage_to_the_artifact(home, model_folder):
    """Staging by links must not tie the registered weights to the trial's checkpoint."""
    before = registry.sha256(model_folder / "model.safetensors")
    weights = registry.download(home, register(home, model_folder)) / "model.safetensors"
    weights.write_bytes(b"x")
    assert registry.sha256(model_folder / "model.safetensors") == before


def test_half_made_versions_are_removed(home, model_folder, monkeypatch):
    """A night killed inside register leaves a version without its last tag: it is removed, whole ones stay."""
    register(home, model_folder)
    with monkeypatch.context() as patch:
        patch.setattr(type(store.client(home)), "set_model_version_tag", lambda *_: (_ for _ in ()).throw(SystemExit()))
        with pytest.raises(SystemExit):
            register(home, model_folder, night="night-2")
    assert [version.complete for version in registry.versions(home, "sentiment")] == [True, False]
    assert registry.heal_versions(home, "sentiment", nights={"night-1"}) == [], "another machine's may be in the making"
    assert registry.heal_versions(home, "sentiment", nights={"night-2"}) == [2]
    assert [version.number for version in registry.versions(home, "sentiment")] == [1]


def test_alias_is_read_back(home, model_folder, monkeypatch):
    """When somebody else moves the alias in between, it is noticed; set_alias is not believed blindly."""
    for night in ("night-1", "night-2"):
        register(home, model_folder, night=night)
    registry.set_alias(home, "sentiment", registry.CANDIDATE, 2)
    assert [v.aliases for v in registry.versions(home, "sentiment")] == [(), ("candidate",)]
    kind = type(store.client(home))
    set_it = kind.set_registered_model_alias
    monkeypatch.setattr(kind, "set_registered_model_alias", lambda self, n, a, v: set_it(self, n, a, "2"))
    with pytest.raises(NightFailed, match="somebody else, expected 1, got version 2"):
        registry.set_alias(home, "sentiment", registry.CANDIDATE, 1)


def test_unknown_names_are_the_users_mistake(registered):
    """Unknown models and versions: a complaint with what exists; no champion is no error."""
    home, _ = registered
    with pytest.raises(UserError, match="no such model, got 'sentimnet'; did you mean sentiment?"):
        registry.versions(home, "sentimnet")
    with pytest.raises(UserError, match=r"sentiment: no such version \(it has 1\), got 7"):
        registry.version_of(home, "sentiment", 7)
    with pytest.raises(UserError, match="no such version"):
        registry.set_alias(home, "sentiment", "champion", 7)
    with pytest.raises(UserError, match="no such model"):
        registry.versions(home, "../it's")
    assert registry.champion(home, "topics") is None and registry.by_alias(home, "sentiment", "other") is None
    assert registry.names(home) == ["sentiment"]


def test_descriptions(home, model_folder):
    """A version's description is replaced; the model's too while it is ours, and a person's words stay."""
    register(home, model_folder)
    client = store.client(home)
    registry.set_description(home, "sentiment", "**Promoted** because", 1)
    assert registry.version_of(home, "sentiment", 1).description.startswith("**Promoted** because\n")
    for text in ("What people think, and how to use it", "Other words of ours", "x" * 6000):
        registry.set_description(home, "sentiment", text)
        assert client.get_registered_model("sentiment").description.startswith(text[:4000])
    client.update_registered_model("sentiment", "Ask Ana before you use it")
    registry.set_description(home, "sentiment", "Words of ours")
    assert client.get_registered_model("sentiment").description == "Ask Ana before you use it"


def answers(url: str, server: subprocess.Popen, seconds: float = 240) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=5).status == 200
        except OSError:
            time.sleep(0.3)
    return False


def end(process: subprocess.Popen) -> None:
    import signal

    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_served_by_mlflow(registered, tmp_path):
    """`mlflow models serve -m models:/sentiment@champion --env-manager local` answers over HTTP."""
    home, _ = registered
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/sentiment@champion"]
    command += ["--env-manager", "local", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # MLflow looks for uvicorn on the path, as an activated environment has it
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | store.QUIET | {"MLFLOW_TRACKING_URI": home.tracking_uri, "PATH": path}
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    try:
        assert answers(f"http://127.0.0.1:{port}/ping", server)
        asked = {"dataframe_records": [{"text": "a lovely flight"}, {"text": "late again"}]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        found = json.load(urllib.request.urlopen(request, timeout=60))["predictions"]
        assert [set(row["scores"]) for row in found] == [set(LABELS)] * 2
        assert all(row["score"] == row["scores"][row["label"]] for row in found)
    finally:
        end(server)


@pytest.mark.slow
def test_shared_server(tmp_path, model_folder, mlflow_address):
    """Against a real MLflow server: register, fetch once, notice damage, list; artifacts travel over HTTP."""
    shared = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": mlflow_address})
    store.prepare(shared)
    version = register(shared, model_folder)
    registry.set_alias(shared, "sentiment", registry.CHAMPION, 1)
    assert registry.champion(shared, "sentiment").aliases == ("champion",)
    folder = registry.download(shared, version)
    assert folder == shared.root / "models" / "sentiment" / "1"
    assert set(os.listdir(folder)) == set(os.listdir(model_folder))
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert registry.download(shared, version) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp, "fetched once"
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(NightFailed, match="not those"):
        registry.download(shared, version)
    assert registry.sha256(registry.download(shared, version) / "model.safetensors") == registry.sha256(
        model_folder / "model.safetensors"
    )
