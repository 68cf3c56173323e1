"""The drawing engine: step-level continuous batching, in plain torch, on a thread of its own.

A *ticket* is a picture that waits, a *row* a picture being drawn. Between two network evaluations
("a step boundary") rows join and leave, so a short drawing never waits for a long one. One batch
holds rows of one size and one set of weights, at any timestep, step count, guidance or seed: the
network takes a timestep per row and the solver is a table line per row. Groups of rows take turns,
one step each. Text is encoded at admission and decoding is grouped by the step rows finish at.

It knows neither Ray nor HTTP: it must run, and be timed, where there is only torch.

Legend: B rows, C latent channels, h, w latent size, H, W pixels, L text tokens, Dt text width.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
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
from pixart_serve.prompts import PromptFeatures

_MAX_DECODED = 8  # pictures decoded together: the autoencoder's memory peak, not the network's
_LOG = logging.getLogger(__name__)


class EngineError(Exception):
    """Base of what the engine raises or puts into a future."""


class QueueFull(EngineError):
    """Too many pictures wait; ``retry_after_seconds`` says when a place is likely."""

    def __init__(self, num_waiting: int, retry_after_seconds: int) -> None:
        super().__init__(
            f"{num_waiting} pictures already wait; try again in {retry_after_seconds} s"
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

    Guidance acts at timesteps inside ``guidance_interval`` (low, high), of 0 (clean) to 1000.
    """

    prompt: str
    seed: int
    steps: int
    guidance: float
    width: int
    height: int
    negative_prompt: str = ""
    guidance_interval: tuple[float, float] = EVERYWHERE

    @property
    def num_rows(self) -> int:
        """Rows of the batch it may take at any step: guidance 1 needs no unconditional one."""
        return 1 if self.guidance == 1 else 2


@dataclass(frozen=True)
class Drawing:
    """A finished picture (H, W, 3) uint8, its seed, and the version that drew every step of it."""

    picture: NDArray[np.uint8]
    seed: int
    version: int


@dataclass(frozen=True, eq=False)
class LoadedVersion:
    """Weights in memory, the registry's number for them, and when they came (Unix seconds)."""

    number: int
    drawer: Drawer
    loaded_at: int = field(default_factory=lambda: int(time.time()))


@dataclass(eq=False)
class _Ticket:
    """A picture that waits. ``version`` is set when it must not be drawn by the live one."""

    request: DrawRequest
    future: "Future[Drawing]"
    version: LoadedVersion | None


@dataclass(eq=False)
class _Row(_Ticket):
    """A picture being drawn: x and x0 (C, h, w), features (L, Dt), steps taken so far."""

    version: LoadedVersion
    features: Tensor
    negative: Tensor
    guidance: Guidance
    schedule: Schedule
    x: Tensor
    x0: Tensor
    admitted_at: float
    step: int = 0


_Group = tuple[LoadedVersion, int, int]  # what may share a batch: weights, width, height
_Item = TypeVar("_Item", bound=_Ticket)


