"""A picture as server-sent events, as the official client parses them.

What can be refused is refused before the first byte, with a status of its own; what goes wrong
afterwards is an ``error`` event, since the status has been sent. Comments keep a silent connection
open through proxies. The answer is written here rather than by Starlette's StreamingResponse so
that one place holds the picture from its queueing to its end: whoever leaves, however, its row is
dropped at the next step.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pixart_serve.contract import ApiError
from pixart_serve.engine import Drawing, Preview

_HEARTBEAT = b": still drawing\n\n"


class EventStream(Response):
    """One picture, its previews first."""

    media_type = "text/event-stream"

    def __init__(
        self,
        submit: Callable[[Callable[[Preview], None]], asyncio.Future[Drawing]],
        render: Callable[[Drawing], dict[str, Any]],
        explain: Callable[[Exception], ApiError],
        *,
        max_seconds: float,
        heartbeat_seconds: float,
    ) -> None:
        """``submit`` queues the picture and may refuse it with an ApiError; ``render`` (which may
        take long) makes a preview or the drawing an event; ``explain`` makes a failure an answer.
        """
        self.status_code, self.background = 200, None
        self._submit, self._render, self._explain = submit, render, explain
        self._max_seconds, self._heartbeat_seconds = max_seconds, heartbeat_seconds
        # nginx would collect previews until the picture is there.
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        previews: asyncio.Queue[Preview | None] = asyncio.Queue()
        drawing = self._submit(previews.put_nowait)
        drawing.add_done_callback(lambda _: previews.put_nowait(None))
        writing = asyncio.ensure_future(self._write(send, previews, drawing))
        leaving = asyncio.ensure_future(wait_for_disconnect(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            for future in (drawing, writing, leaving):
                future.cancel()

    async def _write(
        self, send: Send, previews: asyncio.Queue[Preview | None], drawing: asyncio.Future[Drawing]
    ) -> None:
        async def send_body(body: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def wait() -> Preview | None:
            while True:
                try:
                    return await asyncio.wait_for(previews.get(), self._heartbeat_seconds)
                except TimeoutError:
                    await send_body(_HEARTBEAT)

        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async with asyncio.timeout(self._max_seconds):
                while (preview := await wait()) is not None:
                    await send_body(_encode(await asyncio.to_thread(self._render, preview)))
            event = await asyncio.to_thread(self._render, drawing.result())
        except Exception as error:
            event = {"type": "error", **self._explain(error).body}
        await send_body(_encode(event), more=False)


async def wait_for_disconnect(receive: Receive) -> None:
    """Returns when the client is gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, whose size is bounded while it arrives. Raises ApiError."""
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > max_bytes:
                raise ApiError(413, f"the body is larger than {max_bytes} bytes")
    except ClientDisconnect as error:
        raise ApiError(499, "the client went away") from error
    return bytes(body)


def _encode(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
