"""The README's path for a newcomer: its commands, pasted as printed and in their order, on a small real night."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECTION = (ROOT / "README.md").read_text().partition("## Live with it\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```\n(.*?)^```$", SECTION, re.M | re.S)
PYTHON = re.findall(r"^```python\n(.*?)^```$", SECTION, re.M | re.S)
NIGHT = (
    "overnight run configs/sentiment.yaml --set data.sample=700 --set search.trials=1 --set training.epochs=0.5"
    " --set promotion.floor=0"
)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_pasted_commands_work_in_their_order(tmp_path):
    """All blocks of "Live with it" in one shell, after a smaller night than that of `make run`."""
    assert len(BLOCKS) > 3 and len(PYTHON) == 1, "the section is still there"
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    lines = [NIGHT, *BLOCKS, f"{sys.executable} <<'PYTHON'\n{PYTHON[0]}print('answered')\nPYTHON", "overnight down"]
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "OVERNIGHT_HOME": str(tmp_path / ".overnight"),
        "PYTHONPATH": str(ROOT),
        "no_proxy": "localhost,127.0.0.1",
    }
    with open(tmp_path / "said", "w") as said:
        shell = subprocess.Popen(
            ["bash", "-e"], stdin=subprocess.PIPE, stdout=said, stderr=said, text=True,
            cwd=tmp_path, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            shell.communicate("\n".join(lines) + "\n", timeout=1400)
        finally:
            subprocess.run(["overnight", "down"], env=environment, cwd=tmp_path, capture_output=True)
            os.killpg(shell.pid, signal.SIGTERM)
    text = (tmp_path / "said").read_text()
    assert shell.returncode == 0, text
    assert '"label"' in text and "answered" in text and (tmp_path / "labels.csv").read_text().count("\n") == 3
    assert "Traceback" not in text
