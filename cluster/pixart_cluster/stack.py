"""``pixart up`` and ``down``: all that a cluster has, on this machine alone, kept in one folder.

Ray with token authentication and its dashboard, MLflow on the folder's own database, and an S3
endpoint if asked for. Everything listens on 127.0.0.1. What is up is noted in the folder with the
processes it consists of, so that ``down`` finds them when whoever brought them up was killed; runs,
tables and versions stay, sockets, token and processes go.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from pixart_cluster.local import MIN_CPUS, SCRATCH_PREFIX
from pixart_cluster.server import (
    HOST,
    ServerError,
    check_port,
    free_port,
    mlflow_server,
    stop_session,
    wait_for_answer,
)  # fmt: skip
from pixart_platform.storage import write_atomic
from pixart_platform.tracking import sqlite_uri

_NOTE, _TOKEN, _ENVIRONMENT = "up.json", "ray.token", "environment.sh"
_STOP_SECONDS = 60.0
_STARTS = 3  # of Ray: its agent must be there in 20 seconds, and a port may be taken meanwhile


@dataclass(frozen=True)
class Ports:
    """Where everything listens."""

    mlflow: int = 5000
    ray: int = 6379
    dashboard: int = 8265
    s3: int = 9000


@contextmanager
def stack(root: Path, ports: Ports, *, with_s3: bool) -> Iterator[list[str]]:
    """Everything, for the block; lines that tell a person what is where. Raises ServerError."""
    if (note := root / _NOTE).exists() and _alive(json.loads(note.read_text())["processes"]):
        raise ServerError(f"{root} is up already; `pixart down --root {root}` first")
    wanted = {"--port": ports.mlflow, "--ray-port": ports.ray, "--dashboard-port": ports.dashboard}
    for option, port in (wanted | ({"--s3-port": ports.s3} if with_s3 else {})).items():
        check_port(port, option)
    root.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        running.callback(_forget, root)
        environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(root / _TOKEN),
            "MLFLOW_TRACKING_URI": sqlite_uri(root), "PIXART_RUNS": str(root),
        }  # fmt: skip
        scratch = tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-")
        running.callback(shutil.rmtree, scratch, ignore_errors=True)
        _write_note(root, scratch, [os.getpid()])
        if with_s3:
            environment |= running.enter_context(_s3_server(root, ports.s3))
        address = running.enter_context(mlflow_server(root, ports.mlflow))
        _write_secret(root / _TOKEN, secrets.token_hex(32))
        head = _start_ray(root / "logs" / "ray.log", ports, f"{scratch}/ray", environment)
        running.callback(_stop_ray, head)
        _write_note(root, scratch, [p.pid for p in [_me(), *_me().children(recursive=True)]])
        environment |= {
            "RAY_ADDRESS": f"{HOST}:{ports.ray}",
            "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{ports.dashboard}",
        }
        lines = "".join(f"export {name}={value}\n" for name, value in environment.items())
        _write_secret(root / _ENVIRONMENT, lines)
        yield [
            f"MLflow on {address}",
            f"Ray's dashboard on http://{HOST}:{ports.dashboard}, its token in {root / _TOKEN}",
            *([f"S3 on {environment['AWS_ENDPOINT_URL']}, in memory"] if with_s3 else []),
            f"in another shell: source {root / _ENVIRONMENT}",
        ]


def down(root: Path) -> bool:
    """End what is up in ``root``, also when its command was killed; whether anything was.

    Raises ServerError if something does not end.
    """
    note = root / _NOTE
    if not note.exists():
        return False
    told = json.loads(note.read_text())
    leader, known = told["processes"][:1], told["processes"]
    for process in _alive(leader):  # ends the others in order
        process.send_signal(signal.SIGTERM)
        _wait_until_gone(leader, _STOP_SECONDS)
    left = _alive(known)
    for process in [*left, *(child for p in left for child in p.children(recursive=True))]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    if stuck := _wait_until_gone(known, _STOP_SECONDS):
        raise ServerError(f"{root}: processes {[process.pid for process in stuck]} do not end")
    _forget(root)
    shutil.rmtree(told["scratch"], ignore_errors=True)
    return True


def _me() -> psutil.Process:
    return psutil.Process()


def _write_note(root: Path, scratch: str, pids: Sequence[int]) -> None:
    """The first process is the one that brings the others up."""
    known = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            known.append((pid, psutil.Process(pid).create_time()))
    write_atomic(root / _NOTE, json.dumps({"scratch": scratch, "processes": known}).encode())


def _alive(processes: Sequence[tuple[int, float]]) -> list[psutil.Process]:
    """Those of a note that still run, and are not others under the same number."""
    found = []
    for pid, created in processes:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            is_same = abs(process.create_time() - created) < 1
            if is_same and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait_until_gone(
    processes: Sequence[tuple[int, float]], seconds: float
) -> list[psutil.Process]:
    """Those that are still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while (left := _alive(processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


def _forget(root: Path) -> None:
    for name in (_NOTE, _TOKEN, _ENVIRONMENT):
        (root / name).unlink(missing_ok=True)


def _write_secret(path: Path, text: str) -> None:
    """Readable by its owner alone from the first moment."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _start_ray(
    log: Path, ports: Ports, folder: str, environment: dict[str, str]
) -> "subprocess.Popen[bytes]":
    """Ray's head, started again if it ends by itself; raises ServerError if it always does."""
    inherited = {
        name: value for name, value in os.environ.items()
        if not name.startswith("RAY_AUTH_") and name != "RAY_ADDRESS"
    }  # fmt: skip
    inherited["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # jobs' python
    log.unlink(missing_ok=True)
    for left in reversed(range(_STARTS)):
        with log.open("ab") as output:
            head = subprocess.Popen(
                [
                    Path(sys.executable).parent / "ray", "start", "--head", "--block",
                    "--node-ip-address", HOST, "--port", str(ports.ray),
                    "--include-dashboard", "true",  # or none: one that fails is left out
                    "--dashboard-host", HOST, "--dashboard-port", str(ports.dashboard),
                    # Ray's own choice is one per machine: beside another Ray, whoever submits would
                    # be told "No available agent" for ever, or the head would end.
                    "--dashboard-agent-listen-port", "0",
                    "--ray-client-server-port", str(free_port()),
                    "--num-cpus", str(max(MIN_CPUS, os.cpu_count() or 1)),
                    "--temp-dir", folder, "--disable-usage-stats",
                ],
                stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=inherited | environment,
            )  # fmt: skip
        try:
            wait_for_answer(f"http://{HOST}:{ports.dashboard}/api/version", head, log, "Ray")
        except BaseException as error:
            is_over = head.poll() is not None and isinstance(error, ServerError)
            _stop_ray(head)
            if not (left and is_over):
                raise
        else:
            break
    return head


def _stop_ray(head: "subprocess.Popen[bytes]") -> None:
    below = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    stop_session(head)
    psutil.wait_procs(below, 5)
    for process in below:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def _s3_server(root: Path, port: int) -> Iterator[dict[str, str]]:
    """moto's server, for trying ``s3://`` places out; yields what its clients need.

    Raises ServerError where it is not installed.
    """
    if not find_spec("moto"):
        raise ServerError("--s3 needs moto's server: pip install 'moto[server,s3]'")
    (root / "logs").mkdir(exist_ok=True)
    log = root / "logs" / "s3.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(port)],
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        address = f"http://{HOST}:{port}"
        wait_for_answer(f"{address}/moto-api/", server, log, "S3")
        yield {
            "AWS_ENDPOINT_URL": address, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "local", "AWS_SECRET_ACCESS_KEY": "local",
        }  # fmt: skip
    finally:
        stop_session(server)
