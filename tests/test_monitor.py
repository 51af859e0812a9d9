"""The monitor: drift that is there is found, none is found where there is none, and an alarm reaches Prefect."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import Command, make_rows, prefect_says
from pyarrow import parquet

from overnight.config.operations import Monitor
from overnight.errors import UserError
from overnight.home import Home, write_json
from overnight.monitor import latest
from overnight.monitor.judge import File
from overnight.monitor.run import monitor
from overnight.monitor.state import alarmed, records, save
from overnight.tracking.registry import Version

LABELS = ["bad", "good", "plain"]
SETTINGS = Monitor(window=100)
NIGHT = "tiny-20260101-000000"


# -- a champion with the rows of its night -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model) -> Path:
    """A finished model folder whose untrained head was shifted so that it predicts all three labels."""
    import torch

    from overnight import problems
    from overnight.settings import Training
    from overnight.training.card import Card, finish_model_folder
    from overnight.training.predict import Scorer

    folder = tmp_path_factory.mktemp("finished") / "best"
    problem = problems.get("sequence-classification")
    model = problem.load_model(str(tiny_model), {"labels": LABELS}, Training())
    card = Card(problem.name, {"labels": LABELS}, 32, "macro_f1")
    model.save_pretrained(folder)
    finish_model_folder(folder, card, str(tiny_model))
    answers = Scorer(folder).predict_texts(make_rows(200, seed=9)[["text"]].to_dict("records"))
    logits = np.log([list(answer["scores"].values()) for answer in answers])
    with torch.no_grad():
        model.classifier.weight *= 1 / logits.std(0).mean()
        model.classifier.bias -= torch.tensor(logits.mean(0) / logits.std(0).mean(), dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    from overnight.training.predict import Scorer

    return Scorer(folder)


def usual_texts(count: int, seed: int) -> list[str]:
    """Texts as the night's: `make_rows` numbers its rows, and a window of low numbers would be another distribution."""
    return make_rows(1500, seed=seed).text.sample(count, random_state=seed).tolist()


def rows_of(scorer, count: int, seed: int, right: float = 0.9) -> list[dict[str, str]]:
    """Texts with labels that the model gets right at this rate."""
    draw = random.Random(seed)
    texts = [{"text": text} for text in usual_texts(count, seed)]
    answers = [answer["label"] for answer in scorer.predict_texts(texts)]
    labels = [label if draw.random() < right else draw.choice(LABELS) for label in answers]
    return [text | {"label": label} for text, label in zip(texts, labels, strict=True)]


@pytest.fixture(scope="module")
def night(tmp_path_factory, scorer) -> Path:
    """A home with what a night leaves of the champion's rows."""
    root = tmp_path_factory.mktemp("monitored") / "home"
    place = root / "nights" / NIGHT
    (place / "rows").mkdir(parents=True)
    for side, count, seed in (("train", 1500, 11), ("validation", 300, 12), ("test", 400, 13)):
        rows = rows_of(scorer, count, seed)
        parquet.write_table(pa.Table.from_pylist(rows), place / "rows" / f"{side}.parquet")
    write_json(place / "evaluation" / "predictions.json", {"candidate": scorer.predict_texts(rows)})
    return root


@pytest.fixture
def place(tmp_path, night) -> Home:
    shutil.copytree(night, tmp_path / "home")
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "home")})


def version(number: int = 1, night: str = NIGHT) -> Version:
    return Version("tiny", number, None, ("champion",), {"overnight.night": night}, {"macro_f1": 0.9}, "", 0.0)


def log(place: Home, scorer, texts, number: int = 1, day: str = "2026-01-02", with_text: bool = True) -> None:
    """Lines of scored traffic."""
    rows = [{"text": text} for text in texts]
    answers, tokens = scorer.predict(rows)
    lines = []
    for row, answer, count in zip(rows, answers, tokens, strict=True):
        facts = {"time": 1.0, "version": number, "label": answer["label"], "score": answer["score"]}
        facts |= {"characters": len(row["text"]), "tokens": count} | (row if with_text else {})
        lines.append(json.dumps(facts) + "\n")
    with open(place.folder("scored", "tiny") / f"{day}.jsonl", "a") as file:
        file.write("".join(lines))


