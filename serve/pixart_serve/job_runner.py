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
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pixart_models.config import ModelInputError
from pixart_platform.errors import StorageError
from pixart_serve.contract import ApiError
from pixart_serve.engine import Drawing, DrawingFailed, DrawRequest, QueueFull
from pixart_serve.job_store import Ending, Fault, Job, JobStore, Lease
from pixart_serve.job_watch import JobWatch
from pixart_serve.orders import Order, OrderDesk, translate
from pixart_serve.service import DrawingService
from pixart_serve.settings import ServeSettings
from pixart_serve.usage import Account, Accounts, caller, cost_of

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 2.0  # between looks at the jobs, which take a listing each
_ROOM_SECONDS = 0.05  # between looks for free rows; about a step
_PATIENCE = 10  # looks at what a key can spare before its part is let go
_MAX_PARTS = 2  # while the last pictures of one are drawn, the next one begins
_THREADS = 8
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
        self._accounts = accounts
        self._watch = JobWatch(
            store, settings.job_lease_seconds, settings.job_keep_seconds, knows_key
        )
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="jobs")
        self._changed, self._freed = asyncio.Event(), asyncio.Event()
        self._parts: dict[Lease, asyncio.Task[None]] = {}
        self._num_rows = 0  # of all parts, in the engine or on their way
        self._num_storing = 0  # pictures

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
            await self._on_thread(self._watch.close)
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
            except Exception as error:  # whatever it was: jobs are looked after to the end
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
        lost = await self._on_thread(self._watch.look)
        for lease in lost & self._parts.keys():
            self._parts[lease].cancel()
        if len(self._parts) < _MAX_PARTS:
            taken: Lease | None = await self._on_thread(self._watch.take)
            if taken:
                self._parts[taken] = part = asyncio.ensure_future(self._attend(taken))
                part.add_done_callback(lambda _: self._leave(taken))
                self._changed.set()  # there may be another

    async def _erase(self) -> None:
        await self._on_thread(self._watch.erase)

    def _leave(self, lease: Lease) -> None:
        part = self._parts.pop(lease)
        if not part.cancelled() and (error := part.exception()):
            _LOG.error("%s, part %d was let go", lease.job.id, lease.part, exc_info=error)
        self._changed.set()

    async def _attend(self, lease: Lease) -> None:
        """The fence around a part: it is done, or its job failed, or somebody may try again."""
        job = lease.job
        try:
            try:
                await self._draw(lease)
            except StorageError as error:
                _LOG.warning("%s, part %d is left for later: %s", job.id, lease.part, error)
                await asyncio.sleep(_LOOK_SECONDS)
            except Exception as error:  # what nobody foresaw fails the job, not the replica
                answer = translate(error)
                if answer.retry_after_seconds is None:
                    ending = Ending(status="failed", at=time.time(), error=_fault_of(answer))
                    await self._on_thread(self._store.end, job, ending)
                else:
                    await asyncio.sleep(answer.retry_after_seconds)
        finally:
            await self._on_thread(self._watch.release, lease)

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
        except ExceptionGroup as errors:  # one reason is enough to say why a part was let go
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
        except BaseException:  # being cancelled too; else the picture's end frees its rows
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
