"""Where a pipeline keeps everything, and whoever shows its progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pixart_platform.storage import Folder, open_folder
from pixart_platform.tracking import sqlite_uri


class Monitor(Protocol):
    """Whoever shows progress."""

    @contextmanager
    def job(self, name: str, total: int, unit: str) -> Iterator["JobMonitor"]: ...

    def note(self, message: str) -> None: ...


class JobMonitor(Protocol):
    def reach(self, done: int) -> None: ...


@dataclass(frozen=True)
class Workspace:
    """Where a pipeline keeps everything: one folder."""

    root: Path
    tracking_uri: str
    scratch: Path

    @classmethod
    def under(cls, root: Path, scratch: Path, tracking_uri: str = "") -> "Workspace":
        root.mkdir(parents=True, exist_ok=True)
        return cls(root, tracking_uri or sqlite_uri(root), scratch)

    def open_store(self, place: str) -> Folder:
        """Where tables are kept: ``place``, or this workspace's own folder."""
        return open_folder(place or self.root / "tables")

    @property
    def costs(self) -> Path:
        return self.root / "costs"
