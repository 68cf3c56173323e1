"""The ballot: a page on this machine alone that shows a poll's pairs, one after another.

One file, whose style and script the page's policy names by their hashes: nothing else runs, and
nothing is asked of another origin. What is sent names no version, in no address and no header.
Only this machine's browser may ask, and only this page may post.
"""

import asyncio
import base64
import hashlib
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any, Protocol, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException

from pixart_platform.errors import PixartError
from pixart_serve.contract import ApiError
from pixart_serve.stream import read_body

_HOST = "127.0.0.1"
_OURS = (_HOST, "localhost")
_MAX_BODY = 1 << 14
_UNAVAILABLE = 503


class BallotError(PixartError):
    """A page that cannot be shown."""


class Booth(Protocol):
    """What there is to vote on.

    Raises PixartError, whose ``status``, where it has one, is HTTP's word for it.
    """

    def ballot(self, voter: str) -> dict[str, Any]: ...
    def picture(self, voter: str, pair: str, side: str) -> bytes: ...
    def vote(self, voter: str, pair: str, choice: str, reason: str = "") -> None: ...
    def undo(self, voter: str) -> None: ...


class _Undo(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    voter: str


class _Vote(_Undo):
    pair: str
    choice: str
    reason: str = ""


_Told = TypeVar("_Told", bound=_Undo)


def build_ballot(booth: Booth, voter: str) -> FastAPI:
    """The page and what it asks; ``voter`` is who votes unless the page's address says another."""
    app = FastAPI(openapi_url=None)
    page = files("pixart_serve").joinpath("ballot.html").read_text(encoding="utf-8")
    headers = _headers(page)

    async def send_page() -> Response:
        return Response(page, media_type="text/html")

    async def send_ballot(request: Request) -> JSONResponse:
        who = request.query_params.get("voter") or voter
        return JSONResponse(await _ask(booth.ballot, who))

    async def send_picture(request: Request, pair: str, side: str) -> Response:
        who = request.query_params.get("voter") or voter
        return Response(await _ask(booth.picture, who, pair, side), media_type="image/png")

    async def vote(request: Request) -> JSONResponse:
        told = await _read(request, _Vote)
        await _ask(booth.vote, told.voter, told.pair, told.choice, told.reason)
        return JSONResponse(await _ask(booth.ballot, told.voter))

    async def undo(request: Request) -> JSONResponse:
        told = await _read(request, _Undo)
        await _ask(booth.undo, told.voter)
        return JSONResponse(await _ask(booth.ballot, told.voter))

    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        fault = _find_fault(request)
        response = await _answer(request, fault) if fault else await call_next(request)
        response.headers.update(headers)
        return response

    app.add_api_route("/", send_page, methods=["GET"])
    app.add_api_route("/ballot", send_ballot, methods=["GET"])
    app.add_api_route("/pictures/{pair}/{side}", send_picture, methods=["GET"])
    app.add_api_route("/votes", vote, methods=["POST"])
    app.add_api_route("/undo", undo, methods=["POST"])
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.middleware("http")(guard)
    return app


def _headers(page: str) -> dict[str, str]:
    def hashes(tag: str) -> str:
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        digest = hashlib.sha256(content.encode()).digest()
        return f"'sha256-{base64.b64encode(digest).decode()}'"

    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
            "img-src 'self' data:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
            "frame-ancestors 'none'; require-trusted-types-for 'script'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _find_fault(request: Request) -> ApiError | None:
    """Whoever else's page may ask a loopback address, by another name of it or from elsewhere."""
    host = request.headers.get("host", "")
    if not re.fullmatch(rf"({'|'.join(map(re.escape, _OURS))})(:\d+)?", host):
        return ApiError(403, f"host {host[:80]!r}: this page is for {' and '.join(_OURS)} alone")
    if request.method != "POST":
        return None
    origin = request.headers.get("origin", f"http://{host}")
    site = request.headers.get("sec-fetch-site", "same-origin")
    if origin != f"http://{host}" or site != "same-origin":
        return ApiError(403, f"origin {origin[:80]!r}: only the page itself may vote")
    kind = request.headers.get("content-type", "")
    if kind.partition(";")[0].strip().lower() != "application/json":
        return ApiError(415, f"content-type {kind[:80]!r}: must be application/json")
    return None


async def _read(request: Request, shape: type[_Told]) -> _Told:
    try:
        return shape.model_validate_json(await read_body(request, _MAX_BODY))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "body"
        raise ApiError(400, f"{place}: {first['msg'].lower()}", param=place) from error


_Found = TypeVar("_Found")


async def _ask(what: Callable[..., _Found], *arguments: str) -> _Found:
    """Off the event loop: what there is lies on disk. Raises ApiError."""
    try:
        return await asyncio.to_thread(what, *arguments)
    except PixartError as error:
        raise ApiError(getattr(error, "status", _UNAVAILABLE), str(error)) from error


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        place = f"{request.method} {request.url.path[:200]}"
        error = ApiError(error.status_code, f"{place}: {error.detail.lower()}")
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


def claim_port(port: int) -> socket.socket:
    """Listen on a port of this machine alone; 0 is any. Raises BallotError."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((_HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise BallotError(
            f"--port {port}: cannot be listened on ({error.strerror}); stop what has it, or "
            f"choose another port, 0 for any that is free"
        ) from error
    return listener


@contextmanager
def shown(app: FastAPI, listener: socket.socket) -> Iterator[str]:
    """Serve the page for the block; yields its address."""
    server = uvicorn.Server(
        uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False,
            timeout_graceful_shutdown=3,
        )
    )  # fmt: skip
    thread = threading.Thread(target=server.run, args=([listener],), name="ballot")
    thread.start()
    try:
        yield f"http://{_HOST}:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        listener.close()
