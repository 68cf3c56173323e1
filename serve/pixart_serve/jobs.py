"""Drawing jobs over HTTP: many pictures of one prompt, ordered now and fetched when they are drawn.

    POST   /v1/images/jobs                  the body of a generation, n up to serve.max_job_pictures
    GET    /v1/images/jobs                  one's own jobs, newest first
    GET    /v1/images/jobs/ID               how far it is
    GET    /v1/images/jobs/ID/images/K      picture K of 0 to n - 1, drawn from seed + K
    POST   /v1/images/jobs/ID/cancel        ends a job; what is in flight stops at the next step
    DELETE /v1/images/jobs/ID               forgets a job that has ended, and its pictures

The shape is that of OpenAI's videos. A job is drawn by one version, the one that was chosen when it
was ordered, and belongs to the key that ordered it: to others it is not there. Any replica answers,
from storage. With an ``Idempotency-Key`` asking again gives the same job again. Keys pay for each
picture when it is drawn, so a job of an hour is paced by what its key may spend in a minute.
"""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from pixart_platform.errors import StorageError
from pixart_platform.recipe import digest_of
from pixart_platform.storage import open_folder
from pixart_serve.contract import ApiError, JobRequest, parse_job
from pixart_serve.job_runner import JobRunner
from pixart_serve.job_store import Ending, Fault, Job, JobStore, Progress, job_id, owner_of
from pixart_serve.orders import Order, OrderDesk
from pixart_serve.service import DrawingService
from pixart_serve.settings import ServeSettings
from pixart_serve.stream import read_body
from pixart_serve.usage import Accounts, caller, cost_of

_LOG = logging.getLogger(__name__)
JOBS = "/v1/images/jobs"
_KEY, _LIMIT = re.compile(r"[\x21-\x7e]{1,255}"), re.compile(r"[0-9]{1,3}")
LISTED, MAX_LISTED = 20, 100
_ANSWER_SECONDS = 30.0  # of storage, while somebody waits
_RETRY_AFTER_SECONDS = 5
_THREADS = 8
_Result = TypeVar("_Result")


