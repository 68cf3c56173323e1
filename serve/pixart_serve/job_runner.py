"""Drawing what jobs ask for, beside the requests that somebody waits for.

Every replica runs one. It looks through the jobs every second or two, takes a part that nobody
draws (of the owner who waited longest, then of the oldest job), and gives its pictures to the
engine a few at a time. They take at most half of a batch's rows, and only rows that are free, so a
request finds room at the next step; while there is none, one picture at a time goes on, so a job
moves under any load. It waits likewise while its key has less than half a minute's units left. A
part is let go when its job has ended, when another replica has taken it over, when its key cannot
pay for a while, and when this replica closes, so that others can go on at once.
"""

import asyncio
import logging
import math
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pixart_models.config import ModelInputError
from pixart_platform.errors import StorageError
from pixart_serve.contract import ApiError
from pixart_serve.engine import Drawing, DrawingFailed, DrawRequest, QueueFull
from pixart_serve.job_store import (
    END,
    Ending,
    Entry,
    Fault,
    Job,
    JobStore,
    Lease,
    UnreadableOrder,
)
from pixart_serve.orders import Order, OrderDesk, translate
from pixart_serve.service import DrawingService
from pixart_serve.settings import ServeSettings
from pixart_serve.usage import Account, Accounts, caller, cost_of

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 2.0  # between looks at the jobs, which take a listing each
_ROOM_SECONDS = 0.05  # between looks for free rows; about a step
_PATIENCE = 10  # looks at what a key can spare before its part is let go
_MAX_PARTS = 2  # while the last pictures of one are drawn, the next one begins
_MAX_LOST = 10  # replicas, over one part, before that is held against its job
_THREADS = 8
_State = Mapping[str, str]  # tags of state files by name
_Result = TypeVar("_Result")


