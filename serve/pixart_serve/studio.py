"""The Studio: a page at ``/`` that draws through the public API, as any client would.

Three files that hold no data and ask nothing of another origin, so they need no API key; all that
the page asks for does. The policy lets it run its own script and style, speak to this service
and show pictures it was given, and nothing else: no inline code, no markup made of text.
"""

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import FastAPI, Request
from fastapi.responses import Response

_FILES = {
    "/": ("studio.html", "text/html"),
    "/studio.css": ("studio.css", "text/css"),
    "/studio.js": ("studio.js", "text/javascript"),
}
PATHS = frozenset(_FILES)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
        "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_studio(app: FastAPI) -> None:
    """Give ``app`` the page's routes; they are no part of the API's description."""
    for path, (name, media_type) in _FILES.items():
        content = files("pixart_serve").joinpath(name).read_bytes()
        app.add_route(path, _sender(content, media_type), include_in_schema=False)


def _sender(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    async def send(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return send
