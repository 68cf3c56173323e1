"""API keys: who may ask, from a file with one salted hash a line, ``NAME:SALT:HASH``.

Keys are 256 random bits, which no one guesses however fast the hash, so one SHA-256 is enough; a
slow one (scrypt, for passwords people choose) would cost each request what a small picture costs
and let anybody without a key spend it. A line is made by ``make_key()``, taken back by deleting it;
the file is read again when it changes.
"""

import hashlib
import hmac
import logging
import re
import secrets
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from pixart_platform.errors import PixartError
from pixart_serve import studio
from pixart_serve.access import note
from pixart_serve.contract import ApiError
from pixart_serve.usage import Accounts, caller

LIVENESS = "/healthz"
OPEN = frozenset({LIVENESS, *studio.PATHS})  # the page holds no data, and asks with a key
_LOG = logging.getLogger(__name__)
_LINE = re.compile(r"([\w.-]{1,64}):([0-9a-f]{32}):([0-9a-f]{64})", re.ASCII)
_MAX_KEY = 256  # characters; ours have 46


class KeysError(PixartError):
    """A file of API keys that cannot be used."""


def make_key(name: str) -> tuple[str, str]:
    """A new key and the line for the file; the key itself is to be kept nowhere here.

    Raises KeysError for a name that is not 1 to 64 letters, digits, ``.``, ``_`` or ``-``.
    """
    key, salt = f"pk-{secrets.token_urlsafe(32)}", secrets.token_hex(16)
    line = f"{name}:{salt}:{_hash(salt, key)}"
    if not _LINE.fullmatch(line):
        raise KeysError(f"name = {name!r}: use 1 to 64 letters, digits, '.', '_' or '-'")
    return key, line


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + key.encode()).hexdigest()


class ApiKeys:
    """The keys of a file. Raises KeysError if it cannot be used or holds none at the start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._look()
        self._keys = self._read()
        if not self._keys:
            raise KeysError(f"api_keys_file = {path}: no key in it, so nobody could ask")

    def find(self, key: str) -> str | None:
        """The name of a key, None if it is none of ours; the time tells nothing about either."""
        self._refresh()
        found = None
        if len(key) <= _MAX_KEY:
            for name, (salt, expected) in self._keys.items():
                if hmac.compare_digest(_hash(salt, key), expected):
                    found = name
        return found

    def knows(self, name: str) -> bool:
        """Whether there is a key of that name (still)."""
        self._refresh()
        return name in self._keys

    def _refresh(self) -> None:
        """Read a file that changed; while it cannot be used, the keys of before stay good."""
        stamp = self._look()
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._keys = self._read()
            except KeysError as error:
                _LOG.error("%s; the keys read before stay good", error)

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> dict[str, tuple[str, str]]:
        """Salt and hash by name. A bad line is named by its number: it may be a key by mistake."""
        where = f"api_keys_file = {self._path}"
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise KeysError(f"{where}: {error.strerror}") from error
        except UnicodeDecodeError:
            raise KeysError(f"{where}: not a text file") from None
        keys: dict[str, tuple[str, str]] = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise KeysError(f"{where}: line {number} is not NAME:SALT:HASH, as make_key gives")
            name, salt, expected = match.groups()
            if name in keys:
                raise KeysError(f"{where}: line {number} names {name!r} again; one key a name")
            keys[name] = (salt, expected)
        return keys


def require_keys(app: FastAPI, keys: ApiKeys, accounts: Accounts) -> None:
    """From now on ``app`` answers those with a key only, on every path but liveness and the page.

    The check is the innermost middleware: those around it give refusals their request id.
    """
    app.state.wants_key = True
    app.user_middleware.append(Middleware(_KeyCheck, keys=keys, accounts=accounts))


class _KeyCheck:
    def __init__(self, app: ASGIApp, keys: ApiKeys, accounts: Accounts) -> None:
        self._app, self._keys, self._accounts = app, keys, accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") in OPEN:
            await self._app(scope, receive, send)
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        name = self._keys.find(key.strip()) if scheme.lower() == "bearer" else None
        if name is None:
            await _refuse(scope, receive, send)
            return
        note(key=name)
        token = caller.set(self._accounts.of(name))
        try:
            await self._app(scope, receive, send)
        finally:
            caller.reset(token)


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Never repeats what was sent: a mistyped key is still most of one."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    refusal = ApiError(
        401,
        "this service wants an API key: send 'Authorization: Bearer KEY' (api_key in the OpenAI "
        "client) with one that is known here",
        code="invalid_api_key",
    )
    note(reason=refusal.reason)
    headers = {"WWW-Authenticate": "Bearer"}
    await JSONResponse(refusal.body, refusal.status, headers=headers)(scope, receive, send)
