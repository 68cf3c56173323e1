"""Pipelines as Ray jobs: ordered by name, followed, and gone on with when a driver is lost.

A run goes by its name. Each time it is submitted is an attempt (to Ray, ``pixart-NAME-3``), one at
a time: to submit what is under way is to follow it, and to submit what has ended is to go on with
it, as the pipeline itself finds what is done. Nothing of a run is on the submitter's machine but
the recipe, which travels with the job; passwords never do, the cluster's nodes have their own.
"""

import asyncio
import json
import logging
import os
import shlex
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from pixart_platform.errors import PixartError
from pixart_platform.recipe import digest_of
from pixart_platform.tracking import SUBMISSION, hide_password

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

    from pixart_cluster.recipe import FullRecipe

GIVEN, GIVEN_VARIABLE = "given:", "PIXART_RECIPE"  # a job's recipe, and where it finds it
_ADDRESS = "RAY_API_SERVER_ADDRESS"
_ID = "pixart-{}-{}"
_RUN, _ATTEMPT, _DIGEST = "pixart_run", "pixart_attempt", "pixart_digest"  # a job's metadata
_OWN_EXITS = range(1, 128)  # of a program that ended itself; signals are beyond, or negative
_POLL_SECONDS, _START_SECONDS, _STOP_SECONDS = 1.0, 120.0, 60.0
_PACKAGES = (
    "pixart_platform", "pixart_models", "pixart_jobs", "pixart_serve", "pixart_cluster",
)  # fmt: skip


class ClusterError(PixartError):
    """A cluster that does not answer or refuses, or a run that is not as asked."""


@dataclass(frozen=True)
class Order:
    """A pipeline to run: its recipe, where, and what it needs besides."""

    recipe: "FullRecipe"
    root: str
    """The run's folder on the cluster, which all nodes share."""
    registry: str = ""
    """MLflow's address; empty, what the nodes' environment says, else the run's folder."""
    driver_nodes: Mapping[str, str] | None = None
    """Labels of the node of the driver; left out, the head."""
    ships_code: bool = False
    """Whether this checkout's packages travel along, instead of those on the nodes."""

    def __post_init__(self) -> None:
        if not self.root.startswith("/"):
            raise ClusterError(
                f"--runs: {self.root} is not absolute; name a folder that all nodes share"
            )
        if hide_password(self.registry) != self.registry:
            raise ClusterError(
                "--registry: the password would be seen by all who see the job; leave it out, and "
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the nodes"
            )

    @property
    def entrypoint(self) -> str:
        command = ["python", "-m", "pixart_cluster.cli", "run", GIVEN, "--root", self.root]
        return shlex.join([*command, *(["--registry", self.registry] if self.registry else [])])

    @property
    def digest(self) -> str:
        return digest_of({"recipe": self.recipe.model_dump(mode="json"), "does": self.entrypoint})


@dataclass(frozen=True)
class Attempt:
    """One submission of a run, as Ray sees it now."""

    run: str
    number: int
    digest: str
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    exit_code: int | None
    started: float
    """Unix seconds; 0 before."""
    ended: float

    @property
    def id(self) -> str:
        return _ID.format(self.run, self.number)

    @property
    def has_ended(self) -> bool:
        return self.state in ("STOPPED", "SUCCEEDED", "FAILED")

    @property
    def is_lost(self) -> bool:
        """Whether it ended by no doing of its own: its node or its process was taken away."""
        return self.state == "FAILED" and self.exit_code not in _OWN_EXITS

    @property
    def seconds(self) -> float:
        return (self.ended or time.time()) - self.started if self.started else 0.0

    def describe(self, last_line: str = "") -> str:
        """What a person wants to know."""
        attempt = f"attempt {self.number}"
        after = f"after {_duration(self.seconds)}"
        said = f": {last_line}" if last_line else ""
        if self.state == "PENDING":
            return f"waiting to start ({attempt}): {self.message}"
        if self.state == "RUNNING":
            return f"under way for {_duration(self.seconds)} ({attempt}){said}"
        if self.state == "SUCCEEDED":
            return f"done {after} ({attempt})"
        if self.state == "STOPPED":
            return f"stopped {after} ({attempt}); submit it again to go on"
        if self.is_lost:
            why = self.message.partition("\n")[0]
            return f"lost its driver {after} ({attempt}): {why}; submit it again to go on"
        return f"failed {after} with exit code {self.exit_code} ({attempt}){said}"


