"""What is drawn: requests, pictures, and a batch of rows taking one step. No thread, no queue.

A *ticket* is a picture that waits, a *row* a picture being drawn. Rows of one batch share a size
and a set of weights, nothing else: the network takes a timestep per row and the solver is a table
line per row. A preview is the network's present idea of the clean latents, decoded; taking one
reads a row and changes nothing, so the finished picture is the same bit by bit. It costs one
decoding: with the usual f8 autoencoder as many FLOPs as a guided step of XL/2, 5 % of 20 steps;
with the digits' three tenths of a 12-step drawing.

Legend: B rows, C latent channels, h, w latent size, H, W pixels, L text tokens, Dt text width.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixart_models.config import ModelInputError
from pixart_models.drawing import (
    EVERYWHERE,
    Drawer,
    Guidance,
    fresh_noise,
    initial_noise,
    picture_sizes,
    predict,
)
from pixart_models.solvers import Schedule, build_schedule, solver_step
from pixart_serve.observer import Observer
from pixart_serve.prompts import PromptFeatures

_LOG = logging.getLogger(__name__)


class EngineError(Exception):
    """Base of what the engine raises or puts into a future."""


class QueueFull(EngineError):
    """Too many pictures wait; ``retry_after_seconds`` says when there should be room."""

    def __init__(self, num_waiting: int, retry_after_seconds: int) -> None:
        super().__init__(
            f"{num_waiting} pictures already wait; try again in {retry_after_seconds} s"
        )
        self.retry_after_seconds = retry_after_seconds


class TooLate(EngineError):
    """What would be ready after it is wanted; no ``retry_after_seconds``: later is no better."""

    def __init__(self, seconds: float, max_seconds: float, retry_after_seconds: int | None) -> None:
        way_out = (
            "ask for fewer steps or pictures, a smaller size or more time"
            if retry_after_seconds is None
            else f"try again in {retry_after_seconds} s, or allow more"
        )
        super().__init__(
            f"this would be ready in about {seconds:.3g} s, and may take {max_seconds:g} s; "
            f"{way_out}"
        )
        self.retry_after_seconds = retry_after_seconds


class NotReady(EngineError):
    """No version is live, or the engine was closed."""


class DrawingFailed(EngineError):
    """A picture that was begun and could not be finished."""


class NonFiniteDrawing(DrawingFailed):
    """Latents that became NaN or infinite."""


@dataclass(frozen=True)
class DrawRequest:
    """One picture: ``width`` and ``height`` in pixels, ``steps`` network evaluations.

    Guidance acts at timesteps inside ``guidance_interval`` (low, high), of 0 (clean) to 1000;
    ``guidance_rescale``, 0 to 1, takes back of the contrast that it adds.
    ``num_previews`` are shown on the way, to who submits with somewhere to show them.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    negative_prompt: str = ""
    guidance_interval: tuple[float, float] = EVERYWHERE
    guidance_rescale: float = 0.0
    num_previews: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the batch it may take at any step: guidance 1 needs no unconditional one."""
        return 1 if self.guidance == 1 else 2

    @property
    def preview_steps(self) -> list[int]:
        """The steps after which it is shown, evenly spaced; a short drawing has fewer of them."""
        parts = self.num_previews + 1
        return sorted({self.steps * i // parts for i in range(1, parts)} - {0})


@dataclass(frozen=True)
class Drawing:
    """A finished picture (H, W, 3) uint8, its seed, and the version that drew every step of it."""

    picture: NDArray[np.uint8]
    seed: int
    version: int


@dataclass(frozen=True)
class Preview(Drawing):
    """What the picture looks like so far; ``index`` counts its previews from 0."""

    index: int


@dataclass(frozen=True, eq=False)
class LoadedVersion:
    """Weights in memory, the registry's number for them, and when they came (Unix seconds)."""

    number: int
    drawer: Drawer
    loaded_at: int = field(default_factory=lambda: int(time.time()))


@dataclass(eq=False)
class Ticket:
    """A picture that waits. ``version`` is set when it must not be drawn by the live one."""

    request: DrawRequest
    future: "Future[Drawing]"
    version: LoadedVersion | None
    on_preview: Callable[[Preview], None] | None
    asked_at: float = field(default_factory=time.monotonic, kw_only=True)
    predicted: float = field(default=0.0, kw_only=True)
    """Seconds from then to its picture, as was thought then; 0 if nobody asked."""
    deadline: float = field(default=math.inf, kw_only=True)
    """When nobody wants it any more, by the monotonic clock."""

    @property
    def num_steps_left(self) -> int:
        return self.request.steps


@dataclass(eq=False)
class Row(Ticket):
    """A picture being drawn: x and x0 (C, h, w), features (L, Dt), steps taken so far."""

    version: LoadedVersion
    features: Tensor
    negative: Tensor
    guidance: Guidance
    schedule: Schedule
    x: Tensor
    x0: Tensor
    step: int = 0

    @property
    def num_steps_left(self) -> int:
        return self.schedule.num_steps - self.step


Item = TypeVar("Item", bound=Ticket)


