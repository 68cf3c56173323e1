"""MLflow's own server over real HTTP, in this process, that can be away and come back.

with MlflowServer(folder) as server:
    Tracker.start(server.uri, ...)
    server.mood = "away"
"""

import logging
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

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