class ImageJob(BaseModel):
    """A drawing job; times are in Unix seconds."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["image.job"] = "image.job"
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled"]
    created_at: int
    started_at: int | None
    completed_at: int | None
    """When it ended, however it did."""
    expires_at: int
    """When it fails if it has not ended by then; afterwards, when it and its pictures go."""
    progress: int
    """Of 0 to 100: the share of its pictures that were drawn or failed."""
    num_pictures: int
    num_done: int
    num_failed: int
    """Pictures that could not be drawn or were held back; asking for one tells why."""
    model: str
    model_version: int
    seed: int
    """Picture k is drawn from seed + k."""
    size: str
    output_format: str
    error: Fault | None


class ImageJobs:
    """What the routes do; without ``settings.jobs`` they say how to switch jobs on."""

    def __init__(
        self,
        service: DrawingService,
        desk: OrderDesk,
        settings: ServeSettings,
        accounts: Accounts | None,
        knows_key: Callable[[str], bool] | None,
    ) -> None:
        """As for JobRunner. Raises StorageError for a place that is none."""
        self._desk, self._settings = desk, settings
        self._store: JobStore | None = None
        self._runner: JobRunner | None = None
        if settings.jobs:
            self._store = JobStore(open_folder(settings.jobs))
            self._runner = JobRunner(self._store, service, desk, settings, accounts, knows_key)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="jobs-api")

    @asynccontextmanager
    async def running(self, _: FastAPI) -> AsyncIterator[None]:
        """Draw while the application is up."""
        if self._runner is None:
            yield
            return
        running = asyncio.ensure_future(self._runner.run())
        try:
            yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def create(self, body: bytes, key: str | None) -> tuple[ImageJob, bool]:
        """The job, and whether it was there already. Raises ApiError."""
        store = self._open_store()
        if key is not None and not _KEY.fullmatch(key):
            raise ApiError(
                400,
                f"Idempotency-Key: must be 1 to 255 visible ASCII characters, has {len(key)}",
                param="Idempotency-Key",
            )
        asked = parse_job(body)
        account = caller.get()
        name = account.name if account else None
        id_, digest = job_id(name, key), digest_of(asked.model_dump(exclude_none=True))
        found = await self._ask(store.find, owner_of(name), id_) if key else None
        if found is None:
            order = await self._judge(asked)
            job = _fix(order, id_, name, digest)
            found = await self._ask(store.create, job)
            if found.token == job.token:
                if self._runner:
                    self._runner.wake()
                return _describe(job, Progress(None, 0, 0, None), self._settings), False
        if found.digest != digest:
            raise ApiError(
                409,
                f"this Idempotency-Key was used for {found.id}, which was asked for otherwise; "
                f"use a new one for another job",
                param="Idempotency-Key",
                code="idempotency_key_reused",
            )
        return await self._look(store, found), True

    async def _judge(self, asked: JobRequest) -> Order:
        """Everything that can be refused before any work."""
        settings, account = self._settings, caller.get()
        if (asked.n or 1) > settings.max_job_pictures:
            raise ApiError(
                400, f"n = {asked.n}: a job has at most {settings.max_job_pictures}", param="n"
            )
        order = await self._desk.judge(asked)
        cost, one = (cost_of(some, order.served.grid) for some in (order.wanted, order.wanted[:1]))
        if settings.max_job_units and cost > settings.max_job_units:
            raise ApiError(
                400,
                f"the job costs {cost} units (rows x steps x image tokens), and one may cost "
                f"{settings.max_job_units}; ask for fewer or smaller pictures, or fewer steps",
                code="cost_limit_exceeded",
            )
        if account and 0 < account.units_per_minute < one:
            raise ApiError(
                400,
                f"each picture costs {one} units (rows x steps x image tokens) and this key has "
                f"{account.units_per_minute} a minute; ask for smaller pictures or fewer steps",
                code="cost_limit_exceeded",
            )
        owner = owner_of(account.name if account else None)
        entries = await self._ask(self._open_store().entries)
        if sum(entry.owner == owner for entry in entries) >= settings.max_jobs:
            raise ApiError(
                429,
                f"there are {settings.max_jobs} jobs already; delete some that have ended",
                code="too_many_jobs",
            )
        return order

    async def get(self, id_: str) -> ImageJob:
        store = self._open_store()
        return await self._look(store, await self._find(store, id_))

    async def list(self, limit: str, after: str | None) -> dict[str, Any]:
        """A page of one's own jobs, newest first, those after a job of that id."""
        store, owner = self._open_store(), _owner()
        if not (_LIMIT.fullmatch(limit) and 1 <= int(limit) <= MAX_LISTED):
            raise ApiError(400, f"limit = {limit[:20]!r}: must be 1 to {MAX_LISTED}", param="limit")
        own = [e.id for e in reversed(await self._ask(store.entries)) if e.owner == owner]
        if after is not None:
            if after not in own:
                raise ApiError(400, f"after = {after[:40]!r}: no job of yours", param="after")
            own = own[own.index(after) + 1 :]
        page = own[: int(limit)]
        looks = [self._look_if_there(store, owner, id_) for id_ in page]
        jobs = [job.model_dump() for job in await asyncio.gather(*looks) if job]
        return {"object": "list", "data": jobs, "has_more": len(own) > len(page)}

    async def picture(self, id_: str, number: str) -> tuple[bytes, str]:
        """A picture's file and its media type."""
        store = self._open_store()
        job = await self._find(store, id_)
        valid = number.isascii() and number.isdecimal() and len(number) < 8
        if not valid or int(number) >= job.num_pictures:
            raise ApiError(
                404, f"{id_} has pictures 0 to {job.num_pictures - 1}", code="picture_not_found"
            )
        found = await self._ask(store.picture, job, int(number))
        if isinstance(found, bytes):
            return found, f"image/{job.request.output_format or 'png'}"
        fault = found or Fault(code="picture_not_ready", message="it is not drawn (yet)")
        raise ApiError(404, f"picture {int(number)} of {id_}: {fault.message}", code=fault.code)

    async def cancel(self, id_: str) -> ImageJob:
        """End a job, unless it has ended."""
        store = self._open_store()
        job = await self._find(store, id_)
        await self._ask(store.end, job, Ending(status="cancelled", at=time.time()))
        if self._runner:
            self._runner.stop(job)
        return await self._look(store, job)

    async def delete(self, id_: str) -> dict[str, Any]:
        store = self._open_store()
        job = await self._find(store, id_)
        progress = await self._ask(store.progress, job)
        if progress.ending is None:
            raise ApiError(409, f"{id_} has not ended; cancel it first", code="job_not_ended")
        await self._ask(store.discard, job.entry)
        return {"id": id_, "object": "image.job", "deleted": True}

    def _open_store(self) -> JobStore:
        if self._store is None:
            raise ApiError(
                404,
                "this service keeps no jobs; start it with serve.jobs set to a folder or s3:// "
                "place that all its replicas see",
                code="jobs_not_kept",
            )
        return self._store

    async def _find(self, store: JobStore, id_: str) -> Job:
        job: Job | None = await self._ask(store.find, _owner(), id_)
        if job is None:
            raise ApiError(404, f"there is no job {id_[:40]!r}", code="job_not_found")
        return job

    async def _look(self, store: JobStore, job: Job) -> ImageJob:
        return _describe(job, await self._ask(store.progress, job), self._settings)

    async def _look_if_there(self, store: JobStore, owner: str, id_: str) -> ImageJob | None:
        job = await self._ask(store.find, owner, id_)
        return await self._look(store, job) if job else None

    async def _ask(self, work: Callable[..., _Result], *args: Any) -> _Result:
        """Ask the storage. Raises ApiError 503."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await loop.run_in_executor(self._threads, work, *args)
        except (StorageError, TimeoutError) as error:
            _LOG.warning("the storage of jobs failed: %s", error or "no answer in time")
            raise ApiError(
                503,
                "the storage of jobs does not answer",
                code="storage_unavailable",
                retry_after_seconds=_RETRY_AFTER_SECONDS,
            ) from error


def _owner() -> str:
    account = caller.get()
    return owner_of(account.name if account else None)


def _fix(order: Order, id_: str, account: str | None, digest: str) -> Job:
    """The job of an order, with all that was left open decided once and for all its pictures."""
    one = order.wanted[0]
    request = order.asked.model_dump() | {
        "model": f"{order.served.name}@{order.served.version}",
        "n": len(order.wanted),
        "size": f"{one.width}x{one.height}",
        "seed": one.seed,
        "num_inference_steps": one.steps,
        "guidance_scale": one.guidance,
        "guidance_interval": one.guidance_interval,
        "guidance_rescale": one.guidance_rescale,
    }
    return Job(
        id=id_,
        token=secrets.token_hex(12),
        created=int(time.time() * 1000),
        account=account,
        digest=digest,
        version=order.served.version,
        request=JobRequest(**request),
    )


def _describe(job: Job, progress: Progress, settings: ServeSettings) -> ImageJob:
    ending, request = progress.ending, job.request
    status = ending.status if ending else "queued" if progress.begun is None else "in_progress"
    since = ending.at if ending else job.created / 1000
    num_tried = progress.num_done + progress.num_failed
    return ImageJob(
        id=job.id,
        status=status,
        created_at=job.created // 1000,
        started_at=None if progress.begun is None else int(progress.begun),
        completed_at=int(ending.at) if ending else None,
        expires_at=int(since + settings.job_keep_seconds),
        progress=100 * num_tried // job.num_pictures,
        num_pictures=job.num_pictures,
        num_done=progress.num_done,
        num_failed=progress.num_failed,
        model=str(request.model).partition("@")[0],
        model_version=job.version,
        seed=request.seed or 0,
        size=str(request.size),
        output_format=request.output_format or "png",
        error=ending.error if ending else None,
    )


def add_jobs(app: FastAPI, jobs: ImageJobs, settings: ServeSettings) -> None:
    """The routes."""

    async def create_job(request: Request) -> JSONResponse:
        body = await read_body(request, settings.max_body_bytes)
        job, replayed = await jobs.create(body, request.headers.get("idempotency-key"))
        headers = {"Location": f"{JOBS}/{job.id}"}
        headers |= {"Idempotent-Replayed": "true"} if replayed else {}
        return JSONResponse(job.model_dump(), 202, headers=headers)

    async def list_jobs(request: Request) -> dict[str, Any]:
        asked = request.query_params
        return await jobs.list(asked.get("limit", str(LISTED)), asked.get("after"))

    async def get_job(id: str) -> dict[str, Any]:
        return (await jobs.get(id)).model_dump()

    async def get_picture(id: str, k: str) -> Response:
        file, media_type = await jobs.picture(id, k)
        return Response(file, media_type=media_type, headers={"X-Content-Type-Options": "nosniff"})

    async def cancel_job(id: str) -> dict[str, Any]:
        return (await jobs.cancel(id)).model_dump()

    async def delete_job(id: str) -> dict[str, Any]:
        return await jobs.delete(id)

    app.add_api_route(JOBS, create_job, methods=["POST"], status_code=202)
    app.add_api_route(JOBS, list_jobs, methods=["GET"])
    app.add_api_route(f"{JOBS}/{{id}}", get_job, methods=["GET"])
    app.add_api_route(f"{JOBS}/{{id}}", delete_job, methods=["DELETE"])
    app.add_api_route(f"{JOBS}/{{id}}/cancel", cancel_job, methods=["POST"])
    app.add_api_route(f"{JOBS}/{{id}}/images/{{k}}", get_picture, methods=["GET"])
