"""Bodies of requests: read up to a limit, checked row by row, refused with all their mistakes at once.

Two shapes: ours, `{"text": …}` or `{"rows": [{"text": …}, …]}`, and those that `mlflow models serve` takes.
No complaint quotes a value: it may be somebody's text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request

from overnight.data.normalise import normalise, repair
from overnight.errors import Complaint, nearest
from overnight.serving.batching import Row

MOST = 20
"""Complaints of one answer."""
FORMATS = ("dataframe_split", "dataframe_records", "instances", "inputs")
KINDS = {dict: "an object", list: "a list", bool: "true or false", int: "a number", float: "a number"}


class Refused(Exception):
    """A request that is not answered with predictions."""

    def __init__(self, status: int, *complaints: Complaint, retry_after: float | None = None):
        super().__init__("; ".join(map(str, complaints)))
        self.status, self.complaints, self.retry_after = status, complaints, retry_after


async def read_json(request: Request, limit: int) -> Any:
    """The body, which must be JSON.

    Raises:
        Refused: 413, when it has more bytes than the limit; 400, when it is no JSON.
    """
    body = bytearray()
    declared = request.headers.get("content-length", "")
    too_long = declared.isdecimal() and int(declared) > limit
    async for chunk in request.stream():
        body += chunk
        too_long = too_long or len(body) > limit
        if too_long:  # the server itself reads the rest and throws it away, so that the client hears why
            raise Refused(413, Complaint("body", f"at most {limit:,} bytes, split the request"))
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = f" ({error})" if isinstance(error, json.JSONDecodeError) else ""
        raise Refused(400, Complaint("body", f"must be JSON{reason}")) from None


def predict_rows(body: Any, roles: Sequence[str], max_rows: int) -> list[Row]:
    """The rows of a body of /predict.

    Raises:
        Refused: 422, with what is wrong; 413, when there are too many rows.
    """
    if not isinstance(body, dict):
        raise Refused(422, Complaint("body", f"must be an object with {_fields(roles)}, or with rows", _kind(body)))
    if "rows" not in body or "rows" in roles:
        return _checked([body], [""], roles, max_rows, known=("rows", *roles))
    complaints = [Complaint(key, "cannot stand beside rows") for key in body if key != "rows"]
    rows = body["rows"]
    if not isinstance(rows, list):
        complaints.append(Complaint("rows", "must be a list", _kind(rows)))
    if complaints:
        raise Refused(422, *complaints[:MOST])
    return _checked(rows, [f"rows[{i}]" for i in range(len(rows))], roles, max_rows, known=roles)


def invocation_rows(body: Any, roles: Sequence[str], max_rows: int) -> list[Row]:
    """The rows of a body of /invocations, read as MLflow's scoring server reads them; unknown columns are ignored.

    Raises:
        Refused: 400, with what is wrong; 413, when there are too many rows.
    """
    given = [key for key in FORMATS if isinstance(body, dict) and key in body]
    if len(given) != 1:
        raise Refused(400, Complaint("body", f"must be an object with exactly one of {', '.join(FORMATS)}"))
    key, data = given[0], body[given[0]]
    rows: list[Any] | None
    try:
        if key == "dataframe_split":
            rows = _of_split(data)
        elif isinstance(data, dict) and key != "dataframe_records":
            rows = _of_columns(data, roles)
        else:
            rows = list(data) if isinstance(data, list) else None
            if rows and key != "dataframe_records" and len(roles) == 1 and not any(isinstance(r, dict) for r in rows):
                rows = [{roles[0]: value} for value in rows]
    except (KeyError, TypeError, ValueError):
        rows = None
    if rows is None:
        raise Refused(400, Complaint(key, "not rows in this format"))
    try:
        return _checked(rows, [f"{key}[{i}]" for i in range(len(rows))], roles, max_rows, known=None)
    except Refused as refused:
        refused.status = 400 if refused.status == 422 else refused.status
        raise


def as_trained(rows: Sequence[Row], exact: bool = False) -> list[Row]:
    """Texts repaired and normalised as the training rows were, so that the same text gets the same answer everywhere.

    What is logged, and what the candidate is asked in the shadow, are these texts too. Where predictions point into a
    text (`exact`) it stays as its client knows it.
    """
    if exact:
        return list(rows)
    return [{role: normalise(repair(text)) or "" for role, text in row.items()} for row in rows]


def _of_split(data: Any) -> list[Any]:
    columns = data["columns"]
    values = [value if isinstance(value, list) else [value] for value in data["data"]]
    return [dict(zip(columns, value, strict=True)) for value in values]


def _of_columns(data: dict[str, Any], roles: Sequence[str]) -> list[Any]:
    columns = {role: data[role] if isinstance(data[role], list) else [data[role]] for role in roles}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _checked(
    rows: Sequence[Any], places: Sequence[str], roles: Sequence[str], max_rows: int, known: Sequence[str] | None
) -> list[Row]:
    """The rows with the fields of the roles alone; `known`: other fields are refused, None: they are ignored."""
    if len(rows) > max_rows:
        raise Refused(413, Complaint("body", f"at most {max_rows:,} rows, split the request", f"{len(rows):,}"))
    complaints: list[Complaint] = []
    for row, place in zip(rows, places, strict=True):
        complaints += _wrong(row, f"{place} → " if place else "", place, roles, known)
        if len(complaints) >= MOST:
            break
    if complaints:
        raise Refused(422, *complaints[:MOST])
    return [{role: row[role] for role in roles} for row in rows]


def _wrong(row: Any, prefix: str, place: str, roles: Sequence[str], known: Sequence[str] | None) -> list[Complaint]:
    if not isinstance(row, Mapping):
        return [Complaint(place, f"must be an object with {_fields(roles)}", _kind(row))]
    found = []
    if known is not None:
        found += [
            Complaint(f"{prefix}{key}", "not a field of this model", None, nearest(key, known))
            for key in row
            if key not in known
        ]
    for role in roles:
        if role not in row:
            found.append(Complaint(f"{prefix}{role}", "is missing"))
        elif not isinstance(row[role], str):
            found.append(Complaint(f"{prefix}{role}", "must be text", _kind(row[role])))
        elif not _encodable(row[role]):
            found.append(Complaint(f"{prefix}{role}", "holds half of a surrogate pair, which is no character"))
    return found


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fields(roles: Sequence[str]) -> str:
    return " and ".join(roles)


def _kind(value: Any) -> str:
    return KINDS.get(type(value), "nothing" if value is None else "text")
