"""The documentation tells what the code does, and the tree in the README is the tree on the disk."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import overnight

ROOT = Path(__file__).parents[1]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
IGNORED = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()] + [".git", ".gitignore"]
COMMANDS = {path: command for path, command, _ in GENERATE["every_command"]()}


def ours(folder: Path) -> Iterator[Path]:
    """Every file below a folder that belongs to the project."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch(path.name, pattern) for pattern in IGNORED):
            continue
        if path.is_dir():
            yield from ours(path)
        else:
            yield path


PAGES = [path for path in ours(ROOT) if path.suffix == ".md"]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# -- what is made from the code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["configuration", "commands"])
def test_generated_pages_are_up_to_date(page):
    """`make docs` was run after the last change of the config or the command line."""
    assert (ROOT / "docs" / f"{page}.md").read_text() == GENERATE[page](), "run `make docs`"


def test_every_key_is_documented():
    """Each key of the schema, however deep, has its own row."""
    from overnight.config import json_schema

    schema = json_schema()
    page = (ROOT / "docs" / "configuration.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    documented = {row.rpartition(".")[2] for row in rows}
    inner = [section["properties"].items() for section in schema["$defs"].values()]
    keys = {key for keys in inner for key, facts in keys if "$ref" not in facts}
    keys |= {key for key, facts in schema["properties"].items() if not GENERATE["_section_of"](facts)}
    assert keys == documented
    training = schema["$defs"]["Training"]["properties"]
    assert {f"training.{key}" for key in training} <= set(rows)


def test_every_command_is_documented():
    """Each command has a heading on its page, and a sentence of help."""
    page = (ROOT / "docs" / "commands.md").read_text()
    for path, command in COMMANDS.items():
        assert f"# `{' '.join(path)}`\n" in page
        assert command.help and command.help.strip().endswith(".")


# -- what is written by hand -------------------------------------------------------------------------------------------


def tree() -> tuple[list[str], dict[str, list[str]]]:
    """Top-level entries of the README's tree, and what is listed below each folder."""
    text = (ROOT / "README.md").read_text().partition("```text\n.ci/")[2].partition("```")[0]
    top: list[str] = []
    below: dict[str, list[str]] = {}
    for line in (".ci/" + text).splitlines():
        entry = line.split()[0]
        if line.startswith(" "):
            below.setdefault(top[-1], []).append(entry)
        else:
            top.append(entry)
        assert len(line.split()) > 1, f"{entry} says nothing"
    return top, below


def test_tree_is_that_of_the_disk():
    """Every top-level entry is in the tree and the other way round; so is every package of the library."""
    top, below = tree()
    disk = [path for path in ROOT.iterdir() if not any(fnmatch(path.name, pattern) for pattern in IGNORED)]
    assert sorted(top) == sorted(f"{path.name}/" if path.is_dir() else path.name for path in disk)
    packages = {f"{path.parent.name}/" for path in (ROOT / "overnight").glob("*/__init__.py")}
    assert {entry for entry in below["overnight/"] if entry.endswith("/")} == packages
    assert all((ROOT / folder / entry).exists() for folder, entries in below.items() for entry in entries)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    """Every relative link names a file, and its anchor a heading of that file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name(page)}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{name(page)}: {target}"


def quoted() -> Iterator[tuple[str, str]]:
    """(page, command) for each `overnight …` in code, on a line of its own or within a sentence."""
    for page in PAGES:
        if page.name == "commands.md":
            continue
        text = page.read_text()
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
        spans = re.findall(r"`(overnight [^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
        lines = re.findall(r"^(?:.*&& )?(?:\S*/)?(overnight [a-z].*)$", blocks, re.M)
        for command in [*spans, *lines]:
            yield name(page), re.split(r" >|  +#", command)[0]


QUOTED = sorted(set(quoted()))


def test_commands_are_found():
    """The search for quoted commands finds those that must be there."""
    found = {command for _, command in QUOTED}
    assert {"overnight doctor", "overnight run CONFIG --force", "overnight report"} <= found


@pytest.mark.parametrize(("page", "command"), QUOTED)
def test_quoted_commands_exist(page, command):
    """A command in the documentation can be pasted: it exists, with these options and enough arguments."""
    words = shlex.split(command.replace("[", "").replace("]", "").removesuffix(" &"))
    path: tuple[str, ...] = ("overnight",)
    rest = words[1:]
    while rest and (*path, rest[0]) in COMMANDS:
        path, rest = (*path, rest[0]), rest[1:]
    if rest == ["--help"]:
        return
    command_found: Any = COMMANDS[path]
    assert not hasattr(command_found, "commands") or not rest, f"{page}: no such command: {command}"
    options = {word for parameter in command_found.params for word in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in rest if word.startswith("-") and word.partition("=")[0] not in options]
    assert not unknown, f"{page}: {command}"
    if rest:  # named alone, as in "`overnight run` does …", a command needs no arguments
        command_found.make_context("overnight", ["1" if word == "VERSION" else word for word in rest])


def test_readme_names_the_two_commands():
    """What the README promises first exists in the Makefile."""
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z]+)\b", "".join(re.findall(r"`[^`]+`|```.*?```", readme, re.S))))
    assert {"run", "test"} <= named
    for page in PAGES:
        for target in re.findall(r"^make ([a-z]+)|`make ([a-z]+)`", page.read_text(), re.M):
            assert re.search(rf"^{''.join(target)}:", makefile, re.M), f"{name(page)}: make {''.join(target)}"


def test_promises_are_proved():
    """Every test that the README calls as a witness exists."""
    witnesses = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "README.md").read_text())
    assert len(witnesses) > 5
    for file, test in witnesses:
        assert re.search(rf"^ *def {test}\(", (ROOT / file).read_text(), re.M), f"{file}::{test}"


def test_expectations_and_reasons_are_explained():
    """The page on validation names every entry of `validation.expect` and every reason of a refusal."""
    from overnight.config import Expectations

    page = (ROOT / "docs" / "validation.md").read_text()
    rows = (ROOT / "overnight" / "expectations" / "rows.py").read_text()
    for word in [*Expectations.model_fields, *re.findall(r'reasons(?: = \{|\[)"(\w+)"', rows)]:
        assert f"`{word}`" in page, word


def test_rules_of_the_gate_are_explained():
    """The page on promotion names every rule and every key that it reads."""
    from overnight.config import Promotion

    page = (ROOT / "docs" / "promotion.md").read_text()
    gate = (ROOT / "overnight" / "promotion.py").read_text()
    for word in re.findall(r'Reason\("(\w+)"', gate):
        assert f"`{word}`" in page, word
    for key in Promotion.model_fields:
        assert f"`promotion.{key}`" in page, key


def test_exit_codes_are_told():
    """The table of exit codes is that of the errors."""
    from overnight.errors import DataRefused, NightFailed, UserError

    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    told = [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.M)]
    assert told == [0, UserError.exit_code, DataRefused.exit_code, NightFailed.exit_code, 130]


def test_changelog_and_version():
    """Work that is not released stands at the top; the version is the same in both places."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## (.+)$", changelog, re.M)[0] == "[Unreleased]"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == overnight.__version__
    assert "Apache License" in (ROOT / "LICENSE").read_text() and project["license"] == "Apache-2.0"


FORBIDDEN = {
    "a folder of somebody's machine": r"(?<![\w.$}<~*])/(?:home|root|Users|work|mnt)/\w",
    "a mark of unfinished work": r"\b(?:TO[D]O|FIX[M]E|XX[X])\b",
    "a trailer of a commit": r"(?i)\b(?:co-authored|generated)[- ](?:by|with):",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_text_holds(what):
    """Nothing in the tree points at the place it was written in, or at work that is not done."""
    found = [
        f"{name(path)}: {match.group()}"
        for path in ours(ROOT)
        if path.suffix in (".md", ".py", ".toml", ".yaml", ".j2", ".sh", "") and path.name != "LICENSE"
        for match in re.finditer(FORBIDDEN[what], path.read_text(errors="replace"))
    ]
    assert not found
