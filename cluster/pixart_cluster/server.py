"""MLflow's own server for one person, on a run's folder.

It listens on 127.0.0.1 alone and asks nobody who they are; a team starts its server as the README
says.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pixart_platform.errors import PixartError
from pixart_platform.tracking import sqlite_uri

HOST = "127.0.0.1"
_START_SECONDS, _STOP_SECONDS = 120.0, 10.0
_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


class ServerError(PixartError):
    """MLflow's server could not be started."""


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """MLflow on ``folder``, for the block; its address. Raises ServerError."""
    check_port(port)
    log, address = folder / "logs" / "mlflow.log", f"http://{HOST}:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                sys.executable, "-m", "mlflow", "server",
                "--backend-store-uri", sqlite_uri(folder),
                "--artifacts-destination", (folder / "artifacts").as_uri(),
                "--host", HOST, "--port", str(port), "--workers", "1",
                "--allowed-hosts", f"localhost:{port},{HOST}:{port}",
            ],
            stdout=output, stderr=subprocess.STDOUT, env=os.environ | _ENVIRONMENT,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_for_answer(f"{address}/health", server, log, "MLflow")
        yield address
    finally:
        stop_session(server)


def check_port(port: int, option: str = "--port") -> None:
    """Raise ServerError unless we could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ServerError(
                f"{option} {port}: cannot listen on {HOST}:{port} ({error.strerror}); stop what "
                f"does, or choose another"
            ) from error


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_answer(url: str, server: "subprocess.Popen[bytes]", log: Path, name: str) -> None:
    """Raise ServerError if a server has ended, or says nothing for two minutes."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError:  # it wants to know who asks
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    last = log.read_text(errors="replace").rstrip().rpartition("\n")[2].strip()
    raise ServerError(f"{name} did not start on {url} ({last or 'it said nothing'}); see {log}")


def stop_session(server: "subprocess.Popen[bytes]") -> None:
    """End it with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(_STOP_SECONDS)
