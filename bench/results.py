"""Where measurements are written: one section a benchmark in RESULTS.md, each with its machine and its date."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import Any

import torch

PAGE = Path(__file__).with_name("RESULTS.md")
TITLE = """# Results

Written by `make bench` (or `python -m bench.<name>` for one section). Each ratio was taken between runs that followed
one another on the machine named below its table, in alternation; the median of the pairs is quoted with their range.
Absolute figures belong to that machine alone.
"""


def apart(name: str, *arguments: str) -> dict[str, Any]:
    """`python -m bench.<name>` with these arguments in a process of its own: the JSON on the last line printed."""
    done = subprocess.run([sys.executable, "-m", f"bench.{name}", *arguments], stdout=PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the pairs' ratios, with the smallest and the largest."""
    pairs = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    return f"{median(pairs):.2f}× [{pairs[0]:.2f}, {pairs[-1]:.2f}]"


def machine() -> str:
    """One line: processor, cores, what it multiplies in, versions."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        name = found[1].strip() if found else name
    facts = [f"{name}, {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}"]
    if torch.cuda.is_available():
        facts.append(torch.cuda.get_device_name())
    facts += [f"{package} {version(package)}" for package in ("torch", "transformers")]
    return ", ".join(facts)


def record(name: str, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: str) -> None:
    """Prints a table and puts it into RESULTS.md in place of the one that the same benchmark wrote before."""
    lines = [f"## {title}", f"<!-- {name} -->", "", "| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", notes, "", f"`python -m bench.{name.split()[0]}`, {datetime.date.today()}, {machine()}."]
    section = "\n".join(lines) + "\n"
    print(section)
    old = re.split(r"\n(?=## )", PAGE.read_text())[1:] if PAGE.exists() else []
    kept = {re.findall(r"<!-- (.+?) -->", text)[0]: text.strip() + "\n" for text in old}
    kept[name] = section
    PAGE.write_text("\n".join([TITLE, *(kept[key] for key in sorted(kept))]))
