"""The shared installation: its files are what they should be, and nights run on the very servers they describe."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import SECRET, Command, Hooks, Project, make_rows
from installation import COMPOSE, ROOT, SERVICES, Installation, forget_tools, postgres_tools, tool, variables

from overnight.cli import run
from overnight.stack import PASSWORDS, SETTINGS, write_passwords


def slow(test):
    """Servers start within minutes on a small machine that is busy."""
    return pytest.mark.slow(pytest.mark.timeout(5400)(test))


# -- the files ---------------------------------------------------------------------------------------------------------


def test_compose_files_follow_the_specification():
    """The schema of the Compose specification, as check-jsonschema ships it."""
    files = [str(path) for path in sorted((ROOT / "docker").glob("compose*.yaml"))]
    assert len(files) >= 2
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_containers_are_hardened():
    """compose-lint: nothing but what is left to whoever installs: digests, and how many cores a machine has."""
    command = [sys.executable, "-m", "compose_lint", "check", str(COMPOSE), "--format", "json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)
    assert not found["errors"]
    left = {"CL-0019": "a digest", "CL-0026": "no CPU limit"}
    others = [f for f in found["findings"] if left.get(f["rule_id"], "none such") not in f["message"]]
    assert not others
    for name, service in SERVICES.items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["mem_limit"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        assert "healthcheck" in service or service["restart"] == "no", name
        assert re.search(r":\d+\.\d+", service["image"]), f"{name}: pinned by version"


def test_dockerfile_is_clean():
    """hadolint has nothing to say, not even in passing."""
    done = subprocess.run([tool("hadolint"), str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_a_cpu_image_has_the_versions_of_the_lock():
    """PyTorch's index has other files than PyPI: its hashes are taken out, its version and all the others stay."""
    program = re.search(r"awk '(.+?)'", (ROOT / "docker" / "Dockerfile").read_text())[1]
    lock = ROOT / "requirements.lock"
    kept = subprocess.run(["awk", program, str(lock)], capture_output=True, text=True, check=True).stdout
    before, after = (re.split(r"^(?=[a-z0-9])", text, flags=re.M)[1:] for text in (lock.read_text(), kept))
    changed = [(was, now) for was, now in zip(before, after, strict=True) if was != now]
    assert len(changed) == 1
    was, now = changed[0]
    assert was.startswith("torch==") and "--hash" in was and "--hash" not in now
    assert now.splitlines()[0] == was.splitlines()[0].rstrip(" \\")


def test_every_password_is_made_and_none_has_a_default():
    """Compose refuses to start without just the variables that init-stack writes; the others are told in the file."""
    text = COMPOSE.read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == set(PASSWORDS)
    optional = set(re.findall(r"\$\{(\w+):-", text))
    assert not optional & required and not re.search(r"\$\w", text) and not re.search(r"\$\{\w+\}", text)
    assert optional == set(re.findall(r"^#(\w+)=", SETTINGS, re.M))


def test_init_stack(tmp_path, capsys):
    """Random, long, for the owner's eyes alone, shown to nobody, and never written over."""
    out = tmp_path / ".env"
    assert run(["init-stack", "--out", str(out)]) == 0
    first = variables(out)
    assert set(first) == set(PASSWORDS) and len(set(first.values())) == len(first)
    assert all(re.fullmatch(r"(admin:)?[0-9a-f]{48}", value) for value in first.values())
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run(["init-stack", "--out", str(out)]) == 2
    assert variables(out) == first
    assert run(["init-stack", "--out", str(out), "--force"]) == 0
    assert not set(variables(out).values()) & set(first.values()) and stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run(["init-stack", "--out", str(tmp_path / "nowhere" / ".env")]) == 2
    said = "".join(capsys.readouterr())
    assert not [value for value in first.values() if value.partition(":")[2] in said and value in said]
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


