"""The YAML of one model: facts, no code. Closed, frozen, and every mistake of a file reported at once.

config = load_config("configs/sentiment.yaml", ["training.epochs=1"], problems=registry)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from overnight.errors import Complaint, UserError, nearest
from overnight.settings import Training

ARROW = " → "
TRAINING_FIELDS = tuple(f.name for f in fields(Training))
_TRAINING = TypeAdapter(Training)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """What is fine-tuned."""

    base: str
    """The base model: `pkg://package/folder`, a folder, or a hub name (`google-bert/bert-base-uncased`)."""

    revision: str | None = None
    """Commit or tag of a hub model; pin it, so that a night depends on nothing that moves."""

    max_length: Annotated[int, Field(ge=8, le=8192)] = 128
    """Longest input in tokens; what is longer is cut off."""


class Data(Section):
    """Where the rows come from."""

    source: str
    """`pkg://package/path`, a path or glob (CSV, TSV, JSONL, Parquet, a folder a class), or `hf://name[:config][@revision]`."""

    columns: dict[str, str] = {}
    """Role of the problem → name of the source's column, as `{text: body, label: topic}`; same names need no entry."""

    slices: tuple[str, ...] = ()
    """Columns of the source by whose values the evaluation is broken down."""

    encoding: str = "auto"
    """Text encoding of CSV, TSV, JSONL and text files; `auto` takes UTF-8 where it fits, else what is detected."""

    repair: bool = True
    """Repair mojibake (UTF-8 read as Latin-1 and the like) before anything looks at the text."""

    split: str | None = None
    """Split of a Hugging Face dataset to read; absent: all of them, put together."""

    sample: Annotated[int, Field(ge=20)] | None = None
    """Take this many rows, the same ones every night, with each label's share kept; absent: all rows."""


Severity = Literal["block", "warn", "off"]


class Expectation(Section):
    """One check of the data.

    Checks of single rows send each bad row to quarantine, whether `block` or `warn`; the severity says what
    happens when their share passes `max_share`.
    """

    severity: Severity = "block"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""


class RowCount(Expectation):
    min: Annotated[int, Field(ge=1)] = 100
    """Fewest rows."""
    max: Annotated[int, Field(ge=1)] | None = None
    """Most rows."""


class Columns(Expectation):
    """The columns of the problem and the slices; without one of the problem's own no night runs, whatever this says."""


class NotNull(Expectation):
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of rows without a text or a label; such rows are always refused, even when this is `off`."""


class Labels(Expectation):
    known: tuple[str, ...] | None = None
    """The labels that may occur; absent: those of the last accepted night, or, on the first, those found."""
    min: Annotated[int, Field(ge=1)] = 2
    """Fewest different labels among the accepted rows."""
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Largest share of rows with another label; such rows are refused one by one."""


class LabelShare(Expectation):
    severity: Severity = "warn"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""
    max_change: Annotated[float, Field(gt=0, le=1)] = 0.10
    """Largest change of a label's share (0.10 = ten points) against the last accepted night."""


class Characters(Expectation):
    min: Annotated[int, Field(ge=0)] = 3
    """Fewest characters; shorter rows are refused one by one."""
    max: Annotated[int, Field(ge=1)] = 100_000
    """Most characters; longer rows are refused one by one."""
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of rows with a shorter or longer text."""


class Tokens(Expectation):
    severity: Severity = "warn"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""
    max_share_cut: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of rows longer than `model.max_length` tokens."""


class Duplicates(Expectation):
    severity: Severity = "warn"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.10
    """Largest share of rows that repeat an earlier row; the copies are refused one by one."""


class Contradictions(Expectation):
    severity: Severity = "warn"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Largest share of rows whose text occurs with another label too; all of them are refused."""


class EncodingDamage(Expectation):
    severity: Severity = "warn"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""
    max_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of rows with characters lost or garbled beyond repair; such rows are refused one by one."""


class Language(Expectation):
    severity: Severity = "warn"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""
    expected: tuple[str, ...] | None = None
    """ISO 639-1 codes of the languages that belong in the data; absent: the expectation is off."""
    min_share: Annotated[float, Field(ge=0, le=1)] = 0.80
    """Smallest share of rows in those languages, measured on a fixed sample."""


class Expectations(Section):
    """The checks, each with a default."""

    row_count: RowCount = RowCount()
    """Number of rows."""
    columns: Columns = Columns()
    """Columns present."""
    not_null: NotNull = NotNull()
    """Text and label present."""
    labels: Labels = Labels()
    """Only known labels; rows with others are refused one by one."""
    label_share: LabelShare = LabelShare()
    """Label shares near those of the last accepted night."""
    characters: Characters = Characters()
    """Length of a text in characters."""
    tokens: Tokens = Tokens()
    """Length of a text in tokens."""
    duplicates: Duplicates = Duplicates()
    """Rows that repeat a text."""
    contradictions: Contradictions = Contradictions()
    """Rows whose text occurs with several labels."""
    encoding_damage: EncodingDamage = EncodingDamage()
    """Characters lost or garbled."""
    language: Language = Language()
    """Language of the texts."""


