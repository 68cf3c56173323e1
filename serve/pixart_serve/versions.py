"""The versions in memory: each proved before anybody draws with it, few enough to fit.

A version is loaded beside those that draw: every byte checked, encoders borrowed from the live
one, a picture drawn between the live rows. It then stays until room is needed, so that going back
to it costs nothing; the least recently used goes first, and never one that is drawing.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable
from concurrent.futures import Future

from pixart_models.drawing import load_drawer
from pixart_platform.errors import PixartError, StorageError
from pixart_platform.registry import Version
from pixart_serve.engine import Drawing, DrawingEngine, DrawRequest, LoadedVersion

_SMOKE_STEPS = 2
_SMOKE_GUIDANCE = 2.0
_SMOKE_SECONDS = 300.0


class VersionRefused(PixartError):
    """A version that must not draw, with the reason."""


class VersionUnavailable(PixartError):
    """A version that cannot be had now; trying again later makes sense."""


class LoadedVersions:
    """At most ``max_versions`` of a model in memory.

    Methods are thread-safe, but one load at a time, or there would be more than agreed.
    """

    def __init__(self, engine: DrawingEngine, device: str, max_versions: int) -> None:
        self._engine, self._device, self._max_versions = engine, device, max_versions
        self._kept: OrderedDict[int, LoadedVersion] = OrderedDict()  # least recently used first
        self._num_drawing: Counter[int] = Counter()
        self._lock = threading.Lock()  # never held for long: the event loop waits for it

    @property
    def numbers(self) -> list[int]:
        """What is in memory, least recently used first."""
        with self._lock:
            return list(self._kept)

    def get(self, number: int) -> LoadedVersion | None:
        """A version at hand, now the most recently used."""
        with self._lock:
            if number in self._kept:
                self._kept.move_to_end(number)
            return self._kept.get(number)

    def note_drawing(self, version: LoadedVersion, futures: Iterable["Future[Drawing]"]) -> None:
        """Keep ``version`` until all ``futures`` are done."""

        def forget(_: "Future[Drawing]") -> None:
            with self._lock:
                self._num_drawing[version.number] -= 1

        for future in futures:
            with self._lock:
                self._num_drawing[version.number] += 1
            future.add_done_callback(forget)

    def load(self, version: Version, keep: Collection[int]) -> LoadedVersion:
        """The version from memory or else from storage, dropping others but those to ``keep``.

        Raises VersionRefused, VersionUnavailable when nothing may be dropped, and OSError or
        StorageError, which is the storage's doing and no fault of the version.
        """
        found = self.get(version.number)
        if found is None:
            self._make_room(keep)
            found = self._prove(version)
            with self._lock:
                self._kept[version.number] = found
        return found

    def _make_room(self, keep: Collection[int]) -> None:
        with self._lock:
            while len(self._kept) >= self._max_versions:
                idle = [n for n in self._kept if n not in keep and self._num_drawing[n] == 0]
                if not idle:
                    raise VersionUnavailable(
                        f"no room for another version: all {len(self._kept)} in memory are in "
                        f"use; serve.max_versions is {self._max_versions}"
                    )
                del self._kept[idle[0]]

    def _prove(self, version: Version) -> LoadedVersion:
        """Check, load beside the live weights and try out. A version comes from outside, so
        whatever it provokes is held against it, except what the storage does."""
        live = self._engine.live
        try:
            folder = version.fetch()
            drawer = load_drawer(folder, self._device, like=live.drawer if live else None)
            loaded = LoadedVersion(version.number, drawer)
            side = drawer.config.resolution
            smoke = DrawRequest("", 0, _SMOKE_STEPS, _SMOKE_GUIDANCE, side, side)
            self._engine.try_out(loaded, smoke).result(timeout=_SMOKE_SECONDS)
        except (OSError, StorageError):
            raise
        except PixartError as error:
            raise VersionRefused(str(error)) from error
        except Exception as error:
            raise VersionRefused(f"{version.name} version {version.number}: {error}") from error
        return loaded
