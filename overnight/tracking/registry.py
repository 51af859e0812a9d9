"""Model versions: registered whole, found by number or by the aliases `candidate` and `champion`, fetched and checked.

    version = register(home, "sentiment", folder, run_id=night, inputs=("text",), example={"text": ["good"]}, ...)
    set_alias(home, "sentiment", CANDIDATE, version.number)
    champion(home, "sentiment")               # Version or None
    download(home, version)                   # folder for transformers' from_pretrained and pipeline

A version is a pyfunc model from code: weights as safetensors, tokenizer, the code that runs them; nothing pickled.
The tag `overnight.complete` is set last: a version without it was interrupted and is removed by `heal_versions`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from overnight.errors import Complaint, NightFailed, UserError, nearest
from overnight.golden import GOLDEN
from overnight.home import Home, read_json
from overnight.tracking.runs import NIGHT, flat_numbers, metric_key
from overnight.tracking.store import client, globally, reaching

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import Model, ModelSignature

CANDIDATE, CHAMPION = "candidate", "champion"
COMPLETE, METRICS, SHA256 = "overnight.complete", "overnight.metrics", "overnight.weights_sha256"
WEIGHTS = "model.safetensors"
FOLDER = "artifacts/model"
OURS = "<!-- written by overnight -->"
"""Ends the descriptions that we wrote; MLflow's pages do not show it."""
REQUIREMENTS = ("mlflow", "torch", "transformers", "accelerate", "safetensors", "numpy", "pandas", "scikit-learn")


@dataclass(frozen=True)
class Version:
    """A registered model version; `created` in epoch seconds, `metrics` those it was registered with."""

    name: str
    number: int
    run_id: str | None
    aliases: tuple[str, ...]
    tags: dict[str, str]
    metrics: dict[str, float]
    description: str
    created: float

    @property
    def model_uri(self) -> str:
        return f"models:/{self.name}/{self.number}"

    @property
    def complete(self) -> bool:
        return self.tags.get(COMPLETE) == "true"


@contextmanager
def one_writer(home: Home, name: str) -> Iterator[None]:
    """Holds the aliases and the ledger of a model for this process and thread; may be nested.

    MLflow has no compare-and-swap for aliases. On a shared server, writers of other machines are met by reading back
    what was written.
    """
    from filelock import FileLock, Timeout

    path = home.folder("locks") / f"registry-{re.sub(r'[^a-z0-9_-]', '_', name)}.lock"
    try:
        with FileLock(path, timeout=900, is_singleton=True, thread_local=True):
            yield
    except Timeout:
        raise NightFailed(Complaint(name, "another process has been changing this model for 15 minutes")) from None


def register(
    home: Home,
    name: str,
    folder: Path,
    *,
    run_id: str,
    inputs: Sequence[str],
    example: Mapping[str, Sequence[str]],
    tags: Mapping[str, Any],
    metrics: Mapping[str, Any],
    description: str = "",
) -> Version:
    """Registers a finished model folder as the next version; the same folder of the same run stays one version.

    Args:
        folder: `from_pretrained` files, tokenizer files and `overnight.json`.
        run_id: the night's run.
        inputs: the problem's text roles: the columns of the signature.
        example: input → texts, kept beside the model as its input example.
        tags: lineage, as text; `overnight.` is ours.
        metrics: numbers on the test rows, nested or flat.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    from mlflow.entities import LoggedModelOutput, Metric
    from mlflow.models import Model

    digest = sha256(folder / WEIGHTS)
    numbers = {key: value for key, value in flat_numbers(metrics) if math.isfinite(value)}
    facts = {key: str(value)[:5000] for key, value in tags.items() if value is not None}
    facts |= {SHA256: digest, METRICS: json.dumps(numbers, ensure_ascii=False)}
    with one_writer(home, name), reaching(home):
        mlflow = client(home)
        for version in _versions(home, name):
            if version.complete and version.run_id == run_id and version.tags.get(SHA256) == digest:
                return version
        experiment_id = mlflow.get_run(run_id).info.experiment_id
        logged = mlflow.create_logged_model(experiment_id, name, run_id, model_type="overnight")
        with tempfile.TemporaryDirectory(dir=home.folder("mlflow"), prefix="register-") as place:
            path = Path(place, "model")
            model_id = logged.model_id
            known_as = Model(logged.artifact_location, run_id=run_id, model_uuid=model_id, model_id=model_id)
            save_model(path, folder, inputs, example, known_as)
            mlflow.log_model_artifacts(logged.model_id, str(path))
        mlflow.finalize_logged_model(logged.model_id, "READY")
        mlflow.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        now = int(time.time() * 1000)
        # on the model and on the run: MLflow's model page compares versions by these
        logged_numbers = [
            Metric(f"test/{metric_key(key)}"[:250], value, now, 0, run_id=run_id, model_id=logged.model_id)
            for key, value in numbers.items()
        ]
        for start in range(0, len(logged_numbers), 500):
            mlflow.log_batch(run_id, metrics=logged_numbers[start : start + 500])
        _make_registered_model(home, name, description)
        with globally(home):  # the SQL registry looks the logged model up through the global URI
            made = mlflow.create_model_version(
                name, f"models:/{logged.model_id}", run_id, facts, description=description, model_id=logged.model_id
            )
        mlflow.set_model_version_tag(name, str(made.version), COMPLETE, "true")
        return version_of(home, name, int(made.version))


def set_alias(home: Home, name: str, alias: str, number: int) -> None:
    """Points an alias at a version and reads it back.

    Raises:
        UserError: no such model or version.
        NightFailed: when somebody else moved the alias at the same time.
        TrackingUnavailable: when MLflow does not answer.
    """
    with one_writer(home, name), reaching(home):
        version_of(home, name, number)
        client(home).set_registered_model_alias(name, alias, str(number))
        found = by_alias(home, name, alias)
        if found is None or found.number != number:
            got = "nothing" if found is None else f"version {found.number}"
            raise NightFailed(Complaint(f"{name}@{alias}", f"was moved by somebody else, expected {number}", got))


def remove_alias(home: Home, name: str, alias: str) -> None:
    """Takes an alias away; one that is not there is no error."""
    with one_writer(home, name), reaching(home):
        client(home).delete_registered_model_alias(name, alias)


def champion(home: Home, name: str) -> Version | None:
    """The version in production, or None before the first promotion.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    return by_alias(home, name, CHAMPION)


