"""What Prometheus reads from /metrics, and the middleware that counts requests."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from starlette.requests import ClientDisconnect

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """One set a server, in a registry of its own: several servers of one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        where: dict[str, Any] = {"namespace": "overnight", "registry": self.registry}
        self.requests = Counter("requests", "Requests answered.", ["route", "status"], **where)
        self.seconds = Histogram("request_seconds", "From request to answer.", ["route"], buckets=SECONDS, **where)
        self.texts = Counter("texts", "Texts answered.", ["version"], **where)
        self.batches = Histogram("batch_texts", "Texts that the model was given at once.", buckets=TEXTS, **where)
        self.waiting = Gauge("waiting_texts", "Texts accepted and not answered yet.", **where)
        self.served = Gauge("served_version", "The version that answers; 0: none yet.", **where)
        self.switches = Counter("switches", "Times that another version took over.", **where)
        self.failed = Counter("failed_versions", "Versions that could not be loaded or failed the smoke test.", **where)
        self.behind = Gauge("behind", "1 while another version should serve than does, or nobody knows.", **where)
        self.shadow = Counter("shadow_texts", "Texts that the candidate was asked too.", ["version", "agree"], **where)
        self.shadow_dropped = Counter("shadow_dropped_texts", "Texts for it that were dropped: too busy.", **where)
        self.lines_dropped = Counter("score_lines_dropped", "Lines of scored texts that were not written.", **where)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class Counted:
    """ASGI middleware: counts requests by route and status, and their seconds."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, ended, status = time.perf_counter(), 0.0, 500

        async def sending(message: Any) -> None:
            nonlocal ended, status
            if message["type"] == "http.response.start":
                status = message["status"]
            ended = time.perf_counter()  # what is done after the answer is not the client's time
            await send(message)

        try:
            await self.app(scope, receive, sending)
        except ClientDisconnect:  # before its body was whole: there is nobody to answer
            ended, status = time.perf_counter(), 499
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe((ended or time.perf_counter()) - began)
