"""Following an alias: what the registry points at is what draws, once it has proved itself.

A version is prepared beside the live one - every byte checked, loaded, a picture drawn between
the live rows - and only then activated. A version that fails is refused once and loudly; the live
one stays. A registry that cannot be reached changes nothing.
"""

import logging
import threading

from pixart_models.drawing import load_drawer
from pixart_platform.errors import PixartError
from pixart_platform.registry import Registry, Version
from pixart_serve.engine import DrawingEngine, DrawRequest, LoadedVersion

_LOG = logging.getLogger(__name__)
_SMOKE_STEPS = 2
_SMOKE_GUIDANCE = 2.0
_SMOKE_SECONDS = 300.0


class VersionRefused(PixartError):
    """A version that must not go live, with the reason."""


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
    ) -> None:
        self._registry, self._alias, self._engine = registry, alias, engine
        self._device, self._poll_seconds = device, poll_seconds
        self._refused: int | None = None
        self._trouble = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow-alias", daemon=True)

    @property
    def refused(self) -> int | None:
        """The version the alias names now that was found bad; moving the alias clears it."""
        return self._refused

    def load_first(self) -> None:
        """Go live with what the alias names. Raises RegistryError or VersionRefused."""
        self._engine.activate(self._prepare(self._registry.get(self._alias)))

    def start(self) -> None:
        """Follow from now on, on a thread."""
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(self._poll_seconds + 10)

    def poll(self) -> None:
        """Look once, and go live with another version if there is one and it is good."""
        wanted = self._registry.get(self._alias)
        live = self._engine.live
        if live and live.number == wanted.number:
            self._refused = None
        elif wanted.number != self._refused:
            try:
                self._engine.activate(self._prepare(wanted))
                _LOG.warning("%s version %d is live", wanted.name, wanted.number)
                self._refused = None
            except VersionRefused as refusal:
                self._refused = wanted.number
                _LOG.error("%s; version %s stays live", refusal, live.number if live else None)

    def _prepare(self, version: Version) -> LoadedVersion:
        """Check, load beside the live weights and try out. Raises VersionRefused.

        A version comes from outside, so whatever it provokes is held against it; except OSError,
        which is the storage's doing and is tried again.
        """
        live = self._engine.live
        try:
            version.verify()
            drawer = load_drawer(version.folder, self._device, like=live.drawer if live else None)
            loaded = LoadedVersion(version.number, drawer)
            side = drawer.config.resolution
            smoke = DrawRequest("", 0, _SMOKE_STEPS, _SMOKE_GUIDANCE, side, side)
            self._engine.try_out(loaded, smoke).result(timeout=_SMOKE_SECONDS)
        except OSError:
            raise
        except PixartError as error:
            raise VersionRefused(str(error)) from error
        except Exception as error:
            raise VersionRefused(f"{version.name} version {version.number}: {error}") from error
        return loaded

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
