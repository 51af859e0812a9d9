"""A port, and the application on it until ctrl-c or SIGTERM: requests in flight are finished, new ones refused."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from overnight.errors import Complaint, UserError
from overnight.home import Home
from overnight.serving.options import Options

GRACE = 20
"""Seconds that requests in flight have once a signal came; the command line ends a process after 30."""
KEEP_ALIVE = 75
"""Seconds an idle connection stays open: longer than proxies keep theirs, else they send into one that just closed."""


def run(home: Home, options: Options, host: str, port: int, told: Callable[[str], object]) -> None:
    """Serves until a signal comes.

    Args:
        port: 0 takes a free one.
        told: is given the address, once the port is ours.

    Raises:
        UserError: the port is taken, the host cannot be bound; no such model or alias.
    """
    with bound(host, port) as place:
        import uvicorn

        from overnight.serving.app import create_app
        from overnight.serving.follow import check_alias
        from overnight.tracking import store

        store.prepare(home)
        check_alias(home, options.name, options.alias)
        told(address(place))
        config = uvicorn.Config(
            create_app(home, options),
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=KEEP_ALIVE,
        )
        try:
            uvicorn.Server(config).run(sockets=[place])
        except KeyboardInterrupt:  # uvicorn raises its signal again when all is done: the wished end of a service
            pass


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; connections wait in it until the server accepts them.

    Raises:
        UserError: the port is taken or the host cannot be bound.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        place = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(Complaint("--port", "is taken by another program", str(port))) from None
        raise UserError(Complaint("--host, --port", f"cannot be bound ({error.strerror})", f"{host}:{port}")) from None
    with place:
        yield place


def address(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
