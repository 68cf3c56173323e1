"""The HTTP side: OpenAI's Images API over a DrawingService, as the official client speaks it.

Bodies are read and judged here rather than by FastAPI, so that their size is bounded while they
arrive and every refusal has OpenAI's shape, with 400 where FastAPI would say 422.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixart_serve.access import logged, note
from pixart_serve.contract import ApiError
from pixart_serve.docs_page import add_docs
from pixart_serve.engine import Drawing, Preview
from pixart_serve.jobs import ImageJobs, add_jobs
from pixart_serve.keys import LIVENESS
from pixart_serve.observer import NOBODY, Observer
from pixart_serve.orders import Order, OrderDesk, translate, translated
from pixart_serve.service import DrawingService, ServedModel
from pixart_serve.settings import ServeSettings
from pixart_serve.stream import EventStream, read_body, wait_for_disconnect
from pixart_serve.studio import add_studio
from pixart_serve.usage import Accounts

_LOG = logging.getLogger(__name__)


def build_api(
    service: DrawingService,
    settings: ServeSettings,
    *,
    default_steps: int,
    default_guidance: float,
    default_guidance_rescale: float = 0.0,
    behind_serve: bool = False,
    observer: Observer = NOBODY,
    accounts: Accounts | None = None,
    knows_key: Callable[[str], bool] | None = None,
) -> FastAPI:
    """The application. ``behind_serve``: Ray Serve's proxy already answers with x-request-id.

    ``accounts`` pay for jobs; with ``knows_key`` those of other keys fail. Raises FilterError, and
    StorageError for a place of jobs that is none.
    """
    desk = OrderDesk(
        service, settings, default_steps=default_steps, default_guidance=default_guidance,
        default_guidance_rescale=default_guidance_rescale, observer=observer,
    )  # fmt: skip
    generator = _Generator(service, settings, desk)
    jobs = ImageJobs(service, desk, settings, accounts, knows_key)
    app = FastAPI(openapi_url=None, lifespan=jobs.running)

    async def generate(request: Request) -> Response:
        return await generator.generate(request)

    def describe(served: ServedModel) -> dict[str, Any]:
        return _describe(served) | desk.describe(served)

    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(_served(service))]}

    async def get_model(model: str) -> dict[str, Any]:
        with translated():
            return describe(await service.find(model))

    async def check_health() -> JSONResponse:
        if not service.is_healthy():
            raise ApiError(503, "the drawing engine is stuck", code="unhealthy")
        served = _served(service)
        return JSONResponse({"status": "ok", "model": served.name, "version": served.version})

    app.add_api_route("/v1/images/generations", generate, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", get_model, methods=["GET"])
    app.add_api_route(LIVENESS, check_health, methods=["GET"])
    add_jobs(app, jobs, settings)
    add_docs(app)
    add_studio(app)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_middleware(_Boundary, sends_request_id=not behind_serve, observer=observer)
    return app


class _Generator:
    """What ``POST /v1/images/generations`` does: take the order, draw, hand over."""

    def __init__(self, service: DrawingService, settings: ServeSettings, desk: OrderDesk) -> None:
        self._service, self._settings, self._desk = service, settings, desk

    async def generate(self, request: Request) -> Response:
        order = await self._desk.take(await read_body(request, self._settings.max_body_bytes))
        if order.asked.stream:
            return self._stream(order)
        drawings = await self._draw(request, order)
        return JSONResponse(
            {
                "created": int(time.time()),
                "data": [await asyncio.to_thread(order.entry, d) for d in drawings],
                "usage": order.usage,
                **order.about,
            }
        )

    async def _draw(self, request: Request, order: Order) -> list[Drawing]:
        """Draw, unless the client leaves first: then its rows are dropped at the next step."""
        drawing = asyncio.ensure_future(
            self._service.draw(order.wanted, order.served, max_seconds=order.max_seconds)
        )
        leaving = asyncio.ensure_future(wait_for_disconnect(request.receive))
        try:
            await asyncio.wait(
                {drawing, leaving}, timeout=order.patience_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )  # fmt: skip
            if leaving.done() and not drawing.done():
                raise ApiError(499, "the client went away")
            with translated():
                if not drawing.done():
                    raise TimeoutError
                return drawing.result()
        finally:
            drawing.cancel()
            leaving.cancel()

    def _stream(self, order: Order) -> EventStream:
        def submit(on_preview: Callable[[Preview], None]) -> asyncio.Future[Drawing]:
            with translated():
                return self._service.submit(
                    order.wanted, order.served, max_seconds=order.max_seconds, on_preview=on_preview
                )[0]

        return EventStream(
            submit, order.event, _explain,
            max_seconds=order.patience_seconds, heartbeat_seconds=self._settings.heartbeat_seconds,
        )  # fmt: skip


def _served(service: DrawingService) -> ServedModel:
    with translated():
        return service.served()


def _describe(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.loaded_at,
        "owned_by": "pixart-ray",
        "alias": served.alias,
        "version": served.version,
    }


def _explain(error: Exception) -> ApiError:
    """What a stream that has begun says of a failure."""
    answer = translate(error)
    note(reason=answer.reason)
    return answer


async def _answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}"
        answer = ApiError(error.status_code, message)
        note(reason=answer.reason)
        return JSONResponse(answer.body, error.status_code, headers=dict(error.headers or {}))
    assert isinstance(error, ApiError)
    note(reason=error.reason)
    return JSONResponse(error.body, error.status, headers=error.headers)


class _Boundary:
    """Outermost: x-request-id on every answer, an answer to every fault of ours, and the log."""

    def __init__(self, app: ASGIApp, sends_request_id: bool, observer: Observer) -> None:
        self._app, self._sends_request_id, self._observer = app, sends_request_id, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        valid = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        request_id = given if valid else f"req_{secrets.token_hex(12)}"
        with logged(scope, request_id, self._observer):
            await self._call(scope, receive, send, request_id)

    async def _call(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                note(status=message["status"])
                if self._sends_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            _LOG.exception("request %s failed", request_id)
            if started:
                raise
            failure = ApiError(500, "an internal error; its request id is in the log")
            note(reason=failure.reason)
            answer = JSONResponse(failure.body, failure.status, headers=failure.headers)
            await answer(scope, receive, send_with_id)
