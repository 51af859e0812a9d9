"""The monitor: drift that is there is found, none is found where there is none, and an alarm reaches Prefect."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from conftest import Command, make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from overnight.config.operations import Monitor
from overnight.errors import UserError
from overnight.home import Home, write_json
from overnight.monitor import drift, latest
from overnight.monitor.judge import File
from overnight.monitor.run import monitor
from overnight.monitor.state import alarmed, fires, recent, records, save
from overnight.monitor.traffic import traffic
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


# -- the statistics ----------------------------------------------------------------------------------------------------


def _labels(draw, shares, count):
    return draw.choice(LABELS, count, p=shares).tolist()


def _counts(draw, count, shift=0):
    texts = [(draw.zipf(1.5, 20) % 300 + shift).tolist() for _ in range(count)]
    return texts


@pytest.mark.parametrize("seed", range(5))
def test_statistics_tell_drift_from_chance(seed):
    """Each statistic stays below its limit for windows of the same distribution, and exceeds it for another one."""
    draw = np.random.default_rng(seed)
    normal, wide = (lambda n, m=0: draw.normal(m, 1, n)), (lambda n, m=0: draw.normal(m, 1, (n, 16)))
    vocabulary = drift.Vocabulary(_counts(draw, 2000), _counts(draw, 600), 1000)
    own = [0.5, 0.3, 0.2]
    pairs = {
        "label_share": lambda moved: drift.label_share(
            _labels(draw, own, 800), _labels(draw, [0.2, 0.3, 0.5] if moved else own, 500)
        ),
        "length": lambda moved: drift.distribution(normal(800), normal(500, 1 if moved else 0)),
        "rare_tokens": lambda moved: vocabulary.rare_tokens(
            drift.count_tokens(_counts(draw, 500, 200 if moved else 0), 1000)
        ),
        "token_frequencies": lambda moved: vocabulary.token_frequencies(
            drift.count_tokens(_counts(draw, 500, 50 if moved else 0), 1000)
        ),
        "embedding": lambda moved: drift.embedding(wide(600), wide(500, 0.5 if moved else 0)),
    }
    for name, statistic in pairs.items():
        limit = getattr(Monitor(), name)
        same, other = statistic(False), statistic(True)
        assert same.effect < limit, name
        assert other.effect >= limit and other.p < 1e-4, name


def test_a_difference_that_is_certain_but_small_is_no_drift():
    """With enough rows every difference is certain; its size decides."""
    draw = np.random.default_rng(3)
    found = drift.distribution(draw.normal(0, 1, 100_000), draw.normal(0.1, 1, 100_000))
    assert found.p < 1e-9 and found.effect < Monitor().length


def test_quality_is_a_drop_beyond_chance():
    """A worse metric counts, a better one does not, and the standard error is that of both sides."""
    from overnight.evaluation import label_tally

    draw = np.random.default_rng(5)

    def tally(count: int, right: float):
        true = draw.choice(LABELS, count).tolist()
        return label_tally(true, [t if draw.random() < right else draw.choice(LABELS) for t in true], LABELS)

    def found(before, now):
        return drift.quality(before, now, "accuracy", lower_is_better=False, resamples=500)

    good, same, bad = tally(600, 0.9), tally(500, 0.9), tally(500, 0.6)
    assert found(good, bad).effect > 0.1 and found(good, bad).p < 1e-6
    assert found(good, same).p > 0.01 and found(bad, good).effect < 0 and found(bad, good).p > 0.5
    assert found(good.values()["accuracy"], bad).p < found(good, bad).p, "a number has no error of its own"


def test_hidden_states_do_not_depend_on_the_batch(scorer):
    """A row's hidden state is the same alone and among longer ones: padding is not averaged."""
    rows = [{"text": text} for text in ["a", "a lovely day", "a very late and broken flight with rude crew " * 3]]
    together = scorer.hidden(rows)
    assert together.shape == (3, 32)
    for row, found in zip(rows, together, strict=True):
        np.testing.assert_allclose(scorer.hidden([row])[0], found, atol=1e-5)


# -- the rule ----------------------------------------------------------------------------------------------------------

HISTORY = st.lists(st.tuples(st.sampled_from(["window", "drifted", "alarm"]), st.integers(1, 2)), max_size=30)


@settings(deadline=None)
@given(HISTORY, st.integers(1, 6), st.integers(1, 6))
def test_the_rule_counts_the_last_windows_of_the_version_since_its_last_alarm(history, windows, wanted):
    """k of n, told in another way: walk back from the end until n windows, or an alarm."""
    lines = [
        {"key": str(i), "version": number} | ({"alarm": 1.0} if kind == "alarm" else {"drifted": kind == "drifted"})
        for i, (kind, number) in enumerate(history)
    ]
    seen = []
    for kind, number in reversed(history):
        if number != 1:
            continue
        if kind == "alarm" or len(seen) == windows:
            break
        seen.append(kind == "drifted")
    assert fires(lines, 1, windows=windows, drifted=wanted) == (sum(seen) >= wanted)
    assert len(recent(lines, 1, windows)) == len(seen)


