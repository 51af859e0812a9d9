"""What a user does in a browser, on the pages of one real night: MLflow, Prefect, the morning report.

    python -m pytest -m browser        # needs playwright, and Chromium: $CHROMIUM, or `chromium` on the path

Where one of them is missing the tests are skipped, but with CI=true they fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import Project
from test_report import MONITOR, night

from overnight.report import html

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
PATIENCE = 60_000  # milliseconds: MLflow's pages take their time on a small machine
# MLflow's pages open their assistant on the first visit, in front of everything else
SEEN = "for (const key of ['panelOpen_v1', 'fab.autoOpenedOnFirstLoad_v1'])" + (
    "localStorage.setItem(`mlflow.assistant.${key}`, String(key.startsWith('fab')))"
)


@pytest.fixture(scope="session")
def browser():
    """A real Chromium."""
    missing = [name for name, found in (("playwright", find_spec("playwright")), ("chromium", CHROMIUM)) if not found]
    if missing:
        say = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        say(f"not installed: {' and '.join(missing)}")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def served(browser, tmp_path_factory, tiny_model, prefect_api) -> dict:
    """One night while `overnight ui` serves the pages: the record, the addresses, the folder."""
    project = Project(tmp_path_factory.mktemp("browser"), tiny_model, prefect_api)
    command = [Path(sys.executable).with_name("overnight"), "ui", "--json"]
    ui = subprocess.Popen(command, env=project.environment, cwd=project.folder, stdout=subprocess.PIPE, text=True)
    try:
        links = json.loads("".join(iter(ui.stdout.readline, "}\n")) + "}")
        search = {"trials": 3, "pruner": "none", "space": {"learning_rate": {"low": 2e-3, "high": 3.5e-3}}}
        record = project.facts("run", str(project.config), "--set", f"search={json.dumps(search)}")
        yield {"record": record, "folder": project.home / "nights" / record["id"], **links}
    finally:
        ui.terminate()
        ui.wait(60)


@pytest.fixture
def page(browser):
    """An empty page; afterwards: nothing was asked of any other machine."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.add_init_script(SEEN)
    asked: set[str] = set()
    context.on("request", lambda request: asked.add(request.url))
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    yield page
    context.close()
    assert [url for url in asked if not re.match(r"(http://127\.0\.0\.1:|data:|blob:|file:)", url)] == []


def test_from_last_nights_run_to_its_report(page, served):
    """MLflow: the experiment, last night's run, its trials in order of their metric, the report among its artifacts."""
    night = served["record"]["id"]
    page.goto(served["mlflow"])
    page.get_by_text("Model training").click()
    page.get_by_role("link", name="Experiments").first.click()
    page.get_by_role("link", name="tiny", exact=True).click()
    row = page.get_by_role("link", name=night)
    row.wait_for()
    page.get_by_role("button", name="Sort: Created").click()
    page.get_by_placeholder("Search").last.fill("best/value")
    page.get_by_text("best/value", exact=True).last.click()
    trials = [t for t in served["record"]["search"]["trials"] if t["state"] == "finished"]
    names = page.get_by_role("link", name=re.compile("^trial-"))
    names.first.wait_for()
    best = max(trials, key=lambda t: t["value"])
    assert names.first.inner_text() in {f"trial-{t['number']:02d}" for t in trials if t["value"] == best["value"]}
    row.click()
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("report", exact=True).click()
    page.get_by_text("report.html", exact=True).click()
    report = page.frame_locator("iframe.mlflow-html-iframe")
    assert report.get_by_role("heading", level=1).inner_text() == "Version 1 is the first champion"
    report.locator("#plot-parallel svg").wait_for()


def test_curves_of_a_trial(page, served):
    """MLflow: a trial's own page draws its curves."""
    page.goto(served["mlflow"])
    page.get_by_text("Model training").click()
    page.get_by_role("link", name="tiny", exact=True).click()
    page.get_by_role("link", name=served["record"]["id"]).click()
    page.get_by_role("link", name="trial-00").click()
    page.get_by_role("tab", name="Model metrics").click()
    page.get_by_placeholder("Search metric charts").fill("validation/macro_f1")
    page.get_by_text("trial-00 (validation/macro_f1)").first.wait_for()
    page.locator(".js-plotly-plot .scatterlayer path.js-line").first.wait_for(state="attached")


