"""What a team has, for real: PostgreSQL, and MLflow's server on it, as the README says to start it.

    with postgres() as database, team_mlflow(database, "s3://bucket", folder) as server:
        Registry(server.uri, "digits")

Both listen on 127.0.0.1 alone, are started here and are gone afterwards.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
from processes import REPOSITORY, stop_group

from pixart_cluster.server import free_port

ADMIN = "admin"
_START_SECONDS = 120.0


@dataclass(frozen=True)
class TeamServer:
    """An MLflow that asks who is there."""

    uri: str
    admin_password: str
    log: Path


@contextmanager
def postgres() -> Iterator[str]:
    """A cluster of its own; the URI of its user, without a database. Never run by root."""
    programs = _find_programs()
    user = "nobody" if os.getuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as made:
        folder, password, port = Path(made), secrets.token_hex(16), free_port()
        (folder / "password").write_text(password)
        if user:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "mlflow", "-A", "scram-sha-256",
             f"--pwfile={folder / 'password'}", "-E", "UTF8", "--no-locale", "--no-sync"],
            user=user, cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-h", "127.0.0.1", "-p", str(port),
             "-k", folder],
            user=user, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            uri = f"postgresql+psycopg2://mlflow:{password}@127.0.0.1:{port}"
            for name in ("mlflow", "auth"):
                create_database(uri, name)
            yield uri
        finally:
            server.send_signal(signal.SIGINT)  # whoever is still connected, too, must go
            server.wait(60)


def _find_programs() -> Path:
    """The folder of initdb, which Debian keeps off the path."""
    debian = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))
    if found := shutil.which("initdb") or (debian[-1] if debian else None):
        return Path(found).resolve().parent
    pytest.skip("no initdb here: apt-get install postgresql (make setup does, as root on Debian)")


def create_database(uri: str, name: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            connection = psycopg2.connect(f"{uri}/postgres".replace("+psycopg2", ""))
            break
        except psycopg2.OperationalError:
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.1)
    connection.autocommit = True
    connection.cursor().execute(f"CREATE DATABASE {name}")
    connection.close()


def readme_command() -> str:
    """How the README starts a team's server."""
    blocks = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
    (found,) = (str(block) for block in blocks if "mlflow server" in block)
    return found


@contextmanager
def team_mlflow(database: str, artifacts: str, folder: Path) -> Iterator[TeamServer]:
    """The README's server on this machine: its artifacts, address and names are replaced."""
    port, password = free_port(), secrets.token_hex(16)
    command = readme_command()
    for theirs, ours in {
        "s3://models/mlflow": artifacts, "mlflow.example.com": f"127.0.0.1:{port}",
        "--host 0.0.0.0": "--host 127.0.0.1", "--port 5000": f"--port {port}",
        "--workers 4": "--workers 1",
    }.items():  # fmt: skip
        assert theirs in command, f"the README does not say {theirs}"
        command = command.replace(theirs, ours)
    (folder / "auth.ini").write_text(
        f"[mlflow]\ndefault_permission = READ\nauth_cache_ttl_seconds = 60\n"
        f"database_uri = {database}/auth\n"
    )
    secret = {
        "MLFLOW_BACKEND_STORE_URI": f"{database}/mlflow",
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN,
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
    }
    log, path = folder / "mlflow.log", f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with ExitStack() as stack:
        process = subprocess.Popen(
            ["bash", "-ec", command], cwd=folder, env=os.environ | secret | {"PATH": path},
            stdout=stack.enter_context(log.open("wb")), stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        stack.callback(stop_group, process)
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield TeamServer(f"http://127.0.0.1:{port}", password, log)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: int = answer.status
            return found == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False
