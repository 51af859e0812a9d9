"""Live progress of a night: one line that moves in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from overnight.progress import listen

PLAIN_SECONDS = 15.0


class Progress:
    """Turns the night's events into what a person reads."""

    def __init__(self, console: Console):
        self.console = console
        self.live: Live | None = None
        self.stage, self.begun = "", time.monotonic()
        self.trials = 0
        self.deadline: float | None = None
        self.running: dict[int, dict[str, Any]] = {}
        self.ended = 0
        self._told = 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        if "warning" in event:
            self.line(f"[yellow]![/] {escape(event['warning'])}")
        elif "stage" in event:
            self._stage(event)
        elif "trials" in event:
            self.trials, self.deadline = event["trials"], event["deadline"]
        elif "places" in event:
            self.line(f"  {event['places']}")
        elif "trial" in event:
            self._trial(event)
        if self.live is None and time.monotonic() - self._told > PLAIN_SECONDS and self.running:
            self._told = time.monotonic()
            self.line(self.status())

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def status(self) -> str:
        """What is going on right now, in one line."""
        seconds = time.monotonic() - self.begun
        parts = [f"[bold]{self.stage}[/] {seconds:.0f} s"]
        for number, state in sorted(self.running.items()):
            text = f"trial {number}"
            if "step" in state:
                text += f" epoch {state['epoch']:.1f} step {state['step']}/{state['steps']}"
            if state.get("samples_per_second"):
                text += f" {state['samples_per_second']:.0f} samples/s"
            if "value" in state:
                text += f" validation {state['value']:.3f}"
            parts.append(text)
        if self.stage == "search" and self.trials:
            parts.append(f"{self.ended} of {self.trials} trials done")
            if self.deadline is not None:
                parts.append(f"at most {max(0.0, self.deadline - time.monotonic()):.0f} s left")
        return " · ".join(parts)

    def __rich__(self) -> Text:
        return Text.from_markup(self.status() if self.stage else "")

    def _stage(self, event: dict[str, Any]) -> None:
        if event["state"] == "running":
            self.stage, self.begun = event["stage"], time.monotonic()
        else:
            self.line(f"[green]✓[/] {event['stage']:<10} {event['seconds']:6.1f} s")
            self.stage = ""

    def _trial(self, event: dict[str, Any]) -> None:
        number = event["trial"]
        if event.get("state") == "running":
            self.running[number] = {}
            drawn = ", ".join(f"{k} {_short(v)}" for k, v in event["params"].items())
            self.line(f"  trial {number}: {drawn or 'the settings of the config'}")
        elif "state" in event:
            self.running.pop(number, None)
            self.ended += 1
            value = f" {event['value']:.4f}" if event.get("value") is not None else ""
            seconds = f" in {event['seconds']:.0f} s" if "seconds" in event else ""
            error = f": {escape(event['error'])}" if "error" in event else ""
            self.line(f"  trial {number}: {event['state']}{value}{seconds}{error}")
        elif number in self.running:
            self.running[number].update(event)


@contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """Shows the progress of whatever night runs in the block, on standard error."""
    if quiet:
        yield
        return
    console = Console(file=sys.stderr)
    progress = Progress(console)
    with listen(progress):
        if console.is_terminal:
            with Live(progress, console=console, refresh_per_second=4, transient=True) as live:
                progress.live = live
                yield
        else:
            yield


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
