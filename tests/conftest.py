"""Small real parts that the tests share: a two-layer BERT with a vocabulary built from the rows of the tests."""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from overnight.services import set_quiet_environment

os.environ["HF_HUB_OFFLINE"] = "1"
set_quiet_environment()

SECRET = "s3cr3t"
"""Stands in the addresses of `Hooks`."""

WORDS = {
    "good": "great lovely happy wonderful excellent friendly superb enjoyed delightful perfect".split(),
    "bad": "awful terrible broken rude late lost dreadful angry horrible failed".split(),
    "plain": "monday station report table number window paper train city street".split(),
}
FILLER = "the a flight crew was is today with our and seat that service bag it went very".split()


# shapes of random models that cost nothing to run, as transformers' configurations name them
SIZES = {"vocab_size": 60, "max_position_embeddings": 40, "num_labels": 3}
BERT = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DISTIL = {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "dropout": 0.0, "attention_dropout": 0.0}
DISTIL |= {"seq_classif_dropout": 0.0}


def make_rows(count: int, seed: int = 1):
    """`count` different texts of three labels, each label told by its own words: learnable in seconds."""
    import pandas as pd

    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = draw.choice(list(WORDS))
        words = draw.choices(WORDS[label], k=5) + draw.choices(FILLER, k=draw.randint(2, 12)) + [f"no{i}"]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return pd.DataFrame(rows)


def save_tiny_model(folder: Path, texts: list[str]) -> Path:
    """A real BERT of two layers, 32 wide, with a WordPiece vocabulary of the texts; random weights."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, BertTokenizerFast

    # not trained: the trainer breaks ties by chance, so that every run of the tests would have another model
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = sorted(set("".join(texts).lower()) - set(" "))
    words = sorted({word for text in texts for word in text.lower().split() if word.isalpha() and len(word) > 1})
    vocabulary = [*special, *letters, *(f"##{letter}" for letter in letters), *words[:400]]
    codes = {token: code for code, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(codes, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.05,  # the usual 0.02 is for hundreds of units; here one run in two would confuse two labels
    )
    BertModel(config).save_pretrained(folder)
    return folder


class Hooks(ThreadingHTTPServer):
    """Records what is posted; /500 answers so, /hang answers when the test is over."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Hook)
        self.got: list[tuple[str, dict]] = []
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def address(self, path: str, scheme: str = "json") -> str:
        return f"{scheme}://127.0.0.1:{self.server_address[1]}/{path}/{SECRET}"

    def at(self, path: str) -> list[dict]:
        return [body for where, body in self.got if where.startswith(f"/{path}/")]


class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        if "hang" in self.path:
            self.server.over.wait()
        self.send_response(500 if "500" in self.path else 200)
        self.end_headers()

    def log_message(self, *_):
        pass