class Cluster:
    """A Ray cluster by its Jobs API. Raises ClusterError where it cannot be asked."""

    def __init__(self, address: str = "") -> None:
        from ray.job_submission import JobSubmissionClient

        self.address = address or os.environ.get(_ADDRESS, "")
        if "://" not in self.address:
            raise ClusterError(
                f"--address {self.address or '(none)'}: no cluster is named; give "
                f"http://HEAD:8265, or set {_ADDRESS}; `pixart up` starts one here"
            )
        os.environ[_ADDRESS] = self.address  # goes before what Ray's client is told
        for handler in logging.getLogger("ray").handlers:
            handler.setLevel(logging.WARNING)  # not of every upload
        with self._asked():
            self._client = JobSubmissionClient(self.address)

    @contextmanager
    def _asked(self) -> Iterator[None]:
        import requests
        from ray.exceptions import AuthenticationError

        try:
            yield
        except (AuthenticationError, requests.RequestException, OSError, RuntimeError) as error:
            told = str(error).strip()
            if isinstance(error, AuthenticationError) or "401" in told or "403" in told:
                raise ClusterError(
                    f"Ray at {self.address} refuses: no token, or another one; set "
                    f"RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
                ) from error
            raise ClusterError(
                f"Ray at {self.address} cannot be asked: {told.splitlines()[0]}"
            ) from error

    def attempts(self, run: str = "") -> list[Attempt]:
        """Of one run, or of all, oldest first."""
        with self._asked():
            found = [_attempt(job) for job in self._client.list_jobs()]
        mine = [a for a in found if a is not None and run in ("", a.run)]
        return sorted(mine, key=lambda attempt: (attempt.run, attempt.number))

    def latest(self, run: str) -> Attempt:
        """Raises ClusterError for a run that was never submitted."""
        if not (found := self.attempts(run)):
            known = ", ".join(sorted({a.run for a in self.attempts()}))
            raise ClusterError(
                f"run {run!r} was never submitted to {self.address}"
                + (f"; it knows {known}" if known else "")
            )
        return found[-1]

    def submit(self, order: Order) -> tuple[Attempt, bool]:
        """The run's attempt under way, and whether it is a new one.

        Raises ClusterError if one of another recipe is under way.
        """
        name = order.recipe.name
        earlier = self.attempts(name)
        under_way = [a for a in earlier if not a.has_ended]
        if not under_way:
            number = earlier[-1].number + 1 if earlier else 1
            try:
                self._start(order, number)
            except ClusterError:  # whoever asked at the same moment was first
                if not any(a.number == number for a in self.attempts(name)):
                    raise
                return self.submit(order)
            return self.latest(name), True
        if under_way[-1].digest != order.digest:
            raise ClusterError(
                f"run {name!r} is under way with another recipe ({under_way[-1].id}); stop it with "
                f"`pixart stop {name}`, or set another name"
            )
        return under_way[-1], False

    def _start(self, order: Order, number: int) -> None:
        name = order.recipe.name
        told = {_RUN: name, _ATTEMPT: str(number), _DIGEST: order.digest}
        document = yaml.safe_dump(order.recipe.model_dump(mode="json"), sort_keys=False)
        variables = {
            SUBMISSION: _ID.format(name, number), GIVEN_VARIABLE: document, "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        environment: dict[str, Any] = {"env_vars": variables}
        if order.ships_code:
            environment["py_modules"] = _package_folders()
        with self._asked():
            submit_when_ready(
                self._client,
                entrypoint=order.entrypoint,
                submission_id=_ID.format(name, number),
                runtime_env=environment,
                metadata=told,
                entrypoint_label_selector=dict(order.driver_nodes or {}) or None,
            )

    def stop(self, run: str) -> Attempt:
        """Stop what is under way of a run, and wait until it is."""
        attempt = self.latest(run)
        if attempt.has_ended:
            raise ClusterError(f"run {run!r} is not under way: {attempt.describe()}")
        with self._asked():
            self._client.stop_job(attempt.id)
        return self.wait(attempt, _STOP_SECONDS)

    def wait(self, attempt: Attempt, seconds: float) -> Attempt:
        """The attempt when it has ended, or after so many seconds."""
        deadline = time.monotonic() + seconds
        while not (now := self.look(attempt)).has_ended and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return now

    def look(self, attempt: Attempt) -> Attempt:
        """The same attempt now."""
        (now,) = [a for a in self.attempts(attempt.run) if a.number == attempt.number]
        return now

    def logs(self, attempt: Attempt) -> str:
        """All that its driver has said. Raises ClusterError where its node is gone."""
        with self._asked():
            return str(self._client.get_job_logs(attempt.id))

    def last_line(self, attempt: Attempt) -> str:
        """What its driver said last, or why that cannot be known."""
        try:
            lines = self.logs(attempt).strip().splitlines()
        except ClusterError:
            return "" if attempt.state == "PENDING" else "the node of its driver does not answer"
        return lines[-1].strip() if lines else ""

    def follow(self, attempt: Attempt) -> Iterator[str]:
        """What its driver says, from the beginning, until it has ended.

        Not before it has started: Ray then goes on reading on the head, where nothing is written.
        """
        import aiohttp

        num_told = 0
        while True:
            before = self.look(attempt)
            if before.state == "PENDING":
                time.sleep(_POLL_SECONDS)
                continue
            try:
                for text in self._tail(attempt, num_told):
                    num_told += len(text)
                    yield text
                is_whole = True
            except (RuntimeError, OSError, aiohttp.ClientError):  # a node, or a connection, is gone
                is_whole = False
            if before.has_ended or (is_whole and self.look(attempt).has_ended):
                return
            time.sleep(_POLL_SECONDS)

    def _tail(self, attempt: Attempt, skip: int) -> Iterator[str]:
        """The stream as it comes, without its first ``skip`` characters."""
        loop = asyncio.new_event_loop()
        stream = cast(AsyncGenerator[str], self._client.tail_job_logs(attempt.id))
        try:
            while True:
                text: str = loop.run_until_complete(anext(stream))
                if unseen := text[skip:]:
                    yield unseen
                skip = max(skip - len(text), 0)
        except StopAsyncIteration:
            return
        finally:
            loop.run_until_complete(stream.aclose())
            loop.close()


def run_to_end(cluster: Cluster, order: Order, retries: int) -> Iterator[str]:
    """Submit and follow; a driver that is lost is submitted again, ``retries`` times at most.

    Yields what the drivers say. Raises ClusterError unless it ends well.
    """
    while True:
        attempt, is_new = cluster.submit(order)
        yield f"{attempt.id}: {'submitted' if is_new else 'is under way already; following it'}\n"
        yield from cluster.follow(attempt)
        attempt = cluster.wait(attempt, _STOP_SECONDS)
        if attempt.state == "SUCCEEDED":
            return
        if not attempt.is_lost or not retries:
            raise ClusterError(f"{attempt.run}: {attempt.describe()}")
        retries -= 1
        yield f"{attempt.run}: {attempt.describe()}; submitting it\n"


def as_json(attempt: Attempt, last_line: str = "") -> str:
    """For programs, one line."""
    fields = ("run", "number", "id", "state", "exit_code", "started", "ended", "is_lost", "message")
    return json.dumps({f: getattr(attempt, f) for f in fields} | {"last_line": last_line})


def _attempt(job: "JobDetails") -> Attempt | None:
    """None for a job that is not one of ours."""
    told = job.metadata or {}
    if _RUN not in told or not told.get(_ATTEMPT, "").isdigit():
        return None
    return Attempt(
        run=told[_RUN], number=int(told[_ATTEMPT]), digest=told.get(_DIGEST, ""),
        state=str(job.status), message=job.message or "", exit_code=job.driver_exit_code,
        started=(job.start_time or 0) / 1000, ended=(job.end_time or 0) / 1000,
    )  # fmt: skip


def _package_folders() -> list[str]:
    from importlib.util import find_spec

    specs = [find_spec(name) for name in _PACKAGES]
    return [str(Path(s.origin).parent) for s in specs if s and s.origin]


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"


def submit_when_ready(client: "JobSubmissionClient", **asked: Any) -> str:
    """Submit a job; its id. A cluster that has just started has no agent yet that takes jobs."""
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return client.submit_job(**asked)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(_POLL_SECONDS)
