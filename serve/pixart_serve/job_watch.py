"""What there is to do for jobs: which part nobody draws, which leases are lost, what has expired.

It reads the storage, so its methods are called on threads: ``look`` and ``take`` in turn, the
others at any time.
"""

import math
import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace

from pixart_serve.job_store import END, Ending, Entry, Fault, Job, JobStore, Lease, UnreadableOrder

_MAX_LOST = 10  # replicas, over one part, before that is held against its job
_State = Mapping[str, str]  # tags of state files by name


class JobWatch:
    """One replica's view of all jobs, and the leases it holds."""

    def __init__(
        self,
        store: JobStore,
        lease_seconds: float,
        keep_seconds: float,
        knows_key: Callable[[str], bool] | None,
    ) -> None:
        """With ``knows_key`` jobs of other keys fail."""
        self._store, self._knows_key = store, knows_key
        self._lease_seconds, self._keep_seconds = lease_seconds, keep_seconds
        self._held: set[Lease] | None = set()  # None at the end
        self._leasing = threading.Lock()  # a lease must not be renewed when it was released
        self._beat = 0
        self._going: list[tuple[Job, _State]] = []  # unfinished jobs, oldest first
        self._orders: dict[str, Job] = {}  # the same, by token
        self._expiries: dict[str, float] = {}  # in Unix seconds, of ended jobs, by token
        self._served: dict[str, float] = {}  # by owner: when a part was last taken
        self._watched: dict[str, tuple[str, float]] = {}  # by file: its tag, and since when
        self._trash: dict[str, float] = {}  # by token: since when it was seen

    def look(self) -> set[Lease]:
        """Look at all jobs: which of our leases are lost.

        Shows that the others live, ends what took too long, and forgets what has expired.
        """
        self._renew()
        keep, entries, held = self._keep_seconds, self._store.entries(), set(self._held or ())
        states: dict[str, tuple[Job, _State] | None] = {}
        for entry in entries:
            expiry = self._expiries.get(entry.token, entry.created / 1000 + 2 * keep)
            if time.time() > expiry:
                self._store.discard(entry)
            elif entry.token not in self._expiries:
                with suppress(UnreadableOrder):
                    states[entry.token] = self._inspect(entry)
        self._going = [found for found in states.values() if found]
        tokens, now = {entry.token for entry in entries}, time.monotonic()
        lost = {lease for lease in held if _is_lost(lease, tokens, states)}
        self._orders = {job.token: job for job, _ in self._going}
        self._expiries = {t: at for t, at in self._expiries.items() if t in tokens}
        oldest = now - 4 * self._lease_seconds
        self._watched = {f: seen for f, seen in self._watched.items() if seen[1] > oldest}
        return lost

    def take(self) -> Lease | None:
        """A part of a job that nobody draws, as of the last look."""
        held = set(self._held or ())
        owners = [lease.job.entry.owner for lease in held]

        def turn(found: tuple[Job, _State]) -> tuple[int, float]:
            owner = found[0].entry.owner
            return owners.count(owner), self._served.get(owner, 0.0)

        for job, state in sorted(self._going, key=turn):
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

    def release(self, lease: Lease) -> None:
        """Let others have the part at once."""
        with self._leasing:
            if self._held and lease in self._held:
                self._held.remove(lease)
                self._store.release(lease)

    def close(self) -> None:
        """Release what is held, and take no more."""
        with self._leasing:
            held, self._held = self._held or (), None
            for lease in held:
                self._store.release(lease)

    def erase(self) -> None:
        """Erase forgotten work that was there before, so that nobody still writes to it."""
        now = time.monotonic()
        self._trash = {token: self._trash.get(token, now) for token in self._store.trash()}
        for token, since in self._trash.items():
            if now > since + self._lease_seconds:
                self._store.erase(token)

    def _inspect(self, entry: Entry) -> tuple[Job, _State] | None:
        """The job and its state, None if it has ended or is not there."""
        job = self._orders.get(entry.token) or self._store.find(entry.owner, entry.id)
        if job is None or job.token != entry.token:  # deleted, or its creator has not come so far
            if self._stands_still(entry.file, ""):
                self._store.discard(entry)
            return None
        state, keep = self._store.state(job), self._keep_seconds
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

    def _renew(self) -> None:
        self._beat += 1
        with self._leasing:
            for lease in self._held or ():
                self._store.renew(lease, self._beat)

    def _stands_still(self, file: str, tag: str) -> bool:
        """Whether a file has been seen with this very tag for as long as a lease."""
        seen, since = self._watched.get(file, ("", math.inf))
        if since == math.inf or seen != tag:
            self._watched[file] = tag, time.monotonic()
            return False
        return time.monotonic() > since + self._lease_seconds

    def _take(self, lease: Lease) -> bool:
        with self._leasing:
            if self._held is None or not self._store.take(lease):
                return False
            self._held.add(lease)
            return True

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
