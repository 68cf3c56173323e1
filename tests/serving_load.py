"""Callers of a drawing service, for its benchmark and its fault campaign, and models to serve.

Callers are coroutines of one process. In an open loop they come at the moments of a Poisson
process, whether or not earlier ones were answered, as callers that know nothing of each other do;
in a closed loop a fixed number of them ask again as soon as they were answered.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_models.drawing import Drawer
from pixart_platform.registry import Registry, Version
from pixart_platform.tracking import Tracker, sqlite_uri

STEPS = (8, 12, 16, 20, 28, 40)
SCALES = (1.0, 2.5, 4.5)
_WORDS = ("red", "green", "blue", "white", "one", "three", "five", "eight")
PATIENCE_SECONDS = 120


@dataclass(frozen=True)
class Ask:
    """What a caller wants drawn."""

    prompt: str
    seed: int
    steps: int
    guidance: float

    @property
    def row_steps(self) -> int:
        return self.steps * (1 if self.guidance == 1 else 2)

    @property
    def body(self) -> dict[str, Any]:
        """As the Images API wants it."""
        return {
            "prompt": self.prompt, "seed": self.seed, "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }  # fmt: skip


@dataclass
class Answer:
    """What became of it: HTTP's status (0 if there was none), seconds, and the body."""

    ask: Ask
    asked_at: float
    status: int = 0
    seconds: float = float("inf")
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    error: str = ""

    @property
    def is_good(self) -> bool:
        return self.status == 200


Call = Callable[[aiohttp.ClientSession, Ask], Awaitable[Answer]]


def draw_asks(seed: int, count: int) -> list[Ask]:
    """Captions, steps and scales as they come."""
    rng = random.Random(seed)
    return [
        Ask(
            f"a {' '.join(rng.sample(_WORDS, 2))} on a dark picture", rng.randrange(2**31),
            rng.choice(STEPS), rng.choice(SCALES),
        )
        for _ in range(count)
    ]  # fmt: skip


def caller(url: str, timeout: float = PATIENCE_SECONDS, **more: Any) -> Call:
    """Who posts to ``url``, with ``more`` in each body."""
    limit = aiohttp.ClientTimeout(total=timeout)

    async def call(session: aiohttp.ClientSession, ask: Ask) -> Answer:
        began = time.monotonic()
        answer = Answer(ask, began)
        try:
            async with session.post(url, json=ask.body | more, timeout=limit) as reply:
                read = reply.json if "json" in reply.content_type else reply.read
                answer.body, answer.status = await read(), reply.status
                answer.headers = {name.lower(): value for name, value in reply.headers.items()}
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            answer.error = repr(error)
        answer.seconds = time.monotonic() - began
        return answer

    return call


async def come_at_random(
    call: Call, asks: Sequence[Ask], per_second: float, seed: int
) -> list[Answer]:
    """An open loop: one caller for each of ``asks``, ``per_second`` of them on average."""
    rng, began, at = random.Random(seed), time.monotonic(), 0.0
    calls = list[asyncio.Task[Answer]]()
    async with _session() as session:
        for ask in asks:
            at += rng.expovariate(per_second)
            await asyncio.sleep(max(began + at - time.monotonic(), 0))
            calls.append(asyncio.ensure_future(call(session, ask)))
        return list(await asyncio.gather(*calls))


async def come_again(
    call: Call, asks: Sequence[Ask], num_callers: int, stop: Callable[[], bool]
) -> list[Answer]:
    """A closed loop until ``stop``: who was answered asks the next of ``asks``, round and round."""
    answers, turn = list[Answer](), 0

    async def work(session: aiohttp.ClientSession) -> None:
        nonlocal turn
        while not stop():
            turn += 1
            answers.append(await call(session, asks[turn % len(asks)]))

    async with _session() as session:
        await asyncio.gather(*(work(session) for _ in range(num_callers)))
    return answers


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values the one at ``share``; infinite when there are none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("inf")


@dataclass
class Models:
    """Registered versions of one tiny model, with what draws them."""

    uri: str
    registry: Registry
    drawers: dict[int, Drawer]

    def promote(self, version: Version) -> None:
        self.registry.set_alias("champion", version)


def register_models(root: Path, count: int, preset: str = "digits-mini", uri: str = "") -> Models:
    """``count`` versions of random weights in a registry, a new one below ``root`` if none is
    given; the first leads."""
    uri = uri or sqlite_uri(root)
    tracker = Tracker.start(uri, "serving", "models", "models", artifacts=root)
    models = Models(uri, Registry(uri, "digits"), {})
    for k in range(count):
        drawer = build_drawer(k + 1, preset)
        folder = write_snapshot(root / "snapshots" / str(k + 1), drawer)
        version = models.registry.register(folder, tracker.run_id, {})
        models.drawers[version.number] = drawer
        if k == 0:
            models.promote(version)
    tracker.finish()
    torch.set_num_threads(1)
    return models
