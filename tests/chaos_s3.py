"""An S3 server to test against: moto over real HTTP, with S3's bad days at a share of its calls.

    with ChaosS3(share=0.1, seed=3) as server, endpoint(server.uri):
        make_bucket("b").write("name", b"data")

The faults, each drawn from a seeded generator: an internal error, a request to slow down, a
connection held and then hung up, one cut in the middle of an upload or of a download, an answer
that is lost after the work was done, and on a conditional put a conflict. Which call draws which
depends on the order in which calls arrive; the share does not. All servers of a process show the
same buckets, so what was written through a bad one can be checked through a good one. moto looks
and then writes, so its calls are taken one at a time: conditional puts are as atomic as S3's.
"""

import io
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import boto3
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from pixart_platform import object_store
from pixart_platform.object_store import S3Folder

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

STATUS_OF = {
    "InternalError": "500 Internal Server Error",
    "SlowDown": "503 Slow Down",
    "ConditionalRequestConflict": "409 Conflict",
}
BROKEN = ("stall", "torn upload", "torn download", "lost answer")
FAULTS = (*STATUS_OF, *BROKEN)  # and, where asked for, "flipped bit" of a download


class ChaosS3:
    """The server; ``calls`` counts what it was asked by method, ``faults`` what went wrong.

    A stall takes one of ``stall_seconds``; above 60 it outlasts the client's patience.
    """

    def __init__(
        self,
        share: float = 0.0,
        seed: int = 0,
        kinds: Iterable[str] = FAULTS,
        *,
        stall_seconds: Sequence[float] = (2.0,),
    ) -> None:
        self.share, self.kinds, self.stall_seconds = share, tuple(kinds), stall_seconds
        self.calls: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.sent_bytes = 0  # in answers
        self._random = random.Random(seed)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> "ChaosS3":
        self._server = make_server(
            "127.0.0.1", 0, self, threaded=True, request_handler=_QuietHandler
        )
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
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

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        fault = self._draw(environ)
        sent = int(environ.get("CONTENT_LENGTH") or 0)
        if fault == "torn upload":
            environ["wsgi.input"].read(sent // 2)
            _hang_up(environ)
        body = environ["wsgi.input"].read(sent)
        if fault == "stall":
            time.sleep(self._random.choice(self.stall_seconds))
            _hang_up(environ)
        if fault in STATUS_OF:
            text = f"<Error><Code>{fault}</Code><Message>Try again.</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))]
            start_response(STATUS_OF[fault], headers)
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [text]
        answer = self._ask_moto(environ | {"wsgi.input": io.BytesIO(body)}, start_response)
        if fault == "lost answer":
            _hang_up(environ)
        self.sent_bytes += len(answer) // (2 if fault == "torn download" else 1)
        if fault == "torn download":
            return _tear(environ, answer)
        if fault == "flipped bit":
            answer = answer[:-1] + bytes([answer[-1] ^ 1])
        return [answer]

    def _draw(self, environ: "WSGIEnvironment") -> str:
        """The fault of this call, or an empty string."""
        method = environ["REQUEST_METHOD"]
        self.calls[method] += 1
        impossible = {
            "torn download": method != "GET",
            "flipped bit": method != "GET",
            "torn upload": not int(environ.get("CONTENT_LENGTH") or 0),
            "ConditionalRequestConflict": "HTTP_IF_NONE_MATCH" not in environ,
        }
        possible = [kind for kind in self.kinds if not impossible.get(kind)]
        if not possible or self._random.random() >= self.share:
            return ""
        fault = self._random.choice(possible)
        self.faults[fault] += 1
        return fault

    def _ask_moto(self, environ: dict[str, Any], start_response: "StartResponse") -> bytes:
        with self._one_at_a_time:
            return b"".join(self._moto(environ, start_response))


def _hang_up(environ: "WSGIEnvironment") -> NoReturn:
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionAbortedError("on purpose")


def _tear(environ: "WSGIEnvironment", answer: bytes) -> Iterator[bytes]:
    yield answer[: len(answer) // 2]
    _hang_up(environ)


class _QuietHandler(MotoRequestHandler):  # type: ignore[misc]  # moto has no types
    def log(self, type: str, message: str, *args: object) -> None:
        """Tell nobody of every request."""


CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@contextmanager
def endpoint(uri: str) -> Iterator[None]:
    """This process, and those it starts, speak to the server at ``uri``."""
    wanted = CREDENTIALS | {"AWS_ENDPOINT_URL": uri}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    object_store._make_client.cache_clear()
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        object_store._make_client.cache_clear()


def make_bucket(name: str) -> S3Folder:
    """A new bucket at the present endpoint."""
    boto3.Session().client("s3").create_bucket(Bucket=name)
    return S3Folder(name, "")
