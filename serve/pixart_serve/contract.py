"""The wire contract: the OpenAI Images API's request, its error object, and pictures as files.

A body is parsed strictly (a number in quotes is an error, so is a field nobody knows), and every
refusal names the field, the value and what would be right. Pictures say what drew them and that
nobody photographed them; the marks are metadata, the floor of what provenance asks for: readable by
anyone, gone after a screenshot.
"""

import difflib
import io
from typing import Annotated, Any, Literal, TypeVar
from xml.sax.saxutils import quoteattr

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
MAX_PICTURES = 10
_REASONS = {
    400: "bad_request", 404: "not_found", 405: "bad_method", 413: "too_large", 499: "client_gone",
    500: "internal",
}  # fmt: skip
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
    def reason(self) -> str:
        """For logs and counters: the code or, without one, what the status stands for."""
        return self.body["error"]["code"] or _REASONS.get(self.status, str(self.status))

    @property
    def headers(self) -> dict[str, str]:
        """Tells clients whether trying again makes sense; the official one obeys."""
        if self.retry_after_seconds is not None:
            return {"Retry-After": str(self.retry_after_seconds)}
        retried = self.status in (409, 429) or self.status >= 500  # by the official client
        return {"x-should-retry": "false"} if retried else {}


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
    n: Annotated[int, Field(ge=1, le=MAX_PICTURES)] | None = None
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
    guidance_rescale: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    """Share of the contrast that guidance adds which is taken back, so that colours stay."""
    max_wait_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """What this may take until it is drawn, if less than the service's own limit: refused at once
    with a time to come back when it would take longer, given up when it takes 5 % more."""

    @field_validator("guidance_interval")
    @classmethod
    def _check_interval(cls, interval: tuple[float, float] | None) -> tuple[float, float] | None:
        if interval and interval[0] > interval[1]:
            raise ValueError("must be [low, high] with low <= high")
        return interval


class JobRequest(GenerationRequest):
    """The body of ``POST /v1/images/jobs``; null means unset."""

    n: Annotated[int, Field(ge=1)] | None = None
    stream: Literal[False] | None = None
    partial_images: Literal[0] | None = None
    max_wait_seconds: None = None


Request = TypeVar("Request", bound=GenerationRequest)


def parse_job(body: bytes) -> JobRequest:
    """Raises ApiError 400 for the first fault found."""
    return _parse(body, JobRequest)


def _parse(body: bytes, kind: type[Request]) -> Request:
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        param = str(fault["loc"][0]) if fault["loc"] else None
        hint = (_JOB_HINTS if kind is JobRequest else _HINTS).get(param or "", "")
        raise ApiError(400, _explain(param, fault) + hint, param=param) from error


def parse_generation(body: bytes) -> GenerationRequest:
    """Raises ApiError 400 for the first fault found."""
    asked = _parse(body, GenerationRequest)
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
    return f"{param} = {_shorten(fault['input'])}: {fault['msg']}"


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


_HINTS = {"response_format": "; pictures are not kept, so there is no URL to give"}
_JOB_HINTS = {
    "response_format": "; pictures of a job are fetched one by one",
    "stream": "; ask how far a job is with GET /v1/images/jobs/ID",
    "partial_images": "; a job shows no previews",
    "max_wait_seconds": "; a job waits until there is room, and can be cancelled",
}


def encode_picture(
    picture: NDArray[np.uint8], file_format: OutputFormat, quality: int, marks: dict[str, str]
) -> bytes:
    """A picture (H, W, 3) uint8 as a file; ``quality`` 0-100 is for JPEG and WebP.

    ``marks`` (Software, Model, Model-Version and Seed) are in it three times over: in PNG's text or
    in EXIF, for people; and for machines in XMP, in the words of IPTC Photo Metadata 2025.1.
    """
    image, file, xmp = Image.fromarray(picture), io.BytesIO(), _xmp(marks)
    marks = {"Source": "AI-generated", "DigitalSourceType": _SOURCE_TYPE, **marks}
    if file_format == "png":
        info = PngInfo()
        for key, value in marks.items():
            info.add_text(key, value)
        info.add_itxt("XML:com.adobe.xmp", xmp)
        image.save(file, "png", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    exif[_EXIF_SOFTWARE] = marks["Software"]
    exif[_EXIF_DESCRIPTION] = "; ".join(f"{key}: {value}" for key, value in marks.items())
    image.save(file, file_format, quality=max(quality, 1), exif=exif, xmp=xmp.encode())
    return file.getvalue()


def _xmp(marks: dict[str, str]) -> str:
    """The packet, between the marks by which a program finds it in any file."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        '<rdf:Description rdf:about=""'
        ' xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
        ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
        f" xmp:CreatorTool={quoteattr(marks['Software'])}"
        f" Iptc4xmpExt:DigitalSourceType={quoteattr(_SOURCE_TYPE)}"
        f" Iptc4xmpExt:AISystemUsed={quoteattr(marks['Model'])}"
        f" Iptc4xmpExt:AISystemVersionUsed={quoteattr(marks['Model-Version'])}/>"
        '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