# -- the installation --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def disks():
    """Not below pytest's own folder, which only root may enter when root runs the tests."""
    place = Path(tempfile.mkdtemp(prefix="stack-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place, ignore_errors=True)
    forget_tools()


@pytest.fixture(scope="module")
def team():
    """Who is told how nights ended."""
    server = Hooks()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def env(disks, team) -> Path:
    """`overnight init-stack`, and what a person adds."""
    write_passwords(disks / ".env")
    with open(disks / ".env", "a") as file:
        file.write("OVERNIGHT_SERVE=worked\nOVERNIGHT_LOG_SCORES=true\n")
    (disks / "worker.env").write_text(f"TEAM={team.address('json')}\n")
    return disks / ".env"


@pytest.fixture(scope="module")
def installation(disks, env):
    """The first start of a shared installation."""
    (disks / "first").mkdir()
    made = Installation(disks / "first", env)
    try:
        made.start_stores()
        made.start("prefect")
        made.start("mlflow")
        yield made
    finally:
        made.stop()


class Patient(Project):
    """Servers, a night and everything else on one small machine take their time."""

    def run(self, *arguments: str, code: int = 0) -> Command:
        done = self.start(*arguments)
        assert done.wait(2400) == code, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done


def moved(project: Patient, installation: Installation) -> Patient:
    """The project of a laptop, with nothing but its environment changed."""
    given = installation.environment("worker")
    names = ("PREFECT_API_URL", "PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_URI", "OVERNIGHT_STUDY_STORAGE")
    names += ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    project.environment |= {name: given[name] for name in names} | {"PATH": given["PATH"]}
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny_model, installation) -> Patient:
    return moved(Patient(tmp_path_factory.mktemp("shared"), tiny_model, ""), installation)


@pytest.fixture(scope="module")
def first(project) -> dict:
    """The record of a night on the shared servers."""
    return project.facts("run", str(project.config))


@slow
def test_a_night_runs_on_shared_servers(project, first, installation):
    """Promoted; runs, versions, artifacts, studies and task runs are on the servers, none of them under the home."""
    import boto3
    import optuna

    assert first["state"] == "promoted" and project.champion() == 1
    for embedded in ("mlflow/mlflow.db", "mlflow/artifacts/tiny", "optuna", "prefect"):
        assert not (project.home / embedded).exists(), embedded
    given = installation.environment("backup")
    s3 = boto3.client(
        "s3",
        endpoint_url=given["MLFLOW_S3_ENDPOINT_URL"],
        aws_access_key_id=given["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=given["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    keys = [found["Key"] for found in s3.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert any(key.endswith("artifacts/model/model.safetensors") for key in keys)
    assert any(key.endswith("report/report.html") for key in keys)
    assert optuna.get_all_study_names(given["OVERNIGHT_STUDY_STORAGE"]) == [first["id"]]
    assert tasks(installation) >= 12


def tasks(installation: Installation) -> int:
    """Number of task runs that Prefect has recorded as completed."""
    user = installation.secrets["PREFECT_AUTH_STRING"]
    wanted = {"state": {"type": {"any_": ["COMPLETED"]}}}
    status, body = installation.ask("prefect", "/api/task_runs/count", user, task_runs=wanted)
    assert status == 200
    return int(body)


@slow
def test_champions_move_on_shared_servers(project, first):
    """Promoted by hand, rolled back, both in the ledger that MLflow keeps."""
    project.run("run", str(project.config), "--force")
    if project.champion() == 1:
        project.run("promote", "tiny", "2", "--reason", "support asked for it")
    assert project.champion() == 2
    project.run("rollback", "tiny", "--reason", "it was a mistake")
    assert project.champion() == 1
    assert project.facts("history", "tiny")[-1]["reason"] == "it was a mistake"
    shutil.rmtree(project.home / "ledger")  # the home's copy: a second machine has none
    assert [entry["action"] for entry in project.facts("history", "tiny")][-1] == "rollback"


@slow
def test_nobody_gets_in_without_a_password(installation):
    """Health is open; everything else asks, and MLflow answers to its own names alone. Databases are kept apart."""
    admin = f"admin:{installation.secrets['MLFLOW_ADMIN_PASSWORD']}"
    search = "/api/2.0/mlflow/registered-models/search"
    for user in (None, "admin:password", "admin:password1234"):
        assert installation.ask("mlflow", search, user)[0] == 401
        assert installation.ask("prefect", "/api/flows/count", user, limit=1)[0] == 401
    assert installation.ask("mlflow", search, admin)[0] == 200
    assert installation.ask("mlflow", search, admin, host="evil.example")[0] == 403
    assert installation.ask("mlflow", search, admin, host=f"localhost:{installation.ports['mlflow']}")[0] == 200
    assert installation.ask("s3", "/mlflow")[0] == 403
    given = installation.environment("mlflow")
    for change, said in (({"PGDATABASE": "prefect"}, "permission denied"), ({"PGPASSWORD": "x"}, "authentication")):
        query = [Path(postgres_tools()) / "psql", "--command=select 1"]
        done = subprocess.run(query, env=given | {"PGDATABASE": "mlflow"} | change, capture_output=True, text=True)
        assert done.returncode and said in done.stderr


@pytest.fixture(scope="module")
def reader(installation) -> str:
    """The account of the service, made by the command of docs/operations.md."""
    admin = f"admin:{installation.secrets['MLFLOW_ADMIN_PASSWORD']}"
    account = {"username": "service", "password": installation.secrets["MLFLOW_SERVICE_PASSWORD"]}
    assert installation.ask("mlflow", "/api/2.0/mlflow/users/create", admin, **account)[0] == 200
    given = installation.environment("service")
    return f"{given['MLFLOW_TRACKING_USERNAME']}:{given['MLFLOW_TRACKING_PASSWORD']}"


@slow
def test_the_service_only_reads(first, installation, reader):
    """It sees the champion and cannot move it."""
    alias = "/api/2.0/mlflow/registered-models/alias"
    assert installation.ask("mlflow", f"{alias}?name=tiny&alias=champion", reader)[0] == 200
    moved = {"name": "tiny", "alias": "champion", "version": "2"}
    assert installation.ask("mlflow", alias, reader, **moved)[0] == 403


@slow
def test_who_was_granted_a_model_may_move_its_champion(project, first, installation):
    """A person's account, made and granted by the commands of docs/operations.md: not before, and then by name."""
    admin = f"admin:{installation.secrets['MLFLOW_ADMIN_PASSWORD']}"
    account = {"username": "ana", "password": "correct-horse-battery"}
    assert installation.ask("mlflow", "/api/2.0/mlflow/users/create", admin, **account)[0] == 200
    before = dict(project.environment)
    project.environment |= {"MLFLOW_TRACKING_USERNAME": "ana", "MLFLOW_TRACKING_PASSWORD": account["password"]}
    try:
        assert "ermission denied" in project.run("promote", "tiny", "2", "--reason", "mine", code=4).stderr
        grant = {"username": "ana", "resource_type": "registered_model", "resource_id": "tiny", "permission": "EDIT"}
        assert installation.ask("mlflow", "/api/3.0/mlflow/users/permissions/grant", admin, **grant)[0] == 200
        project.run("promote", "tiny", "2", "--reason", "mine")
        project.run("rollback", "tiny", "--reason", "not mine")
        assert project.champion() == 1
    finally:
        project.environment = before


@pytest.fixture(scope="module")
def worker(installation, tiny_model) -> Path:
    """The worker, with a config of its own deployed; the folder of its home."""
    project = Project(installation.app, tiny_model, "")
    facts = yaml.safe_load(project.config.read_text())
    facts |= {"name": "worked", "schedule": {"cron": "0 2 * * *"}, "notify": [{"to_env": "TEAM"}]}
    facts |= {"monitor": {"window": 20}, "search": {"trials": 1}}
    (installation.app / "configs").mkdir()
    (installation.app / "configs" / "worked.yaml").write_text(yaml.safe_dump(facts))
    installation.start("worker")
    told = installation.facts("worker", "deploy", "--no-file")
    assert {"kind": "created", "what": "worked", "details": "0 2 * * * UTC"} in told
    assert installation.prefect("work_pools/overnight")["type"] == "process"
    return installation.volumes("worker")["/var/lib/overnight"]


def start_night(installation: Installation, **parameters: object) -> str:
    """The flow run that the worker is to run."""
    deployment = installation.prefect("deployments/name/retrain/worked")["id"]
    return installation.prefect(f"deployments/{deployment}/create_flow_run", parameters=parameters)["id"]


def end_night(installation: Installation, run: str) -> None:
    end = time.monotonic() + 1800
    while (state := installation.prefect(f"flow_runs/{run}")["state"])["type"] not in ENDS:
        assert time.monotonic() < end
        time.sleep(1)
    assert state["type"] == "COMPLETED", state["message"] + (installation.folder / "worker.log").read_text()[-3000:]


ENDS = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def champion(installation: Installation) -> int:
    versions = installation.facts("worker", "models", "worked")
    return next(version["number"] for version in versions if "champion" in version["aliases"])


@slow
def test_the_worker_runs_a_night(installation, worker, team):
    """Deployed and run as the compose file has it; the team is told, and links lead to where a browser is."""
    end_night(installation, start_night(installation))
    record = installation.facts("worker", "report")
    assert record["state"] == "promoted" and champion(installation) == 1
    (body,) = team.at("json")
    assert body["title"] == "worked promoted: Version 1 is the first champion"
    wanted = {"artifacts": {"key": {"any_": ["mlflow-version"]}}}
    (link,) = [a["data"] for a in installation.prefect("artifacts/filter", **wanted) if "worked" in a["data"]]
    assert f"(http://127.0.0.1:{installation.ports['mlflow']}/#/models/worked/versions/1)" in link


@slow
def test_prefect_is_restarted_in_the_middle_of_a_night(installation, worker):
    """The container is made anew: the night keeps its slot, and ends as it would have."""
    run = start_night(installation, force=True, overrides=["training.epochs=150"])
    wait_for(lambda: len(list(worker.glob("nights/*/trials/*/metrics.jsonl"))) == 2, "a second night that trains")
    lease = installation.prefect(f"flow_runs/{run}")["state"]["state_details"]["deployment_concurrency_lease_id"]
    installation.stop("prefect")
    installation.start("prefect")
    installation.prefect(f"v2/concurrency_limits/leases/{lease}/renew", lease_duration=300)
    end_night(installation, run)
    assert installation.facts("worker", "report")["candidate"]["version"] == 2


def wait_for(done: Callable[[], bool], what: str, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@slow
def test_a_day_after(installation, worker, reader):
    """Served, watched, scored, moved, cleaned: the service follows, the monitor sees what it answered."""
    installation.start("service")
    now, rows = champion(installation), make_rows(60, seed=9)

    def answered() -> dict:
        status, body = installation.ask("service", "/predict", rows=[{"text": text} for text in rows.text])
        assert status == 200, body
        return json.loads(body)

    assert answered()["version"] == now
    agree = [one["label"] == label for one, label in zip(answered()["predictions"], rows.label, strict=True)]
    assert sum(agree) > 50
    installation.start("monitor")
    seen = json.loads((worker / "monitor" / "worked" / "latest.json").read_text())
    assert seen["version"] == now and len(seen["windows"]) >= 3, "what the service answered"
    installation.stop("monitor")

    rows[["text"]].to_csv(installation.app / "new.csv", index=False)
    told = installation.facts("worker", "score", "worked", "new.csv", str(worker / "scored.csv"), "--log-scores")
    assert (told["rows"], told["errors"]) == (60, 0)
    assert len(installation.facts("worker", "monitor", "worked")["windows"]) >= 3, "what was scored from a file"

    other = 3 - now
    installation.run("worker", "promote", "worked", str(other), "--reason", "support asked for it")
    wait_for(lambda: answered()["version"] == other, "the service follows a promotion", 120)
    installation.run("worker", "rollback", "worked", "--reason", "it was a mistake")
    wait_for(lambda: answered()["version"] == now, "the service follows a rollback", 120)
    installation.run("worker", "clean", "--apply")
    assert answered()["version"] == now
    installation.stop("service", "worker")


@slow
def test_a_bucket_is_filled_before_it_is_emptied(installation, tmp_path, monkeypatch):
    """A restore that is cut short leaves the artifacts that there were."""
    from overnight.stores import Bucket

    given = installation.environment("backup")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, given[name])
    bucket = Bucket("s3://order/below", given["MLFLOW_S3_ENDPOINT_URL"])
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
    bucket.put(tmp_path / "old")
    calls: list[str] = []
    bucket._client.meta.events.register("before-call.s3", lambda model, **_: calls.append(model.name))
    bucket.put(tmp_path / "new")
    assert list(bucket.keys()) == ["new.txt"]
    assert calls.index("PutObject") < calls.index("DeleteObject")


@slow
def test_all_disks_are_lost(project, first, installation, worker, reader, disks, env, tmp_path):
    """Backed up while servers run, restored into an empty installation: champion, history, task runs, users, all.

    Of the worker's home; the laptop keeps its own.
    """
    here, history = project.facts("history", "tiny"), installation.facts("worker", "history", "worked")
    now, backup = champion(installation), tmp_path / "backup"
    told = installation.facts("backup", "backup", str(backup))
    assert told["databases"] == ["mlflow", "optuna", "prefect"] and told["artifacts"]
    recorded = tasks(installation)
    secrets = {name: value.rpartition(":")[2] for name, value in installation.secrets.items()} | {
        "TEAM": f"json/{SECRET}"
    }
    files = {path: path.read_bytes() for path in backup.rglob("*") if path.is_file()}
    assert not [(path, name) for path, text in files.items() for name, one in secrets.items() if one.encode() in text]

    # over what is there only by force, and not while its servers hold it
    assert "--force" in installation.run("backup", "restore", str(backup), code=2).stderr
    installation.stop()
    (disks / "second").mkdir()
    second = Installation(disks / "second", env)
    try:
        second.start_stores()
        second.run("backup", "restore", str(backup))
        for name, command in UPGRADE.items():
            service = name if name in SERVICES else "worker"
            words = [second.text(service, word) for word in command]
            subprocess.run([sys.executable, "-m", *words], env=second.environment(service), check=True)
        second.start("prefect")
        second.start("mlflow")
        new = moved(project, second)
        assert new.champion() == 1 and new.facts("history", "tiny") == here
        assert new.facts("run", str(new.config))["state"] == "skipped"
        assert tasks(second) == recorded
        assert champion(second) == now and second.facts("worker", "history", "worked") == history
        assert not [f for f in second.facts("worker", "doctor") if f["state"] in ("broken", "healed")]
        second.start("service")
        answer = json.loads(second.ask("service", "/predict", rows=[{"text": "a great flight"}])[1])
        assert answer["version"] == now
        second.stop("service")
        second.run("worker", "promote", "worked", str(3 - now), "--reason", "life goes on")
        # and once more over this one, whose last promotion is gone then
        second.stop("mlflow", "prefect")
        second.run("backup", "restore", str(backup), "--force")
        second.start("mlflow")
        assert champion(second) == now and second.facts("worker", "history", "worked") == history
    finally:
        second.stop()


# docs/operations.md, "Upgrade": what migrates the databases, each in its own service
UPGRADE = {
    "mlflow": ["mlflow", "db", "upgrade", "postgresql+psycopg2:///mlflow"],
    "prefect": ["prefect", "server", "database", "upgrade", "-y"],
    "worker": [
        "optuna.cli",
        "storage",
        "upgrade",
        "--storage",
        SERVICES["worker"]["environment"]["OVERNIGHT_STUDY_STORAGE"],
    ],
}