def other_texts(count: int, seed: int = 1) -> list[str]:
    """Texts about something else, longer than those of the night."""
    draw = random.Random(seed)
    words = "quarterly revenue dividend shareholders margin forecast liquidity audit ledger equity".split()
    return [" ".join(draw.choices(words, k=draw.randint(20, 40))) for _ in range(count)]


def drifted(result: dict) -> set[str]:
    return {name for record in result["windows"] for name, one in record["findings"].items() if one["drifted"]}


def test_hidden_states_do_not_depend_on_the_batch(scorer):
    """A row's hidden state is the same alone and among longer ones: padding is not averaged."""
    rows = [{"text": text} for text in ["a", "a lovely day", "a very late and broken flight with rude crew " * 3]]
    together = scorer.hidden(rows)
    assert together.shape == (3, 32)
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_allclose(scorer.hidden([row])[0], found, atol=1e-5)


# -- scored traffic ----------------------------------------------------------------------------------------------------


def test_the_same_traffic_is_no_drift(place, folder, scorer):
    """Windows of the night's own distribution: none drifts; windows are judged once; the rest waits."""
    log(place, scorer, usual_texts(530, 21))
    result = monitor(place, version(), folder, SETTINGS)
    assert len(result["windows"]) == 5 and result["waiting"] == 30
    assert not result["fired"] and result["recent"] == {"drifted": 0, "windows": 5} and drifted(result) == set()
    names = {"label_share", "confidence", "length", "rare_tokens", "token_frequencies", "embedding"}
    assert set(result["windows"][0]["findings"]) == names
    again = monitor(place, version(), folder, SETTINGS)
    assert again["windows"] == [] and again["recent"] == result["recent"] and again["waiting"] == 30


def test_other_traffic_raises_an_alarm(place, folder, scorer):
    """Three of five windows of other texts fire; without texts their length alone tells; one window does not."""
    texts = other_texts(300)
    log(place, scorer, [*usual_texts(200, 22), *texts[:100]])
    assert not monitor(place, version(), folder, SETTINGS)["fired"]
    log(place, scorer, texts[100:], day="2026-01-03", with_text=False)
    result = monitor(place, version(), folder, SETTINGS)
    assert result["fired"] and result["recent"] == {"drifted": 3, "windows": 5}
    assert len(result["windows"]) == 2 and "length" in drifted(result) and "embedding" not in drifted(result)
    assert "3 of the last 5 windows drifted" in result["text"] and "ALARM" in result["text"]


def test_another_version_begins_anew(place, folder, scorer):
    """What an earlier champion scored, and what was found about it, is not held against the new one."""
    log(place, scorer, other_texts(300))
    assert monitor(place, version(), folder, SETTINGS)["fired"]
    log(place, scorer, make_rows(100, seed=23).text, number=2)
    result = monitor(place, version(2), folder, SETTINGS)
    assert result["recent"] == {"drifted": 0, "windows": 1} and not result["fired"]


def test_an_alarm_is_raised_once(place, folder, scorer):
    """After an alarm its windows are not counted again; new drifted ones raise another."""
    log(place, scorer, other_texts(300))
    assert monitor(place, version(), folder, SETTINGS)["fired"]
    alarmed(place, "tiny", 1, time.time())
    assert not monitor(place, version(), folder, SETTINGS)["fired"]
    log(place, scorer, other_texts(300, seed=2))
    assert monitor(place, version(), folder, SETTINGS)["fired"]


def test_a_file_raises_its_alarm_once(tmp_path, place, folder):
    """Judged again after its alarm, a file raises no second one; other rows do."""
    path = write(tmp_path / "other.jsonl", [{"text": text} for text in other_texts(300)])
    assert monitor(place, version(), folder, SETTINGS, File(path))["fired"]
    alarmed(place, "tiny", 1, time.time())
    again = monitor(place, version(), folder, SETTINGS, File(path))
    assert not again["fired"] and len(again["windows"]) == 3 and again["recent"] == {"drifted": 0, "windows": 0}
    write(path, [{"text": text} for text in other_texts(300, seed=2)])
    assert monitor(place, version(), folder, SETTINGS, File(path))["fired"]


# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_labelled_file_tells_quality(tmp_path, place, folder, scorer):
    """The metric with its interval, near the night's when labels agree, drifted when they do not."""
    good = write(tmp_path / "good.jsonl", rows_of(scorer, 200, 31))
    result = monitor(place, version(), folder, SETTINGS, File(good))
    assert len(result["windows"]) == 2 and drifted(result) == set()
    quality = result["windows"][0]["quality"]
    assert quality["low"] < quality["value"] < quality["high"] and quality["rows"] == 100
    bad = write(
        tmp_path / "bad.jsonl", [{"body": r["text"], "topic": r["label"]} for r in rows_of(scorer, 200, 32, 0.4)]
    )
    result = monitor(place, version(), folder, SETTINGS, File(bad, {"text": "body", "label": "topic"}))
    assert drifted(result) == {"quality"} and result["recent"] == {"drifted": 2, "windows": 4}
    assert "macro_f1" in result["windows"][0]["findings"]["quality"]["text"]


def test_a_file_of_other_texts_drifts(tmp_path, place, folder):
    """Vocabulary, length and hidden states of texts about something else; judged again, they count once."""
    path = write(tmp_path / "other.jsonl", [{"text": text} for text in other_texts(150)])
    for _ in range(2):
        result = monitor(place, version(), folder, SETTINGS, File(path))
        assert {"length", "token_frequencies", "embedding"} <= drifted(result)
        assert result["recent"] == {"drifted": 1, "windows": 1} and result["windows"][0]["quality"] is None


def test_what_is_wrong_with_a_file_is_said(tmp_path, place, folder):
    """Too few rows, a column that is not there, a role that is none."""
    path = write(tmp_path / "few.jsonl", [{"text": "a", "topic": "good"}] * 5)
    for file, told in (
        (File(path), "needs at least 20 rows with a text, got 5"),
        (File(path, {"label": "topics"}), "no such column in few.jsonl, got 'topics'; did you mean topic?"),
        (File(path, {"labels": "topic"}), "must be one of text, label, got 'labels'"),
        (File(tmp_path / "none.csv"), "no such file"),
    ):
        with pytest.raises(UserError, match=told.replace("?", r"\?")):
            monitor(place, version(), folder, SETTINGS, file)
    assert records(place, "tiny") == []


def test_without_the_rows_of_the_night_quality_remains(tmp_path, place, folder, scorer):
    """One line says what is gone; a labelled file is judged by the metric that the version was registered with."""
    shutil.rmtree(place.nights)
    log(place, scorer, other_texts(100))
    result = monitor(place, version(), folder, SETTINGS)
    assert result["windows"] == [] and not result["fired"]
    assert result["text"] == result["missing"] and f"the rows of night {NIGHT} are gone" in result["missing"]
    path = write(tmp_path / "bad.jsonl", rows_of(scorer, 100, 33, 0.3))
    result = monitor(place, version(), folder, SETTINGS, File(path))
    assert drifted(result) == {"quality"} and set(result["windows"][0]["findings"]) == {"quality"}
    blind = write(tmp_path / "blind.jsonl", [{"text": text} for text in other_texts(200)])
    again = monitor(place, version(), folder, SETTINGS, File(blind))
    assert again["unjudged"] == 200 and again["windows"] == [], "nothing was found, which is not that nothing drifted"
    assert again["recent"] == result["recent"] == {"drifted": 1, "windows": 1}


def test_a_version_whose_weights_are_broken_drifts(tmp_path, place, folder, scorer):
    """It answers with scores that are no numbers; that is judged like anything else, labels or not."""
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folder, tmp_path / "broken") / "model.safetensors"
    weights = load_file(broken)
    weights["classifier.bias"].fill_(float("nan"))
    save_file(weights, broken, {"format": "pt"})
    path = write(tmp_path / "usual.jsonl", rows_of(scorer, 100, 34))
    result = monitor(place, version(), broken.parent, SETTINGS, File(path))
    assert {"confidence", "quality"} <= drifted(result)
    assert "100 are no numbers" in result["windows"][0]["findings"]["confidence"]["text"]


