"""Tells people how a night ended, through Apprise: webhooks, chats, e-mail. It never costs a night.

    announce(config.notify, night)             # once for each end of a night
    announce_untold(home, config)              # what a killed night did not get to
    send(["TEAM_CHAT"], "title", "body")       # {"TEAM_CHAT": None}, or why it did not arrive

Addresses hold secrets: they are read from the environment at the last moment, and never written or shown.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from overnight.config import Config, Notification, read_notify
from overnight.errors import OvernightError
from overnight.home import Home, redact
from overnight.nights import KILLED, Night, next_steps, night_records
from overnight.progress import emit
from overnight.report.words import duration, headline, interval, metric_lines, point, took

if TYPE_CHECKING:
    from apprise import AppriseAsset, NotifyBase

SECONDS = 20.0
"""All addresses together, with the second try: a night's end waits no longer."""
PAUSE = 1.0
"""Seconds before the second try."""
MOST_REASONS = 8
LONGEST = 400
"""Characters of one line."""
TONES = {"good": "success", "calm": "info", "ask": "warning", "bad": "failure"}
REFUSED = "it was refused, or nobody answered"


def announce(addresses: Sequence[Notification], night: Night) -> None:
    """Sends a night's end to the addresses that ask for it, once each; what does not arrive becomes a warning.

    A night that is continued may end in another way than before, or be killed once more: that is told too.
    """
    record, told = night.record, night.record.get("notified", {})
    state = end = record["state"]
    if record.get("why") == KILLED:
        state, end = "failed", f"killed, continued {record.get('continued', 0)} times"
        record = {**record, "state": state, "next": next_steps(record)}
    due = [address.to_env for address in addresses if state in address.on and told.get(address.to_env) != end]
    if not due:
        return
    warnings = _tell(due, record)
    kept = [*record.get("warnings", []), *warnings]
    with suppress(OSError):
        night.update(notified={**told, **dict.fromkeys(due, end)}, warnings=kept or None)


def announce_untold(home: Home, config: Config) -> None:
    """Sends what earlier nights did not get to: one that was killed, and an answer given where no address was set.

    The caller holds the model, and has healed it.
    """
    records = night_records(home, config.name)
    for record in records:
        # a night that began when nobody was to be told has no list of those who know
        told = record.get("notified")
        if told is not None:  # an address that is new is told of the last night alone
            due = [address for address in config.notify if record is records[-1] or address.to_env in told]
            announce(due, Night(home.nights / record["id"], record))


def announce_answer(night: Night) -> None:
    """Sends what a person's word made of a night that waited, to those of its config whose addresses are set here.

    That may be another shell than the one of the nights; those who are left hear it from the next night.
    """
    addresses = read_notify(night.folder / "config.json")  # JSON is YAML
    announce([address for address in addresses if os.environ.get(address.to_env, "").strip()], night)


def announce_skipped(config: Config, record: Mapping[str, Any]) -> None:
    """Sends that there was nothing to do."""
    _tell([address.to_env for address in config.notify if "skipped" in address.on], record)


@contextmanager
def mistakes_told(config: str) -> Iterator[None]:
    """Sends the error that ends the block: a night that could not begin, because of its config or its data.

    Whoever sits at a terminal sees it there, and nothing is sent.

    Args:
        config: path of the YAML file; also of one with mistakes, as long as its `notify` can be read.
    """
    try:
        yield
    except Exception as error:
        watched = sys.stderr.isatty()
        due = [address.to_env for address in read_notify(config) if "failed" in address.on and not watched]
        why = str(error) if isinstance(error, OvernightError) else f"{type(error).__name__}: {error}"
        steps = [{"text": "check the config and the data", "command": f"overnight validate {config}"}]
        _tell(due, {"model": config, "state": "failed", "why": why, "next": steps})
        raise


def message(record: Mapping[str, Any]) -> tuple[str, str]:
    """Title and body: the first lines of the morning report, in its words. No text of the data, no password."""
    night = cast(Any, record)
    said = headline(night)
    lines = [_line(why) for why in said.why[:MOST_REASONS]]
    for metric in metric_lines(night)[:1]:
        text = f"{metric.name} {point(metric.candidate)} {interval(metric.candidate)}".strip()
        if metric.champion:
            change = f"{point(metric.difference, True)} {interval(metric.difference, True)}".strip()
            text += f"; champion {point(metric.champion)}, difference {change}"
        lines.append(f"{text} on the test rows")
    if "id" in record:
        seconds = took(night)
        lines.append(f"night {record['id']}" + (f", {duration(seconds)}" if seconds is not None else ""))
    steps = [f"{step.get('text', '')}: {step['command']}" for step in record.get("next", ()) if step.get("command")]
    return f"{record['model']} {said.word.lower()}: {said.title}", "\n".join([*lines, *steps])


