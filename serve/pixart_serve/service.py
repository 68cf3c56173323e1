"""Between HTTP and the engine: what the API may ask, answered on an event loop.

The API knows this protocol only, so it is tested with a real engine and no Ray.
"""

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pixart_serve.contract import ApiError
from pixart_serve.engine import (
    Drawing,
    DrawingEngine,
    DrawRequest,
    LoadedVersion,
    NotReady,
    Preview,
)
from pixart_serve.follower import Follower, UnknownVersion
from pixart_serve.usage import charged
from pixart_serve.versions import VersionRefused, VersionUnavailable

_REFERENCE = re.compile(r"[A-Za-z_][\w-]{0,99}|\d{1,9}", re.ASCII)  # an alias or a number
_LOAD_SECONDS = 60.0  # a request waits for its version; the official client for 600
_RETRY_AFTER_SECONDS = 5


@dataclass(frozen=True)
class ServedModel:
    """What draws: ``side`` is the native picture side and ``grid`` the step of sizes, in pixels;
    ``max_tokens`` bounds a prompt; ``loaded_at`` is in Unix seconds; ``pinned`` is the version
    that must draw, None for whichever is live."""

    name: str
    alias: str
    version: int
    side: int
    grid: int
    max_tokens: int
    loaded_at: int
    pinned: LoadedVersion | None = field(default=None, repr=False, compare=False)


