"""The HTTP side: OpenAI's Images API over a DrawingService, as the official client speaks it.

Bodies are read and judged here rather than by FastAPI, so that their size is bounded while they
arrive and every refusal has OpenAI's shape, with 400 where FastAPI would say 422.
"""

import asyncio
import base64
import logging
import secrets
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pixart_models.config import ModelInputError
from pixart_serve.contract import ApiError, GenerationRequest, encode_picture, parse_generation
from pixart_serve.engine import Drawing, DrawRequest, EngineError, NotReady, QueueFull
from pixart_serve.service import DrawingService, ServedModel
from pixart_serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)
_EFFORT = {"low": 0.5, "high": 2.0, "hd": 2.0}
_REPORTED = {"low": "low", "high": "high", "hd": "high"}
_STARTING_SECONDS = 2  # when to ask again while no version is live


def build_api(
    service: DrawingService,
    settings: ServeSettings,
    *,
    default_steps: int,
    default_guidance: float,
    behind_serve: bool = False,
) -> FastAPI:
    """The application. ``behind_serve``: Ray Serve's proxy already answers with x-request-id."""
    app = FastAPI(title="pixart-ray", docs_url=None, redoc_url=None)
    generator = _Generator(service, settings, default_steps, default_guidance)

    async def generate(request: Request) -> JSONResponse:
        return JSONResponse(await generator.generate(request))

    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(_served(service))]}

    async def get_model(model: str) -> dict[str, Any]:
        return _describe(_find_model(service, model))

    async def check_health() -> JSONResponse:
        if not service.is_healthy():
            raise ApiError(503, "the drawing engine is stuck", code="unhealthy")
        served = _served(service)
        return JSONResponse({"status": "ok", "model": served.name, "version": served.version})

    schema = {"schema": GenerationRequest.model_json_schema()}
    app.add_api_route(
        "/v1/images/generations", generate, methods=["POST"],
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": schema}}},
    )  # fmt: skip
    app.add_api_route("/v1/models", list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", get_model, methods=["GET"])
    app.add_api_route("/healthz", check_health, methods=["GET"])
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_middleware(_Boundary, sends_request_id=not behind_serve)
    return app


class _Generator:
    """What ``POST /v1/images/generations`` does: decode, check, draw, encode."""

    def __init__(
        self, service: DrawingService, settings: ServeSettings, steps: int, guidance: float
    ) -> None:
        self._service, self._settings = service, settings
        self._steps, self._guidance = steps, guidance
        # Two prompts, each byte at worst a JSON escape of six, and room for the rest.
        self._max_body_bytes = 12 * settings.max_prompt_bytes + 16_384

    async def generate(self, request: Request) -> dict[str, Any]:
        asked = parse_generation(await _read_body(request, self._max_body_bytes))
        served = _find_model(self._service, asked.model)
        width, height = self._size(asked, served)
        num_tokens = await self._count_tokens("prompt", asked.prompt, served)
        await self._count_tokens("negative_prompt", asked.negative_prompt or "", served)
        quality = self._quality(asked)
        drawings = await _draw(request, self._service, self._requests(asked, width, height))
        num_image_tokens = len(drawings) * (width // served.grid) * (height // served.grid)
        return {
            "created": int(time.time()),
            "data": [await asyncio.to_thread(_entry, asked, quality, served, d) for d in drawings],
            "size": f"{width}x{height}",
            "quality": _REPORTED.get(asked.quality or "auto", "medium"),
            "background": "opaque",
            "output_format": asked.output_format or "png",
            "usage": {
                "input_tokens": num_tokens,
                "input_tokens_details": {"image_tokens": 0, "text_tokens": num_tokens},
                "output_tokens": num_image_tokens,
                "total_tokens": num_tokens + num_image_tokens,
            },
        }

    def _size(self, asked: GenerationRequest, served: ServedModel) -> tuple[int, int]:
        """(width, height) in pixels."""
        if asked.size in (None, "auto"):
            return served.side, served.side
        grid, longest = served.grid, self._settings.max_side
        sides = str(asked.size).split("x")
        if len(sides) == 2 and all(s.isascii() and s.isdecimal() and len(s) < 6 for s in sides):
            width, height = map(int, sides)
            if all(0 < side <= longest and side % grid == 0 for side in (width, height)):
                return width, height
        raise ApiError(
            400,
            f"size = {str(asked.size)[:40]!r}: must be 'auto' or WIDTHxHEIGHT, both multiples of "
            f"{grid} from {grid} to {longest // grid * grid} pixels, as in "
            f"'{served.side}x{served.side}'",
            param="size",
        )

    async def _count_tokens(self, param: str, prompt: str, served: ServedModel) -> int:
        """Tokens of a prompt that will be read to its end."""
        num_bytes, most = len(prompt.encode()), self._settings.max_prompt_bytes
        if num_bytes > most:
            raise ApiError(
                400, f"{param} has {num_bytes} bytes; the maximum is {most}", param=param
            )
        num_tokens = await self._service.count_tokens(prompt)
        if num_tokens > served.max_tokens:
            raise ApiError(
                400,
                f"{param} has {num_tokens} tokens; the maximum is {served.max_tokens}. Shorten it: "
                f"nothing is cut off silently",
                param=param,
                code="prompt_too_long",
            )
        return num_tokens

    def _quality(self, asked: GenerationRequest) -> int:
        """The file's quality, 0-100."""
        quality = 100 if asked.output_compression is None else asked.output_compression
        if quality != 100 and asked.output_format in (None, "png"):
            raise ApiError(
                400,
                f"output_compression = {quality}: PNG is lossless; ask for output_format jpeg or "
                f"webp, or leave it out",
                param="output_compression",
            )
        return quality

    def _requests(self, asked: GenerationRequest, width: int, height: int) -> list[DrawRequest]:
        num_pictures, limits = asked.n or 1, self._settings
        if num_pictures > limits.max_queued:
            raise ApiError(
                400, f"n = {num_pictures}: at most {limits.max_queued} here", param="n"
            )  # fmt: skip
        effort = _EFFORT.get(asked.quality or "auto", 1.0)
        preset = min(max(round(self._steps * effort), 1), limits.max_steps)
        steps = asked.num_inference_steps or preset
        if steps > limits.max_steps:
            raise ApiError(
                400,
                f"num_inference_steps = {steps}: at most {limits.max_steps} here",
                param="num_inference_steps",
            )
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        guidance = self._guidance if asked.guidance_scale is None else asked.guidance_scale
        return [
            DrawRequest(
                asked.prompt, seed + i, steps, guidance, width, height, asked.negative_prompt or ""
            )
            for i in range(num_pictures)
        ]


def _entry(
    asked: GenerationRequest, quality: int, served: ServedModel, drawing: Drawing
) -> dict[str, Any]:
    """One element of ``data``."""
    marks = {
        "Software": "pixart-ray",
        "Model": served.name,
        "Model-Version": str(drawing.version),
        "Seed": str(drawing.seed),
    }
    file = encode_picture(drawing.picture, asked.output_format or "png", quality, marks)
    return {
        "b64_json": base64.b64encode(file).decode(),
        "seed": drawing.seed,
        "model_version": drawing.version,
    }


def _served(service: DrawingService) -> ServedModel:
    try:
        return service.served()
    except NotReady as error:
        raise _translate(error) from error


def _find_model(service: DrawingService, reference: str | None) -> ServedModel:
    served = _served(service)
    if reference is None or served.answers_to(reference):
        return served
    raise ApiError(
        404,
        f"model {reference[:80]!r} is not served here; ask for {served.name!r}, "
        f"'{served.name}@{served.alias}' or '{served.name}@{served.version}', or leave model out",
        param="model",
        code="model_not_found",
    )


def _describe(served: ServedModel) -> dict[str, Any]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.loaded_at,
        "owned_by": "pixart-ray",
        "alias": served.alias,
        "version": served.version,
    }


async def _read_body(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise ApiError(413, f"the body is larger than {max_bytes} bytes")
    except ClientDisconnect as error:
        raise ApiError(499, "the client went away") from error
    return bytes(body)


async def _draw(
    request: Request, service: DrawingService, wanted: list[DrawRequest]
) -> list[Drawing]:
    """Draw, unless the client leaves first: then its rows are dropped at the next step."""
    drawing = asyncio.ensure_future(service.draw(wanted))
    leaving = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait({drawing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not drawing.done():
            raise ApiError(499, "the client went away")
        return drawing.result()
    except (EngineError, ModelInputError) as error:
        raise _translate(error) from error
    finally:
        drawing.cancel()
        leaving.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _translate(error: Exception) -> ApiError:
    if isinstance(error, QueueFull):
        wait = error.retry_after_seconds
        return ApiError(429, str(error), code="queue_full", retry_after_seconds=wait)
    if isinstance(error, NotReady):
        return ApiError(503, str(error), code="not_ready", retry_after_seconds=_STARTING_SECONDS)
    if isinstance(error, ModelInputError):
        return ApiError(400, str(error))
    return ApiError(500, f"the drawing failed ({type(error).__name__})", code="drawing_failed")


async def _answer(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path[:200]}: {error.detail.lower()}"
        answer = ApiError(error.status_code, message)
        return JSONResponse(answer.body, error.status_code, headers=dict(error.headers or {}))
    assert isinstance(error, ApiError)
    return JSONResponse(error.body, error.status, headers=error.headers)


class _Boundary:
    """Outermost: x-request-id on every answer, and an answer to every fault of ours."""

    def __init__(self, app: ASGIApp, sends_request_id: bool) -> None:
        self._app, self._sends_request_id = app, sends_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        valid = 0 < len(given) <= 128 and given.isascii() and given.isprintable()
        request_id = given if valid else f"req_{secrets.token_hex(12)}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
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
            answer = JSONResponse(failure.body, failure.status, headers=failure.headers)
            await answer(scope, receive, send_with_id)
