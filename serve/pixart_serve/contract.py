"""The wire contract: the OpenAI Images API's request, its error object, and pictures as files.

A body is parsed strictly (a number in quotes is an error, so is a field nobody knows), and every
refusal names the field, the value and what would be right. Pictures say what drew them and that
nobody photographed them; the marks are metadata, the floor of what provenance asks for: readable by
anyone, gone after a screenshot.
"""

import difflib
import io
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from pixart_models.diffusion import NUM_TIMESTEPS

OutputFormat = Literal["png", "jpeg", "webp"]
Quality = Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"]
_Timestep = Annotated[float, Field(ge=0, le=NUM_TIMESTEPS, allow_inf_nan=False)]
# IPTC's term for a picture made by a trained model.
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_EXIF_DESCRIPTION, _EXIF_SOFTWARE = 0x010E, 0x0131
MAX_SEED = 2**63 - 1
_SHOWN = 80  # characters of a bad value that an error repeats


class ApiError(Exception):
    """An answer that is not a picture, in OpenAI's shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_seconds = status, retry_after_seconds
        self.body = {
            "error": {"message": message, "type": _error_type(status), "param": param, "code": code}
        }

    @property
    def headers(self) -> dict[str, str]:
        """Tells clients whether trying again makes sense; the official one obeys."""
        if self.retry_after_seconds is not None:
            return {"Retry-After": str(self.retry_after_seconds)}
        return {"x-should-retry": "false"} if self.status == 429 or self.status >= 500 else {}


def _error_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


class GenerationRequest(BaseModel):
    """The body of ``POST /v1/images/generations``; null means unset."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    prompt: str = Field(min_length=1)
    model: str | None = None
    """The served model: its name, name@alias or name@version."""
    n: Annotated[int, Field(ge=1, le=10)] | None = None
    size: str | None = None
    """``auto`` (the model's native size) or WIDTHxHEIGHT in pixels."""
    quality: Quality | None = None
    """Half (low), once, twice (high, hd), three (xhigh) or four times (max) the default steps."""
    response_format: Literal["b64_json"] | None = None
    output_format: OutputFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    """Quality of a JPEG or WebP."""
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: bool | None = None
    """Server-sent events, for n = 1: ``image_generation.partial_image`` and ``.completed``."""
    partial_images: Annotated[int, Field(ge=0, le=3)] | None = None
    """Previews in a stream; fewer when there are no more steps. Each costs one decoding."""
    user: str | None = None
    safety_identifier: str | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    """Picture i of n is drawn from seed + i."""
    negative_prompt: str | None = None
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=20, allow_inf_nan=False)] | None = None
    guidance_interval: tuple[_Timestep, _Timestep] | None = None
    """Guide at timesteps from low to high alone: [0, 1000] is always, 0 is clean, 1000 noise."""
    max_wait_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """What this may take until it is drawn, if less than the service's own limit: refused at once
    with a time to come back when it would take longer, given up when it does."""

    @field_validator("guidance_interval")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval and interval[0] > interval[1]:
            raise ValueError("must be [low, high] with low <= high")
        return interval


def parse_generation(body: bytes) -> GenerationRequest:
    """Raises ApiError 400 for the first fault found."""
    try:
        asked = GenerationRequest.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        param = str(fault["loc"][0]) if fault["loc"] else None
        raise ApiError(400, _explain(param, fault), param=param) from error
    if asked.stream and (asked.n or 1) > 1:
        raise ApiError(400, f"n = {asked.n}: a stream is of one picture; ask for each", param="n")
    if asked.partial_images and not asked.stream:
        raise ApiError(
            400,
            f"partial_images = {asked.partial_images}: previews need stream = true",
            param="partial_images",
        )
    return asked


def _explain(param: str | None, fault: Any) -> str:
    if param is None:
        return f"the body must be one JSON object: {fault['msg']}"
    if fault["type"] == "missing":
        return f"{param} is required"
    if fault["type"] == "extra_forbidden":
        known = sorted(GenerationRequest.model_fields)
        near = difflib.get_close_matches(param, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return f"unknown field {_shorten(param)}; {hint}"
    return f"{param} = {_shorten(fault['input'])}: {fault['msg']}{_HINTS.get(param, '')}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


_HINTS = {
    "response_format": "; pictures are not kept, so there is no URL to give",
}


def encode_picture(
    picture: NDArray[np.uint8], file_format: OutputFormat, quality: int, marks: dict[str, str]
) -> bytes:
    """A picture (H, W, 3) uint8 as a file; ``quality`` 0-100 is for JPEG and WebP."""
    marks = {"Source": "AI-generated", "DigitalSourceType": _SOURCE_TYPE, **marks}
    image, file = Image.fromarray(picture), io.BytesIO()
    if file_format == "png":
        info = PngInfo()
        for key, value in marks.items():
            info.add_text(key, value)
        image.save(file, "png", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    exif[_EXIF_SOFTWARE] = "pixart-ray"
    exif[_EXIF_DESCRIPTION] = "; ".join(f"{key}: {value}" for key, value in marks.items())
    image.save(file, file_format, quality=max(quality, 1), exif=exif)
    return file.getvalue()
