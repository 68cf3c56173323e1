"""Drawing jobs in storage: what was ordered, who draws which part, what is drawn, how it ended.

The state is a folder that all replicas see, so any of them answers and any goes on. Folders can
create a file once and no more than that, so whatever must happen once is a file of its own:

    index/CREATED.OWNER.ID.TOKEN        finds jobs, oldest first, without reading them
    orders/OWNER/ID.json                the order; a job is there if this is
    work/TOKEN/pictures/000017.png      a picture, whoever draws it first
    work/TOKEN/faults/000017.json       why there is none
    work/TOKEN/state/0002.0001          a lease: who draws part 2, for the first time
    work/TOKEN/state/{begun,0002.done,end.json}
    trash/TOKEN                         work to be erased

A lease is a file that its holder keeps changing. One that stays as it is for long enough, by the
clock of whoever watches it, is void, and the next number may be taken; no two clocks are compared.
Leases only save work: a holder that was asleep and draws on can neither change a picture nor an
end. The token is new with each order, so nothing of a deleted job turns up in one of the same id.
"""

import hashlib
import re
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from pixart_platform.errors import StorageError
from pixart_platform.storage import FileAbsent, Folder, delete_folder
from pixart_serve.contract import JobRequest

PART_PICTURES = 32  # what one replica takes at a time; others take the next ones
END = "end.json"
_ID = re.compile(r"imgjob_[0-9a-f]{24}")
_ENTRY = re.compile(r"(\d{14})\.([0-9a-f]{24})\.(imgjob_[0-9a-f]{24})\.([0-9a-f]{24})")


class UnreadableOrder(StorageError):
    """An order that this release did not write; those who did may go on with it."""


class Entry(NamedTuple):
    """A job as the index knows it; ``created`` is in Unix milliseconds."""

    created: int
    owner: str
    id: str
    token: str

    @property
    def file(self) -> str:
        return f"index/{self.created:014d}.{self.owner}.{self.id}.{self.token}"