class DrawingEngine:
    """Draws what is submitted until it is closed. All public methods are thread-safe."""

    def __init__(self, *, max_rows: int, max_queued: int, stall_seconds: float = 60.0) -> None:
        """``max_rows`` (at least 2) bounds one batch, ``max_queued`` the pictures that wait;
        a turn that takes longer than ``stall_seconds`` counts as unhealthy."""
        assert max_rows >= 2, "a guided picture takes two rows"
        self._max_rows, self._max_queued, self._stall_seconds = max_rows, max_queued, stall_seconds
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._active: dict[_Group, list[_Row]] = {}  # the engine thread's own, in order of turns
        self._num_active = 0
        self._live: LoadedVersion | None = None
        self._closed = False
        self._busy_since: float | None = None
        self._picture_seconds = 1.0
        self._prompts = PromptFeatures()
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)
        self._thread.start()

    @property
    def live(self) -> LoadedVersion | None:
        """What new rows are drawn with."""
        return self._live

    def activate(self, version: LoadedVersion) -> None:
        """Begin new rows on ``version``; rows in flight finish on the weights they began with."""
        with self._changed:
            self._live = version

    def submit(self, request: DrawRequest) -> "Future[Drawing]":
        """Queue one picture. Raises QueueFull or NotReady."""
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[DrawRequest]) -> "list[Future[Drawing]]":
        """Queue all or none. Cancelling a future drops its row at the next step boundary.

        Futures end in a Drawing, in DrawingFailed, or in ModelInputError for a picture that the
        live version cannot draw. Raises QueueFull or NotReady.
        """
        with self._changed:
            if self._live is None:
                raise NotReady("no version is live yet")
            num_waiting = len(self._waiting) + len(requests)
            # The second bound: many sizes make many groups, each with rows of its own in flight.
            num_inside = num_waiting + self._num_active
            if num_waiting > self._max_queued or num_inside > self._max_queued + self._max_rows:
                raise QueueFull(len(self._waiting), self._retry_after_seconds())
            return self._enqueue([_Ticket(request, Future(), None) for request in requests])

    def try_out(self, version: LoadedVersion, request: DrawRequest) -> "Future[Drawing]":
        """Draw with ``version`` between the live one's rows, before it is activated.

        It passes the bound on the queue, or an overloaded engine could never be updated.
        """
        return self._enqueue([_Ticket(request, Future(), version)])[0]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of ``prompt`` to the live text encoder, untruncated. Raises NotReady."""
        if self._live is None:
            raise NotReady("no version is live yet")
        return self._prompts.count_tokens(self._live.drawer.text_encoder, prompt)

    def is_healthy(self) -> bool:
        """Whether the thread lives and its present turn is not stuck."""
        since = self._busy_since
        stuck = since is not None and time.monotonic() - since > self._stall_seconds
        return self._thread.is_alive() and not stuck

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Stop after the present turn and fail what is left with NotReady."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout_seconds)

    def _enqueue(self, tickets: list[_Ticket]) -> "list[Future[Drawing]]":
        with self._changed:
            if self._closed:
                raise NotReady("the drawing engine is closed")
            self._waiting.extend(tickets)
            self._changed.notify()
        return [ticket.future for ticket in tickets]

    def _retry_after_seconds(self) -> int:
        """Seconds until the queue has drained, at the pace of the last picture; 1 to 60."""
        batches = sum(ticket.request.num_rows for ticket in self._waiting) / self._max_rows
        return math.ceil(min(max(batches * self._picture_seconds, 1), 60))

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
                if self._closed:
                    break
                tickets = self._take_tickets()
            self._busy_since = time.monotonic()
            self._admit(tickets)
            self._take_turn()
            self._num_active = sum(map(len, self._active.values()))
            self._busy_since = None
        for ticket in [*self._waiting, *(row for rows in self._active.values() for row in rows)]:
            _fail(ticket, NotReady("the drawing engine was closed"))

    def _take_tickets(self) -> list[_Ticket]:
        """Drop what was cancelled, then take in order what fits; a full group lets others by."""
        for group, rows in list(self._active.items()):
            rows[:] = [row for row in rows if not _was_cancelled(row)]
            if not rows:
                del self._active[group]
        used = {g: sum(r.request.num_rows for r in rows) for g, rows in self._active.items()}
        taken: list[_Ticket] = []
        left: list[_Ticket] = []
        for ticket in self._waiting:
            if _was_cancelled(ticket):
                continue
            version = ticket.version or self._live
            assert version is not None, "submitting without a live version is refused"
            group = (version, ticket.request.width, ticket.request.height)
            total = used.get(group, 0) + ticket.request.num_rows
            if total <= self._max_rows:
                taken.append(replace(ticket, version=version))
            else:
                left.append(ticket)
                total = self._max_rows  # first in, first out: nobody passes it in its group
            used[group] = total
        self._waiting = left
        self._num_active += len(taken)
        return taken

    def _admit(self, tickets: list[_Ticket]) -> None:
        rows: list[_Row] = []
        _isolate(tickets, lambda some: rows.extend(self._begin(some)))
        for row in rows:
            group = (row.version, row.request.width, row.request.height)
            self._active.setdefault(group, []).append(row)

    def _begin(self, tickets: Sequence[_Ticket]) -> list[_Row]:
        """Rows at step 0. Raises ModelInputError when one cannot be drawn."""
        rows = []
        for version in dict.fromkeys(t.version for t in tickets):
            assert version is not None
            drawer, some = version.drawer, [t for t in tickets if t.version is version]
            prompts = [p for t in some for p in (t.request.prompt, t.request.negative_prompt)]
            features = self._prompts.encode(drawer.text_encoder, prompts)
            for ticket in some:
                request = ticket.request
                shape = drawer.latent_shape(request.width, request.height)
                x = initial_noise(request.seed, shape)  # (C, h, w)
                x = x.to(drawer.device, non_blocking=True)
                rows.append(
                    _Row(
                        request=request, future=ticket.future, version=version,
                        features=features[request.prompt],
                        negative=features[request.negative_prompt],
                        guidance=Guidance(request.guidance, request.guidance_interval),
                        schedule=build_schedule(
                            drawer.config.objective, request.steps, drawer.config.solver
                        ),
                        x=x, x0=torch.zeros_like(x), admitted_at=time.monotonic(),
                    )
                )  # fmt: skip
        return rows

    def _take_turn(self) -> None:
        """One step of the group that waited longest; it goes to the back of the line."""
        if not self._active:
            return
        group = next(iter(self._active))
        rows = _isolate(self._active.pop(group), _step)
        going = [row for row in rows if row.step < row.schedule.num_steps]
        if going:
            self._active[group] = going
        done = [row for row in rows if row.step == row.schedule.num_steps]
        for start in range(0, len(done), _MAX_DECODED):
            _isolate(done[start : start + _MAX_DECODED], _finish)
        if done:
            self._picture_seconds = time.monotonic() - done[0].admitted_at


def _step(rows: Sequence[_Row]) -> None:
    """Advance all rows one step; they change only if nothing was raised."""
    drawer, asked = rows[0].version.drawer, [row.request for row in rows]
    x = torch.stack([row.x for row in rows])  # (B, C, h, w)
    x0 = torch.stack([row.x0 for row in rows])  # (B, C, h, w)
    times = torch.stack([row.schedule.timesteps[row.step] for row in rows])  # (B,)
    lines = torch.stack([row.schedule.table[row.step] for row in rows])  # (B, 6)
    scale = [row.guidance.at(t) for row, t in zip(rows, times.tolist(), strict=True)]
    features, negatives = [row.features for row in rows], [row.negative for row in rows]
    sizes = picture_sizes(asked[0].width, asked[0].height, len(rows))  # (B, 3)
    output = predict(drawer.network, x, times, features, negatives, scale, sizes)
    noise = fresh_noise(lines, [r.seed for r in asked], [row.step for row in rows], x)
    x, x0 = solver_step(x, output, x0, lines, noise)
    for i, row in enumerate(rows):
        row.x, row.x0, row.step = x[i], x0[i], row.step + 1


def _finish(rows: Sequence[_Row]) -> None:
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
            _fail(row, NonFiniteDrawing(f"version {number} drew non-finite latents"))
        elif row.future.set_running_or_notify_cancel():
            row.future.set_result(Drawing(picture, row.request.seed, number))


def _isolate(items: list[_Item], work: Callable[[list[_Item]], object]) -> list[_Item]:
    """Do ``work`` on all items at once or, if that raises, one by one: only the bad ones fail.

    Returns the others. This is the engine's fence: whatever a row does, the thread lives.
    """
    if not items:
        return []
    try:
        work(items)
    except Exception as error:
        if len(items) > 1:
            return [item for item in items if _isolate([item], work)]
        _fail(items[0], error)
        return []
    return items


def _was_cancelled(ticket: _Ticket) -> bool:
    """Whether its future was cancelled; whoever waits on a cancelled future is told here."""
    return ticket.future.cancelled() and not ticket.future.set_running_or_notify_cancel()


def _fail(ticket: _Ticket, error: Exception) -> None:
    if not isinstance(error, EngineError | ModelInputError):
        _LOG.error("a drawing failed", exc_info=error)
        failure = DrawingFailed(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        error = failure
    if ticket.future.set_running_or_notify_cancel():
        ticket.future.set_exception(error)
