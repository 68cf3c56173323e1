"""An order: a request that was judged before any work, and how its pictures are handed over.

Every limit is checked here, at once and by name: a request that would be cut short, squeezed or
given up later is refused now. What the engine says of a failure becomes an answer here too.
"""

import asyncio
import base64
import logging
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pixart_models.config import ModelInputError
from pixart_models.drawing import EVERYWHERE
from pixart_serve.access import note
from pixart_serve.contract import (
    MAX_PICTURES,
    ApiError,
    GenerationRequest,
    encode_picture,
    parse_generation,
)
from pixart_serve.engine import (
    Drawing,
    DrawRequest,
    EngineError,
    NotReady,
    Preview,
    QueueFull,
    TooLate,
)
from pixart_serve.filters import Filters, load_filters
from pixart_serve.observer import NOBODY, Observer
from pixart_serve.service import DrawingService, ServedModel
from pixart_serve.settings import ServeSettings

_LOG = logging.getLogger(__name__)
_EFFORT = {"low": 0.5, "high": 2.0, "hd": 2.0, "xhigh": 3.0, "max": 4.0}
_REPORTED = {"low": "low", "high": "high", "hd": "high", "xhigh": "xhigh", "max": "max"}
_PATIENCE = 1.05  # of what was promised: what is late by less is nearly drawn, and sent
_STARTING_SECONDS = 2  # when to ask again while no version is live