class JobRunner:
    """Draws the jobs of a store while ``run`` does."""

    def __init__(
        self,
        store: JobStore,
        service: DrawingService,
        desk: OrderDesk,
        settings: ServeSettings,
        accounts: Accounts | None,
        knows_key: Callable[[str], bool] | None,
    ) -> None:
        """``accounts`` pay for what is drawn; with ``knows_key`` jobs of other keys fail."""
        self._store, self._service, self._desk, self._settings = store, service, desk, settings
        self._accounts, self._knows_key = accounts, knows_key
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="jobs")
        self._changed, self._freed = asyncio.Event(), asyncio.Event()
        self._parts: dict[Lease, asyncio.Task[None]] = {}
        self._num_rows = 0  # of all parts, in the engine or on their way
        self._num_storing = 0  # pictures
        self._beat = 0
        self._leases: set[Lease] | None = set()  # what is to be released; None at the end
        self._leasing = threading.Lock()  # a lease must not be renewed when it was released
        # The rest belongs to the thread that looks.
        self._orders: dict[str, Job] = {}  # unfinished, by token
        self._expiries: dict[str, float] = {}  # in Unix seconds, of ended jobs, by token
        self._served: dict[str, float] = {}  # by owner: when a part was last taken
        self._watched: dict[str, tuple[str, float]] = {}  # by file: its tag, and since when
        self._trash: dict[str, float] = {}  # by token: since when it was seen

    def wake(self) -> None:
        """Look at the jobs now: there is a new one."""
        self._changed.set()

    def stop(self, job: Job) -> None:
        """Drop what is drawn here of a job that has ended."""
        for lease, part in self._parts.items():
            if lease.job.token == job.token:
                part.cancel()

    async def run(self) -> None:
        """Until this is cancelled; then what is in flight is dropped, and others may go on."""
        lease_seconds = self._settings.job_lease_seconds
        try:
            async with asyncio.TaskGroup() as group:
                look_seconds = min(_LOOK_SECONDS, lease_seconds / 4)
                group.create_task(self._repeat(self._look, look_seconds, self._changed))
                group.create_task(self._repeat(self._erase, lease_seconds / 2, asyncio.Event()))
        finally:
            for part in self._parts.values():
                part.cancel()
            await asyncio.gather(*self._parts.values(), return_exceptions=True)
            await self._on_thread(self._close)
            self._threads.shutdown(wait=False)

    async def _repeat(
        self, work: Callable[[], Awaitable[None]], seconds: float, at_once: asyncio.Event
    ) -> None:
        """The fence: what goes wrong is logged, once, and tried again."""
        before = ""
        while True:
            at_once.clear()
            trouble = ""
            try:
                await work()
            except Exception as error:
                trouble = f"{type(error).__name__}: {error}"
                if trouble != before:
                    _LOG.exception("cannot look after the jobs; trying again")
            before = trouble
            await _wait(at_once, seconds)

    def _on_thread(self, work: Callable[..., _Result], *args: Any) -> asyncio.Future[_Result]:
        """Storage may take minutes to fail, and the loop's own threads are for requests."""
        return asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    async def _look(self) -> None:
        """Let go of the parts that are lost, and take one if there is one."""
        going, lost = await self._on_thread(self._survey, list(self._parts))
        for lease in lost & self._parts.keys():
            self._parts[lease].cancel()
        if len(self._parts) < _MAX_PARTS:
            taken: Lease | None = await self._on_thread(self._take_any, going, list(self._parts))
            if taken:
                self._parts[taken] = part = asyncio.ensure_future(self._attend(taken))
                part.add_done_callback(lambda _: self._leave(taken))
                self._changed.set()  # there may be another

    def _leave(self, lease: Lease) -> None:
        part = self._parts.pop(lease)
        if not part.cancelled() and (error := part.exception()):
            _LOG.error("%s, part %d was let go", lease.job.id, lease.part, exc_info=error)
        self._changed.set()

    def _take(self, lease: Lease) -> bool:
        with self._leasing:
            if self._leases is None or not self._store.take(lease):
                return False
            self._leases.add(lease)
            return True

    def _renew(self, leases: Sequence[Lease]) -> None:
        self._beat += 1
        with self._leasing:
            for lease in leases:
                if self._leases and lease in self._leases:
                    self._store.renew(lease, self._beat)

    def _release(self, lease: Lease) -> None:
        with self._leasing:
            if self._leases and lease in self._leases:
                self._leases.remove(lease)
                self._store.release(lease)

    def _close(self) -> None:
        """Release what was taken while nobody waited for it any more."""
        with self._leasing:
            leases, self._leases = self._leases or (), None
            for lease in leases:
                self._store.release(lease)

    def _survey(self, held: Sequence[Lease]) -> tuple[list[tuple[Job, _State]], set[Lease]]:
        """The unfinished jobs, oldest first, and which of our leases are lost.

        Shows that the others live, ends what took too long, and forgets what has expired.
        """
        self._renew(held)
        keep, entries = self._settings.job_keep_seconds, self._store.entries()
        states: dict[str, tuple[Job, _State] | None] = {}
        for entry in entries:
            expiry = self._expiries.get(entry.token, entry.created / 1000 + 2 * keep)
            if time.time() > expiry:
                self._store.discard(entry)
            elif entry.token not in self._expiries:
                with suppress(UnreadableOrder):
                    states[entry.token] = self._inspect(entry)
        going = [found for found in states.values() if found]
        tokens, now = {entry.token for entry in entries}, time.monotonic()
        lost = {lease for lease in held if _is_lost(lease, tokens, states)}
        self._orders = {job.token: job for job, _ in going}
        self._expiries = {t: at for t, at in self._expiries.items() if t in tokens}
        oldest = now - 4 * self._settings.job_lease_seconds
        self._watched = {f: seen for f, seen in self._watched.items() if seen[1] > oldest}
        return going, lost

    def _inspect(self, entry: Entry) -> tuple[Job, _State] | None:
        """The job and its state, None if it has ended or is not there."""
        job = self._orders.get(entry.token) or self._store.find(entry.owner, entry.id)
        if job is None or job.token != entry.token:  # deleted, or its creator has not come so far
            if self._stands_still(entry.file, ""):
                self._store.discard(entry)
            return None
        state, keep = self._store.state(job), self._settings.job_keep_seconds
        if END not in state:
            if time.time() > job.created / 1000 + keep:
                fault = Fault(code="expired", message=f"it was not done within {keep:g} s")
            elif job.account and self._knows_key and not self._knows_key(job.account):
                fault = Fault(code="key_revoked", message="the key that made it is gone")
            else:
                return job, state
            self._store.end(job, Ending(status="failed", at=time.time(), error=fault))
        self._expiries[entry.token] = self._store.ending(job).at + keep
        return None

    def _stands_still(self, file: str, tag: str) -> bool:
        """Whether a file has been seen with this very tag for as long as a lease."""
        seen, since = self._watched.get(file, ("", math.inf))
        if since == math.inf or seen != tag:
            self._watched[file] = tag, time.monotonic()
            return False
        return time.monotonic() > since + self._settings.job_lease_seconds

    def _take_any(self, going: Sequence[tuple[Job, _State]], held: Sequence[Lease]) -> Lease | None:
        owners = [lease.job.entry.owner for lease in held]

        def turn(found: tuple[Job, _State]) -> tuple[int, float]:
            owner = found[0].entry.owner
            return owners.count(owner), self._served.get(owner, 0.0)

        for job, state in sorted(going, key=turn):
            ours = {lease.part for lease in held if lease.job.token == job.token}
            lease = self._next_lease(job, state, ours)
            if lease and lease.number > _MAX_LOST:
                message = f"{_MAX_LOST} replicas were lost over the same part of it"
                fault = Fault(code="abandoned", message=message)
                self._store.end(job, Ending(status="failed", at=time.time(), error=fault))
            elif lease and self._take(lease):
                self._served[job.entry.owner] = time.monotonic()
                return lease
        return None

    def _next_lease(self, job: Job, state: _State, ours: Collection[int]) -> Lease | None:
        """For the first part of a job that nobody draws."""
        for part in range(job.num_parts):
            if part in ours or f"{part:04d}.done" in state:
                continue
            lease = Lease(job, part, _newest(part, state) + 1, secrets.token_hex(12))
            before = replace(lease, number=lease.number - 1)
            tag = state.get(before.name)
            if tag is None or self._stands_still(before.file, tag):
                return lease
        return None

    async def _erase(self) -> None:
        """Erase forgotten work once nobody can still be writing to it."""
        now = time.monotonic()
        found = await self._on_thread(self._store.trash)
        self._trash = {token: self._trash.get(token, now) for token in found}
        for token, since in self._trash.items():
            if now > since + self._settings.job_lease_seconds:
                await self._on_thread(self._store.erase, token)

    async def _attend(self, lease: Lease) -> None:
        """The fence around a part: it is done, or its job failed, or somebody may try again."""
        job = lease.job
        try:
            try:
                await self._draw(lease)
            except StorageError as error:
                _LOG.warning("%s, part %d is left for later: %s", job.id, lease.part, error)
                await asyncio.sleep(_LOOK_SECONDS)
            except Exception as error:
                answer = translate(error)
                if answer.retry_after_seconds is None:
                    ending = Ending(status="failed", at=time.time(), error=_fault_of(answer))
                    await self._on_thread(self._store.end, job, ending)
                else:
                    await asyncio.sleep(answer.retry_after_seconds)
        finally:
            await self._on_thread(self._release, lease)

    async def _draw(self, lease: Lease) -> None:
        """Raises what keeps a whole part from being drawn."""
        job = lease.job
        account = self._accounts.of(job.account) if self._accounts and job.account else None
        caller.set(account)  # in the context of this task and those it starts
        order = await self._desk.judge(job.request)
        # Rows keep their version in memory; whoever waits for room must not.
        order = replace(order, served=replace(order.served, pinned=None))
        try:
            async with asyncio.TaskGroup() as group:
                for k in await self._on_thread(self._store.missing, lease):
                    request = order.wanted[k]
                    if account and not await _can_pay(account, request, order.served.grid):
                        return  # other jobs may have the place
                    await self._wait_for_room(request)
                    queued = await self._submit(job, request)
                    keeping = group.create_task(self._keep(order, job, k, queued))
                    keeping.add_done_callback(partial(_cancel, queued))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self._on_thread(self._store.finish, lease)

    async def _wait_for_room(self, request: DrawRequest) -> None:
        """Until the picture keeps nobody waiting."""
        while True:
            after = self._num_rows + request.num_rows
            free = self._service.num_free_rows()
            fits = after <= self._settings.max_rows // 2 and request.num_rows <= free
            if self._num_storing < _THREADS and (fits or not self._num_rows):
                return
            self._freed.clear()
            await _wait(self._freed, _ROOM_SECONDS)

    async def _submit(self, job: Job, request: DrawRequest) -> asyncio.Future[Drawing]:
        """Queue a picture. Raises what holds for all of the job's."""
        self._num_rows += request.num_rows
        try:
            while True:
                try:
                    served = await self._service.find(job.request.model)
                    queued = self._service.submit([request], served)[0]
                    break
                except QueueFull as full:
                    await asyncio.sleep(full.retry_after_seconds)
        except BaseException:
            self._free(request)
            raise
        queued.add_done_callback(lambda _: self._free(request))
        return queued

    def _free(self, request: DrawRequest) -> None:
        self._num_rows -= request.num_rows
        self._freed.set()

    async def _keep(self, order: Order, job: Job, k: int, queued: asyncio.Future[Drawing]) -> None:
        """Store a picture, or why there is none."""
        drawn = await _outcome(queued)
        self._num_storing += 1
        try:
            if isinstance(drawn, Fault):
                await self._on_thread(self._store.add, job, k, drawn)
            else:
                file = await _outcome(self._on_thread(order.file, drawn))
                await self._on_thread(self._store.add, job, k, file)
        finally:
            self._num_storing -= 1
            self._freed.set()