class FurtherExpectation(Section):
    """Any expectation of Great Expectations, judged on the rows as they came in."""

    expect: str
    """Its name, as `expect_column_values_to_not_match_regex`."""

    arguments: dict[str, Any] = {}
    """Its arguments, as `{column: text, regex: "^RT ", mostly: 0.9}`."""

    severity: Severity = "block"
    """`block` stops the night when the expectation fails, `warn` reports it, `off` does not look."""


class Validation(Section):
    """What the data must fulfil before a model is trained on it."""

    expect: Expectations = Expectations()
    """The expectations that every text problem has."""

    also: tuple[FurtherExpectation, ...] = ()
    """Further expectations, one list entry each."""

    max_refused: Annotated[float, Field(ge=0, le=1)] = 0.20
    """Largest share of rows that may go to quarantine; with more the night stops."""

    show_examples: bool = False
    """Whether reports and Data Docs may quote texts; off, they show counts and row numbers only."""


class Split(Section):
    """Shares of the rows; which side a row is on depends on its own text alone."""

    test: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    """Share of the frozen test rows, never trained on."""

    validation: Annotated[float, Field(gt=0, lt=0.5)] = 0.15
    """Share of the rows by which trials are compared."""

    near_duplicate: Annotated[float, Field(gt=0.3, le=1)] = 0.7
    """Jaccard similarity of word shingles from which two rows count as near-duplicates."""


class Domain(Section):
    """Where a searched parameter may lie: `{low, high}` (whole numbers when both are) or `{choices}`."""

    low: int | float | None = None
    """Smallest value."""
    high: int | float | None = None
    """Largest value."""
    log: bool = False
    """Whether to draw on a logarithmic scale."""
    choices: Annotated[tuple[bool | int | float | str | None, ...], Field(min_length=2)] | None = None
    """The values to choose from."""

    @model_validator(mode="after")
    def _one_kind(self) -> Domain:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("takes low and high, or choices, not both")
        elif self.low is None or self.high is None:
            raise ValueError("needs low and high, or choices")
        elif not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low} and high {self.high}")
        elif self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range must start above 0, got {self.low}")
        return self

    @property
    def extremes(self) -> tuple[Any, ...]:
        """The values whose validity implies that of the whole domain."""
        return self.choices if self.choices is not None else (self.low, self.high)


class Search(Section):
    """The Optuna search over fine-tuning runs."""

    trials: Annotated[int, Field(ge=1)] = 10
    """Number of trials a night, finished and pruned ones together."""

    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall-clock budget; whichever of `trials` and `minutes` is used up first ends the search."""

    parallel: Annotated[int, Field(ge=1)] = 1
    """Trials that run at the same time, each in a process of its own on its share of the cores."""

    space: dict[str, Domain] = {}
    """Training field → `{low, high, log}` or `{choices}`; empty: one trial with the settings of `training:`."""

    sampler: Literal["tpe", "random"] = "tpe"
    """How parameters are proposed."""

    pruner: Literal["hyperband", "median", "none"] = "median"
    """Which unpromising trials are stopped early."""

    prune_after: Annotated[int, Field(ge=0)] = 1
    """Evaluations each trial may make before it can be pruned."""

    warm_start: Annotated[int, Field(ge=0)] = 2
    """Best parameter sets of earlier nights to try first."""

    seed: Annotated[int, Field(ge=0)] = 17
    """Seed of the sampler."""


class Evaluation(Section):
    """How candidate and champion are compared."""

    metric: str | None = None
    """The metric the search maximises and the gate compares; absent: the problem's own (`macro_f1`)."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the confidence intervals."""

    resamples: Annotated[int, Field(ge=200)] = 2000
    """Bootstrap resamples."""


class Promotion(Section):
    """When a candidate replaces the champion."""

    mode: Literal["auto", "manual", "dry-run"] = "auto"
    """`auto` promotes what passes, `manual` waits for `overnight promote`, `dry-run` only says what it would do."""

    floor: float = 0.0
    """Lowest value of the metric on the test rows; below it nothing is promoted, not even on the first night."""

    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """Smallest gain over the champion that counts."""

    max_class_drop: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest drop of one class's F1 that is tolerated, beyond what chance explains."""

    max_latency_ratio: Annotated[float, Field(gt=0)] = 1.5
    """Largest ratio of the candidate's latency a text to the champion's."""


