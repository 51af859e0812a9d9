"""A problem's rows, read and judged: what the night, `overnight validate` and `overnight plan` share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from overnight import problems
from overnight.config import Data, Model, Validation
from overnight.data.ingest import Ingested, ingest
from overnight.expectations import Validated, validate_rows
from overnight.newbase import NEW

if TYPE_CHECKING:
    from overnight.problems.base import Facts, Problem


def read_rows(data: Data, problem: str, folder: Path, where: str) -> Ingested:
    """Ingests the columns that the problem needs; arguments and errors as `overnight.data.ingest.ingest`."""
    return ingest(data, folder, problems.get(problem), where=where)


def facts_of(problem: Problem, rows: Mapping[str, Iterable[Any]], model: Model) -> Facts:
    """What the problem has to know of the training rows, and of the config where it writes texts."""
    written = {"generation": model.generation.model_dump()} if problem.generates else {}
    return problem.facts(rows) | written


def judge_rows(
    rows: Ingested,
    validation: Validation,
    slices: Sequence[str],
    problem: str,
    model: Model,
    previous: Mapping[str, Any] | None,
    folder: Path,
    docs_folder: Path,
) -> Validated:
    """Validates ingested rows, tokens counted by the model's tokenizer; as `overnight.expectations.validate_rows`."""
    from overnight.training.models import load_tokenizer, resolve_base

    kind = problems.get(problem)
    return validate_rows(
        rows.path,
        validation,
        columns=kind.required_roles,
        slices=slices,
        text_roles=kind.text_roles,
        target=kind.target,
        labelled=kind.labelled,
        max_length=model.max_length,
        # of a base that is made of these rows there is none yet
        tokenizer=None if model.base == NEW else load_tokenizer(resolve_base(model.base), model.revision),
        previous=previous,
        folder=folder,
        docs_folder=docs_folder,
    )
