"""A problem's rows, read and judged: what the night, `overnight validate` and `overnight plan` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from overnight import problems
from overnight.config import Data, Model, Validation
from overnight.data.ingest import Ingested, ingest
from overnight.expectations import Validated, validate_rows


def read_rows(data: Data, problem: str, folder: Path, where: str) -> Ingested:
    """Ingests the columns that the problem needs; arguments and errors as `overnight.data.ingest.ingest`."""
    kind = problems.get(problem)
    return ingest(
        data,
        folder,
        required_roles=kind.required_roles,
        optional_roles=kind.optional_roles,
        text_roles=kind.text_roles,
        target=kind.target,
        where=where,
    )


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
        max_length=model.max_length,
        tokenizer=load_tokenizer(resolve_base(model.base), model.revision),
        previous=previous,
        folder=folder,
        docs_folder=docs_folder,
    )