@dataclass(frozen=True)
class Order:
    """A request that was found good, and how its pictures are handed over."""

    asked: GenerationRequest
    served: ServedModel
    num_tokens: int
    wanted: list[DrawRequest]
    max_seconds: float
    filters: Filters = field(repr=False)
    observer: Observer = field(default=NOBODY, repr=False)

    @property
    def patience_seconds(self) -> float:
        """When it is given up: a little after ``max_seconds``, which the engine promises by."""
        return _PATIENCE * self.max_seconds

    @property
    def about(self) -> dict[str, Any]:
        """What answers and events say of all pictures."""
        asked, one = self.asked, self.wanted[0]
        about = {
            "size": f"{one.width}x{one.height}",
            "quality": _REPORTED.get(asked.quality or "auto", "medium"),
            "background": "opaque",
            "output_format": asked.output_format or "png",
        }
        identifier = asked.safety_identifier or asked.user
        return about | ({"safety_identifier": identifier} if identifier else {})

    @property
    def usage(self) -> dict[str, Any]:
        grid = self.served.grid
        num_image_tokens = sum((r.width // grid) * (r.height // grid) for r in self.wanted)
        return {
            "input_tokens": self.num_tokens,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": self.num_tokens},
            "output_tokens": num_image_tokens,
            "total_tokens": self.num_tokens + num_image_tokens,
        }

    def file(self, drawing: Drawing) -> bytes:
        """The picture in the format asked for. Raises ApiError if it must not be sent."""
        self.filters.check_picture(drawing.picture)
        asked = self.asked
        marks = {
            "Software": "pixart-ray",
            "Model": self.served.name,
            "Model-Version": str(drawing.version),
            "Seed": str(drawing.seed),
        }
        quality = 100 if asked.output_compression is None else asked.output_compression
        file_format, began = asked.output_format or "png", time.monotonic()
        file = encode_picture(drawing.picture, file_format, quality, marks)
        self.observer.encoded_picture(file_format, time.monotonic() - began)
        return file

    def entry(self, drawing: Drawing) -> dict[str, Any]:
        """One element of ``data``. Raises ApiError for a picture that must not be sent."""
        file = self.file(drawing)
        note(version=drawing.version)
        return {
            "b64_json": base64.b64encode(file).decode(),
            "seed": drawing.seed,
            "model_version": drawing.version,
        }

    def event(self, drawing: Drawing) -> dict[str, Any]:
        """A preview or the picture, as an event of a stream."""
        event = {"created_at": int(time.time()), **self.about, **self.entry(drawing)}
        if isinstance(drawing, Preview):
            kind = "image_generation.partial_image"
            return {"type": kind, "partial_image_index": drawing.index, **event}
        return {"type": "image_generation.completed", "usage": self.usage, **event}


class OrderDesk:
    """Judges requests against the settings and the model that would draw them."""

    def __init__(
        self,
        service: DrawingService,
        settings: ServeSettings,
        *,
        default_steps: int,
        default_guidance: float,
        default_guidance_rescale: float = 0.0,
        observer: Observer = NOBODY,
    ) -> None:
        """Raises FilterError."""
        self._service, self._settings, self._observer = service, settings, observer
        self._steps, self._guidance = default_steps, default_guidance
        self._rescale = default_guidance_rescale
        self._filters = load_filters(settings)

    def describe(self, served: ServedModel) -> dict[str, Any]:
        """What can be asked of a model, for a page that asks: sides in pixels, and who draws."""
        limits = self._settings
        return {
            "side": served.side,
            "grid": served.grid,
            "max_side": limits.max_side,
            "max_pictures": min(limits.max_queued, MAX_PICTURES),
            "max_steps": limits.max_steps,
            "default_steps": min(self._steps, limits.max_steps),
            "default_guidance": self._guidance,
            "versions": self._service.versions(),
        }

    async def take(self, body: bytes) -> Order:
        """Everything that can be judged before any work. Raises ApiError."""
        asked, most = parse_generation(body), self._settings.max_queued
        if (asked.n or 1) > most:
            raise ApiError(400, f"n = {asked.n}: at most {most} here", param="n")
        return await self.judge(asked)

    async def judge(self, asked: GenerationRequest) -> Order:
        """The same, whatever the number of pictures."""
        negative = asked.negative_prompt or ""
        self._check_bytes("prompt", asked.prompt)
        self._check_bytes("negative_prompt", negative)
        if self._filters.prompt:
            await asyncio.to_thread(self._filters.check_prompt, asked.prompt, negative)
        seed = secrets.randbelow(2**32) if asked.seed is None else asked.seed
        with translated():
            served = await self._service.find(asked.model, seed)
        width, height = self._size(asked, served)
        num_tokens = await self._count_tokens("prompt", asked.prompt, served)
        await self._count_tokens("negative_prompt", negative, served)
        self._check_compression(asked)
        wanted = self._requests(asked, seed, width, height)
        limit = self._settings.max_wait_seconds
        max_seconds = min(asked.max_wait_seconds or limit, limit)
        note(size=f"{width}x{height}", steps=wanted[0].steps, n=len(wanted))
        if self._settings.log_prompts:
            note(prompt=asked.prompt, negative_prompt=negative)
        return Order(asked, served, num_tokens, wanted, max_seconds, self._filters, self._observer)

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

    def _check_bytes(self, param: str, prompt: str) -> None:
        num_bytes, most = len(prompt.encode()), self._settings.max_prompt_bytes
        if num_bytes > most:
            raise ApiError(
                400, f"{param} has {num_bytes} bytes; the maximum is {most}", param=param
            )

    async def _count_tokens(self, param: str, prompt: str, served: ServedModel) -> int:
        """Tokens of a prompt that will be read to its end."""
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

    def _check_compression(self, asked: GenerationRequest) -> None:
        if asked.output_compression not in (None, 100) and asked.output_format in (None, "png"):
            raise ApiError(
                400,
                f"output_compression = {asked.output_compression}: PNG is lossless; ask for "
                f"output_format jpeg or webp, or leave it out",
                param="output_compression",
            )

    def _requests(
        self, asked: GenerationRequest, seed: int, width: int, height: int
    ) -> list[DrawRequest]:
        num_pictures, limits = asked.n or 1, self._settings
        effort = _EFFORT.get(asked.quality or "auto", 1.0)
        preset = min(max(round(self._steps * effort), 1), limits.max_steps)
        steps = asked.num_inference_steps or preset
        if steps > limits.max_steps:
            raise ApiError(
                400,
                f"num_inference_steps = {steps}: at most {limits.max_steps} here",
                param="num_inference_steps",
            )
        guidance = self._guidance if asked.guidance_scale is None else asked.guidance_scale
        share = self._rescale if asked.guidance_rescale is None else asked.guidance_rescale
        return [
            DrawRequest(
                asked.prompt, seed + i, steps, guidance, width, height,
                negative_prompt=asked.negative_prompt or "",
                guidance_interval=asked.guidance_interval or EVERYWHERE, guidance_rescale=share,
                num_previews=0 if self._filters.picture else asked.partial_images or 0,
            )
            for i in range(num_pictures)
        ]  # fmt: skip


@contextmanager
def translated() -> Iterator[None]:
    """Turn what the engine raises into answers."""
    try:
        yield
    except (EngineError, ModelInputError, TimeoutError) as error:
        raise translate(error) from error


def translate(error: Exception) -> ApiError:
    """What is said of a failure; a retry is offered where it would not draw it all again."""
    match error:
        case ApiError():
            answer = error
        case QueueFull(retry_after_seconds=after):
            answer = ApiError(429, str(error), code="queue_full", retry_after_seconds=after)
        case TooLate(retry_after_seconds=after):
            answer = ApiError(
                429,
                str(error),
                code="too_late",
                retry_after_seconds=after,
                param="max_wait_seconds",
            )
        case NotReady():
            after = _STARTING_SECONDS
            answer = ApiError(503, str(error), code="not_ready", retry_after_seconds=after)
        case ModelInputError():
            answer = ApiError(400, str(error))
        case TimeoutError():
            answer = ApiError(504, "it was not ready in time and was given up", code="timed_out")
        case EngineError():
            failure = f"the drawing failed ({type(error).__name__})"
            answer = ApiError(500, failure, code="drawing_failed")
        case _:
            _LOG.error("an answer failed", exc_info=error)
            answer = ApiError(500, "an internal error; the log has it")
    return answer