def test_a_look_leaves_nothing(tmp_path, place, folder):
    """With `keep=False` nothing is remembered, though the windows count for the answer."""
    path = write(tmp_path / "other.jsonl", [{"text": text} for text in other_texts(300)])
    assert monitor(place, version(), folder, SETTINGS, File(path), keep=False)["fired"]
    assert records(place, "tiny") == []


def test_the_last_result_is_kept(place):
    """What the morning report reads."""
    assert latest(place, "tiny") is None
    save(place, {"model": "tiny", "text": "fine", "fired": False})
    assert latest(place, "tiny")["text"] == "fine" and latest(place, "other") is None


# -- the command -------------------------------------------------------------------------------------------------------


class Desk:
    """A folder with a config, a registered champion and its night, in which commands run."""

    def __init__(self, folder: Path, root: Path):
        self.folder, self.root = folder, root
        self.home = Home.from_environment({"OVERNIGHT_HOME": str(root)})
        self.environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
        self.environment |= {"OVERNIGHT_HOME": str(root), "COLUMNS": "200"}

    def run(self, *arguments: str, code: int = 0, api: str | None = None) -> Command:
        environment = self.environment | ({"PREFECT_API_URL": api} if api else {})
        done = Command(["monitor", *arguments], environment, self.folder)
        assert done.wait() == code, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done


@pytest.fixture(scope="module")
def desk(tmp_path_factory, empty_store, night, folder) -> Desk:
    from overnight.tracking import registry, runs, store

    place = tmp_path_factory.mktemp("desk")
    shutil.copytree(empty_store, place / "home")
    shutil.copytree(night / "nights", place / "home" / "nights")
    home = Home.from_environment({"OVERNIGHT_HOME": str(place / "home")})
    run = runs.open_night(home, store.experiment(home, "tiny"), NIGHT)
    tags = {"overnight.night": NIGHT, "overnight.config": "tiny.yaml"}
    facts = {"inputs": ("text",), "example": {"text": ["a"]}, "metrics": {"macro_f1": 0.9}}
    for name in ("tiny", "heard"):
        registry.register(home, name, folder, run_id=run, tags=tags, **facts)
        registry.set_alias(home, name, registry.CHAMPION, 1)
    facts = {"name": "tiny", "model": {"base": "b"}, "data": {"source": "s"}, "monitor": {"window": 50, "windows": 3}}
    (place / "tiny.yaml").write_text(yaml.safe_dump(facts))
    return Desk(place, place / "home")


def test_the_event_arrives_at_prefect(desk, prefect_api):
    """An alarm is an event about the model's resource, once something listens, and it is raised once."""
    write(desk.folder / "other.jsonl", [{"text": text} for text in other_texts(150)])
    trigger = {"type": "event", "posture": "Reactive", "expect": ["overnight.drift"], "threshold": 1, "within": 0}
    trigger["match"] = {"prefect.resource.id": "overnight.model.heard"}
    automation = {"name": "heard", "enabled": False, "trigger": trigger, "actions": [{"type": "do-nothing"}]}
    made = prefect_says("POST", f"{prefect_api}/automations/", json=automation)["id"]
    told = desk.run("heard", "other.jsonl", api=prefect_api)
    assert "3 of the last 3 windows drifted" in told.stdout
    assert (
        "told nobody: no deployment of heard listens (overnight deploy); to retrain: overnight run tiny.yaml --force"
        in told.stdout
    )
    prefect_says("PATCH", f"{prefect_api}/automations/{made}", json={"enabled": True})
    told = desk.run("heard", "other.jsonl", api=prefect_api)
    assert "ALARM" in told.stdout and "told Prefect: event overnight.drift" in told.stdout, "the alarm was not spent"
    assert latest(desk.home, "heard")["told"] == "Prefect: event overnight.drift"
    told = desk.run("heard", "other.jsonl", api=prefect_api)
    assert "ALARM" not in told.stdout and "\ntold " not in told.stdout
    prefect_says("DELETE", f"{prefect_api}/automations/{made}")

    def events() -> list[dict]:
        body = {"filter": {"event": {"name": ["overnight.drift"]}, "resource": {"id": ["overnight.model.heard"]}}}
        return list(prefect_says("POST", f"{prefect_api}/events/filter", json=body)["events"])

    deadline = time.monotonic() + 30
    while not events() and time.monotonic() < deadline:
        time.sleep(0.2)
    (event,) = events()
    assert event["payload"]["version"] == 1 and event["payload"]["recent"] == {"drifted": 3, "windows": 3}


