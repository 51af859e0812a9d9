"""The application: routes, and what they answer.

app = create_app(home, Options("sentiment"))       # for uvicorn, or any other ASGI server; one process
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.background import BackgroundTask

from overnight import __version__
from overnight.errors import Complaint
from overnight.home import Home
from overnight.serving import openapi
from overnight.serving.batching import Batcher, Full, Row, Scored
from overnight.serving.bodies import Refused, as_trained, invocation_rows, predict_rows, read_json
from overnight.serving.follow import Follower, Served
from overnight.serving.metrics import Counted, Metrics
from overnight.serving.options import Options
from overnight.serving.scores import ScoreLog
from overnight.serving.shadow import Shadow

log = logging.getLogger(__name__)

Rows = Callable[[Any, Sequence[str], int], list[Row]]


class Service:
    """The parts of one server, and its answers."""

    def __init__(self, home: Home, options: Options):
        self.options, self.metrics = options, Metrics()
        self.follower = Follower(home, options, self.metrics)
        self.batcher = Batcher(options.max_batch, options.max_queue, self.metrics.batches.observe)
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.shadow = Shadow(options.shadow, self.batcher, self.metrics)
        self.scores = None
        if options.log_scores:
            self.scores = ScoreLog(home.root / "scored" / options.name, options.log_texts, self.metrics)

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """While the server runs: follows the alias and scores what waits."""
        scoring = asyncio.create_task(self.batcher.run())
        self.follower.start()
        try:
            yield
        finally:
            self.follower.stop()
            scoring.cancel()
            self.batcher.close()
            if self.scores:
                self.scores.close()

    async def predict(self, request: Request) -> Response:
        """One text, or several. All rows of a request are answered by the same version."""
        served, rows, scored = await self._scored(request, predict_rows)
        predictions = [one for one, _ in scored]
        answer = {"model": self.options.name, "version": served.version.number, "predictions": predictions}
        return self._answer(answer, served, rows, scored)

    async def invocations(self, request: Request) -> Response:
        """What `mlflow models serve` takes and returns; the version is in the header `Overnight-Version`."""
        served, rows, scored = await self._scored(request, invocation_rows)
        return self._answer({"predictions": [one for one, _ in scored]}, served, rows, scored)

    async def health(self) -> Response:
        """The process is alive, whether it has a model or not."""
        return JSONResponse({"alive": True})

    async def ready(self) -> Response:
        """Whether a model is loaded and has passed its smoke test; `problem`: why it is not the registry's."""
        follower = self.follower
        loaded = {"version": follower.current, "previous": follower.previous, "shadow": follower.shadow}
        facts = {
            "ready": follower.current is not None,
            "model": self.options.name,
            "alias": self.options.alias,
            **{key: one.version.number if one else None for key, one in loaded.items()},
            "registry_answered": follower.looked,
            "problem": follower.problem,
        }
        return JSONResponse(facts, 200 if facts["ready"] else 503)

    async def metrics_page(self) -> Response:
        """Counters for Prometheus."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    async def _scored(self, request: Request, rows_of: Rows) -> tuple[Served, list[Row], list[Scored]]:
        body = await read_json(request, self.options.max_bytes)
        served = self.follower.current
        if served is None:
            reason = self.follower.problem or "the model is being loaded"
            raise Refused(503, Complaint(self.options.name, f"not ready: {reason}"), retry_after=5)
        # in a thread: a long text that is not plain ASCII takes a while, and others want their answers meanwhile
        given = rows_of(body, served.problem.text_roles, self.options.max_rows)
        rows = await asyncio.to_thread(as_trained, given, served.problem.points_into_text)
        try:
            return served, rows, await self.batcher.submit(served, rows)
        except Full as full:
            complaint = Complaint("server", f"{self.batcher.waiting:,} texts wait already, try again later")
            raise Refused(429, complaint, retry_after=full.seconds) from None
        except Exception as error:
            log.exception("version %d failed", served.version.number)
            complaint = Complaint(f"version {served.version.number}", f"failed ({type(error).__name__})")
            raise Refused(500, complaint) from None

    def _answer(self, facts: Any, served: Served, rows: list[Row], scored: list[Scored]) -> Response:
        self.metrics.texts.labels(served.version.number).inc(len(rows))
        headers = {"Overnight-Version": str(served.version.number)}
        return JSONResponse(facts, headers=headers, background=BackgroundTask(self._after, served, rows, scored))

    async def _after(self, served: Served, rows: list[Row], scored: list[Scored]) -> None:
        """When the answer is out."""
        if self.scores:
            self.scores.add(served.version.number, served.problem, rows, scored)
        candidate = self.follower.shadow
        if candidate is not None and candidate is not served:
            self.shadow.offer(candidate, rows, scored)


def create_app(home: Home, options: Options) -> FastAPI:
    """The application; `store.prepare(home)` has come before, and its model is looked for once it runs."""
    service = Service(home, options)
    app = FastAPI(
        title=f"{options.name}@{options.alias}",
        version=__version__,
        description="A model served by overnight.",
        lifespan=service.running,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Counted, metrics=service.metrics)
    app.add_exception_handler(Refused, _refused)
    app.post("/predict", **openapi.PREDICT)(service.predict)
    app.post("/invocations", **openapi.INVOCATIONS)(service.invocations)
    app.get("/health", **openapi.HEALTH)(service.health)
    app.get("/ping", include_in_schema=False)(service.health)  # as MLflow's server calls it
    app.get("/ready", **openapi.READY)(service.ready)
    app.get("/metrics", **openapi.METRICS)(service.metrics_page)
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """Every refusal has one shape; on /invocations it has MLflow's names too."""
    assert isinstance(error, Refused)
    facts: dict[str, Any] = {"error": str(error), "complaints": [complaint.__dict__ for complaint in error.complaints]}
    if request.url.path == "/invocations":
        facts |= {"error_code": "BAD_REQUEST" if error.status < 500 else "INTERNAL_ERROR", "message": str(error)}
    headers = {} if error.retry_after is None else {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
    return JSONResponse(facts, error.status, headers)