def test_a_rule_that_cannot_fire_is_refused():
    """`drifted` above `windows` is a mistake of the config."""
    with pytest.raises(ValueError, match="drifted must not be above windows, got 6 of 5"):
        Monitor(drifted=6)


# -- scored traffic ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 1, 2]), st.booleans()), max_size=60), st.data())
def test_traffic_is_cut_into_windows_without_loss(tmp_path_factory, lines, data):
    """However lines come in and whenever they are read, windows hold each line of the version once, in order."""
    folder = tmp_path_factory.mktemp("scored")
    lines = sorted(lines, key=lambda line: line[0])
    written = []
    cursor, seen = None, []
    for i, (day, number, whole) in enumerate(lines):
        facts = {"time": i, "version": number, "label": "good", "score": 0.5, "characters": i}
        with open(folder / f"2026-01-0{day + 1}.jsonl", "a") as file:
            file.write(json.dumps(facts) + "\n" if whole else 'nonsense\n"text"\n')
        if whole and number == 1:
            written.append(i)
        if data.draw(st.booleans()):
            for window in traffic(folder, 1, 4, ["text"], cursor):
                if len(window) == 4:
                    cursor, seen = window.cursor, seen + window.characters
    *whole, last = traffic(folder, 1, 4, ["text"], cursor)
    assert seen + [c for window in whole for c in window.characters] + last.characters == written
    assert len(last) < 4 and all(len(window) == 4 for window in whole)


def test_a_line_that_is_being_written_waits(tmp_path):
    """Half a line is neither read nor skipped."""
    line = json.dumps({"time": 1, "version": 1, "label": "x", "score": 1, "characters": 7}) + "\n"
    path = tmp_path / "2026-01-01.jsonl"
    path.write_text(line + line[:20])
    first, rest = traffic(tmp_path, 1, 1, ["text"], None)
    assert len(first) == 1 and len(rest) == 0
    path.write_text(line + line)
    second = next(traffic(tmp_path, 1, 1, ["text"], first.cursor))
    assert second.characters == [7] and second.cursor == (path.name, 2 * len(line))


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
    registry.register(home, "tiny", folder, run_id=run, tags=tags, **facts)
    registry.set_alias(home, "tiny", registry.CHAMPION, 1)
    facts = {"name": "tiny", "model": {"base": "b"}, "data": {"source": "s"}, "monitor": {"window": 50, "windows": 3}}
    (place / "tiny.yaml").write_text(yaml.safe_dump(facts))
    return Desk(place, place / "home")


def test_the_event_arrives_at_prefect(desk, prefect_api):
    """An alarm is an event about the model's resource on the server; the windows it was about raise no second one."""
    write(desk.folder / "other.jsonl", [{"text": text} for text in other_texts(150)])
    told = desk.run("tiny", "other.jsonl", api=prefect_api)
    assert "3 of the last 3 windows drifted" in told.stdout and "told Prefect: event overnight.drift" in told.stdout

    def events() -> list[dict]:
        body = {"filter": {"event": {"name": ["overnight.drift"]}, "resource": {"id": ["overnight.model.tiny"]}}}
        request = urllib.request.Request(
            f"{prefect_api}/events/filter", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            found = json.load(response)["events"]  # other tests of this server send theirs
        return [event for event in found if "recent" in event["payload"]]

    deadline = time.monotonic() + 30
    while not events() and time.monotonic() < deadline:
        time.sleep(0.2)
    (event,) = events()
    assert event["payload"]["version"] == 1 and event["payload"]["recent"] == {"drifted": 3, "windows": 3}
    assert latest(desk.home, "tiny")["told"] == "Prefect: event overnight.drift"


def test_without_a_server_the_command_is_told(desk):
    """Nothing to send an event to: what to type instead, by the config that the version came from; exit code 0."""
    write(desk.folder / "more.jsonl", [{"text": text} for text in other_texts(150, seed=7)])
    result = json.loads(desk.run("tiny", "more.jsonl", "--dry-run", "--json").stdout)
    assert result["fired"] and result["told"] == "nobody: --dry-run" and result["settings"] == "tiny.yaml"
    assert len(result["windows"]) == 3, "windows of 50 rows, as the config says"
    told = desk.run("tiny", "more.jsonl")
    assert "no Prefect server runs; to retrain: overnight run tiny.yaml --force" in told.stdout
    assert latest(desk.home, "tiny")["fired"]


def test_the_command_complains_in_one_line(desk):
    """Unknown models, and a file where traffic is watched."""
    assert "no such model" in desk.run("tinny", code=2).stderr
    assert "leave FILE out" in desk.run("tiny", "more.jsonl", "--watch", "5", code=2).stderr


def test_watching_goes_on_until_it_is_ended(desk, scorer):
    """`--watch` judges what has come meanwhile; ctrl-c ends it as it should."""
    watching = Command(["monitor", "tiny", "--watch", "1"], desk.environment, desk.folder)
    while "windows" not in watching.stdout:
        time.sleep(0.05)
    log(desk.home, scorer, make_rows(60, seed=41).text)
    watching.until("traffic: 50 rows judged")
    watching.signal(signal.SIGINT)
    assert watching.wait() == 0 and "ended" in watching.stderr