class Job(BaseModel):
    """An order as it is stored; ``request`` leaves nothing open, not even the seed and version.

    ``account`` is the name of the key that made it; ``digest`` that of what was asked.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    token: str
    created: int
    account: str | None
    digest: str
    version: int
    request: JobRequest

    @property
    def entry(self) -> Entry:
        return Entry(self.created, owner_of(self.account), self.id, self.token)

    @property
    def num_pictures(self) -> int:
        return self.request.n or 1

    @property
    def num_parts(self) -> int:
        return -(-self.num_pictures // PART_PICTURES)

    def part(self, number: int) -> range:
        """The pictures of a part."""
        start = number * PART_PICTURES
        return range(start, min(start + PART_PICTURES, self.num_pictures))

    def file(self, name: str) -> str:
        return f"work/{self.token}/{name}"

    def picture_file(self, number: int) -> str:
        return self.file(f"pictures/{number:06d}.{self.request.output_format or 'png'}")

    def fault_file(self, number: int) -> str:
        return self.file(f"faults/{number:06d}.json")


class Fault(BaseModel):
    """Why a job or one of its pictures failed."""

    code: str
    message: str


class Ending(BaseModel):
    """How a job ended, decided once; ``at`` is in Unix seconds."""

    status: Literal["completed", "failed", "cancelled"]
    at: float
    error: Fault | None = None


@dataclass(frozen=True)
class Progress:
    """How far a job is; ``begun`` in Unix seconds."""

    begun: float | None
    num_done: int
    num_failed: int
    ending: Ending | None


@dataclass(frozen=True, eq=False)
class Lease:
    """The right to draw a part of a job, for the ``number``-th time; ``holder`` is unique."""

    job: Job
    part: int
    number: int
    holder: str

    @property
    def name(self) -> str:
        return f"{self.part:04d}.{self.number:04d}"

    @property
    def file(self) -> str:
        return self.job.file(f"state/{self.name}")


def owner_of(account: str | None) -> str:
    """The part of names that belongs to a key, or to all who come without one."""
    name = "no key" if account is None else f"key {account}"
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def job_id(account: str | None, idempotency_key: str | None) -> str:
    """The same for the same key of the same owner, new without one."""
    if idempotency_key is None:
        return f"imgjob_{secrets.token_hex(12)}"
    named = f"{owner_of(account)} {idempotency_key}"
    return f"imgjob_{hashlib.sha256(named.encode()).hexdigest()[:24]}"


class JobStore:
    """All jobs of a service. Every method may raise StorageError; none keeps anything in memory."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def create(self, job: Job) -> Job:
        """Store an order, or give back the one that has its id already."""
        entry = job.entry
        self._folder.create_once(entry.file, b"")  # first: a job that nobody finds would stay
        if self._folder.create_once(_order_file(entry), job.model_dump_json().encode()):
            if self._folder.find(entry.file) is None:  # we slept, it was taken for a leftover
                self._folder.create_once(entry.file, b"")
                self._folder.delete(f"trash/{job.token}")
            return job
        self._folder.delete(entry.file)
        found = self.find(entry.owner, entry.id)
        if found is None:
            raise StorageError(f"{entry.id} was deleted while it was ordered again; try again")
        return found

    def find(self, owner: str, id_: str) -> Job | None:
        """The job of an owner; ``id_`` may be anything."""
        if not _ID.fullmatch(id_):
            return None
        file = f"orders/{owner}/{id_}.json"
        try:
            return Job.model_validate_json(self._folder.read(file))
        except FileAbsent:
            return None
        except ValidationError:  # it would repeat the prompt
            raise UnreadableOrder(f"{self._folder.uri}/{file}: not as written here") from None

    def entries(self) -> list[Entry]:
        """What the index lists, oldest first; the orders of some may not be there."""
        names = (file.name.removeprefix("index/") for file in self._folder.walk("index/"))
        return [
            Entry(int(match[1]), match[2], match[3], match[4])
            for match in map(_ENTRY.fullmatch, names)
            if match
        ]

    def state(self, job: Job) -> dict[str, str]:
        """The names of a job's state files, with tags that change when they do."""
        start = job.file("state/")
        return {f.name.removeprefix(start): f.tag for f in self._folder.walk(start)}

    def progress(self, job: Job) -> Progress:
        names = {f.name.removeprefix(job.file("")) for f in self._folder.walk(job.file(""))}
        return Progress(
            float(self._folder.read(job.file("state/begun"))) if "state/begun" in names else None,
            sum(name.startswith("pictures/") for name in names),
            sum(name.startswith("faults/") for name in names),
            self.ending(job) if f"state/{END}" in names else None,
        )

    def ending(self, job: Job) -> Ending:
        """Raises FileAbsent for a job that goes on."""
        return Ending.model_validate_json(self._folder.read(job.file(f"state/{END}")))

    def end(self, job: Job, ending: Ending) -> None:
        """End a job this way, unless it has ended."""
        self._folder.create_once(job.file(f"state/{END}"), ending.model_dump_json().encode())

    def picture(self, job: Job, number: int) -> bytes | Fault | None:
        """A picture's file, or why there is none, or None until it was tried."""
        with suppress(FileAbsent):
            return self._folder.read(job.picture_file(number))
        with suppress(FileAbsent):
            return Fault.model_validate_json(self._folder.read(job.fault_file(number)))
        return None

    def add(self, job: Job, number: int, tried: bytes | Fault) -> None:
        """Keep a picture or why there is none, unless another replica has."""
        if isinstance(tried, Fault):
            self._folder.create_once(job.fault_file(number), tried.model_dump_json().encode())
        else:
            self._folder.create_once(job.picture_file(number), tried)

    def missing(self, lease: Lease) -> list[int]:
        """The pictures of a part that are still to be tried."""
        job = lease.job
        tried = {
            f.name for kind in ("pictures/", "faults/") for f in self._folder.walk(job.file(kind))
        }
        return [
            k for k in job.part(lease.part) if not {job.picture_file(k), job.fault_file(k)} & tried
        ]

    def take(self, lease: Lease) -> bool:
        """Whether the lease is ours now."""
        if not self._folder.create_once(lease.file, lease.holder.encode()):
            return False
        self._folder.create_once(lease.job.file("state/begun"), b"%f" % time.time())
        return True

    def renew(self, lease: Lease, beat: int) -> None:
        """Show that the holder lives; each ``beat`` is another number."""
        self._folder.write(lease.file, f"{lease.holder} {beat}".encode())

    def release(self, lease: Lease) -> None:
        """Let others have the part at once."""
        self._folder.delete(lease.file)

    def finish(self, lease: Lease) -> None:
        """All pictures of the part were tried; with the last part the job ends."""
        job = lease.job
        self._folder.create_once(job.file(f"state/{lease.part:04d}.done"), b"")
        if sum(name.endswith(".done") for name in self.state(job)) < job.num_parts:
            return
        ending = Ending(status="completed", at=time.time())
        if not self.progress(job).num_done and isinstance(fault := self.picture(job, 0), Fault):
            ending = Ending(status="failed", at=ending.at, error=fault)
        self.end(job, ending)

    def discard(self, entry: Entry) -> None:
        """Forget a job; its files are erased once nobody can still be writing some."""
        try:
            found = self.find(entry.owner, entry.id)
            ours = found is not None and found.token == entry.token
        except UnreadableOrder:
            ours = True
        if ours:
            self._folder.delete(_order_file(entry))
        self._folder.create_once(f"trash/{entry.token}", b"")
        self._folder.delete(entry.file)

    def trash(self) -> list[str]:
        """Tokens of the work to be erased."""
        return [file.name.removeprefix("trash/") for file in self._folder.walk("trash/")]

    def erase(self, token: str) -> None:
        delete_folder(self._folder / f"work/{token}", f"state/{END}")
        self._folder.delete(f"trash/{token}")


def _order_file(entry: Entry) -> str:
    return f"orders/{entry.owner}/{entry.id}.json"
