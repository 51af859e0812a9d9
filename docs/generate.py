"""Writes docs/configuration.md and docs/commands.md from the code, so that they cannot tell anything else.

make docs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
NOTICE = "<!-- made by docs/generate.py; change the code and run `make docs` -->"
WIDTH = 100

CONFIGURATION = """\
# Configuration

One YAML file a model, in `configs/` or wherever you like. It holds facts and no code. A start for your own data:

```
overnight config init --out my-model.yaml
overnight validate my-model.yaml
```

- Only keys of this page are allowed. A file with mistakes is refused before anything runs, with all of them at once,
  each with the nearest right key.
- Every key has a default, but `name`, `model.base` and `data.source`.
- Any key can be changed for one command: `overnight run configs/sentiment.yaml --set training.epochs=1`. The value is
  read as YAML. Entries of a list cannot be reached one by one; set the whole list.
- `description`, `promotion`, `schedule`, `notify`, `retention` and `monitor` may change without retraining. Any other
  change of a value makes the night train again, also on the same data.
- Words are read as YAML 1.2 has them: `no`, `off` and dates are text, only `true` and `false` are true and false, and
  `5e-5` is a number. A key may stand once in a section.
- `overnight config schema` prints all this as a JSON schema, for editors that complete and check YAML.
"""

COMMANDS = """\
# Commands

What `--help` prints, for every command. Where a command has `--json`, it prints its facts as JSON on standard output
and shows no progress.

Exit codes: 0 done (promoted, kept, waiting or skipped), 2 the input is wrong, 3 the data was refused, 4 the night
failed, 130 interrupted. [Troubleshooting](troubleshooting.md) says what to do about each.
"""

KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "mapping",
    "null": "absent",
}
LIMITS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
LIMITS |= {"minItems": "at least {} entries", "maxLength": "at most {} characters", "pattern": "matches `{}`"}


def configuration() -> str:
    """The page of all keys, from the JSON schema of `overnight.config`."""
    from overnight.config import json_schema

    schema = json_schema()
    definitions = schema["$defs"]
    sections = {key: found for key, facts in schema["properties"].items() if (found := _section_of(facts))}
    plain = {key: facts for key, facts in schema["properties"].items() if key not in sections}
    parts = [NOTICE, "", CONFIGURATION, "## The model", "", *_table(plain, schema["required"], "", definitions)]
    for key, facts in sections.items():
        parts += _section(f"{key}[]" if "items" in schema["properties"][key] else key, facts, definitions)
    return "\n".join(parts).rstrip() + "\n"


def _section(path: str, facts: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[str]:
    """A heading, a table of the section's own keys, then what is below it."""
    section = definitions[_name(facts)]
    yield from ("", f"## `{path}`", "", " ".join(section["description"].split()), "")
    own = {key: value for key, value in section["properties"].items() if not _is_group(value, definitions)}
    yield from _table(own, section.get("required", ()), f"{path}.", definitions)
    for key, value in section["properties"].items():
        if _is_group(value, definitions):
            group = definitions[_name(value)]
            yield from ("", f"### `{path}.{key}`", "", " ".join(group["description"].split()), "")
            for name, entry in group["properties"].items():
                yield from (f"**`{name}`** {entry.get('description', '')}", "")
                keys = definitions[_name(entry)]
                yield from _table(keys["properties"], (), f"{path}.{key}.{name}.", definitions)
                yield ""
        parts = [(value.get("items"), "[]"), (value.get("additionalProperties"), ".<field>")]
        if "$ref" in value and not _is_group(value, definitions):
            parts.append((value, ""))
        for inside, label in parts:
            if isinstance(inside, dict) and "$ref" in inside:
                entry = definitions[_name(inside)]
                yield from ("", f"### `{path}.{key}{label}`", "", " ".join(entry["description"].split()), "")
                yield from _table(entry["properties"], entry.get("required", ()), "", definitions)


def _section_of(facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a key of the file holds, holds optionally or holds a list of; None where it is none."""
    for one in (facts, facts.get("items", {}), *facts.get("anyOf", ())):
        if "$ref" in one:
            return one
    return None


def _name(facts: Mapping[str, Any]) -> str:
    return str(facts["$ref"].rpartition("/")[2])


def _is_group(facts: Mapping[str, Any], definitions: Mapping[str, Any]) -> bool:
    """Whether a key is a section of sections."""
    return "$ref" in facts and all("$ref" in inner for inner in definitions[_name(facts)]["properties"].values())


def _table(
    keys: Mapping[str, Mapping[str, Any]], required: Any, prefix: str, definitions: Mapping[str, Any]
) -> Iterator[str]:
    yield "| key | type | default | limits | meaning |"
    yield "|---|---|---|---|---|"
    for key, facts in keys.items():
        if "$ref" in facts:  # a section of its own
            continue
        default = "**required**" if key in required else _default(facts.get("default"))
        meaning = " ".join(facts.get("description", "").split())
        cells = (f"`{prefix}{key}`", _kind(facts), default, ", ".join(_limits(facts)), meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _kind(facts: Mapping[str, Any]) -> str:
    if "enum" in facts:
        return ", ".join(f"`{choice}`" for choice in facts["enum"])
    if "anyOf" in facts:
        kinds = [_kind(one) for one in facts["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in facts:
        return "entries, see below"
    if facts["type"] == "array":
        return f"list of {_kind(facts['items'])}"
    inside = facts.get("additionalProperties")
    if isinstance(inside, dict):
        return f"mapping to {_kind(inside)}"
    return KINDS[facts["type"]]


def _limits(facts: Mapping[str, Any]) -> Iterator[str]:
    for one in (facts, *facts.get("anyOf", ())):
        for key, words in LIMITS.items():
            if key in one:
                yield words.format(one[key])


def _default(value: Any) -> str:
    return "absent" if value is None else f"`{json.dumps(value, ensure_ascii=False)}`"


def commands() -> str:
    """The page of all commands: the help text of each, without the frames that a terminal gets."""
    parts = [NOTICE, "", COMMANDS]
    for path, command, context in every_command():
        level = "##" if len(path) < 3 else "###"
        command.rich_markup_mode = None
        context.terminal_width = WIDTH
        parts += [f"{level} `{' '.join(path)}`", "", "```text", command.get_help(context).strip(), "```", ""]
    return "\n".join(parts).rstrip() + "\n"


def every_command() -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """(words of the command, command, context) of the program, its groups and its commands, in their order."""
    import typer

    from overnight.cli import app

    def walk(command: Any, path: tuple[str, ...], parent: Any) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
        context = command.make_context(path[-1], [], parent=parent, resilient_parsing=True)
        yield path, command, context
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name), context)

    yield from walk(typer.main.get_command(app), ("overnight",), None)


if __name__ == "__main__":
    for page, text in (("configuration.md", configuration()), ("commands.md", commands())):
        (DOCS / page).write_text(text, encoding="utf-8")
