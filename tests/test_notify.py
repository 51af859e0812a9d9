"""Notifications: what arrives at real servers, what is said of those that fail, and that no night suffers from them."""

from __future__ import annotations

import email
import json
import shutil
import socketserver
import threading
from email.policy import default

import pytest
import yaml
from conftest import SECRET, Project, make_rows

from overnight import notify
from overnight.config import Config
from overnight.healing import heal
from overnight.home import Home, read_json
from overnight.nights import begin_night
from overnight.progress import listen


class Mails(socketserver.ThreadingTCPServer):
    """An SMTP server that takes everything and keeps it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Smtp)
        self.got: list[email.message.EmailMessage] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"mailto://127.0.0.1:{self.server_address[1]}?from=nights@example.com&to=ana@example.com"


class Smtp(socketserver.StreamRequestHandler):
    def handle(self):
        self.wfile.write(b"220 ready\r\n")
        while line := self.rfile.readline().upper():
            if line.startswith(b"DATA"):
                self.wfile.write(b"354 go on\r\n")
                lines = list(iter(self.rfile.readline, b".\r\n"))
                self.server.got.append(email.message_from_bytes(b"".join(lines), policy=default))
            self.wfile.write(b"221 bye\r\n" if line.startswith(b"QUIT") else b"250 fine\r\n")


@pytest.fixture
def mails():
    server = Mails()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def home(tmp_path) -> Home:
    return Home.from_environment({"OVERNIGHT_HOME": str(tmp_path)})


def config(*to: str, **changes) -> Config:
    facts = {"name": "m", "model": {"base": "b"}, "data": {"source": "s"}}
    return Config.model_validate(facts | {"notify": [{"to_env": name, **changes} for name in to]})


def metric(value: float, low: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high}


RECORD = {
    "id": "m-20261123-021500",
    "model": "m",
    "state": "promoted",
    "started": 0.0,
    "ended": 401.0,
    "decision": {
        "would": "promote",
        "reasons": [{"rule": "chance", "passed": True, "text": "gain +0.030 macro_f1, 95 % interval [+0.010, +0.050]"}],
    },
    "candidate": {
        "version": 8,
        "evaluation": {"metric": "macro_f1", "labels": [], "metrics": {"macro_f1": metric(0.83, 0.8, 0.86)}},
    },
    "champion": {
        "version": 7,
        "evaluation": {"metric": "macro_f1", "labels": [], "metrics": {"macro_f1": metric(0.8, 0.77, 0.83)}},
    },
    "comparison": {"differences": {"macro_f1": metric(0.03, 0.01, 0.05)}},
    "next": [{"text": "take it back", "command": "overnight rollback m --reason '…'"}],
}


def test_the_message_is_the_start_of_the_report():
    """Decision first, then why, the metric with its interval beside the champion's, the next command."""
    title, body = notify.message(RECORD)
    assert title == "m promoted: Version 8 is the new champion"
    assert body.splitlines() == [
        "gain +0.030 macro_f1, 95 % interval [+0.010, +0.050]",
        "macro_f1 0.830 [0.800, 0.860]; champion 0.800, difference +0.030 [+0.010, +0.050] on the test rows",
        "night m-20261123-021500, 6 min 41 s",
        "take it back: overnight rollback m --reason '…'",
    ]


def test_no_password_and_no_novel():
    """Errors of others may hold addresses with passwords and pages of text: neither is sent."""
    why = "no answer from postgresql://ana:s3cr3t@db.example.com/x?password=s3cr3t\n" + "\n".join(["x" * 5000] * 50)
    title, body = notify.message({"model": "m", "state": "failed", "why": why})
    assert title.startswith("m failed: ") and "db.example.com" in body
    assert SECRET not in body and len(body) < 5000


def test_every_kind_of_address(hooks, mails):
    """JSON, a Slack-compatible hook on any host, a Mattermost address, e-mail: each gets it in its shape."""
    environ = {
        "AS_JSON": hooks.address("json"),
        "HOOK": hooks.address("services", "http") + "?thread=a%20b",
        "MATTERMOST": f"mmost://127.0.0.1:{hooks.server_address[1]}/abcdefghij",
        "MAIL": mails.address,
    }
    found = notify.send(list(environ), "m kept: <b> & co", "why\nnext: `do it`", environ=environ)
    assert found == dict.fromkeys(environ)
    assert {k: hooks.at("json")[0][k] for k in ("title", "message")} == {
        "title": "m kept: <b> & co",
        "message": "why\nnext: `do it`",
    }
    assert hooks.at("services") == [{"text": "*m kept: &lt;b&gt; &amp; co*\nwhy\nnext: `do it`"}]
    assert f"/services/{SECRET}?thread=a+b" in [path for path, _ in hooks.got]
    assert "m kept: <b> & co" in hooks.at("hooks")[0]["text"]
    (mail,) = mails.got
    assert mail["subject"] == "m kept: <b> & co" and mail["to"] == "ana@example.com"
    assert "next: `do it`" in mail.get_body(("html", "plain")).get_content()


