"""Who draws how much: an account per API key, in units of what the network computes.

One unit is one row of one denoising step for one image token, so a big, guided, careful picture
costs what it costs and not "one request". A token bucket holds a minute's worth and refills
continuously. Each replica keeps its own books. All of it runs on the event loop.

Who is asking travels in a context variable: set where the key is checked, read where rows are
queued, so that nothing in between needs to know of keys.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from pixart_serve.access import note
from pixart_serve.contract import ApiError
from pixart_serve.engine import DrawRequest
from pixart_serve.observer import NOBODY, Observer


@dataclass
class Account:
    """One key's books; ``units_per_minute`` 0 means no limit, ``available`` is left in the bucket.

    What it spends and is refused is counted by the observer.
    """

    name: str
    units_per_minute: int
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    observer: Observer = field(default=NOBODY, repr=False)

    def __post_init__(self) -> None:
        self.available, self._filled_at = float(self.units_per_minute), self.clock()

    def take(self, cost: int) -> None:
        """Take ``cost`` out of the bucket. Raises ApiError 400 or 429."""
        limit = self.units_per_minute
        if not limit:
            return
        self._refill()
        if cost > self.available:
            self.observer.refused_key(self.name)
        if cost > limit:
            raise ApiError(
                400,
                f"the request costs {cost} units (rows x steps x image tokens) and this key has "
                f"{limit} a minute; ask for fewer or smaller pictures, or fewer steps",
                code="cost_limit_exceeded",
            )
        if cost > self.available:
            wait = math.ceil((cost - self.available) * 60 / limit)
            raise ApiError(
                429,
                f"the request costs {cost} units (rows x steps x image tokens), this key has "
                f"{int(self.available)} left of {limit} a minute; try again in {wait} s",
                code="rate_limit_exceeded",
                retry_after_seconds=wait,
            )
        self.available -= cost

    def has_spare(self, cost: int) -> bool:
        """Whether half a minute's worth is left after ``cost``, or all of it is there."""
        self._refill()
        return self.available >= min(cost + self.units_per_minute / 2, self.units_per_minute)

    def _refill(self) -> None:
        limit, now = self.units_per_minute, self.clock()
        refill = (now - self._filled_at) * limit / 60
        self.available, self._filled_at = min(self.available + refill, limit), now


caller: ContextVar[Account | None] = ContextVar("caller", default=None)


class Accounts:
    """The account of every key that has been used."""

    def __init__(
        self,
        units_per_minute: int,
        clock: Callable[[], float] = time.monotonic,
        observer: Observer = NOBODY,
    ) -> None:
        self._units_per_minute, self._clock, self._observer = units_per_minute, clock, observer
        self._by_name: dict[str, Account] = {}

    def of(self, name: str) -> Account:
        if name not in self._by_name:
            self._by_name[name] = Account(name, self._units_per_minute, self._clock, self._observer)
        return self._by_name[name]


def cost_of(requests: Sequence[DrawRequest], grid: int) -> int:
    """Units of pictures whose image tokens are ``grid`` pixels wide and high."""
    return sum(r.num_rows * r.steps * (r.width // grid) * (r.height // grid) for r in requests)


@contextmanager
def charged(requests: Sequence[DrawRequest], grid: int) -> Iterator[None]:
    """Charge the caller, if keys are asked for; what raises inside costs nothing.

    Raises ApiError 429 with a time to come back, or 400 for what is beyond a whole minute.
    """
    account, cost = caller.get(), cost_of(requests, grid)
    note(units=cost)
    if account is None:
        yield
        return
    account.take(cost)
    try:
        yield
    except Exception:
        account.available += cost
        raise
    account.observer.charged(account.name, len(requests), cost)
