"""From a YAML file and overrides to a checked `Config`, or to all complaints about them at once."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from overnight.config.operations import Notification
from overnight.config.sections import Config, Domain, training_value
from overnight.errors import Complaint, UserError, nearest
from overnight.settings import Training

ARROW = " → "
TRAINING_FIELDS = tuple(f.name for f in fields(Training))
RESERVED = ("row_id", "text_id", "source_row", "refusal")
"""Columns that every table of rows has besides those of the config."""
LONGEST_VALUE = 80


def config_hash(config: Config) -> str:
    """SHA-256 of what decides the trained model: not the description, the promotion rule, or how one lives with it."""
    apart = {"description", "promotion", "schedule", "notify", "retention", "monitor"}
    facts = config.model_dump(mode="json", exclude=apart)
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON schema of a config file, for editors and for docs/configuration.md."""
    return Config.model_json_schema() | {"$schema": "https://json-schema.org/draft/2020-12/schema"}


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
    places = _Places(str(path))
    facts, complaints = _read(Path(path), str(path))
    for override in overrides:
        complaints += _apply(override, facts, places)
    complaints += _problem_complaints(facts, problems or {}, places)
    complaints += _space_complaints(facts, places)
    try:
        config = Config.model_validate(facts)
    except ValidationError as error:
        complaints += [_complaint(e, places) for e in error.errors(include_url=False)]
    if complaints:
        raise UserError(*dict.fromkeys(complaints))
    return config


def read_notify(path: str | Path) -> tuple[Notification, ...]:
    """Who is to be told, by a file that may be wrong elsewhere; nobody where that cannot be read."""
    try:
        facts, _ = _read(Path(path), str(path))
        return TypeAdapter(tuple[Notification, ...]).validate_python(facts.get("notify") or ())
    except (UserError, ValidationError):
        return ()


@dataclass
class _Places:
    """Where a key was written: in the file, or on the command line."""

    file: str
    overridden: list[tuple[str, ...]] = field(default_factory=list)

    def __call__(self, *path: str) -> str:
        for key in self.overridden:
            if path and (path[: len(key)] == key or key[: len(path)] == path):
                return f"--set {'.'.join(path)}"
        return f"{self.file}: {ARROW.join(path)}" if path else self.file


class _Loader(yaml.SafeLoader):
    """YAML 1.2 in its plain words: `no`, `off` and dates are text, `5e-5` is a number; a key stands once in a mapping.

    By YAML 1.1, PyYAML's own, `severity: off` is false, the language `no` too, and the second of two equal keys wins.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice in a section", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?[0-9]+[eE][-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _read(path: Path, where: str) -> tuple[dict[str, Any], list[Complaint]]:
    try:
        if path.is_dir() or not path.exists():
            siblings = [str(p) for p in sorted(path.parent.glob("*.y*ml"))] if path.parent.is_dir() else []
            rule = "is a folder, expected a YAML file" if path.is_dir() else "no such file"
            raise UserError(Complaint(where, rule, None, nearest(where, siblings)))
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(Complaint(where, "must be YAML in UTF-8; this is a binary file or another encoding")) from None
    except OSError as error:
        raise UserError(Complaint(where, "cannot be read", error.strerror)) from None
    try:
        facts = _parse(text)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}: line {mark.line + 1}, column {mark.column + 1}" if mark else where
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise UserError(Complaint(place, f"not valid YAML: {reason}")) from None
    if not isinstance(facts, dict):
        got = {type(None): "an empty file", list: "a list"}.get(type(facts), repr(facts)[:LONGEST_VALUE])
        raise UserError(Complaint(where, "must hold keys and values, as `name: my-model`", got))
    return facts, []


def _apply(override: str, facts: dict[str, Any], places: _Places) -> list[Complaint]:
    key, equals, value = override.partition("=")
    path = tuple(key.split("."))
    if not equals or not all(path):
        return [Complaint("--set", "must read path.to.key=value", repr(override))]
    target = facts
    for parent in path[:-1]:
        child = target.get(parent)
        if child is None:  # absent, or a section whose keys are all comments
            child = target[parent] = {}
        if not isinstance(child, dict):
            kind = "a list, which can only be set whole" if isinstance(child, list) else "a value, not a section"
            return [Complaint(f"--set {key}", f"{parent} is {kind}", repr(child)[:LONGEST_VALUE])]
        target = child
    try:
        target[path[-1]] = _parse(value)
    except yaml.YAMLError:
        return [Complaint(f"--set {key}", "the value must be YAML", repr(value))]
    places.overridden.append(path)
    return []


def _problem_complaints(
    facts: dict[str, Any], problems: Mapping[str, Collection[str]], places: _Places
) -> list[Complaint]:
    """What only the problem knows: its name, the roles of its columns, what a slice may not be called."""
    problem = facts.get("problem", Config.model_fields["problem"].default)
    if not problems or not isinstance(problem, str):
        return []
    if problem not in problems:
        return [Complaint(places("problem"), "not a known problem", repr(problem), nearest(problem, problems))]
    roles = problems[problem]
    data = facts.get("data")
    columns, slices = (data.get("columns"), data.get("slices")) if isinstance(data, dict) else (None, None)
    complaints = []
    for role in columns if isinstance(columns, dict) else ():
        if role not in roles:
            rule = f"not a column of {problem} (which has {', '.join(roles)})"
            complaints.append(Complaint(places("data", "columns", str(role)), rule, None, nearest(str(role), roles)))
    for name in slices if isinstance(slices, list) else ():
        if name in (*roles, *RESERVED):
            complaints.append(Complaint(places("data", "slices"), "the name is taken, rename the column", repr(name)))
    return complaints


def _space_complaints(facts: dict[str, Any], places: _Places) -> list[Complaint]:
    """What the space offers must be valid training settings; sections that are no mappings are pydantic's to refuse."""
    search = facts.get("search")
    space = search.get("space") if isinstance(search, dict) else None
    complaints = []
    for name, domain in space.items() if isinstance(space, dict) else ():
        place = places("search", "space", str(name))
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
                training_value(name, value)
            except ValidationError as error:
                complaints.append(Complaint(place, _rule(error.errors()[0]), repr(value)))
    return complaints


