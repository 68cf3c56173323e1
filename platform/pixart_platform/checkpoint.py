"""Resume state on disk: complete or absent, newest complete one found by looking.

A state is a folder ``<images_seen>/`` with DeepSpeed's shards, the average's tensors and a
manifest written last. Ray's own checkpoint memory is not trusted: one reported within a second of
a worker's death was unknown to its controller (measured), while the folder says what is there.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_platform.engine import Engine
from pixart_platform.errors import ManifestError
from pixart_platform.manifest import MANIFEST_FILE, FileRecord, Manifest, verify_folder

_SCHEMA = "state/1"
_AVERAGE = "average.safetensors"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StateStore:
    """The states of one stage, in ``folder``; ``keep`` newest ones are kept."""

    folder: Path
    settings_digest: str
    keep: int = 2

    def find_newest(self) -> int | None:
        """Images seen of the newest complete, undamaged state; None when there is none."""
        for images_seen in reversed(self._list()):
            path = self.folder / str(images_seen)
            try:
                manifest = verify_folder(path)
            except ManifestError as error:
                _log.warning("state %s is passed over: %s", path, error)
                continue
            if manifest.settings.get("digest") == self.settings_digest:
                return images_seen
        return None

    def _list(self) -> list[int]:
        """Images seen of every state folder, complete or not, oldest first."""
        names = [p.name for p in self.folder.glob("[0-9]*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, engine: Engine, images_seen: int, average: dict[str, Tensor] | None) -> None:
        """Save a state. Collective; rank 0 passes the average and commits."""
        path = self.folder / str(images_seen)
        if engine.rank == 0:
            shutil.rmtree(path, ignore_errors=True)  # what a killed save left
            path.mkdir(parents=True)
        engine.barrier()
        engine.save(path)
        if engine.rank == 0 and average is not None:
            save_file(average, path / _AVERAGE)
        engine.barrier()
        if engine.rank == 0:
            files = sorted(p for p in path.rglob("*") if p.is_file())
            records = tuple(
                FileRecord(str(p.relative_to(path)), *_size_and_digest(p)) for p in files
            )
            settings = {"digest": self.settings_digest, "images_seen": images_seen}
            Manifest(_SCHEMA, settings, {}, records).commit_to(path)
            self._prune()

    def load(self, engine: Engine, images_seen: int) -> dict[str, Tensor]:
        """Load the shards into ``engine``; returns the average's tensors. Collective."""
        path = self.folder / str(images_seen)
        engine.load(path)
        device = str(engine.device) if engine.device.type != "cpu" else "cpu"
        return load_file(path / _AVERAGE, device=device) if engine.rank == 0 else {}

    def _prune(self) -> None:
        complete = [n for n in self._list() if (self.folder / str(n) / MANIFEST_FILE).is_file()]
        for images_seen in complete[: -self.keep]:
            shutil.rmtree(self.folder / str(images_seen))


def _size_and_digest(path: Path) -> tuple[int, str]:
    record = FileRecord.of(path)
    return record.num_bytes, record.sha256