def test_champions_version(page, served):
    """MLflow: the registered model, the version behind the alias, why it was promoted, and from there to the report."""
    page.goto(served["mlflow"])
    page.get_by_text("Model training").click()
    page.get_by_role("link", name="Model registry").click()
    page.get_by_role("button", name="Try it now").click()  # what MLflow says on the first visit
    page.get_by_role("link", name="tiny", exact=True).click()
    page.get_by_text("models:/tiny@champion").first.wait_for()
    page.get_by_role("link", name="Version 1").click()
    page.get_by_text("champion", exact=False).first.wait_for()
    assert page.get_by_text(f"Promoted by night {served['record']['id']}").is_visible()
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Morning report").click()
    report = opened.value.frame_locator("iframe.mlflow-html-iframe")
    report.get_by_role("heading", level=1).wait_for()


def test_flow_run_and_artifacts(page, served):
    """Prefect: last night's flow run with its tasks, its artifacts, and the link to the version in MLflow."""
    page.goto(served["prefect"])
    page.get_by_text("Runs", exact=True).first.click()
    page.get_by_role("link", name=re.compile("tiny.yaml")).first.click()
    page.get_by_text("Completed").first.wait_for()
    page.locator("canvas").first.wait_for()  # the graph
    page.get_by_text("Artifacts", exact=True).click()
    for name in ("validation", "trials", "decision", "report"):
        page.get_by_text(name, exact=True).first.wait_for()
    page.get_by_text("mlflow-version", exact=True).first.click()
    link = page.get_by_role("link", name="tiny version 1")
    link.wait_for()
    assert link.get_attribute("href") == f"{served['mlflow']}/#/models/tiny/versions/1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_report_page(browser, served, scheme, width):
    """The file by itself: fits, has its headings and plots, says nothing on the console, asks nobody for anything."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = (served["folder"] / "report.html").as_uri()
    page.goto(address)
    for name in ("curves", "parallel"):
        page.locator(f"#plot-{name} .moving svg path").first.wait_for(state="attached", timeout=PATIENCE)
        assert not page.locator(f"#plot-{name} .still").count() or page.locator(f"#plot-{name} .still").is_hidden()
    headings = [heading.inner_text() for heading in page.get_by_role("heading", level=2).all()]
    wanted = ["Why", "The numbers", "The search", "The data", "What it cost", "Where it comes from", "What next"]
    assert [heading for heading in headings if heading in wanted] == wanted
    assert page.evaluate("document.documentElement.scrollWidth") == width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(244, 245, 248)", "dark": "rgb(14, 18, 27)"}[scheme]
    assert (said, asked) == ([], [address])
    context.close()


def test_champion_beside_candidate(browser, tmp_path):
    """Of a night with a champion: every difference of the two has its interval drawn."""
    file = tmp_path / "report.html"
    file.write_text(html(night(monitor=MONITOR)))
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto(file.as_uri())
    whiskers = page.locator(".compare .whisker")
    assert whiskers.count() == 8 and all(whisker.is_visible() for whisker in whiskers.all())
    assert page.get_by_role("heading", name="Live texts").is_visible()
    page.close()


def test_report_page_by_keyboard(browser, served):
    """A trial is picked with Tab and Enter, stands out in both plots, and is let go again."""
    page = browser.new_page()
    page.goto((served["folder"] / "report.html").as_uri())
    button = page.get_by_role("button", name="trial 2: show in the plots")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "true"
    for name in ("curves", "parallel"):
        page.locator(f"#plot-{name} .moving [stroke='var(--ask)']").first.wait_for(state="attached")
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    page.get_by_role("combobox", name="Show").select_option("training loss")
    page.close()


def test_dragging_over_an_axis_picks_trials(browser, served):
    """Parallel coordinates: what passes where the mouse was drawn is picked, in the table too."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.goto((served["folder"] / "report.html").as_uri())
    plot = page.locator("#plot-parallel .moving svg")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 290, steps=5)
    page.mouse.up()
    picked = page.locator(".trials button[aria-pressed=true]")
    picked.first.wait_for()
    assert picked.count() == len(served["record"]["search"]["trials"])
    page.close()


def test_report_page_without_scripts(browser, served):
    """Nothing is missing but movement: the picture of the curves, the table of the trials."""
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((served["folder"] / "report.html").as_uri())
    assert page.locator("#plot-curves .still svg").is_visible() and page.locator("#plot-parallel").is_hidden()
    assert page.locator(".trials tbody tr").count() == len(served["record"]["search"]["trials"])
    context.close()