def by_alias(home: Home, name: str, alias: str) -> Version | None:
    """The version behind an alias, or None when there is no such alias or model."""
    from mlflow.exceptions import MlflowException

    with reaching(home):
        try:
            found = client(home).get_model_version_by_alias(name, alias)
        except MlflowException as error:
            # MLflow answers INVALID_PARAMETER_VALUE for a missing alias, the other for a missing model
            if error.error_code in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                return None
            raise
        return _version(found, None)


def version_of(home: Home, name: str, number: int) -> Version:
    """One version.

    Raises:
        UserError: no such model, or no such version of it; says what exists.
        TrackingUnavailable: when MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    with reaching(home):
        try:
            return _version(client(home).get_model_version(name, str(number)), None)
        except MlflowException as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST"):
                raise
    numbers = [version.number for version in versions(home, name)]
    have = f"it has {', '.join(map(str, numbers[-10:]))}" if numbers else "it has none"
    raise UserError(Complaint(name, f"no such version ({have})", str(number)))


def versions(home: Home, name: str) -> list[Version]:
    """All versions, oldest first.

    Raises:
        UserError: no such model; says which one was meant.
        TrackingUnavailable: when MLflow does not answer.
    """
    with reaching(home):
        known = names(home)
        if name not in known:
            rule = "no such model" if known else "no such model; none has been registered yet"
            raise UserError(Complaint("models", rule, repr(name), nearest(name, known)))
        return _versions(home, name)


def names(home: Home) -> list[str]:
    """Names of all registered models."""
    with reaching(home):
        found, token = [], None
        while True:
            page = client(home).search_registered_models(max_results=1000, page_token=token)
            found += [model.name for model in page]
            token = page.token
            if not token:
                return sorted(found)


def set_tags(home: Home, name: str, number: int, tags: Mapping[str, Any]) -> None:
    """Adds tags to a version, such as the gate's decision."""
    with reaching(home):
        for key, value in tags.items():
            client(home).set_model_version_tag(name, str(number), key, str(value)[:5000])


def set_description(home: Home, name: str, text: str, number: int | None = None) -> None:
    """The Markdown that MLflow's pages show of a version, or without a number of the registered model itself.

    What a person wrote about the model is left alone, unless `text` says it too.

    Raises:
        TrackingUnavailable: when MLflow does not answer.
    """
    written = f"{text[: 4990 - len(OURS)]}\n\n{OURS}"  # the column holds 5,000 characters
    with reaching(home):
        mlflow = client(home)
        if number is not None:
            mlflow.update_model_version(name, str(number), written)
            return
        known = mlflow.get_registered_model(name).description or ""
        if OURS in known or known in text:
            mlflow.update_registered_model(name, written)


def download(home: Home, version: Version) -> Path:
    """The model folder of a version: `from_pretrained` files, tokenizer, `overnight.json`.

    With artifacts on this disk it is the artifact itself (do not write into it); from a server it is fetched once
    into `models/<name>/<number>` under the home. The weights are compared with the checksum of the registration.

    Raises:
        NightFailed: the weights are not those that were registered.
        TrackingUnavailable: when MLflow or the artifact store does not answer.
    """
    with reaching(home):
        source = client(home).get_model_version_download_uri(version.name, str(version.number))
        parts = urlsplit(source)
        local = Path(unquote(parts.path)) if parts.scheme in ("", "file") else None
        folder = local / FOLDER if local else home.root / "models" / version.name / str(version.number)
        if local is None and not (folder / WEIGHTS).exists():
            _fetch(home, source, folder)
    expected = version.tags.get(SHA256)
    if not (folder / WEIGHTS).is_file():
        raise NightFailed(Complaint(version.model_uri, "its weights are gone", str(folder)))
    if expected and sha256(folder / WEIGHTS) != expected:
        if local is None:
            shutil.rmtree(folder)  # the next call fetches it anew
        raise NightFailed(Complaint(version.model_uri, "its weights are not those that were registered", str(folder)))
    return folder