def begin_rows(tickets: Sequence[Ticket], prompts: PromptFeatures) -> list[Row]:
    """Rows at step 0 of tickets with versions. Raises ModelInputError when one cannot be drawn."""
    rows = []
    for version in dict.fromkeys(t.version for t in tickets):
        assert version is not None
        drawer, some = version.drawer, [t for t in tickets if t.version is version]
        texts = [p for t in some for p in (t.request.prompt, t.request.negative_prompt)]
        features = prompts.encode(drawer.text_encoder, texts)
        for ticket in some:
            request = ticket.request
            shape = drawer.latent_shape(request.width, request.height)
            x = initial_noise(request.seed, shape)  # (C, h, w)
            x = x.to(drawer.device, non_blocking=True)
            rows.append(
                Row(
                    request=request, future=ticket.future, version=version,
                    on_preview=ticket.on_preview, asked_at=ticket.asked_at,
                    features=features[request.prompt],
                    negative=features[request.negative_prompt],
                    guidance=Guidance(
                        request.guidance, request.guidance_interval, request.guidance_rescale
                    ),
                    schedule=build_schedule(
                        drawer.config.objective, request.steps, drawer.config.solver
                    ),
                    x=x, x0=torch.zeros_like(x),
                )
            )  # fmt: skip
    return rows


def step_rows(rows: Sequence[Row]) -> None:
    """Advance all rows one step; they change only if nothing was raised."""
    drawer, asked = rows[0].version.drawer, [row.request for row in rows]
    x = torch.stack([row.x for row in rows])  # (B, C, h, w)
    x0 = torch.stack([row.x0 for row in rows])  # (B, C, h, w)
    times = torch.stack([row.schedule.timesteps[row.step] for row in rows])  # (B,)
    lines = torch.stack([row.schedule.table[row.step] for row in rows])  # (B, 6)
    scale = [row.guidance.at(t) for row, t in zip(rows, times.tolist(), strict=True)]
    features, negatives = [row.features for row in rows], [row.negative for row in rows]
    sizes = picture_sizes(asked[0].width, asked[0].height, len(rows))  # (B, 3)
    shares = [row.guidance.rescale for row in rows]
    output = predict(drawer.network, x, times, features, negatives, scale, sizes, lines, shares)
    noise = fresh_noise(lines, [r.seed for r in asked], [row.step for row in rows], x)
    x, x0 = solver_step(x, output, x0, lines, noise)
    for i, row in enumerate(rows):
        row.x, row.x0, row.step = x[i], x0[i], row.step + 1


def finish_rows(rows: Sequence[Row]) -> None:
    """Decode rows that took their last step and hand over the pictures.

    Finiteness is checked here only: NaN and infinity never leave a row again, and a check at
    each step would make the device wait for the host.
    """
    x = torch.stack([row.x for row in rows])  # (B, C, h, w)
    finite = torch.isfinite(x).flatten(1).all(dim=1).tolist()
    pictures = rows[0].version.drawer.autoencoder.decode(torch.nan_to_num(x))  # (B, H, W, 3)
    for row, picture, good in zip(rows, pictures, finite, strict=True):
        number = row.version.number
        if not good:
            fail(row, NonFiniteDrawing(f"version {number} drew non-finite latents"))
        elif _is_waited_for(row):
            row.future.set_result(Drawing(picture, row.request.seed, number))


def show_rows(
    rows: Sequence[Row], x0: Sequence[Tensor], indices: Sequence[int], observer: Observer
) -> None:
    """Decode what rows looked like (C, h, w) each, and show it to who still waits.

    A preview that fails is left out and the picture goes on: it was never promised.
    """
    wanted = [i for i, row in enumerate(rows) if not row.future.done()]
    if not wanted:
        return
    began = time.monotonic()
    try:
        latents = torch.nan_to_num(torch.stack([x0[i] for i in wanted]))  # (B, C, h, w)
        pictures = rows[0].version.drawer.autoencoder.decode(latents)  # (B, H, W, 3)
        observer.decoded("preview", time.monotonic() - began)
        for i, picture in zip(wanted, pictures, strict=True):
            row = rows[i]
            assert row.on_preview is not None
            row.on_preview(Preview(picture, row.request.seed, row.version.number, indices[i]))
            if indices[i] == 0:
                observer.previewed(time.monotonic() - row.asked_at)
    except Exception:
        _LOG.exception("a preview failed")


def isolate(items: list[Item], work: Callable[[list[Item]], object]) -> list[Item]:
    """Do ``work`` on all items at once or, if that raises, one by one: only the bad ones fail.

    Returns the others. This is the engine's fence: whatever a row does, the thread lives.
    """
    if not items:
        return []
    try:
        work(items)
    except Exception as error:
        if len(items) > 1:
            return [item for item in items if isolate([item], work)]
        fail(items[0], error)
        return []
    return items


def was_cancelled(ticket: Ticket) -> bool:
    """Whether its future was cancelled; whoever waits on a cancelled future is told here."""
    return ticket.future.cancelled() and not ticket.future.set_running_or_notify_cancel()


def fail(ticket: Ticket, error: Exception) -> None:
    """End its future in an EngineError or a ModelInputError; whatever else it was is logged."""
    if not isinstance(error, EngineError | ModelInputError):
        _LOG.error("a drawing failed", exc_info=error)
        failure = DrawingFailed(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        error = failure
    if _is_waited_for(ticket):
        ticket.future.set_exception(error)


def _is_waited_for(ticket: Ticket) -> bool:
    """Whether its future is to be ended now: it was neither cancelled nor given up."""
    future = ticket.future
    given_up = future.done() and not future.cancelled()
    return not given_up and future.set_running_or_notify_cancel()
