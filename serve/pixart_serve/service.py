"""Between HTTP and the engine: what the API may ask, answered on an event loop.

The API knows this protocol only, so it is tested with a real engine and no Ray.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pixart_serve.engine import Drawing, DrawingEngine, DrawRequest, NotReady


@dataclass(frozen=True)
class ServedModel:
    """What is live: ``side`` is the native picture side and ``grid`` the step of sizes, in pixels;
    ``max_tokens`` bounds a prompt; ``loaded_at`` is in Unix seconds."""

    name: str
    alias: str
    version: int
    side: int
    grid: int
    max_tokens: int
    loaded_at: int

    def answers_to(self, reference: str) -> bool:
        """Whether ``reference`` is its name, name@alias or name@version."""
        tails = ("", f"@{self.alias}", f"@{self.version}")
        return reference in [self.name + tail for tail in tails]


class DrawingService(Protocol):
    """What the HTTP side needs."""

    def served(self) -> ServedModel:
        """The live model. Raises NotReady."""
        ...

    def is_healthy(self) -> bool: ...

    async def count_tokens(self, prompt: str) -> int:
        """Tokens before any truncation. Raises NotReady."""
        ...

    async def draw(self, requests: Sequence[DrawRequest]) -> list[Drawing]:
        """Draw all or fail; cancelling this drops them. Raises EngineError, ModelInputError."""
        ...


class EngineService:
    """The service of one engine in this process."""

    def __init__(self, engine: DrawingEngine, model_name: str, alias: str) -> None:
        self._engine, self._name, self._alias = engine, model_name, alias

    def served(self) -> ServedModel:
        live = self._engine.live
        if live is None:
            raise NotReady("no version is live yet")
        config, autoencoder = live.drawer.config, live.drawer.autoencoder
        return ServedModel(
            name=self._name,
            alias=self._alias,
            version=live.number,
            side=config.resolution,
            grid=autoencoder.factor * config.network.patch,
            max_tokens=live.drawer.text_encoder.max_tokens,
            loaded_at=live.loaded_at,
        )

    def is_healthy(self) -> bool:
        return self._engine.is_healthy()

    async def count_tokens(self, prompt: str) -> int:
        return await asyncio.to_thread(self._engine.count_tokens, prompt)

    async def draw(self, requests: Sequence[DrawRequest]) -> list[Drawing]:
        futures = self._engine.submit_all(requests)
        try:
            return await asyncio.gather(*map(asyncio.wrap_future, futures))
        finally:
            for future in futures:
                future.cancel()