class Config(Section):
    """One model a team keeps."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=60)]
    """Name of the registered model, in lower case."""

    description: str = ""
    """What the model is for; shown in the report and the registry."""

    problem: str = "sequence-classification"
    """Kind of NLP problem."""

    model: Model
    """What is fine-tuned."""
    data: Data
    """Where the rows come from."""
    validation: Validation = Validation()
    """What the data must fulfil."""
    split: Split = Split()
    """Train, validation and test rows."""
    training: Training = Training()
    """How one model is fine-tuned; the starting point of the search."""
    search: Search = Search()
    """The search over training settings."""
    evaluation: Evaluation = Evaluation()
    """How candidate and champion are compared."""
    promotion: Promotion = Promotion()
    """When a candidate replaces the champion."""


def config_hash(config: Config) -> str:
    """SHA-256 of what decides the trained model: all but the description and the promotion rule."""
    facts = config.model_dump(mode="json", exclude={"description", "promotion"})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_config(
    path: str | Path, overrides: Iterable[str] = (), *, problems: Mapping[str, Collection[str]] | None = None
) -> Config:
    """Reads and checks one YAML file.

    Args:
        path: the file.
        overrides: `path.to.key=value`, the value in YAML.
        problems: problem names → the roles of their columns; absent: neither is checked.

    Raises:
        UserError: with every mistake of the file and the overrides, each with the nearest right key.
    """
    where = str(path)
    facts, complaints = _read(Path(path), where)
    for override in overrides:
        complaints += _apply(override, facts)
    known = problems or {}
    if known and isinstance(facts.get("problem", ""), str):
        problem = facts.get("problem", Config.model_fields["problem"].default)
        if problem not in known:
            complaints.append(
                Complaint(f"{where}: problem", "not a known problem", repr(problem), nearest(problem, known))
            )
        elif isinstance(facts.get("data"), dict) and isinstance(facts["data"].get("columns"), dict):
            for role in facts["data"]["columns"]:
                if role not in known[problem]:
                    place = ARROW.join(("data", "columns", str(role)))
                    rule = f"not a column of {problem} (which has {', '.join(known[problem])})"
                    complaints.append(Complaint(f"{where}: {place}", rule, None, nearest(str(role), known[problem])))
    complaints += _space_complaints(facts, where)
    try:
        config = Config.model_validate(facts)
    except ValidationError as error:
        complaints += [_complaint(e, where) for e in error.errors(include_url=False)]
    if complaints:
        raise UserError(*complaints)
    return config


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors and for docs/configuration.md."""
    return Config.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


def with_parameters(training: Training, parameters: Mapping[str, Any]) -> Training:
    """`training` with the parameters a trial drew."""
    return Training(**{name: getattr(training, name) for name in TRAINING_FIELDS} | dict(parameters))


def _read(path: Path, where: str) -> tuple[dict[str, Any], list[Complaint]]:
    if path.is_dir() or not path.exists():
        siblings = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
        rule = "is a folder, expected a YAML file" if path.is_dir() else "no such file"
        raise UserError(Complaint(where, rule, None, nearest(where, siblings)))
    try:
        facts = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, PermissionError) as error:
        raise UserError(Complaint(where, "cannot be read as UTF-8 text", type(error).__name__)) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}: line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise UserError(Complaint(place, f"not valid YAML: {getattr(error, 'problem', None) or error}")) from None
    if not isinstance(facts, dict):
        raise UserError(Complaint(where, "expected a mapping of keys to values", type(facts).__name__))
    return facts, []


def _apply(override: str, facts: dict[str, Any]) -> list[Complaint]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        return [Complaint("--set", "must read path.to.key=value", repr(override))]
    *parents, last = key.split(".")
    target = facts
    for parent in parents:
        child = target.setdefault(parent, {})
        if not isinstance(child, dict):
            return [Complaint(f"--set {key}", f"{parent} is a value, not a section", repr(child))]
        target = child
    try:
        target[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        return [Complaint(f"--set {key}", "the value must be YAML", repr(value))]
    return []


def _space_complaints(facts: dict[str, Any], where: str) -> list[Complaint]:
    """What the space offers must be valid training settings; sections that are no mappings are pydantic's to refuse."""
    search = facts.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    complaints = []
    for name, domain in space.items() if isinstance(space, dict) else ():
        place = ARROW.join((f"{where}: search", "space", str(name)))
        if name not in TRAINING_FIELDS:
            near = nearest(str(name), TRAINING_FIELDS)
            complaints.append(Complaint(place, "not a training parameter", None, near))
            continue
        try:
            extremes = Domain.model_validate(domain).extremes
        except ValidationError:
            continue
        for value in extremes:
            try:
                _TRAINING.validate_python({name: value})
            except ValidationError as error:
                rule = error.errors()[0]["msg"].removeprefix("Input ")
                complaints.append(Complaint(place, rule, repr(value)))
    return complaints


def _complaint(error: Any, where: str) -> Complaint:
    path = [str(part) for part in error["loc"]]
    place = f"{where}: {ARROW.join(path)}" if path else where
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return Complaint(place, "unknown key", None, nearest(path[-1], _siblings(path[:-1])))
    if error["type"] in ("missing", "missing_argument"):
        return Complaint(place, "is required")
    rule = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    got = None if error["type"] == "value_error" else repr(error["input"])
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        choices = [c.strip("'") for c in error["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return Complaint(place, rule, got, nearest(error["input"], choices))
    return Complaint(place, rule, got)


def _siblings(path: list[str]) -> list[str]:
    """Names of the keys that the section at `path` knows."""
    if path[:2] == ["search", "space"]:
        return list(Domain.model_fields)
    section: Any = Config
    for part in path:
        if part == "training":
            return list(TRAINING_FIELDS)
        field = section.model_fields.get(part)
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        section = field.annotation
    return list(section.model_fields)
