"""What ``/openapi.json`` says: every route of the API, what it takes, answers and refuses with.

The bodies' shapes are the classes that parse them; the answers' are written down here, and tests
hold real routes and real answers against them. It is not FastAPI's own, which describes what
FastAPI parses: here it parses nothing, and nothing is answered with its 422.
"""

from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from pixart_serve.contract import GenerationRequest, JobRequest, OutputFormat
from pixart_serve.jobs import JOBS, LISTED, MAX_LISTED, ImageJob
from pixart_serve.keys import LIVENESS

_JSON = "application/json"
_REF = "#/components/schemas/{model}"
_ABOUT = """Pictures from prompts, in the words of OpenAI's Images API, so that its clients work as
they are. Every refusal is an `Error` that names the field, the value and what would be right;
`Retry-After` says when asking again makes sense, `x-should-retry: false` that it does not. Every
answer has an `x-request-id`, the caller's own if it sends one."""


class _Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class ErrorDetail(_Answer):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field or header that was wrong."""
    code: str | None


class Error(_Answer):
    """What is answered instead, with any status of 400 or more."""

    error: ErrorDetail


class TokenDetails(_Answer):
    image_tokens: int
    text_tokens: int


class Usage(_Answer):
    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    """Image tokens of all pictures."""
    total_tokens: int


class Picture(_Answer):
    b64_json: str
    """The file, with its marks as AI-generated, in base64."""
    seed: int
    """With the same version, prompt and parameters it gives this picture again."""
    model_version: int


class _About(_Answer):
    size: str
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    background: Literal["opaque"]
    output_format: OutputFormat
    safety_identifier: str = ""
    """Only if one was sent, as `user` perhaps."""


class Pictures(_About):
    created: int
    """Unix seconds."""
    data: list[Picture]
    usage: Usage


class PartialImageEvent(_About, Picture):
    """A preview in a stream."""

    type: Literal["image_generation.partial_image"]
    partial_image_index: int
    created_at: int


class CompletedEvent(_About, Picture):
    """The picture in a stream, its last event; an event of type `error` may come instead."""

    type: Literal["image_generation.completed"]
    created_at: int
    usage: Usage


class VersionNames(_Answer):
    version: int
    aliases: list[str]


class Model(_Answer):
    """A model, the version that draws, and what may be asked of it; sizes in pixels."""

    id: str
    object: Literal["model"]
    created: int
    """When the version was loaded, in Unix seconds."""
    owned_by: str
    alias: str
    """The alias that is followed; empty for a version that was asked for by name."""
    version: int
    side: int
    """Of a picture of size `auto`."""
    grid: int
    """Sides are multiples of this."""
    max_side: int
    max_pictures: int
    max_steps: int
    default_steps: int
    default_guidance: float
    versions: list[VersionNames]
    """At hand or named by an alias, newest first; any registered one may be asked for."""


class Models(_Answer):
    object: Literal["list"]
    data: list[Model]


class JobPage(_Answer):
    object: Literal["list"]
    data: list[ImageJob]
    has_more: bool


class DeletedJob(_Answer):
    id: str
    object: Literal["image.job"]
    deleted: Literal[True]


class Health(_Answer):
    status: Literal["ok"]
    model: str
    version: int


def _schema(of: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=of.__name__)}}


def _parameter(name: str, place: str, about: str, **schema: Any) -> dict[str, Any]:
    needed = {"required": True} if place == "path" else {}
    schema = {"type": "string"} | schema
    return {"name": name, "in": place, "description": about, "schema": schema} | needed


def _operation(
    about: str,
    answer: type[BaseModel] | dict[str, Any],
    *parameters: dict[str, Any],
    body: type[BaseModel] | None = None,
    status: int = 200,
    headers: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """``answer``: what is answered as JSON, or all of its contents by media type."""
    content = answer if isinstance(answer, dict) else {_JSON: _schema(answer)}
    answered = {"description": "As asked.", "content": content}
    refused = {"description": "Refused or failed.", "content": {_JSON: _schema(Error)}}
    summary, _, description = about.partition(". ")
    operation: dict[str, Any] = {
        "summary": summary.rstrip("."),
        "responses": {
            str(status): answered | ({"headers": headers} if headers else {}),
            "4XX": refused,
            "5XX": refused,
        },
    }
    if description:
        operation["description"] = description
    if parameters:
        operation["parameters"] = list(parameters)
    if body:
        operation["requestBody"] = {"required": True, "content": {_JSON: _schema(body)}}
    return operation


_ID = _parameter("id", "path", "The job's.")
_K = _parameter("k", "path", "Which picture, of 0 to n - 1.", type="integer", minimum=0)
_MODEL = _parameter("model", "path", "NAME, NAME@ALIAS or NAME@VERSION.")
_LIMIT = _parameter(
    "limit", "query", "How many.", type="integer", minimum=1, maximum=MAX_LISTED, default=LISTED
)
_AFTER = _parameter("after", "query", "The id of the last job that was seen.")
_KEY = _parameter(
    "Idempotency-Key",
    "header",
    "Asking again with the same key gives the same job, however often and of whichever replica; "
    "with another body it is refused with 409.",
    pattern="^[!-~]{1,255}$",
)
_EVENTS = {"schema": {"oneOf": [_schema(e)["schema"] for e in (PartialImageEvent, CompletedEvent)]}}
_FILES = {
    f"image/{kind}": {"schema": {"type": "string", "format": "binary"}}
    for kind in ("png", "jpeg", "webp")
}
_STARTED = {
    "Location": {"description": "Where to ask for it.", "schema": {"type": "string"}},
    "Idempotent-Replayed": {
        "description": "`true` if the job was there already.",
        "schema": {"type": "string"},
    },
}
_OPERATIONS = {
    ("post", "/v1/images/generations"): _operation(
        "Draw pictures. With `stream` an event stream of previews and the picture.",
        {_JSON: _schema(Pictures), "text/event-stream": _EVENTS},
        body=GenerationRequest,
    ),
    ("post", JOBS): _operation(
        "Order a job. Drawn when there is room, by the version that is chosen now; its pictures "
        "are fetched one by one. It keeps the prompt until it is deleted or expires.",
        ImageJob, _KEY, body=JobRequest, status=202, headers=_STARTED,
    ),
    ("get", JOBS): _operation("List one's own jobs, newest first.", JobPage, _LIMIT, _AFTER),
    ("get", f"{JOBS}/{{id}}"): _operation("See how far a job is.", ImageJob, _ID),
    ("delete", f"{JOBS}/{{id}}"): _operation(
        "Forget a job that has ended, and its pictures.", DeletedJob, _ID
    ),
    ("post", f"{JOBS}/{{id}}/cancel"): _operation(
        "End a job. What is in flight stops at the next step; what is drawn stays.", ImageJob, _ID
    ),
    ("get", f"{JOBS}/{{id}}/images/{{k}}"): _operation(
        "Fetch a picture of a job. 404 until it is drawn.", _FILES, _ID, _K
    ),
    ("get", "/v1/models"): _operation("List what draws.", Models),
    ("get", "/v1/models/{model}"): _operation(
        "Describe a model. A version that is not in memory is loaded first.", Model, _MODEL
    ),
    ("get", LIVENESS): _operation("Say whether pictures can be drawn.", Health),
}  # fmt: skip
_SHAPES: tuple[type[BaseModel], ...] = (
    GenerationRequest, JobRequest, Error, Pictures, PartialImageEvent, CompletedEvent, ImageJob,
    JobPage, DeletedJob, Models, Model, Health,
)  # fmt: skip


def describe_api(wants_key: bool) -> dict[str, Any]:
    """The OpenAPI document. ``wants_key``: every route but liveness asks for an API key."""
    _, definitions = models_json_schema(
        [(shape, "validation") for shape in _SHAPES], ref_template=_REF
    )
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in _OPERATIONS.items():
        is_open: dict[str, Any] = {"security": []} if wants_key and path == LIVENESS else {}
        paths.setdefault(path, {})[method] = operation | is_open
    components: dict[str, Any] = {"schemas": definitions["$defs"]}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "pixart-ray", "version": version("pixart-ray"), "description": _ABOUT},
        "paths": paths,
        "components": components,
    }
    if wants_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document
