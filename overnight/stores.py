"""The databases and the bucket behind shared servers: dumped, loaded, copied.

Databases by PostgreSQL's own pg_dump and psql, artifacts through S3. No password is ever an argument of a
command, where every user of the machine could read it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from overnight.errors import Complaint, NightFailed, UserError
from overnight.home import redact

IGNORED_OWNERS = ("--no-owner", "--no-privileges")
PSQL = ("psql", "--no-psqlrc", "--quiet", "--tuples-only", "--no-align")
# a server that still runs holds locks; better a clear end than waiting for ever
LOCKS = "-c lock_timeout=20s"


class Database:
    """A PostgreSQL database.

    Args:
        url: as SQLAlchemy reads it, `postgresql+driver://user:password@host:port/name`; what it leaves out comes from
            libpq's own variables (PGHOST, PGPASSWORD, …).
    """

    def __init__(self, url: str):
        self.url = url

    @property
    def where(self) -> str:
        return redact(self.url)

    def dump(self, path: Path) -> None:
        """Writes one consistent snapshot as SQL; the server may run.

        Raises:
            UserError: pg_dump is not installed.
            NightFailed: it failed, with its last line.
        """
        self._run("pg_dump", *IGNORED_OWNERS, "--file", str(path))

    def load(self, path: Path) -> None:
        """Makes the database what the dump holds, whatever was in it, or leaves it as it was; its servers must not run.

        Raises: as `dump`.
        """
        drop = "--command=DROP OWNED BY CURRENT_USER"
        self._run(*PSQL, "--set=ON_ERROR_STOP=1", "--single-transaction", drop, "--file", str(path))

    def empty(self) -> bool:
        """Whether it holds no table."""
        query = "select count(*) from pg_tables where schemaname not in ('pg_catalog', 'information_schema')"
        return int(self._run(*PSQL, f"--command={query}")) == 0

    def _environment(self) -> dict[str, str]:
        from sqlalchemy.engine import make_url

        url = make_url(self.url)
        host = url.query.get("host")  # a socket's folder
        facts = {
            "PGHOST": url.host or (host if isinstance(host, str) else None),
            "PGPORT": url.port,
            "PGUSER": url.username,
            "PGPASSWORD": url.password,
            "PGDATABASE": url.database,
        }
        return {name: str(value) for name, value in facts.items() if value is not None}

    def _run(self, tool: str, *arguments: str) -> str:
        environment = os.environ | {"PGCONNECT_TIMEOUT": "10", "PGOPTIONS": LOCKS} | self._environment()
        try:
            done = subprocess.run([tool, *arguments], env=environment, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            rule = "is not installed; it comes with PostgreSQL's client, of the server's version or newer"
            raise UserError(Complaint(tool, rule)) from None
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise NightFailed(Complaint(self.where, f"{tool} failed", " ".join(said[:2])))
        return done.stdout.strip()


class Bucket:
    """The objects below an address, as `s3://bucket/prefix`; keys as boto3 finds them (AWS_ACCESS_KEY_ID, …).

    Args:
        endpoint: address of a store that is not Amazon's.

    Raises:
        UserError: boto3 is not installed.
    """

    def __init__(self, address: str, endpoint: str | None):
        try:
            import boto3
        except ImportError:
            raise UserError(
                Complaint("boto3", "is not installed; `pip install 'overnight[server]'` brings it")
            ) from None
        parts = urlsplit(address)
        self.where, self._name, self._prefix = address, parts.netloc, parts.path.strip("/")
        self._client: Any = boto3.client("s3", endpoint_url=endpoint)

    def keys(self) -> Iterator[str]:
        """Keys below the prefix, without it; none when there is no bucket yet.

        Raises:
            NightFailed: the store does not answer, or refuses us.
        """
        from botocore.exceptions import BotoCoreError, ClientError

        start = f"{self._prefix}/" if self._prefix else ""
        try:
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=start):
                for found in page.get("Contents", ()):
                    if not found["Key"].endswith("/"):  # what browsers of a store make of a folder
                        yield found["Key"][len(start) :]
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchBucket":
                raise self._failed(error) from None
        except BotoCoreError as error:
            raise self._failed(error) from None

    def fetch(self, folder: Path) -> None:
        """Copies all objects into the folder, keys as paths.

        Raises: as `keys`; NightFailed too for a key that would leave the folder.
        """
        for key in self.keys():
            if ".." in PurePosixPath(key).parts or key.startswith("/"):
                raise NightFailed(Complaint(self.where, "a key that is no path below it", key))
            path = folder / key
            path.parent.mkdir(parents=True, exist_ok=True)
            self._do(self._client.download_file, self._name, self._full(key), str(path))

    def put(self, folder: Path) -> None:
        """Makes the bucket, when missing, hold the folder's files and nothing else.

        Raises: as `keys`.
        """
        from botocore.exceptions import ClientError

        try:
            self._client.head_bucket(Bucket=self._name)
        except ClientError:
            self._do(self._client.create_bucket, Bucket=self._name)
        wanted = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        # nothing is deleted before all is there
        for key, path in wanted.items():
            self._do(self._client.upload_file, str(path), self._name, self._full(key))
        for key in [key for key in self.keys() if key not in wanted]:
            self._do(self._client.delete_object, Bucket=self._name, Key=self._full(key))

    def _full(self, key: str) -> str:
        return f"{self._prefix}/{key}" if self._prefix else key

    def _do(self, call: Any, *arguments: Any, **named: Any) -> None:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            call(*arguments, **named)
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> NightFailed:
        return NightFailed(
            Complaint(self.where, "the store of artifacts cannot be used now", str(error).splitlines()[0])
        )