RULES = {
    "missing": "is required",
    "missing_argument": "is required",
    "extra_forbidden": "unknown key",
    "unexpected_keyword_argument": "unknown key",
    "invalid_key": "a key must be text",
    "tuple_type": "must be a list",
    "string_pattern_mismatch": "must be small letters, digits, - and _, and start with a letter or a digit",
}
NO_VALUE = ("missing", "missing_argument", "extra_forbidden", "unexpected_keyword_argument", "invalid_key")


def _complaint(error: Any, places: _Places) -> Complaint:
    path, kind, value = [str(part) for part in error["loc"]], error["type"], error["input"]
    if path[:2] == ["search", "space"] and len(path) > 4 and path[-1] in ("bool", "int", "float", "str"):
        # one complaint, not one for each type that was tried
        rule = "must be a number" if path[3] in ("low", "high") else "must be a number, a text, true or false"
        return Complaint(places(*path[:-1]), rule, _shown(value))
    near = None
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        near = nearest(path[-1], _siblings(path[:-1]))
    elif kind == "literal_error" and isinstance(value, str):
        near = nearest(value, [c.strip("'") for c in error["ctx"]["expected"].replace(" or ", ", ").split(", ")])
    elif kind == "string_pattern_mismatch":
        near = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-") or None
    got = None if value is None or kind in (*NO_VALUE, "value_error") else _shown(value)
    return Complaint(places(*path), _rule(error), got, near)


def _rule(error: Any) -> str:
    """The rule that was broken, in the words of a YAML file."""
    kind, value = error["type"], error["input"]
    if kind in RULES:
        return RULES[kind]
    if kind in ("model_type", "dataclass_type", "dict_type"):
        return "has no keys; fill it, or leave it out" if value is None else "must be a section of keys and values"
    if kind == "string_type":
        return "must be text" + ("" if isinstance(value, dict | list | None) else "; write it in quotes")
    if kind == "too_short":
        return f"needs at least {error['ctx']['min_length']} entries"
    return str(error["msg"].removeprefix("Value error, ").removeprefix("Input ").partition(", unable to parse")[0])


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _siblings(path: Sequence[str]) -> list[str]:
    """Names of the keys that the section at `path` knows; entries of lists and names of a space are passed over."""
    section: Any = Config
    for part in path:
        field_of = getattr(section, "model_fields", {}).get(part)
        if field_of is not None:
            section = _section(field_of.annotation)
    if section is Training:
        return list(TRAINING_FIELDS)
    return list(section.model_fields) if section is not None else []


def _section(annotation: Any) -> Any:
    """The section inside of `Model`, `tuple[Model, ...]` or `dict[str, Model]`; None where there is none."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or is_dataclass(annotation)):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)
