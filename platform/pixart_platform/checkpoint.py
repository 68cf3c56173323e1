"""Resume states: complete or absent, in any storage, for any number of workers, without pickles.

A state is a folder ``<images_seen>/``. Each rank writes the fragments it holds into one
safetensors file, named ``kind|parameter|start``; the manifest comes last, by rank 0. A reader asks
for values by parameter and place, whoever wrote them, so a state of 2 workers resumes on 1 or 8,
and a snapshot or a preview is read from it without disturbing a worker.

Saving copies the fragments and goes on; a thread writes them. When the storage refuses (full,
unreachable) the thread keeps the copy and tries again for as long as training goes on; saves that
come due meanwhile are left out. Files carry their attempt's token, so that what a killed save left
never mixes with another's (Ray issue #41700). Ray's own memory of checkpoints is not asked: one
reported within a second of a worker's death was unknown to its controller (measured).
"""

import hashlib
import json
import logging
import math
import operator
import os
import struct
import threading
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from pixart_platform.engine import Fragment
from pixart_platform.errors import ManifestError, StorageError, TrainingError
from pixart_platform.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    load_manifest,
    verify_folder,
)
from pixart_platform.storage import FileAbsent, Folder, delete_folder

_SCHEMA = "state/2"
_BEST = "best.json"
_RETRY_SECONDS = (1.0, 60.0)  # first and longest pause
_POLL_SECONDS = 0.05
_MAX_HEADER = 100 << 20  # bytes, safetensors' own limit
_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """What a run must remember besides its weights; part of the manifest."""

    images_seen: int = 0
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # logged so far
    recent: list[float] = field(default_factory=list)  # losses of the last batches


@dataclass(frozen=True)
class StateStore:
    """The states of one stage. Kept are the ``keep`` newest, the best, every ``keep_every``-th."""

    folder: Folder
    settings_digest: str
    keep: int = 2
    keep_every_images: int | None = None

    def complete(self) -> list[int]:
        """Images seen of every state that has a manifest, oldest first; none is verified."""
        return [n for n in self._list() if (self.folder / str(n)).find(MANIFEST_FILE)]

    def find_newest(self, least: int = 0) -> "State | None":
        """The newest complete, undamaged state of ``least`` images or more; None without one.

        Raises StorageError where the storage does not answer: that is not to have none.
        """
        for images_seen in reversed([n for n in self._list() if n >= least]):
            place = self.folder / str(images_seen)
            try:
                manifest = verify_folder(place)
            except ManifestError as error:
                _log.warning("state %s is passed over: %s", place.uri, error)
                continue
            if manifest.settings.get("digest") == self.settings_digest:
                return State(place, manifest)
            _log.warning("state %s is passed over: it is of other settings", place.uri)
        return None

    def open(self, images_seen: int) -> "State":
        """Raises ManifestError if it is not complete."""
        place = self.folder / str(images_seen)
        return State(place, load_manifest(place))

    def mark_best(self, images_seen: int, loss: float) -> None:
        """Keep this state until another is better."""
        self.folder.write(_BEST, json.dumps([images_seen, loss]).encode())

    def best(self) -> tuple[int, float] | None:
        """Images seen and loss of the state that was marked best."""
        try:
            images_seen, loss = json.loads(self.folder.read(_BEST))
        except FileAbsent:
            return None
        return images_seen, loss

    def prune(self, newest: float = math.inf) -> None:
        """Delete what need not be kept, and what killed saves left before the newest state.

        States beyond ``newest``, which was just saved, count for nothing: they are damaged, or
        training would have gone on from there.
        """
        complete = [n for n in self.complete() if n <= newest]
        if not complete:
            return
        kept = {*complete[-self.keep :]}
        if best := self.best():
            kept.add(best[0])
        if every := self.keep_every_images:
            before = [0, *complete[:-1]]
            kept |= {
                n for last, n in zip(before, complete, strict=True) if n // every > last // every
            }
        for images_seen in self._list():
            if images_seen not in kept and images_seen < complete[-1]:
                delete_folder(self.folder / str(images_seen), first=MANIFEST_FILE)

    def _list(self) -> list[int]:
        """Images seen of every state folder, complete or not, oldest first."""
        return sorted(int(name) for name in self.folder.children() if name.isdecimal())