def test_what_fails_is_said_without_the_address(hooks):
    """A server that answers 500 is asked twice, one that hangs is left; the others get theirs all the same."""
    environ = {
        "GOOD": hooks.address("json"),
        "BROKEN": hooks.address("500"),
        "HANGS": hooks.address("hang") + "?rto=600",
        "WRONG": f"no address of {SECRET}",
        "NOBODY": "json://127.0.0.1:9/x",
    }
    found = notify.send([*environ, "UNSET"], "t", "b", environ=environ, seconds=6.0)
    assert found["GOOD"] is None and hooks.at("json")
    assert found["BROKEN"] == found["NOBODY"] == "it was refused, or nobody answered" and len(hooks.at("500")) == 2
    assert found["HANGS"] == "nothing in 6 s"
    assert found["WRONG"] == "it holds no address that Apprise knows" and found["UNSET"] == "the variable is not set"
    assert SECRET not in str(found)


def test_each_end_of_a_night_is_told_once(home, hooks, monkeypatch):
    """Told once although it is asked twice; a continued night that ends otherwise is told again; silence is kept."""
    monkeypatch.setenv("TEAM", hooks.address("json"))
    monkeypatch.setenv("BOSS", hooks.address("boss"))
    settings = config("TEAM", "BOSS")
    night = begin_night(home, settings, "f", forced=False)
    assert night.record["notified"] == {}
    for state in ("failed", "failed", "promoted", "promoted", "kept"):
        night.update(state=state)
        notify.announce(settings.notify, night)
    assert len(hooks.at("json")) == len(hooks.at("boss")) == 2, "kept is not among those that are told"
    assert read_json(night.folder / "night.json")["notified"] == {"TEAM": "promoted", "BOSS": "promoted"}
    assert "warnings" not in night.record


def test_a_failed_notification_is_a_warning(home, hooks, monkeypatch):
    """In the record and for whoever watches, by the name of the variable; it is not tried again for this end."""
    monkeypatch.setenv("TEAM", hooks.address("500"))
    settings = config("TEAM", "UNSET")
    night = begin_night(home, settings, "f", forced=False)
    night.update(state="refused", why="labels: 3 unknown")
    heard = []
    with listen(heard.append):
        notify.announce(settings.notify, night)
        notify.announce(settings.notify, night)
    warnings = read_json(night.folder / "night.json")["warnings"]
    assert (
        warnings
        == [event["warning"] for event in heard]
        == [
            "the notification to $TEAM was not sent: it was refused, or nobody answered",
            "the notification to $UNSET was not sent: the variable is not set",
        ]
    )
    assert SECRET not in (night.folder / "night.json").read_text()


@pytest.mark.parametrize("state", ["kept", "refused"])
def test_a_night_killed_before_it_was_told(home, hooks, monkeypatch, state):
    """The next run tells it, once; a night from before anybody was to be told is not told, nor an old one to others."""
    monkeypatch.setenv("TEAM", hooks.address("json"))
    monkeypatch.setenv("BOSS", hooks.address("boss"))
    settings = config("TEAM", on=["kept", "refused"])
    begin_night(home, config(), "e", forced=False).update(state=state)
    notify.announce_untold(home, settings)
    assert not hooks.got
    begin_night(home, settings, "f", forced=False).update(state=state)
    notify.announce_untold(home, settings)
    notify.announce_untold(home, settings)
    assert [body["title"].split(":")[0] for body in hooks.at("json")] == [f"m {state}"]
    begin_night(home, settings, "g", forced=False).update(state=state)
    notify.announce_untold(home, config("TEAM", "BOSS", on=["kept", "refused"]))
    assert len(hooks.at("json")) == 2 and len(hooks.at("boss")) == 1, "somebody new hears of the last night alone"


def test_a_night_that_is_killed_every_night(empty_store, tmp_path, hooks, monkeypatch):
    """It has no process left to say so: the next run does, as a failure, each time; not for one that is interrupted."""
    shutil.copytree(empty_store, tmp_path / "lived")
    home = Home.from_environment({"OVERNIGHT_HOME": str(tmp_path / "lived")})
    monkeypatch.setenv("TEAM", hooks.address("json"))
    settings = config("TEAM")
    for _ in range(2):
        begin_night(home, settings, "f", forced=False)
        heal(home, "m")
        notify.announce_untold(home, settings)
        notify.announce_untold(home, settings)
    bodies = hooks.at("json")
    assert [body["title"] for body in bodies] == ["m failed: The night could not finish; the champion stays"] * 2
    assert bodies[0]["message"].startswith("its process ended without a word\n")
    assert "continue from where it stopped: overnight run" in bodies[0]["message"]
    night = begin_night(home, settings, "f", forced=False)
    assert night.record["continued"] == 2
    with pytest.raises(KeyboardInterrupt), night:
        raise KeyboardInterrupt
    notify.announce_untold(home, settings)
    assert len(hooks.at("json")) == 2
    begin_night(home, settings, "f", forced=False).update(state="failed", why="no memory")
    notify.announce_untold(home, settings)
    assert "no memory" in hooks.at("json")[2]["message"]


