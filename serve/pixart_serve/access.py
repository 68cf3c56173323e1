"""The access log: one line of JSON for each request, without its prompt unless that is wanted.

Who learns something about the request that is being answered notes it down: the key check whose
it is, the desk what is ordered, the books what it costs. As with the caller, a context variable
carries it, so that nothing in between needs to know.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from starlette.types import Scope

from pixart_serve.observer import Observer

_LOG = logging.getLogger(__name__)
_CLIENT_GONE = 499  # what is left when nothing could be answered
_record: ContextVar[dict[str, Any] | None] = ContextVar("access record", default=None)


def note(**fields: Any) -> None:
    """Add to the line of the request that is being answered, if there is one."""
    record = _record.get()
    if record is not None:
        record.update(fields)


@contextmanager
def logged(scope: Scope, request_id: str, observer: Observer) -> Iterator[None]:
    """Whatever is noted inside becomes one line at the end, when ``observer`` is told too."""
    record: dict[str, Any] = {"request_id": request_id, "method": scope.get("method", "")}
    token, began = _record.set(record), time.monotonic()
    try:
        yield
    finally:
        _record.reset(token)
        seconds = time.monotonic() - began
        # Of paths only those we have: others are whatever somebody typed, a secret perhaps.
        route = getattr(scope.get("route"), "path", "other")
        status, reason = record.setdefault("status", _CLIENT_GONE), record.get("reason", "")
        observer.answered(route, status, reason, seconds)
        if _LOG.isEnabledFor(logging.INFO):
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            line = {"time": now, "route": route, "seconds": round(seconds, 4)} | record
            _LOG.info(json.dumps(line))


def open_log() -> None:
    """From now on the lines go to this process's standard output, where Ray collects them."""
    if not _LOG.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _LOG.addHandler(handler)
        _LOG.setLevel(logging.INFO)
