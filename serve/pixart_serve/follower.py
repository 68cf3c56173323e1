"""Following an alias: what the registry points at is what draws, once it has proved itself.

The live version moves with one alias, a challenger with another, and a request may name any
version besides. All are prepared on threads beside the rows that draw. The version before the
live one stays in memory, so that moving the alias back takes effect without a load. A version
that fails is refused once and loudly; the live one stays. A registry that cannot be reached
changes nothing: what is in memory goes on answering.
"""

import hashlib
import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

from pixart_platform.errors import RegistryError, StorageError
from pixart_platform.registry import Registry, Version
from pixart_serve.engine import DrawingEngine, LoadedVersion
from pixart_serve.versions import LoadedVersions, VersionRefused, VersionUnavailable

_LOG = logging.getLogger(__name__)
_MAX_FETCHING = 8  # references looked up or loaded at a time; more are asked to come back
_REFUSED_SECONDS = 60.0  # before a bad version that requests name is read once more


class UnknownVersion(RegistryError):
    """A version or alias that the registry does not know, naming what there is."""


class Follower:
    """Keeps an engine on the version that ``alias`` (or a version number) names."""

    def __init__(
        self,
        registry: Registry,
        alias: str,
        engine: DrawingEngine,
        *,
        device: str = "cpu",
        poll_seconds: float = 2.0,
        max_versions: int = 4,
        challenger: str = "",
        challenger_share: float = 0.0,
    ) -> None:
        """``challenger``: the alias of the version that draws ``challenger_share`` (0 to 1)."""
        self._registry, self._alias, self._engine = registry, alias, engine
        self._poll_seconds = poll_seconds
        self._challenger_alias, self._challenger_share = challenger, challenger_share
        self.versions = LoadedVersions(engine, device, max_versions)
        self._previous: int | None = None
        self._challenger: LoadedVersion | None = None
        self._aliases: dict[str, int] = {}  # as the registry last said
        self._refused: dict[str, int] = {}  # by followed alias
        self._refused_at: dict[int, float] = {}  # by number that a request named
        self._fetching: dict[str, Future[LoadedVersion]] = {}
        self._trouble = ""
        self._changing = threading.Lock()  # held while a version is loaded and put to use
        self._closing = threading.Event()
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="fetch-version")
        self._thread = threading.Thread(target=self._run, name="follow-alias", daemon=True)

    @property
    def refused(self) -> int | None:
        """The version the alias names now that was found bad; moving the alias clears it."""
        return self._refused.get(self._alias)

    @property
    def aliases(self) -> dict[str, int]:
        """Version number by alias, as the registry last said; empty until it was looked at."""
        return self._aliases

    def load_first(self) -> None:
        """Go live with what the alias names. Raises RegistryError, VersionRefused, StorageError."""
        self._engine.activate(self.versions.load(self._registry.get(self._alias), ()))

    def start(self) -> None:
        """Follow from now on, on a thread."""
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._fetcher.shutdown(wait=False, cancel_futures=True)
        if self._thread.is_alive():
            self._thread.join(self._poll_seconds + 10)

    def poll(self) -> None:
        """Look once, and go live with another version if there is one and it is good."""
        self._aliases = self._registry.aliases()
        wanted = self._registry.get(self._alias)
        live = self._engine.live
        if live and live.number == wanted.number:
            self._refused.pop(self._alias, None)
        elif at_hand := self.versions.get(wanted.number):  # going back waits for nobody's load
            self._go_live(at_hand)
        else:
            with self._changing:
                if loaded := self._prepare(self._alias, wanted):
                    self._go_live(loaded)
        if self._challenger_alias:
            self._follow_challenger()

    def choose(self, seed: int) -> LoadedVersion | None:
        """The challenger for its share of seeds, None for the live version.

        The seed decides, so asking again with the seed of an answer gives its picture again.
        """
        name = hashlib.blake2b(str(seed).encode(), digest_size=8).digest()
        drawn = int.from_bytes(name, "big") / 2**64 < self._challenger_share
        return self._challenger if drawn else None

    def at_hand(self, reference: str) -> LoadedVersion | None:
        """The version in memory that a number or alias names, as far as is known here."""
        number = int(reference) if reference.isdecimal() else self._aliases.get(reference)
        return None if number is None else self.versions.get(number)

    def fetch(self, reference: str) -> "Future[LoadedVersion]":
        """Look a number or alias up and load what it names, on a thread.

        Its future ends in UnknownVersion, VersionRefused or VersionUnavailable if not in a
        version. Raises VersionUnavailable when too many are being fetched. For one event loop.
        """
        self._fetching = {r: f for r, f in self._fetching.items() if not f.done()}
        if reference not in self._fetching:
            if len(self._fetching) >= _MAX_FETCHING:
                raise VersionUnavailable(f"{_MAX_FETCHING} other versions are being loaded")
            self._fetching[reference] = self._fetcher.submit(self._fetch, reference)
        return self._fetching[reference]

    def _fetch(self, reference: str) -> LoadedVersion:
        try:
            version = self._look_up(reference)
        except UnknownVersion:
            raise
        except RegistryError as error:
            _LOG.warning("cannot look %r up: %s", reference, error)
            raise VersionUnavailable(
                f"the registry does not answer, and {reference!r} is not in memory"
            ) from error
        refused_at = self._refused_at.get(version.number)
        if refused_at is not None and time.monotonic() < refused_at + _REFUSED_SECONDS:
            raise VersionRefused(f"{version.name} version {version.number} was refused")
        try:
            with self._changing:
                loaded = self.versions.load(version, self._in_service(self._previous))
        except (OSError, StorageError) as error:
            _LOG.warning("cannot read %s version %d: %s", version.name, version.number, error)
            raise VersionUnavailable(f"version {version.number} cannot be read now") from error
        except VersionRefused as refusal:
            self._refused_at[version.number] = time.monotonic()
            _LOG.error("%s; it will not draw", refusal)
            raise
        self._refused_at.pop(version.number, None)
        return loaded

    def _look_up(self, reference: str) -> Version:
        """Raises UnknownVersion, or RegistryError when the registry does not answer."""
        try:
            return self._registry.get(reference)
        except RegistryError as error:
            self._registry.aliases()  # raises unless it was an answer
            raise UnknownVersion(str(error)) from error

    def _follow_challenger(self) -> None:
        try:
            wanted = self._look_up(self._challenger_alias)
        except UnknownVersion:  # taken away: the trial is over
            self._challenger = None
            return
        if self._challenger is None or self._challenger.number != wanted.number:
            with self._changing:
                self._challenger = self._prepare(self._challenger_alias, wanted)

    def _go_live(self, version: LoadedVersion) -> None:
        live = self._engine.live
        self._previous = live.number if live else None
        self._engine.activate(version)
        self._refused.pop(self._alias, None)
        _LOG.warning("%s version %d is live", self._registry.name, version.number)

    def _prepare(self, alias: str, wanted: Version) -> LoadedVersion | None:
        """What an alias has moved to, or None if it was refused, which is logged once."""
        if wanted.number == self._refused.get(alias):
            return None
        if self._previous is not None:
            self.versions.get(self._previous)  # others make room first
        try:
            loaded = self.versions.load(wanted, self._in_service())
        except VersionRefused as refusal:
            self._refused[alias] = wanted.number
            live = self._engine.live
            _LOG.error("%s; version %s stays live", refusal, live.number if live else None)
            return None
        self._refused.pop(alias, None)
        return loaded

    def _in_service(self, *others: int | None) -> set[int]:
        """Numbers that must stay in memory."""
        versions = (self._engine.live, self._challenger)
        return {v.number for v in versions if v} | {n for n in others if n is not None}

    def _run(self) -> None:
        """The thread's fence: whatever goes wrong here, the live version serves on."""
        while not self._closing.wait(self._poll_seconds):
            trouble = ""
            try:
                self.poll()
            except Exception as error:
                trouble = f"{type(error).__name__}: {error}"
                if trouble != self._trouble:
                    _LOG.exception("cannot follow %s, serving on", self._alias)
            self._trouble = trouble
