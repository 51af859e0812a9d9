"""Scoring: the registered model's own path against the same model behind `mlflow models serve`.

    python -m bench.serve [--pairs 5] [--texts 4000] [--seconds 6]

In bulk: a Parquet file of all texts, scored into another as `overnight score` does it, in a process of its own, which
loads the model too; against clients that send the same texts to the server one a request. Clients: 1, 8 and 64 of
them, each waiting for its answer before it sends the next text; and one client that sends 256 texts a request. The
server runs with as many workers as there are cores; its start, and the imports of both sides, are outside of the clock.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import pandas as pd

from bench import texts
from bench.results import apart, ratio, record

CLIENTS = (1, 8, 64)
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement with clients")
    parser.add_argument("--bulk", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bulk:
        print(json.dumps(bulk(*map(Path, arguments.bulk))))
        return
    ways = {f"{n} clients, a text a request" if n > 1 else "1 client, a text a request": (n, 1) for n in CLIENTS}
    ways[f"1 client, {BATCH} texts a request"] = (1, BATCH)
    ours: list[float] = []
    theirs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        own = texts.frame(texts.sides("short", folder)["test"]).text.tolist()
        some = (own * (arguments.texts // len(own) + 1))[: arguments.texts]
        pd.DataFrame({"text": some}).to_parquet(folder / "texts.parquet")
        packed = save_model(folder)
        for _ in range(arguments.pairs):
            ours.append(apart("serve", "--bulk", str(folder / "finished"), str(folder))["speed"])
            with server(packed, folder) as port:
                for name, (clients, batch) in ways.items():
                    theirs[name].append(ask(port, some, clients, batch, arguments.seconds))
            print(ours[-1], {name: found[-1] for name, found in theirs.items()}, file=sys.stderr)
    table = [["overnight, in bulk", f"{median(ours):.0f}", "", "", ""]]
    for name, found in theirs.items():
        speeds = [one["speed"] for one in found]
        latency = [f"{median(one[key] for one in found):.0f}" for key in ("p50", "p99")]
        table.append([f"`mlflow models serve`, {name}", f"{median(speeds):.0f}", *latency, ratio(ours, speeds)])
    header = ["way", "texts/s", "p50 ms", "p99 ms", "overnight in bulk against it"]
    notes = f"{arguments.pairs} pairs, {arguments.texts:,} tweets; the base model with an untrained head."
    record("serve", "Scoring", header, table, notes)


def save_model(folder: Path) -> Path:
    """The model folder that a night would finish, and the MLflow model that it would register, made of it."""
    from overnight.tracking.registry import save_model as as_mlflow_model

    as_mlflow_model(folder / "packed" / "model", finish(folder / "finished"), ["text"], {"text": ["a text"]})
    return folder / "packed" / "model"


def finish(folder: Path) -> Path:
    """A model folder as a night leaves it: the base model with a head that chance has drawn."""
    from overnight.settings import Training
    from overnight.training.card import Card, finish_model_folder
    from overnight.training.models import resolve_base

    base = resolve_base(texts.config("short").model.base)
    facts = {"labels": ["negative", "neutral", "positive"]}
    texts.PROBLEM.load_model(base, facts, Training()).save_pretrained(folder)
    finish_model_folder(folder, Card(texts.PROBLEM.name, facts, texts.MAX_LENGTH["short"], "macro_f1"), base)
    return folder


def bulk(model: Path, folder: Path) -> dict[str, float]:
    """In a process of its own: texts a second of one file, from its opening to the finished other one."""
    import overnight.training.predict  # noqa: F401  # as the server's imports, outside of the clock
    from overnight.bulk.run import Options, score_file
    from overnight.home import Home
    from overnight.tracking.registry import Version

    home = Home.from_environment({"OVERNIGHT_HOME": str(folder / "home")})
    version = Version("bench", 1, None, (), {}, {}, "", 0.0)
    source, target = folder / "texts.parquet", folder / "scored.parquet"
    done = score_file(home, version, model, source, target, Options(scores=True), force=True)
    assert not done["errors"]
    return {"speed": done["rows"] / done["seconds"]}


@contextmanager
def server(model: Path, folder: Path) -> Iterator[int]:
    """`mlflow models serve` with the model; yields its port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", str(len(os.sched_getaffinity(0)))]
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))  # it starts uvicorn by name
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=os.environ | {"PATH": path}
        )
    try:
        for _ in range(600):
            try:
                post(port, ["a text"])
                break
            except OSError:
                if process.poll() is not None:
                    break
                time.sleep(0.5)
        else:
            process.kill()
        if process.poll() is not None:
            raise SystemExit((folder / "server.log").read_text())
        yield port
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 15)
        process.wait()


def post(port: int, some: list[str], connection: http.client.HTTPConnection | None = None) -> None:
    """One request; an answer that has not one prediction a text is an error."""
    connection = connection or http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    body = json.dumps({"dataframe_split": {"columns": ["text"], "data": [[text] for text in some]}})
    connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    assert len(answer["predictions"]) == len(some), answer


def ask(port: int, some: list[str], clients: int, batch: int, seconds: float) -> dict[str, float]:
    """Texts a second and milliseconds a request, with clients that ask without pause."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        place = number * 31
        while time.perf_counter() < end:
            part = [some[(place + i) % len(some)] for i in range(batch)]
            place += batch
            begun = time.perf_counter()
            post(port, part, connection)
            times.append(time.perf_counter() - begun)

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cuts: Any = quantiles(times, n=100) if len(times) > 1 else times * 99
    speed = len(times) * batch / (time.perf_counter() - began)
    return {"speed": speed, "p50": 1000 * cuts[49], "p99": 1000 * cuts[98]}


if __name__ == "__main__":
    main()
