"""MLflow's own server over real HTTP: in this process, with moods, or as a process of its own.

with MlflowServer(folder) as server:
    Tracker.start(server.uri, ...)
    server.mood = "away"
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import pytest

from pixart_cluster.server import free_port
from pixart_platform.tracking import quiet_mlflow, sqlite_uri

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

Mood = Literal["up", "away", "lost answer", "page"]


class MlflowServer:
    """Keeps everything in ``folder``.

    In its moods it hangs up on whoever calls (``away``), does the work and then hangs up (``lost
    answer``), or answers as a balancer does that has lost it (``page``).
    """

    def __init__(self, folder: Path) -> None:
        quiet_mlflow()
        from mlflow.server import app, handlers
        from werkzeug.serving import make_server

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        artifacts = (folder / "artifacts").as_uri()
        with pytest.MonkeyPatch.context() as patch:  # it would name itself to all that comes after
            patch.setenv("MLFLOW_TRACKING_URI", sqlite_uri(folder))
            handlers.initialize_backend_stores(sqlite_uri(folder), default_artifact_root=artifacts)
        self.mood: Mood = "up"
        self.calls: Counter[Mood] = Counter()
        self._app = app
        self._server = make_server("127.0.0.1", 0, self, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "MlflowServer":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        mood = self.mood
        self.calls[mood] += 1
        if mood == "page":
            start_response("200 OK", [("Content-Type", "text/html")])
            return [b"<html>We will be back soon.</html>"]
        answer = [] if mood == "away" else list(self._app(environ, start_response))
        if mood != "up":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError("on purpose")
        return answer


class ServerProcess:
    """MLflow's own server, which can be killed and started again on the same port."""

    def __init__(self, root: Path, backend: str) -> None:
        self._root, self._backend, self._port = root, backend, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [
            str(Path(sys.executable).parent / "mlflow"), "server", "--host", "127.0.0.1",
            "--port", str(self._port), "--backend-store-uri", self._backend, "--workers", "1",
            "--default-artifact-root", (self._root / "artifacts").as_uri(),
        ]  # fmt: skip
        with (self._root / "server.log").open("a") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            )  # fmt: skip
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except OSError:
                time.sleep(0.3)
        raise SystemExit((self._root / "server.log").read_text()[-2000:])

    def kill(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