async def _outcome(work: asyncio.Future[_Result]) -> _Result | Fault:
    """What comes of a picture, or what is its own fault and not its job's."""
    try:
        return await work
    except (DrawingFailed, ModelInputError, ApiError) as error:
        return _fault_of(translate(error))


def _cancel(queued: asyncio.Future[Drawing], _: object) -> None:
    """For a task that may be cancelled before it begins to wait."""
    queued.cancel()


def _newest(part: int, state: _State) -> int:
    """The number of the newest lease of a part, 0 if it has none."""
    numbers = (name.partition(".") for name in state)
    return max((int(n) for p, _, n in numbers if p == f"{part:04d}" and n.isdecimal()), default=0)


def _is_lost(
    lease: Lease, tokens: Collection[str], states: Mapping[str, tuple[Job, _State] | None]
) -> bool:
    """Whether its job is gone or has ended, or another replica draws the part."""
    token = lease.job.token
    if token not in tokens:
        return True
    if token not in states:
        return False  # it could not be looked at
    found = states[token]
    return found is None or _newest(lease.part, found[1]) > lease.number


def _fault_of(answer: ApiError) -> Fault:
    error = answer.body["error"]
    return Fault(code=error["code"] or "failed", message=str(error["message"]))


async def _can_pay(account: Account, request: DrawRequest, grid: int) -> bool:
    """Whether the key can spare what the picture costs, now or in a moment."""
    cost = cost_of([request], grid)
    for _ in range(_PATIENCE):
        if account.has_spare(cost):
            return True
        await asyncio.sleep(_LOOK_SECONDS / _PATIENCE)
    return False


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Until it is set, but no longer than that."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):  # wait_for of 3.11 may swallow being cancelled
            await event.wait()