class Command:
    """An `overnight` command in a process of its own, forked from a server that has imported everything.

    What it does is what `overnight …` does, without the half minute that its imports take.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path):
        self._out = Path(tempfile.mkdtemp(prefix="command-", dir=folder))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["overnight.warm", "flows.retrain", "great_expectations", "mlflow"])
        self._process = context.Process(target=_command, args=(list(arguments), dict(environment), folder, self._out))
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return (self._out / "stdout").read_text() if (self._out / "stdout").exists() else ""

    @property
    def stderr(self) -> str:
        return (self._out / "stderr").read_text() if (self._out / "stderr").exists() else ""

    def wait(self, seconds: float = 240) -> int | None:
        """The exit code."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self.signal(signal.SIGUSR1)  # where its threads are, into standard error
            self._process.join(2)
            raise AssertionError(f"still running: {self.stderr}")
        return self._process.exitcode

    def until(self, said: str) -> Command:
        """Waits until standard error holds the text."""
        while said not in self.stderr:
            assert self._process.is_alive(), self.stderr
            self._process.join(0.02)
        return self

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _command(arguments: list[str], environment: dict[str, str], folder: Path, out: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    from prefect.context import refresh_global_settings_context

    from overnight.cli import run

    faulthandler.register(signal.SIGUSR1, sys.stderr, all_threads=True)
    refresh_global_settings_context()  # Prefect read its settings when it was imported
    code = run(arguments)
    sys.stdout.flush()
    sys.exit(code)


class Project:
    """A folder with data, a config and a home, as a user has."""

    def __init__(self, folder: Path, model: Path, api: str):
        self.folder, self.home = folder, folder / "home"
        self.config = folder / "tiny.yaml"
        self.environment = os.environ | {
            "OVERNIGHT_HOME": str(self.home),
            "PREFECT_API_URL": api,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        }
        rows = make_rows(500)
        rows.to_csv(folder / "rows.csv", index=False)
        self.write(
            {
                "name": "tiny",
                "model": {"base": str(model), "max_length": 32},
                "data": {"source": str(folder / "rows.csv")},
                "validation": {"expect": {"labels": {"known": ["good", "bad", "plain"]}}},
                "training": {"epochs": 6, "learning_rate": 3e-3, "batch_size": 16},
                "search": {"trials": 2, "space": {"learning_rate": {"low": 2e-3, "high": 3.5e-3}}},
                "promotion": {"floor": 0.5},
            }
        )

    def write(self, facts: dict) -> None:
        self.config.write_text(yaml.safe_dump(facts))

    def start(self, *arguments: str) -> Command:
        """One command in the background."""
        return Command(arguments, self.environment, self.folder)

    def run(self, *arguments: str, code: int = 0) -> Command:
        """One command; its exit code is checked, and that it shows no traceback."""
        done = self.start(*arguments)
        assert done.wait() == code, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def facts(self, *arguments: str, code: int = 0):
        return json.loads(self.run(*arguments, "--json", code=code).stdout)

    def champion(self) -> int | None:
        aliased = [v["number"] for v in self.facts("models", "tiny") if "champion" in v["aliases"]]
        return aliased[0] if aliased else None


@pytest.fixture(scope="session")
def tiny_rows():
    return make_rows(400)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_rows) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-bert"), tiny_rows.text.tolist())


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A prepared home, to be copied: MLflow takes seconds to make its tables."""
    from overnight.home import Home
    from overnight.tracking import store

    root = tmp_path_factory.mktemp("empty-home") / "home"
    store.prepare(Home.from_environment({"OVERNIGHT_HOME": str(root)}))
    return root


@pytest.fixture
def home(empty_store, tmp_path):
    """A home of the test's own with an empty MLflow store."""
    import shutil

    from overnight.home import Home

    shutil.copytree(empty_store, tmp_path / "home")
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory):
    """A real Prefect server, one for all tests of a session: starting one takes ten seconds."""
    from overnight.home import Home
    from overnight.services import prefect_server

    before = {name: os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_HOME")}
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path_factory.mktemp("prefect-home"))})
    with prefect_server(home) as api:
        for name, value in before.items():  # only the tests that ask for the server are to see it
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        yield api


def prefect_says(method: str, url: str, **what: Any) -> Any:
    """A Prefect server's answer. Where its SQLite is busy it says 503, and Prefect's own client asks again."""
    from prefect.client.base import PrefectHttpxSyncClient

    with PrefectHttpxSyncClient(timeout=60) as client:
        answer = client.request(method, url, **what)
    return answer.json() if answer.content else None


@pytest.fixture
def mlflow_address(tmp_path):
    """A real MLflow server with its database and its artifacts (`art`) in the test's folder."""
    from overnight.services import _await_health, free_port
    from overnight.tracking.store import QUIET

    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/art"]
    server = subprocess.Popen(command, env=os.environ | QUIET, cwd=tmp_path, start_new_session=True)
    try:
        _await_health(f"{address}/health", server, None, 240)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.fixture
def hooks():
    server = Hooks()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