class State:
    """One complete state, read by ranges."""

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = folder
        extra = manifest.extra
        history = [(n, metrics) for n, metrics in extra["history"]]
        self.progress = Progress(extra["images_seen"], history, extra["recent"])
        self._files = [record.name for record in manifest.files]

    def restore(self, fragments: Iterable[Fragment]) -> None:
        """Fill the fragments' views with the values of their places. Raises StorageError."""
        wanted = list(fragments)
        with self._open() as pieces, torch.no_grad():
            for kind in (
                wanted[0].views if wanted else ()
            ):  # one after the other, as they lie in the files
                for parameter, start, views in wanted:
                    key, end = (kind, parameter), start + views[kind].numel()
                    views[kind].copy_(self._values(key, pieces[key], start, end))

    def read(self, kind: str) -> dict[str, Tensor]:
        """All of one kind: whole parameters, flat (N,) fp32. Raises StorageError."""
        with self._open() as pieces:
            return {
                key[1]: self._values(key, found, 0, min(found[-1].end, sum(map(len, found))))
                for key, found in pieces.items()
                if key[0] == kind
            }

    @contextmanager
    def _open(self) -> "Iterator[dict[tuple[str, str], list[_Piece]]]":
        """Where each kind of each parameter lies, by start."""
        found = defaultdict(list)
        with ExitStack() as files:
            for name in self._files:
                file = files.enter_context(self.folder.open(name))
                for key, piece in _read_header(file, f"{self.folder.uri}/{name}"):
                    found[key].append(piece)
            for pieces in found.values():
                pieces.sort(key=lambda piece: (piece.start, piece.end))
            yield found

    def _values(self, key: tuple[str, str], pieces: "list[_Piece]", begin: int, end: int) -> Tensor:
        """Values ``begin`` to ``end`` of a kind of one parameter."""
        values, done = np.empty(end - begin, np.float32), begin
        first = bisect_right(pieces, begin, key=lambda piece: piece.start) - 1
        for piece in pieces[max(first, 0) :]:
            last = min(end, piece.end)
            if done >= end or piece.start > done:
                break
            piece.read_into(values[done - begin : last - begin], done)
            done = last
        if done < end:
            raise StorageError(
                f"{self.folder.uri}: lacks {' of '.join(key)}, values from {done} to {end}"
            )
        return torch.from_numpy(values)


@dataclass(frozen=True)
class _Piece:
    """Values ``start`` to ``end`` of a parameter, at a byte of an open file."""

    start: int
    end: int
    offset: int
    file: IO[bytes]

    def __len__(self) -> int:
        return self.end - self.start

    def read_into(self, values: NDArray[np.float32], start: int) -> None:
        """Fill ``values`` from the parameter's value ``start`` on."""
        self.file.seek(self.offset + 4 * (start - self.start))
        data = self.file.read(values.nbytes)
        values[:] = np.frombuffer(data, "<f4")


def _read_header(file: IO[bytes], place: str) -> list[tuple[tuple[str, str], _Piece]]:
    """Pieces of a safetensors file, by kind and parameter. Raises StorageError."""
    try:
        size = file.seek(0, os.SEEK_END) - 8
        file.seek(0)
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size, _MAX_HEADER):
            raise ValueError(f"its header has {length} bytes")
        header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise TypeError("its header is no table")
        header.pop("__metadata__", None)
        found = []
        for key, entry in header.items():
            kind, parameter, start = key.split("|")
            begin, end = map(operator.index, entry["data_offsets"])
            fits = start.isdecimal() and 0 <= begin <= end <= size - length
            if not fits or entry["dtype"] != "F32" or end - begin != 4 * math.prod(entry["shape"]):
                raise ValueError(f"{key} is {entry}")
            last = int(start) + (end - begin) // 4
            found.append(((kind, parameter), _Piece(int(start), last, 8 + length + begin, file)))
        return found
    except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
        raise StorageError(f"{place}: no file of a state ({error})") from error


