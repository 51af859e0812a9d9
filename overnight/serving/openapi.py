"""What the OpenAPI page says of each route. Bodies are read by `bodies`, so nothing here checks anything."""

from __future__ import annotations

from typing import Any

ROW = {"type": "object", "additionalProperties": {"type": "string"}, "example": {"text": "what a lovely flight"}}
PREDICTION = {
    "type": "object",
    "description": "What a classification answers; models of other problems answer with fields of their own.",
    "properties": {
        "label": {"type": "string"},
        "score": {"type": "number", "description": "The probability of the label."},
        "scores": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
PREDICTIONS = {"type": "array", "items": PREDICTION}
COMPLAINT = {
    "type": "object",
    "properties": {
        "where": {"type": "string"},
        "rule": {"type": "string"},
        "got": {"type": ["string", "null"]},
        "nearest": {"type": ["string", "null"], "description": "What was probably meant."},
    },
}
ERROR = {
    "type": "object",
    "properties": {"error": {"type": "string"}, "complaints": {"type": "array", "items": COMPLAINT}},
}
READY_FACTS = {
    "type": "object",
    "properties": {
        "ready": {"type": "boolean"},
        "model": {"type": "string"},
        "alias": {"type": "string"},
        "version": {"type": ["integer", "null"]},
        "previous": {"type": ["integer", "null"], "description": "Still loaded, for a rollback."},
        "shadow": {"type": ["integer", "null"], "description": "The candidate that is asked too."},
        "registry_answered": {"type": ["number", "null"], "description": "Epoch seconds."},
        "problem": {"type": ["string", "null"], "description": "Why the alias's version does not serve."},
    },
}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": schema}}}


def _answers(ok: dict[str, Any], wrong: int) -> dict[int | str, dict[str, Any]]:
    refusals = {
        wrong: "The body is wrong; says all that is, and the nearest right name.",
        413: "Too many bytes or rows.",
        429: "The queue is full; Retry-After says when to come back.",
        500: "The model failed on this request.",
        503: "No model is loaded yet.",
    }
    answers: dict[int | str, dict[str, Any]] = {
        200: {"description": "Predictions, in the order of the rows."} | _json(ok)
    }
    return answers | {status: {"description": text, **_json(ERROR)} for status, text in refusals.items()}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, **_json(schema)}}


PREDICT: dict[str, Any] = {
    "summary": "Predict",
    "responses": _answers(
        {
            "type": "object",
            "properties": {
                "model": {"type": "string"},
                "version": {"type": "integer", "description": "The version that answered."},
                "predictions": PREDICTIONS,
            },
        },
        wrong=422,
    ),
    "openapi_extra": _body(
        {"oneOf": [ROW, {"type": "object", "properties": {"rows": {"type": "array", "items": ROW}}}]}
    ),
}
INVOCATIONS: dict[str, Any] = {
    "summary": "Predict, as `mlflow models serve` does",
    "responses": _answers({"type": "object", "properties": {"predictions": PREDICTIONS}}, wrong=400),
    "openapi_extra": _body(
        {
            "type": "object",
            "description": "One of these four.",
            "properties": {
                "dataframe_split": {"type": "object"},
                "dataframe_records": {"type": "array", "items": ROW},
                "instances": {},
                "inputs": {},
            },
            "example": {"dataframe_records": [ROW["example"]]},
        }
    ),
}
HEALTH: dict[str, Any] = {"summary": "Alive", "responses": {200: _json({"type": "object"})}}
READY: dict[str, Any] = {
    "summary": "Ready",
    "responses": {
        200: {"description": "A version answers.", **_json(READY_FACTS)},
        503: {"description": "None yet.", **_json(READY_FACTS)},
    },
}
METRICS: dict[str, Any] = {
    "summary": "Metrics",
    "responses": {200: {"description": "Prometheus text.", "content": {"text/plain": {"schema": {"type": "string"}}}}},
}