def test_a_server_that_fails_spends_no_alarm(desk):
    """Prefect is up but refuses: the result is kept, and says what to type."""

    class Failing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/health") else 500)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None: ...

    write(desk.folder / "third.jsonl", [{"text": text} for text in other_texts(150, seed=9)])
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        told = desk.run("tiny", "third.jsonl", api=f"http://127.0.0.1:{server.server_port}/api")
        server.shutdown()
    assert (
        "ALARM" in told.stdout and "told nobody: Prefect: " in told.stdout and "overnight run tiny.yaml" in told.stdout
    )
    assert latest(desk.home, "tiny")["fired"] and latest(desk.home, "tiny")["told"].startswith("nobody: Prefect: ")


def test_without_a_server_the_command_is_told(desk):
    """Nothing to send an event to: what to type instead, by the config that the version came from; exit code 0."""
    write(desk.folder / "more.jsonl", [{"text": text} for text in other_texts(150, seed=7)])
    result = json.loads(desk.run("tiny", "more.jsonl", "--dry-run", "--json").stdout)
    assert result["fired"] and result["told"] == "nobody: --dry-run" and result["settings"] == "tiny.yaml"
    assert len(result["windows"]) == 3, "windows of 50 rows, as the config says"
    told = desk.run("tiny", "more.jsonl")
    assert "no Prefect server runs; to retrain: overnight run tiny.yaml --force" in told.stdout
    assert latest(desk.home, "tiny")["fired"]


def test_a_rollback_begins_anew(desk):
    """What drifted before the champion changed is not held against the one that is back."""
    from overnight.tracking import ledger

    write(desk.folder / "before.jsonl", [{"text": text} for text in other_texts(150, seed=8)])
    assert json.loads(desk.run("tiny", "before.jsonl", "--json").stdout)["fired"]
    ledger.record(desk.home, "tiny", "rollback", from_version=2, to_version=1, reason="back")
    result = json.loads(desk.run("tiny", "--json").stdout)
    assert not result["fired"] and result["recent"] == {"drifted": 0, "windows": 0}


def test_settings_of_another_version_of_overnight(desk, tmp_path):
    """Where the config is gone, that of the night counts; one that is no longer valid is as good as none."""
    night = desk.root / "nights" / NIGHT / "config.json"
    os.rename(desk.folder / "tiny.yaml", tmp_path / "tiny.yaml")
    try:
        for facts, path in (
            ({"monitor": {"window": 60}, "gone": 1}, str(night)),
            ({"monitor": {"w": 1}}, "the defaults"),
        ):
            write_json(night, facts)
            assert json.loads(desk.run("tiny", "--dry-run", "--json").stdout)["settings"] == path
    finally:
        night.unlink()
        os.rename(tmp_path / "tiny.yaml", desk.folder / "tiny.yaml")


def test_the_command_complains_in_one_line(desk):
    """Unknown models, and a file where traffic is watched."""
    assert "no such model" in desk.run("tinny", code=2).stderr
    assert "leave FILE out" in desk.run("tiny", "more.jsonl", "--watch", "5", code=2).stderr
    assert "no such model" in desk.run("tinny", "--watch", "1", code=2).stderr


def test_watching_goes_on_until_it_is_ended(desk, scorer):
    """`--watch` judges what has come meanwhile, whatever failed in between; ctrl-c ends it as it should."""
    watching = Command(["monitor", "tiny", "--watch", "1"], desk.environment, desk.folder)
    while "window" not in watching.stdout:
        assert watching._process.is_alive(), watching.stderr
        time.sleep(0.05)
    config = desk.folder / "tiny.yaml"
    right = config.read_text()
    config.write_text("nonsense")
    log(desk.home, scorer, make_rows(60, seed=41).text)
    watching.until("tiny.yaml")
    time.sleep(2.5)
    assert watching.stderr.count("tiny.yaml") == 1, "said once"
    config.write_text(right)
    watching.until("traffic: 50 rows judged")
    watching.signal(signal.SIGINT)
    assert watching.wait() == 0 and "ended" in watching.stderr
