"""What a report reads: the record of a night as `night.json` holds it. A section that is not known yet is absent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from overnight.evaluation import Comparison, Evaluation
    from overnight.generalisation import Carried
    from overnight.samples import Sample

State = Literal["running", "promoted", "kept", "waiting", "skipped", "refused", "failed", "interrupted"]


class Judged(TypedDict, total=False):
    version: str | int | None
    """Of the registered model; absent when the night ended before it was registered."""
    trial: int
    """The candidate's trial."""
    evaluation: Evaluation


class Trial(TypedDict, total=False):
    """As `overnight.search` lists it."""

    number: int
    state: Literal["finished", "pruned", "failed", "running", "waiting"]
    value: float | None
    params: dict[str, Any]
    evaluations: dict[str, float]
    """Number of the evaluation (from "0") → metric on the validation rows."""
    seconds: float
    samples_per_second: float
    steps: int
    stopped: str | None
    error: str


class Searched(TypedDict, total=False):
    study: str
    wanted: int
    """Trials asked for."""
    minutes: float | None
    """Budget."""
    trials: list[Trial]
    folds: dict[str, Any] | None
    """Of a cross-validation: `metric`, its value in each of the `folds`, `mean` and `sd`."""
    importances: dict[str, float]
    """Parameter → share of what the parameters explain of the metric; {} when too few trials finished to say."""


class Expected(TypedDict, total=False):
    """One expectation, as `overnight.expectations` reports it."""

    expectation: str
    severity: Literal["block", "warn"]
    passed: bool
    text: str
    """One sentence with the number seen and the limit."""
    rows: list[int]
    examples: list[str]
    """Texts, only when `validation.show_examples` asks for them."""


class Rows(TypedDict, total=False):
    """`asdict(Ingested) | asdict(Validated)` and the sides of the split; all but `rows` may be absent."""

    source: str
    source_rows: int
    rows: int
    repaired: int
    broken_rows: int
    labels: dict[str, int]
    fingerprint: str
    rows_clean: int
    rows_refused: int
    reasons: dict[str, int]
    results: list[Expected]
    quarantine: str
    docs: str
    facts: dict[str, Any]
    """Shares of labels and languages, quantiles of lengths; see `Validated.facts`."""
    previous: dict[str, Any] | None
    """The same of the last accepted night."""
    split: dict[str, int]
    """train, validation, test, withheld → rows."""
    near_duplicates: int


class NextStep(TypedDict, total=False):
    text: str
    command: str


class NightRecord(TypedDict, total=False):
    id: str
    model: str
    description: str
    state: State
    why: str | None
    """Sentences, one a line, of a night that did not reach the gate."""
    started: float
    """Unix seconds; `ended` too."""
    ended: float
    decision: dict[str, Any]
    """`Decision.record()`."""
    candidate: Judged
    champion: Judged | None
    """The champion that the candidate was compared with: the one before the decision."""
    comparison: Comparison | None
    elsewhere: list[Carried]
    """Both on other data (`evaluation.also_on`)."""
    samples: list[Sample]
    """What both wrote for some test rows, only when `validation.show_examples` asks for it."""
    search: Searched
    data: Rows
    stages: dict[str, float]
    """Stage → seconds."""
    overhead: float
    """Seconds that no stage's own work accounts for."""
    lineage: dict[str, Any]
    """What the version came from, name → value: config hash, commit, study, run, versions of libraries."""
    metric: str
    """The metric that trials and versions are judged by."""
    monitor: dict[str, Any]
    """What the champion's monitor last said: `text`, and in `windows` what it saw."""
    scheduled: float | str
    """When the night should have started, of one that a schedule started."""
    next: list[NextStep]
    approval: dict[str, Any]
    """Of a waiting night: `run` and `page` in Prefect, and `until`, Unix seconds, when the champion stays."""
    notified: dict[str, State]
    """Variable that holds an address → the end that was sent there; absent when nobody is to be told."""
    warnings: list[str]
    """What went wrong besides, and cost the night nothing."""