def test_an_answer_is_told(home, hooks, monkeypatch):
    """To those whose addresses are set where the answer is given; to the others by a later night, once."""
    monkeypatch.setenv("TEAM", hooks.address("json"))
    monkeypatch.setenv("BOSS", hooks.address("boss"))
    settings = config("TEAM", "BOSS")
    night = begin_night(home, settings, "f", forced=False)
    night.update(state="waiting")
    notify.announce(settings.notify, night)
    monkeypatch.delenv("BOSS")
    night.update(state="promoted", why="approved by ana: looks right")
    notify.announce_answer(night)
    assert "approved by ana: looks right" in hooks.at("json")[1]["message"] and len(hooks.at("boss")) == 1
    assert "warnings" not in night.record
    monkeypatch.setenv("BOSS", hooks.address("boss"))
    begin_night(home, settings, "g", forced=False).update(state="kept")
    notify.announce_untold(home, settings)
    assert len(hooks.at("json")) == 2 and "approved by ana" in hooks.at("boss")[1]["message"]


def test_a_mistake_before_the_night(tmp_path, hooks, monkeypatch):
    """A config with mistakes still says who is to be told; one whose addresses cannot be read ends as it would."""
    monkeypatch.setenv("TEAM", hooks.address("json"))
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"name": "m", "modell": {}, "notify": [{"to_env": "TEAM"}]}))
    with pytest.raises(ValueError), notify.mistakes_told(str(path)):
        raise ValueError("the source is gone")
    (body,) = hooks.at("json")
    assert body["title"].startswith(f"{path} failed: ")
    assert body["message"].splitlines() == [
        "ValueError: the source is gone",
        f"check the config and the data: overnight validate {path}",
    ]
    for text in ("notify: [{to_env: 3}]", "notify: TEAM", "{", ""):
        path.write_text(text)
        with pytest.raises(ValueError), notify.mistakes_told(str(path)):
            raise ValueError
    assert len(hooks.got) == 1


# -- through the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, tiny_model, prefect_api, hooks) -> Project:
    """A project that tells three: one that listens, one that hangs, one whose server is broken."""
    project = Project(tmp_path, tiny_model, prefect_api)
    paths = {"TEAM": "json", "HANGS": "hang", "BROKEN": "500"}
    project.environment |= {name: hooks.address(path) for name, path in paths.items()}
    told = [{"to_env": name, "on": ["promoted", "refused", "failed"]} for name in paths]
    project.write(yaml.safe_load(project.config.read_text()) | {"notify": told})
    return project


def test_a_refused_night_and_a_wrong_source(project, hooks):
    """Whatever becomes of the notifications, the night has its own exit code, and its record says what failed."""
    rows = make_rows(300)
    rows.loc[rows.index % 2 == 0, "label"] = "surprise"
    rows.to_csv(project.folder / "bad.csv", index=False)
    done = project.run("run", str(project.config), "--set", f"data.source={project.folder / 'bad.csv'}", code=3)
    (body,) = hooks.at("json")
    assert body["title"] == "tiny refused: The data did not pass the validation; the champion stays"
    assert "overnight validate" in body["message"] and rows.text[0] not in body["message"]
    record = project.facts("report")
    assert record["state"] == "refused" and record["notified"] == dict.fromkeys(("TEAM", "HANGS", "BROKEN"), "refused")
    assert [w.split()[3] for w in record["warnings"]] == ["$HANGS", "$BROKEN"]
    assert "$HANGS was not sent" in done.stderr and SECRET not in done.stderr + json.dumps(record)
    assert (project.home / "nights" / record["id"] / "report.html").exists()

    project.run("run", str(project.config), "--set", "data.source=/nowhere.csv", code=2)
    assert "/nowhere.csv" in hooks.at("json")[1]["message"]


@pytest.mark.slow
def test_a_promoted_night_is_told(project, hooks):
    """The whole night, beside a hanging and a broken server: exit 0, promoted, told once."""
    assert project.facts("run", str(project.config))["state"] == "promoted"
    assert project.facts("run", str(project.config))["state"] == "skipped"
    (body,) = hooks.at("json")
    assert body["title"] == "tiny promoted: Version 1 is the first champion" and "macro_f1" in body["message"]


def test_the_test_command(project, hooks):
    """`overnight notify CONFIG --test`: a message each, exit 4 when one does not arrive; without, what is set."""
    found = project.facts("notify", str(project.config), "--test", code=4)
    assert {row["to_env"]: row["state"] == "arrived" for row in found} == {
        "TEAM": True,
        "HANGS": False,
        "BROKEN": False,
    }
    assert hooks.at("json")[0]["title"] == "tiny: a test"
    project.run("notify", str(project.config), "--test", "--set", "notify=[{to_env: TEAM}]")
    del project.environment["BROKEN"]
    states = {row["to_env"]: row["state"] for row in project.facts("notify", str(project.config))}
    assert states == {"TEAM": "set", "HANGS": "set", "BROKEN": "the variable is not set"}
    assert len(hooks.at("json")) == 2