class Saver:
    """Saves one worker's part of states, one at a time, in the background."""

    def __init__(
        self, store: StateStore, rank: int, world_size: int, token: str, resumed: int = 0
    ) -> None:
        """``token`` names this attempt, the same on all ranks, another after a restart.

        What has been saved is not saved again; nor is what it was ``resumed`` from, in images.
        """
        self._store, self._rank, self._world_size, self._token = store, rank, world_size, token
        self._thread: threading.Thread | None = None
        self._begun = self._saved = resumed
        self._trouble = ""

    @property
    def is_busy(self) -> bool:
        """Whether a save is still under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, progress: Progress, fragments: Iterable[Fragment]) -> None:
        """Copy the fragments and save them. Every rank must, and none while it is busy."""
        assert not self.is_busy
        if progress.images_seen == self._saved:
            return
        self._begun, self._trouble = progress.images_seen, ""
        tensors = {
            f"{kind}|{parameter}|{start}": view.to("cpu", torch.float32, copy=True)
            for parameter, start, views in fragments
            for kind, view in views.items()
        }
        frozen = Progress(progress.images_seen, list(progress.history), list(progress.recent))
        self._thread = threading.Thread(
            target=self._save, args=(frozen, tensors), name="save-state", daemon=True
        )
        self._thread.start()

    def wait(self, patience_seconds: float) -> None:
        """Wait until no save is under way. Raises TrainingError when that takes too long."""
        if self._thread:
            self._thread.join(patience_seconds)
            if self._thread.is_alive():
                raise TrainingError(
                    f"the state could not be saved within {patience_seconds:.0f} s "
                    f"({self._trouble or 'other ranks have not written theirs'}); make room or "
                    f"mend the storage, and run again: training goes on from the last state"
                )

    def finish(self, patience_seconds: float) -> None:
        """Wait until the last save is complete. Raises TrainingError if that does not happen."""
        self.wait(patience_seconds)
        if self._saved != self._begun:
            raise TrainingError(
                f"the state at {self._begun} images was not saved: its thread broke off, and the "
                f"worker's log says why"
            )

    def _save(self, progress: Progress, tensors: dict[str, Tensor]) -> None:
        place = self._store.folder / str(progress.images_seen)
        pause, longest = _RETRY_SECONDS
        while True:
            try:
                self._write(place, tensors)
                if self._rank == 0:
                    self._commit(place, progress)
                break
            except (StorageError, ManifestError) as error:
                self._trouble = str(error)
                _log.warning(
                    "state at %d images is not saved yet: %s; training goes on, next try in %.0f s",
                    progress.images_seen, error, pause,
                )  # fmt: skip
            time.sleep(pause)
            pause = min(2 * pause, longest)
        self._saved = progress.images_seen
        if self._rank == 0:
            try:
                self._store.prune(progress.images_seen)
            except (StorageError, ManifestError) as error:
                _log.warning("older states are still there: %s", error)

    def _write(self, place: Folder, tensors: dict[str, Tensor]) -> None:
        data = save(tensors)
        name = f"{self._token}-{self._rank:05d}.safetensors"
        place.write(name, data)
        record = FileRecord(name, len(data), hashlib.sha256(data).hexdigest())
        place.write(f"{name}.json", json.dumps(asdict(record)).encode())

    def _commit(self, place: Folder, progress: Progress) -> None:
        """Wait for the other ranks' files, then write the manifest."""
        names: list[str] = []
        while len(names) < self._world_size:
            time.sleep(_POLL_SECONDS)
            found = (entry.name for entry in place.walk(self._token))
            names = [name for name in found if name.endswith(".json")]
        records = tuple(FileRecord(**json.loads(place.read(name))) for name in names)
        settings = {"digest": self._store.settings_digest, "images_seen": progress.images_seen}
        place.delete(MANIFEST_FILE)  # a damaged state's: a sound one would have been resumed from
        Manifest(_SCHEMA, settings, {}, records, asdict(progress)).commit_to(place)
        with suppress(StorageError):  # nobody needs them any more; a retry would miss the deleted
            for name in names:
                place.delete(name)