def heal_versions(home: Home, name: str, nights: Collection[str] | None = None) -> list[int]:
    """Removes the versions that a killed night left half-made; those behind an alias are left alone.

    Args:
        nights: ids of the nights whose versions may go; None: all.

    Returns:
        The numbers of the removed versions.
    """
    with one_writer(home, name), reaching(home):
        removed = []
        for version in _versions(home, name):
            ours = nights is None or version.tags.get(NIGHT) in nights
            if ours and not version.complete and not version.aliases and METRICS in version.tags:
                client(home).delete_model_version(name, str(version.number))
                removed.append(version.number)
        return removed


def sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def requirements() -> list[str]:
    """The exact versions a model needs, from what is installed: nothing is inferred, nothing asks the network."""
    pins = []
    for package in REQUIREMENTS:
        try:
            # "2.15.0+cpu" is on no public index
            pins.append(f"{package}=={installed_version(package).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return pins


def signature(inputs: Sequence[str], answers: Sequence[Mapping[str, Any]] = ()) -> ModelSignature:
    """Text columns in; out what some answers of the model show."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array, Map

    def kind(values: list[Any]) -> Any:
        first = next((value for value in values if value not in ({}, [], None)), None)
        if isinstance(first, str | float | int):
            return {str: DataType.string, float: DataType.double}.get(type(first), DataType.long)
        if isinstance(first, Mapping) and all(isinstance(value, float) for value in first.values()):
            return Map(DataType.double)
        return Array(DataType.string) if isinstance(first, list) and isinstance(first[0], str) else AnyType()

    outputs = {name: kind([answer[name] for answer in answers]) for name in (answers[0] if answers else ())}
    columns = Schema([ColSpec(of, name) for name, of in outputs.items()]) if outputs else None
    return ModelSignature(Schema([ColSpec(DataType.string, name) for name in inputs]), columns)


def save_model(
    path: Path, folder: Path, inputs: Sequence[str], example: Mapping[str, Sequence[str]], known_as: Model | None = None
) -> None:
    """Writes the MLflow model of a finished model folder to disk.

    Not by `log_model`, which would load the model and predict to look around.
    """
    import mlflow.pyfunc
    import pandas as pd

    # under the name by which it is found again, whatever the folder is called; links cost no copy
    staged = path.parent / "artifacts" / "model"
    shutil.copytree(folder, staged, copy_function=_link)
    code = path.parent / "code" / "overnight"
    package = Path(__file__).parents[1]
    shutil.copytree(package, code, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.gz"))
    mlflow.pyfunc.save_model(
        str(path),
        python_model=str(Path(__file__).with_name("pyfunc_model.py")),
        artifacts={"model": str(staged)},
        code_paths=[str(code)],
        pip_requirements=requirements(),
        signature=signature(inputs, (read_json(folder / GOLDEN) or {}).get("predictions", ())),
        input_example=pd.DataFrame(example),
        mlflow_model=known_as,
    )


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    return target


def _fetch(home: Home, source: str, folder: Path) -> None:
    """Fetches beside its place and moves it there whole."""
    import mlflow.artifacts

    parent = home.folder("models", folder.parent.name)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{folder.name}-") as place:
        got = mlflow.artifacts.download_artifacts(
            artifact_uri=f"{source.rstrip('/')}/{FOLDER}", dst_path=place, tracking_uri=home.tracking_uri
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(got, folder)


def _make_registered_model(home: Home, name: str, description: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client(home).create_registered_model(name, description=description or None)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _versions(home: Home, name: str) -> list[Version]:
    mlflow = client(home)
    found: list[ModelVersion] = []
    token = None
    while True:
        page = mlflow.search_model_versions(f"name = '{name}'", max_results=1000, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    if not found:
        return []
    # the search leaves aliases empty; the registered model has them
    aliases: dict[int, list[str]] = {}
    for alias, number in mlflow.get_registered_model(name).aliases.items():
        aliases.setdefault(int(number), []).append(alias)
    listed = [_version(one, aliases.get(int(one.version), [])) for one in found]
    return sorted(listed, key=lambda version: version.number)


def _version(found: ModelVersion, aliases: Sequence[str] | None) -> Version:
    tags = dict(found.tags)
    return Version(
        name=found.name,
        number=int(found.version),
        run_id=found.run_id or None,
        aliases=tuple(sorted(found.aliases if aliases is None else aliases)),
        tags=tags,
        metrics=json.loads(tags.get(METRICS, "{}")),
        description=found.description or "",
        created=found.creation_timestamp / 1000,
    )