class DrawingService(Protocol):
    """What the HTTP side needs."""

    def served(self) -> ServedModel:
        """The live model. Raises NotReady."""
        ...

    def versions(self) -> list[dict[str, Any]]:
        """Numbers that are at hand or have an alias, newest first, each with its aliases."""
        ...

    def is_healthy(self) -> bool: ...

    def num_free_rows(self) -> int:
        """Rows of a batch that nobody draws or waits for."""
        ...

    async def count_tokens(self, prompt: str) -> int:
        """Tokens before any truncation. Raises NotReady."""
        ...

    async def find(self, reference: str | None, seed: int | None = None) -> ServedModel:
        """The model of a name, name@alias or name@version, loaded if need be.

        The seed of a request that names no version decides whether a challenger draws it. Raises
        NotReady, or ApiError 404 or 503.
        """
        ...

    def submit(
        self,
        requests: Sequence[DrawRequest],
        served: ServedModel | None = None,
        *,
        max_seconds: float = math.inf,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> list[asyncio.Future[Drawing]]:
        """Queue all or none, with what ``find`` gave or else the live version.

        Cancelling a future drops its picture; previews arrive on the event loop, each before its
        picture. Raises EngineError (QueueFull and TooLate among them), or ApiError for a caller
        who has drawn too much; futures end in EngineError or ModelInputError.
        """
        ...

    async def draw(
        self,
        requests: Sequence[DrawRequest],
        served: ServedModel | None = None,
        *,
        max_seconds: float = math.inf,
    ) -> list[Drawing]:
        """Draw all or fail, as ``submit`` says; cancelling this drops them."""
        ...


class EngineService:
    """The service of one engine in this process."""

    def __init__(
        self, engine: DrawingEngine, model_name: str, alias: str, follower: Follower | None = None
    ) -> None:
        """Without a ``follower`` the live version is all there is."""
        self._engine, self._name, self._alias = engine, model_name, alias
        self._follower = follower

    def served(self) -> ServedModel:
        return self._describe(self._live())

    async def find(self, reference: str | None, seed: int | None = None) -> ServedModel:
        live, follower = self._live(), self._follower
        name, at, tail = (self._name if reference is None else reference).partition("@")
        if name == self._name and not at:
            chosen = follower.choose(seed) if follower and seed is not None else None
            return self._describe(chosen or live, pinned=chosen is not None)
        if name == self._name and tail == self._alias:
            return self._describe(live)
        if name == self._name and tail == str(live.number):
            return self._describe(live, pinned=True)
        if name == self._name and follower and _REFERENCE.fullmatch(tail):
            return self._describe(await _load(follower, tail), pinned=True)
        raise _not_found(
            f"model {str(reference)[:80]!r} is not served here; ask for {self._name!r}, "
            f"'{self._name}@{self._alias}' or '{self._name}@{live.number}', or leave model out"
        )

    def _live(self) -> LoadedVersion:
        live = self._engine.live
        if live is None:
            raise NotReady("no version is live yet")
        return live

    def _describe(self, version: LoadedVersion, pinned: bool = False) -> ServedModel:
        config, autoencoder = version.drawer.config, version.drawer.autoencoder
        return ServedModel(
            name=self._name,
            alias=self._alias if version is self._engine.live else "",
            version=version.number,
            side=config.resolution,
            grid=autoencoder.factor * config.network.patch,
            max_tokens=version.drawer.text_encoder.max_tokens,
            loaded_at=version.loaded_at,
            pinned=version if pinned else None,
        )

    def versions(self) -> list[dict[str, Any]]:
        live = self._live().number
        aliases, numbers = {self._alias: live}, {live}
        if self._follower:  # what the alias names may not be live yet, or never: it was refused
            aliases = self._follower.aliases | aliases
            numbers.update(self._follower.versions.numbers)
        names: dict[int, list[str]] = {number: [] for number in numbers}
        for alias, number in sorted(aliases.items()):
            names.setdefault(number, []).extend([] if alias.isdecimal() else [alias])
        return [{"version": n, "aliases": names[n]} for n in sorted(names, reverse=True)]

    def is_healthy(self) -> bool:
        return self._engine.is_healthy()

    def num_free_rows(self) -> int:
        return self._engine.num_free_rows()

    async def count_tokens(self, prompt: str) -> int:
        return await asyncio.to_thread(self._engine.count_tokens, prompt)

    def submit(
        self,
        requests: Sequence[DrawRequest],
        served: ServedModel | None = None,
        *,
        max_seconds: float = math.inf,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> list[asyncio.Future[Drawing]]:
        loop, served = asyncio.get_running_loop(), served or self.served()

        def relay(preview: Preview) -> None:
            assert on_preview is not None
            loop.call_soon_threadsafe(on_preview, preview)

        with charged(requests, served.grid):
            futures = self._engine.submit_all(
                requests,
                served.pinned,
                max_seconds=max_seconds,
                on_preview=relay if on_preview else None,
            )
        if served.pinned and self._follower:
            self._follower.versions.note_drawing(served.pinned, futures)
        return [asyncio.wrap_future(future) for future in futures]

    async def draw(
        self,
        requests: Sequence[DrawRequest],
        served: ServedModel | None = None,
        *,
        max_seconds: float = math.inf,
    ) -> list[Drawing]:
        drawings = self.submit(requests, served, max_seconds=max_seconds)
        try:
            return await asyncio.gather(*drawings)
        finally:
            for drawing in drawings:
                drawing.cancel()


async def _load(follower: Follower, reference: str) -> LoadedVersion:
    """A version from memory, or else from storage. Raises ApiError."""
    try:
        at_hand = follower.at_hand(reference)
        if at_hand:
            return at_hand
        loading = asyncio.wrap_future(follower.fetch(reference))
        return await asyncio.wait_for(asyncio.shield(loading), _LOAD_SECONDS)
    except UnknownVersion as error:
        raise _not_found(f"{error}") from error
    except VersionRefused as error:  # the reason names folders: it is in the log
        raise ApiError(
            503,
            f"version {reference} did not pass its checks and does not draw; the log of the "
            f"service says why",
            param="model",
            code="version_refused",
        ) from error
    except (VersionUnavailable, TimeoutError) as error:
        reason = str(error) or f"version {reference} is still being loaded"
        raise ApiError(
            503,
            f"{reason}; try again in {_RETRY_AFTER_SECONDS} s",
            param="model",
            code="version_unavailable",
            retry_after_seconds=_RETRY_AFTER_SECONDS,
        ) from error


def _not_found(message: str) -> ApiError:
    return ApiError(404, message, param="model", code="model_not_found")
