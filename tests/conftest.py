"""Small real parts that the tests share: a two-layer BERT with a vocabulary built from the rows of the tests."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION="false",
)

WORDS = {
    "good": "great lovely happy wonderful excellent friendly superb enjoyed delightful perfect".split(),
    "bad": "awful terrible broken rude late lost dreadful angry horrible failed".split(),
    "plain": "monday station report table number window paper train city street".split(),
}
FILLER = "the a flight crew was is today with our and seat that service bag it went very".split()


def make_rows(count: int, seed: int = 1):
    """`count` different texts of three labels, each label told by its own words: learnable in seconds."""
    import pandas as pd

    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = draw.choice(list(WORDS))
        words = draw.choices(WORDS[label], k=3) + draw.choices(FILLER, k=draw.randint(4, 14)) + [f"no{i}"]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return pd.DataFrame(rows)


def save_tiny_model(folder: Path, texts: list[str]) -> Path:
    """A real BERT of two layers, 32 wide, with a WordPiece vocabulary of the texts; random weights."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, BertTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special))
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
    )
    BertModel(config).save_pretrained(folder)
    return folder


OVERNIGHT = Path(sys.executable).with_name("overnight")


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
                "training": {"epochs": 6, "learning_rate": 5e-3, "batch_size": 16},
                "search": {"trials": 2, "space": {"learning_rate": {"low": 3e-3, "high": 8e-3}}},
                "promotion": {"floor": 0.5},
            }
        )

    def write(self, facts: dict) -> None:
        self.config.write_text(yaml.safe_dump(facts))

    def run(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """One command; its exit code is checked, and that it shows no traceback."""
        done = subprocess.run(
            [str(OVERNIGHT), *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == code, done.stdout + done.stderr
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
