"""The drawing engine: step-level continuous batching, in plain torch, on threads of its own.

Between two network evaluations ("a step boundary") rows join and leave, so a short drawing never
waits for a long one. One batch holds rows of one size and one set of weights, at any timestep,
step count, guidance or seed. Groups of rows take turns, one step each. Text is encoded at
admission. Pictures and previews are decoded on a second thread while the next steps run, grouped
by the step that rows reached together: what shares a decoding never depends on timing.

It knows neither Ray nor HTTP: it must run, and be timed, where there is only torch.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch

from pixart_serve.forecast import Load, Pace, Promise, predict_seconds
from pixart_serve.observer import NOBODY, Observer
from pixart_serve.prompts import PromptFeatures
from pixart_serve.rows import (
    Drawing,
    DrawingFailed,
    DrawRequest,
    EngineError,
    LoadedVersion,
    NonFiniteDrawing,
    NotReady,
    Preview,
    QueueFull,
    Row,
    Ticket,
    TooLate,
    begin_rows,
    fail,
    finish_rows,
    isolate,
    show_rows,
    step_rows,
    was_cancelled,
)

__all__ = [
    "DrawRequest", "Drawing", "DrawingEngine", "DrawingFailed", "EngineError", "LoadedVersion",
    "NonFiniteDrawing", "NotReady", "Preview", "QueueFull", "TooLate",
]  # fmt: skip

_MAX_DECODED = 8  # pictures decoded together: the autoencoder's memory peak, not the network's

_Group = tuple[LoadedVersion, int, int]  # what may share a batch: weights, width, height
_Work = tuple[_Group, int, int]  # of one picture: its group, rows, and steps left


class DrawingEngine:
    """Draws what is submitted until it is closed. All public methods are thread-safe."""

    def __init__(
        self,
        *,
        max_rows: int,
        max_queued: int,
        stall_seconds: float = 60.0,
        observer: Observer = NOBODY,
    ) -> None:
        """``max_rows`` (at least 2) bounds one batch, ``max_queued`` the pictures that wait;
        a turn that takes longer than ``stall_seconds`` counts as unhealthy."""
        assert max_rows >= 2, "a guided picture takes two rows"
        self._max_rows, self._max_queued, self._stall_seconds = max_rows, max_queued, stall_seconds
        self._observer = observer
        self._changed = threading.Condition()
        self._waiting: list[Ticket] = []
        self._active: dict[_Group, list[Row]] = {}  # the engine thread's own, in order of turns
        self._in_flight: list[_Work] = []  # as of this turn, for threads that ask
        self._num_decoding = 0
        self._unfinished: set[Future[Drawing]] = set()
        self._live: LoadedVersion | None = None
        self._closed = False
        self._busy_since: dict[str, float] = {}  # by thread, while it works
        self._pace, self._decoding_pace, self._promise = Pace(), Pace(), Promise()
        self._prompts = PromptFeatures(observer=observer)
        self._decodings: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("drawing", self._run), ("decoding", self._run_decodings))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def live(self) -> LoadedVersion | None:
        """What new rows are drawn with."""
        return self._live

    def activate(self, version: LoadedVersion) -> None:
        """Begin new rows on ``version``; rows in flight finish on the weights they began with."""
        with self._changed:
            before, self._live = self._live, version
        self._observer.activated(version.number, swapped=before is not None)

    def submit(self, request: DrawRequest) -> "Future[Drawing]":
        """Queue one picture. Raises QueueFull or NotReady."""
        return self.submit_all([request])[0]

    def submit_all(
        self,
        requests: Sequence[DrawRequest],
        version: LoadedVersion | None = None,
        *,
        max_seconds: float = math.inf,
        on_preview: Callable[[Preview], None] | None = None,
    ) -> "list[Future[Drawing]]":
        """Queue all or none, for ``version`` or else for what is live when their turn comes.

        Cancelling a future drops its row at the next step boundary. Futures end in a Drawing, in
        DrawingFailed, or in ModelInputError for a picture that the version cannot draw.
        ``on_preview`` is called on the decoding thread, before the picture's own future ends.

        Raises QueueFull, NotReady, or TooLate if not all would be ready within ``max_seconds``.
        """
        with self._changed:
            if self._live is None:
                raise NotReady("no version is live yet")
            num_waiting = len(self._waiting) + len(requests)
            # The second bound: many sizes make many groups, each with rows of its own in flight.
            num_inside = num_waiting + len(self._in_flight) + self._num_decoding
            num_over = max(
                num_waiting - self._max_queued, num_inside - self._max_queued - self._max_rows
            )
            if num_over > 0:
                raise QueueFull(len(self._waiting), self._seconds_until_left(num_over))
            predicted, deadline = 0.0, time.monotonic() + max_seconds
            if max_seconds < math.inf:
                predicted = self._check_time(requests, version or self._live, max_seconds)
            tickets = [
                Ticket(r, Future(), version, on_preview, predicted=predicted, deadline=deadline)
                for r in requests
            ]
            futures = self._enqueue(tickets)
            self._unfinished.update(futures)
        for ticket in tickets:
            ticket.future.add_done_callback(partial(self._note_end, ticket))
        return futures

    def try_out(self, version: LoadedVersion, request: DrawRequest) -> "Future[Drawing]":
        """Draw with ``version`` between the live one's rows, before it is activated.

        It passes the bound on the queue, or an overloaded engine could never be updated.
        """
        return self._enqueue([Ticket(request, Future(), version, None)])[0]

    def count_tokens(self, prompt: str) -> int:
        """Tokens of ``prompt`` to the live text encoder, untruncated. Raises NotReady."""
        if self._live is None:
            raise NotReady("no version is live yet")
        return self._prompts.count_tokens(self._live.drawer.text_encoder, prompt)

    def queue_fullness(self) -> float:
        """The share, of 0 to 1, of the places in the queue that are taken."""
        return min(len(self._waiting) / self._max_queued, 1.0)

    def num_free_rows(self) -> int:
        """Rows of a batch that nobody draws or waits for."""
        with self._changed:
            waiting = sum(ticket.request.num_rows for ticket in self._waiting)
            drawing = sum(num_rows for _, num_rows, _ in self._in_flight)
        return max(self._max_rows - waiting - drawing, 0)

    def backlog_seconds(self) -> float:
        """How long the work that is here will take, at the pace measured so far."""
        with self._changed:
            return sum(
                load.turns(self._max_rows) * load.turn_seconds(self._pace, self._max_rows)
                for load in self._loads().values()
            )

    def is_healthy(self) -> bool:
        """Whether the threads live and nothing they do now is stuck."""
        oldest = min(self._busy_since.copy().values(), default=math.inf)
        stuck = time.monotonic() - oldest > self._stall_seconds
        return all(thread.is_alive() for thread in self._threads) and not stuck

    def give_up(self) -> None:
        """If it is stuck for good: tell those who wait with NotReady, and accept nobody."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        for future in list(self._unfinished):
            with suppress(InvalidStateError):  # it was finished, or cancelled, just now
                future.set_exception(NotReady("the drawing engine is stuck"))

    def close(self, timeout_seconds: float = 10.0) -> None:
        """Stop after the present turn, decode what is drawn, fail what is left with NotReady."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        for thread in self._threads:
            thread.join(timeout_seconds)

    def _enqueue(self, tickets: list[Ticket]) -> "list[Future[Drawing]]":
        with self._changed:
            if self._closed:
                raise NotReady("the drawing engine is closed")
            self._waiting.extend(tickets)
            self._changed.notify()
        return [ticket.future for ticket in tickets]

    def _note_end(self, ticket: Ticket, future: "Future[Drawing]") -> None:
        self._unfinished.discard(future)
        seconds = time.monotonic() - ticket.asked_at
        error = None if future.cancelled() else future.exception()
        if ticket.predicted and not error:
            self._promise.observe(ticket.predicted, seconds, is_over=not future.cancelled())
        if future.cancelled():
            self._observer.cancelled()
        elif error:
            self._observer.failed()
        else:
            self._observer.drawn(future.result().version, seconds)

    def _loads(self) -> dict[_Group, Load]:
        """The work that is here, by group."""
        loads: dict[_Group, Load] = {}
        for group, num_rows, steps in [*self._in_flight, *self._work_of(self._waiting)]:
            loads.setdefault(group, Load(group[1] * group[2])).add(num_rows, steps)
        return loads

    def _work_of(self, tickets: Iterable[Ticket]) -> list[_Work]:
        return [(self._group(t), t.request.num_rows, t.num_steps_left) for t in tickets]

    def _group(self, ticket: Ticket) -> _Group:
        version = ticket.version or self._live
        assert version is not None, "submitting without a live version is refused"
        return version, ticket.request.width, ticket.request.height

    def _check_time(
        self, requests: Sequence[DrawRequest], version: LoadedVersion, max_seconds: float
    ) -> float:
        """Predicted seconds of the requests. Raises TooLate unless all would be ready in time."""
        pixels = requests[0].width * requests[0].height
        own = Load(pixels)
        for request in requests:
            assert request.width * request.height == pixels, "one size at a time"
            own.add(request.num_rows, request.steps)
        group = version, requests[0].width, requests[0].height
        now, alone = (
            predict_seconds(self._pace, self._max_rows, ahead, group, own)
            + self._decoding_pace.seconds(pixels * min(num_before + len(requests), _MAX_DECODED))
            for ahead, num_before in ((self._loads(), self._num_decoding), ({}, 0))
        )
        if alone > max_seconds:
            at_best = own.turns(self._max_rows) * self._pace.seconds(
                min(own.num_rows, self._max_rows) * pixels, at_best=True
            )
            later = None if at_best > max_seconds else max(math.ceil(now - alone), 1)
            raise TooLate(alone, max_seconds, later)
        promised = self._promise.multiple * now
        if promised > max_seconds and now > alone:  # with nothing ahead it is tried
            late = min(promised - max_seconds, now - alone)
            raise TooLate(promised, max_seconds, math.ceil(late))
        return now

    def _seconds_until_left(self, num_pictures: int) -> int:
        """Whole seconds until that many of the pictures in flight have left; at least 1."""
        steps_left = sorted(steps for _, _, steps in self._in_flight)
        if num_pictures > len(steps_left):
            return max(math.ceil(self.backlog_seconds()), 1)
        loads = self._loads().values()
        seconds = sum(load.turn_seconds(self._pace, self._max_rows) for load in loads)
        return max(math.ceil(steps_left[num_pictures - 1] * seconds), 1)

    @torch.inference_mode()
    def _run(self) -> None:
        ended = -math.inf
        while True:
            with self._changed:
                is_idle = not self._waiting and not self._active
                self._changed.wait_for(lambda: self._closed or self._waiting or self._active)
                if self._closed:
                    break
                tickets, late = self._take_tickets()
            self._refuse(late)
            self._busy_since["drawing"] = time.monotonic()
            began = self._busy_since["drawing"] if is_idle else ended
            self._admit(tickets)
            del tickets, late  # an idle thread must not keep a retired version in memory
            self._take_turn(began)
            with self._changed:
                self._in_flight = self._work_of(self._rows())
            del self._busy_since["drawing"]
            ended = time.monotonic()
        for ticket in [*self._waiting, *self._rows()]:
            fail(ticket, NotReady("the drawing engine was closed"))
        self._decodings.put(None)

    def _take_tickets(self) -> tuple[list[Ticket], list[tuple[Ticket, float]]]:
        """Drop what was cancelled, then take in order what fits; a full group lets others by.

        And what can no longer be ready in time, with the seconds it needs: work that has taken
        longer than was thought is not made longer by pictures that nobody will wait for.
        """
        for group, rows in list(self._active.items()):
            rows[:] = [row for row in rows if not was_cancelled(row)]
            if not rows:
                del self._active[group]
        used = {g: sum(r.request.num_rows for r in rows) for g, rows in self._active.items()}
        taken: list[Ticket] = []
        left: list[Ticket] = []
        late: list[tuple[Ticket, float]] = []
        now = time.monotonic()
        for ticket in self._waiting:
            if was_cancelled(ticket):
                continue
            group = self._group(ticket)
            total = used.get(group, 0) + ticket.request.num_rows
            num_pixels = min(total, self._max_rows) * group[1] * group[2]
            needed = ticket.num_steps_left * self._pace.seconds(num_pixels)
            if needed and now + needed > ticket.deadline:
                late.append((ticket, needed))
                continue
            if total <= self._max_rows:
                taken.append(replace(ticket, version=group[0]))
            else:
                left.append(ticket)
                total = self._max_rows  # first in, first out: nobody passes it in its group
            used[group] = total
        self._waiting = left
        self._in_flight = self._work_of([*self._rows(), *taken])
        return taken, late

    def _refuse(self, late: list[tuple[Ticket, float]]) -> None:
        for ticket, needed in late:
            left = max(ticket.deadline - time.monotonic(), 0.0)
            fail(ticket, TooLate(needed, left, max(math.ceil(self.backlog_seconds()), 1)))

    def _rows(self) -> list[Row]:
        return [row for rows in self._active.values() for row in rows]

    def _admit(self, tickets: list[Ticket]) -> None:
        rows: list[Row] = []
        isolate(tickets, lambda some: rows.extend(begin_rows(some, self._prompts)))
        for row in rows:
            group = (row.version, row.request.width, row.request.height)
            self._active.setdefault(group, []).append(row)
            self._observer.waited(self._busy_since["drawing"] - row.asked_at)

    def _take_turn(self, began: float) -> None:
        """One step of the group that waited longest; it goes to the back of the line.

        The pace is that of whole turns, so that waiting for a lock or a core counts.
        """
        if not self._active:
            return
        group, admitted = next(iter(self._active)), time.monotonic()
        rows = isolate(self._active.pop(group), step_rows)
        if going := [row for row in rows if row.num_steps_left]:
            self._active[group] = going
        num_rows = sum(row.request.num_rows for row in rows)
        if num_rows:
            now = time.monotonic()
            self._pace.observe(num_rows * group[1] * group[2], now - began)
            self._observer.stepped(group[1], group[2], num_rows, now - admitted)
        shown = [row for row in rows if row.on_preview and row.step in row.request.preview_steps]
        done = [row for row in rows if not row.num_steps_left]
        with self._changed:
            self._num_decoding += len(done)
        for start in range(0, len(shown), _MAX_DECODED):
            some = shown[start : start + _MAX_DECODED]
            indices = [row.request.preview_steps.index(row.step) for row in some]
            x0 = [row.x0 for row in some]
            self._decodings.put(partial(show_rows, some, x0, indices, self._observer))
        for start in range(0, len(done), _MAX_DECODED):
            self._decodings.put(partial(self._finish, done[start : start + _MAX_DECODED]))

    def _finish(self, rows: list[Row]) -> None:
        pixels = sum(row.request.width * row.request.height for row in rows)
        isolate(rows, finish_rows)
        seconds = time.monotonic() - self._busy_since["decoding"]
        self._decoding_pace.observe(pixels, seconds)
        self._observer.decoded("picture", seconds)
        with self._changed:
            self._num_decoding -= len(rows)

    @torch.inference_mode()
    def _run_decodings(self) -> None:
        while (decode := self._decodings.get()) is not None:
            self._busy_since["decoding"] = time.monotonic()
            decode()
            del decode, self._busy_since["decoding"]
