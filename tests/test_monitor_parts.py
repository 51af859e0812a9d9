"""Parts of the monitor: statistics tell drift from chance, the rule counts, traffic is read without loss."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overnight import problems
from overnight.config.operations import Monitor
from overnight.home import Home
from overnight.monitor import drift
from overnight.monitor.judge import truths
from overnight.monitor.state import KEPT, alarmed, recent, records, remember
from overnight.monitor.traffic import end, traffic

LABELS = ["bad", "good", "plain"]


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


@pytest.mark.parametrize("rows", [50, 100, 150, 200, 600])
def test_chance_of_token_frequencies_is_right_at_every_size(rows):
    """Without drift p is spread over 0 to 1, however large the window is beside the 200 held-out rows."""
    found = []
    for seed in range(12):
        draw = np.random.default_rng(seed)
        vocabulary = drift.Vocabulary(_counts(draw, 1000), _counts(draw, 200), 1000)
        found.append(vocabulary.token_frequencies(drift.count_tokens(_counts(draw, rows), 1000)))
    chances = [one.p for one in found]
    assert min(chances) > 1e-3 and 0.15 < np.median(chances) < 0.85
    assert abs(np.mean([one.effect for one in found])) < 0.01
    other = vocabulary.token_frequencies(drift.count_tokens(_counts(draw, rows, 50), 1000))
    assert other.effect > 0.05 and other.p < 1e-6


@pytest.mark.parametrize(
    ("name", "cells", "expected"),
    [
        ("sequence-classification", ["1.0", None, "2"], ["1", None, "2"]),
        ("multi-label-classification", ["b;a", "[]", "[1"], [["a", "b"], [], None]),
        ("regression", ["4", "abc", None], [4.0, None, None]),
        ("token-classification", ['[[2, 8, "x"]]', "[]", '[[2, 99, "x"]]'], [[(2, 8, "x")], [], None]),
    ],
)
def test_targets_of_a_file_are_read_as_a_night_reads_them(name, cells, expected):
    """In every form that a source may have; what cannot be read counts as not known."""
    assert truths(problems.get(name), [{"text": "a lovely flight"}] * 3, cells) == expected


def test_places_of_a_file_are_those_of_its_texts():
    """Blanks and accents that cleaning changes move the truth along, as they move the text that is scored."""
    text = "Zoe\u0308  flew  to Paris"
    cells = [json.dumps([[15, 20, "x"]]), json.dumps([{"text": "flew  to", "start": 6}])]
    assert truths(problems.get("token-classification"), [{"text": text}], cells[:1]) == [[(12, 17, "x")]]
    row = {"question": "what", "context": text}
    assert truths(problems.get("question-answering"), [row], cells[1:]) == [["flew to"]]


def test_a_broken_model_drifts():
    """Scores and hidden states that are no numbers are as far away as can be, and are counted."""
    draw = np.random.default_rng(4)
    scores = draw.uniform(0.5, 1, 500)
    found = drift.distribution(scores, [*draw.uniform(0.5, 1, 50), *[float("nan")] * 50])
    assert 0.4 < found.effect < 0.6 and found.p < 1e-6 and found.text.endswith("; 50 are no numbers")
    assert drift.distribution(scores, [float("nan")] * 50).effect == 1
    wide = draw.normal(0, 1, (400, 8))
    assert drift.embedding(wide, np.full((100, 8), np.nan)).effect > 0.9


def test_a_difference_that_is_certain_but_small_is_no_drift():
    """With enough rows every difference is certain; its size decides."""
    draw = np.random.default_rng(3)
    found = drift.distribution(draw.normal(0, 1, 100_000), draw.normal(0.1, 1, 100_000))
    assert found.p < 1e-9 and found.effect < Monitor().length


def test_quality_is_a_drop_beyond_chance():
    """A worse metric counts, a better one does not, and the standard error is that of both sides."""
    from overnight.problems.labels import label_tally

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


# -- the rule ----------------------------------------------------------------------------------------------------------

HISTORY = st.lists(st.tuples(st.sampled_from(["window", "drifted", "alarm"]), st.integers(1, 2)), max_size=30)


@settings(deadline=None)
@given(HISTORY, st.integers(1, 6))
def test_the_rule_counts_the_last_windows_of_the_version_since_its_last_alarm(history, windows):
    """The n that it looks at, told in another way: walk back from the end until n windows, or an alarm."""
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
    assert [line["drifted"] for line in recent(lines, 1, windows)] == seen[::-1]


def test_counting_begins_anew_with_each_champion():
    """Rows that a version scored before it became champion do not count, nor files that were judged before."""
    traffic = [{"key": str(end), "version": 1, "until": end, "judged": 50.0, "drifted": True} for end in (10.0, 20.0)]
    files = [{"key": str(at), "version": 1, "until": None, "judged": at, "drifted": True} for at in (11.0, 21.0)]
    counted = recent([*traffic, *files], 1, 5, since=20.0)
    assert [line["key"] for line in counted] == ["20.0", "21.0"]


def test_a_large_file_makes_nothing_forgotten(tmp_path):
    """Where traffic goes on and the last alarm outlive any number of windows; a file judged again is known again."""
    place = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path)})
    cursor = {"key": "1 day", "version": 1, "drifted": True, "cursor": ["2026-01-01.jsonl", 7]}
    remember(place, "tiny", [cursor])
    alarmed(place, "tiny", 1, 5.0)
    for name in "abc":
        large = [{"key": f"1 {name} {i}", "version": 1, "drifted": True, "cursor": None} for i in range(2 * KEPT)]
        remember(place, "tiny", large)
    kept = records(place, "tiny")
    assert kept[0] == cursor and kept[1]["alarm"] == 5.0 and kept[-1] == large[-1] and len(kept) == KEPT + 2
    alarmed(place, "tiny", 1, 6.0)
    remember(place, "tiny", large)
    assert recent(records(place, "tiny"), 1, 5) == [], "the alarm about it stays behind it"
    assert records(place, "tiny")[0] == cursor


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
    assert second.characters == [7] and second.cursor == (path.name, 2 * len(line)) == end(tmp_path)


def test_only_days_are_traffic(tmp_path):
    """A copy or an export that somebody left there is not scored traffic, and does not count twice."""
    line = json.dumps({"time": 1, "version": 1, "label": "x", "score": 1, "characters": 7}) + "\n"
    for name in ("2026-01-01.jsonl", "2026-01-01 (copy).jsonl", "zz.jsonl"):
        (tmp_path / name).write_text(line)
    assert [len(window) for window in traffic(tmp_path, 1, 5, ["text"], None)] == [1]
    assert end(tmp_path) == ("2026-01-01.jsonl", len(line)) and end(tmp_path / "none") is None