def send(
    variables: Sequence[str],
    title: str,
    body: str,
    *,
    tone: str = "info",
    environ: Mapping[str, str] | None = None,
    seconds: float = SECONDS,
) -> dict[str, str | None]:
    """Sends to the addresses that these environment variables hold, side by side; each is tried twice.

    Returns:
        Variable → None when it arrived, else why it did not, without the address.
    """
    environ = os.environ if environ is None else environ
    end = time.monotonic() + seconds
    ended: dict[str, str | None] = dict.fromkeys(variables, f"nothing in {seconds:.0f} s")

    def deliver(name: str) -> None:
        ended[name] = _deliver(environ.get(name, "").strip(), title, body, tone, end)

    # a server that hangs on leaves a thread behind, which keeps no process alive
    threads = [threading.Thread(target=deliver, args=(name,), daemon=True, name="notify") for name in variables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    return dict(ended)


def _tell(variables: Sequence[str], record: Mapping[str, Any]) -> list[str]:
    """Sends a record; returns the warnings that were shown. Whatever breaks here is one of them."""
    if not variables:
        return []
    try:
        title, body = message(record)
        failed = send(variables, title, body, tone=headline(cast(Any, record)).tone)
    except Exception as error:
        failed = dict.fromkeys(variables, f"{type(error).__name__}")
    warnings = [f"the notification to ${name} was not sent: {why}" for name, why in failed.items() if why]
    for warning in warnings:
        emit(warning=warning)
    return warnings


def _deliver(address: str, title: str, body: str, tone: str, end: float) -> str | None:
    if not address:
        return "the variable is not set"
    from apprise import AppriseAsset, NotifyFormat, NotifyType

    # its log names hosts and addresses
    logging.getLogger("apprise").setLevel(logging.CRITICAL + 1)
    # no pictures: they would be fetched from Apprise's own pages
    asset = AppriseAsset(app_id="overnight", app_desc="overnight", app_url="", image_url_mask="", image_url_logo="")
    try:
        for again in (False, True):
            if again:
                if time.monotonic() + PAUSE > end:
                    break
                time.sleep(PAUSE)
            # anew for each try: a plugin that has sent waits before it sends again
            hook, plugin = _plugin(address, asset)
            if plugin is None:
                return "it holds no address that Apprise knows"
            text = (f"*{_escaped(title)}*\n{_escaped(body)}", "") if hook else (body, title)
            if plugin.notify(*text, notify_type=NotifyType(TONES.get(tone, tone)), body_format=NotifyFormat.TEXT):
                return None
    except Exception as error:  # its text may hold the address
        return f"{REFUSED} ({type(error).__name__})"
    return REFUSED


def _plugin(address: str, asset: AppriseAsset) -> tuple[bool, NotifyBase | None]:
    """Whether the address is a bare webhook, and Apprise's plugin for it.

    An http address that Apprise does not know as some service's own is taken for a Slack-compatible hook, as
    Mattermost, Rocket.Chat, Zulip and others have them: it gets `{"text": …}`.
    """
    from apprise import Apprise

    plugin = Apprise.instantiate(address, asset=asset)
    parts = urlsplit(address)
    if plugin is not None or parts.scheme not in ("http", "https") or not parts.hostname:
        return False, plugin
    facts = {
        "schema": "jsons" if parts.scheme == "https" else "json",
        "host": parts.hostname,
        "port": parts.port,
        "user": unquote(parts.username or "") or None,
        "password": unquote(parts.password or "") or None,
        "fullpath": parts.path,
        "params": dict(parse_qsl(parts.query)),
        "payload": {"message": "text", "title": "", "version": "", "type": "", "attachments": ""},
    }
    return True, Apprise.instantiate(facts, asset=asset)


def _escaped(text: str) -> str:
    """As Slack asks for it, so that a label cannot be a link or a call of everybody."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _line(text: str) -> str:
    text = re.sub(r"[\w+.-]+://\S+", lambda found: redact(found[0]), " ".join(text.split()))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
