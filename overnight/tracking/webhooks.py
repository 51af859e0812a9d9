"""MLflow's server says when somebody moves an alias in its pages, so that it is looked at then and not next night.

The server tells only of what goes through itself: our own commands, which use the store of the home directly, cause no
message, and need none. A message is never believed: it says which model to look at, nothing else.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any

from overnight.home import Home
from overnight.services import LOOPBACK
from overnight.tracking import store

log = logging.getLogger(__name__)

NAME = "overnight-up"
EVENTS: list[Any] = ["model_version_alias.created", "model_version_alias.deleted"]
LONGEST = 64 * 1024


@contextmanager
def moved_aliases(home: Home, server: str) -> Iterator[SimpleQueue[str]]:
    """The names of models of which `server`, the home's own, says within the block that an alias was moved or deleted.

    With a shared server, or without the own one's consent, the queue stays empty: a night and `overnight doctor` look
    by themselves.
    """
    names: SimpleQueue[str] = SimpleQueue()
    if not home.embedded_tracking:  # a server of other people's, which need not reach this machine
        yield names
        return
    path = f"/{secrets.token_urlsafe(32)}"

    class Receiver(BaseHTTPRequestHandler):
        timeout = 10

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not secrets.compare_digest(self.path, path):
                self.send_error(404)
            elif not length.isdecimal() or int(length) > LONGEST:
                self.send_error(413)
            else:
                try:
                    names.put(str(json.loads(self.rfile.read(int(length)))["data"]["name"]))
                except (ValueError, KeyError, TypeError):
                    self.send_error(400)
                else:
                    self.send_response(204)
                    self.end_headers()

        def log_message(self, *_: object) -> None:
            """The path is a secret of a kind, and the terminal belongs to the command."""

    with ThreadingHTTPServer((LOOPBACK, 0), Receiver) as receiver:
        receiver.daemon_threads = True
        threading.Thread(target=receiver.serve_forever, daemon=True, name="webhooks").start()
        try:
            _subscribe(server, f"http://{LOOPBACK}:{receiver.server_port}{path}")
            yield names
        finally:
            with suppress(Exception):  # the server may be gone; the next `up` removes it
                _unsubscribe(server)
            receiver.shutdown()


def _subscribe(server: str, address: str) -> None:
    try:
        _unsubscribe(server)
        store.client_of(server).create_webhook(NAME, address, EVENTS)
    except Exception as error:  # without it everything works, only later
        log.warning("MLflow will not tell when an alias moves: %s", error)


def _unsubscribe(server: str) -> None:
    client = store.client_of(server)
    for webhook in client.list_webhooks():
        if webhook.name == NAME:
            client.delete_webhook(webhook.webhook_id)
