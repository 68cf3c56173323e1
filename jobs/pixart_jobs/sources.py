"""Sources: where images come from, cut into partitions deterministically.

A source answers two questions anywhere in a cluster: how many partitions there are, and what the
raw items of partition k are. It decodes nothing; ``ingest`` does, and nothing is dropped here.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pixart_jobs.recipe import DataSettings
from pixart_jobs.scenes import compose_scene
from pixart_platform.errors import StorageError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class RawItem:
    """One item as found: its bytes or why they could not be read, and what came with it."""

    source: str
    data: bytes
    raw_caption: str = ""
    label: int | None = None
    truth: str | None = None
    problem: str = ""


class Source(Protocol):
    """A partitioned set of raw items."""

    @property
    def num_partitions(self) -> int: ...

    def fingerprint(self) -> str:
        """Changes when the source's content does."""
        ...

    def read(self, k: int) -> list[RawItem]: ...


@dataclass(frozen=True)
class DigitScenes:
    """The demo's scenes, composed where they are read."""

    num_scenes: int
    partition_rows: int
    seed: int

    @property
    def num_partitions(self) -> int:
        return -(-self.num_scenes // self.partition_rows)

    def fingerprint(self) -> str:
        return f"digits:{self.seed}:{self.num_scenes}"

    def read(self, k: int) -> list[RawItem]:
        last = min((k + 1) * self.partition_rows, self.num_scenes)
        items = []
        for i in range(k * self.partition_rows, last):
            scene = compose_scene(i, seed=self.seed)
            items.append(
                RawItem(f"digits:{i}", scene.png(), scene.raw_caption, scene.label, scene.truth())
            )
        return items


@dataclass(frozen=True)
class ImageFolder:
    """Images at any depth of a folder, sorted by path.

    ``NAME.txt`` beside one is its raw caption, else the words of its name.
    """

    paths: tuple[str, ...]
    folder: str
    partition_rows: int

    @classmethod
    def scan(cls, folder: Path, partition_rows: int) -> "ImageFolder":
        """List the folder. Raises StorageError when it is missing or holds no image."""
        if not folder.is_dir():
            raise StorageError(f"data.source = folder:{folder}: no such folder")
        found = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
        paths = tuple(sorted(str(p.relative_to(folder)) for p in found))
        if not paths:
            raise StorageError(
                f"data.source = folder:{folder}: no image files in it "
                f"({', '.join(sorted(IMAGE_SUFFIXES))})"
            )
        return cls(paths, str(folder), partition_rows)

    @property
    def num_partitions(self) -> int:
        return -(-len(self.paths) // self.partition_rows)

    def fingerprint(self) -> str:
        """Of names, sizes and times: an edited image or caption makes a new table."""
        digest = hashlib.sha256()
        for name in self.paths:
            image = Path(self.folder) / name
            for path in (image, image.with_suffix(".txt")):
                digest.update(os.fsencode(path.relative_to(self.folder)))
                if path.exists():  # a link may lead nowhere
                    stat = path.stat()
                    digest.update(f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()[:16]

    def read(self, k: int) -> list[RawItem]:
        names = self.paths[k * self.partition_rows : (k + 1) * self.partition_rows]
        return [self._read_one(name) for name in names]

    def _read_one(self, name: str) -> RawItem:
        path = Path(self.folder) / name
        name = os.fsencode(name).decode("utf-8", "backslashreplace")  # tables hold UTF-8 only
        try:
            data = path.read_bytes()
        except OSError as error:
            return RawItem(name, b"", problem=f"unreadable file ({error.strerror})")
        caption_path = path.with_suffix(".txt")
        try:
            caption = caption_path.read_text(encoding="utf-8-sig").strip()
        except FileNotFoundError:
            caption = " ".join(re.findall(r"[^\W_]+", path.stem))
        except (OSError, UnicodeDecodeError) as error:
            return RawItem(name, data, problem=f"unreadable caption {caption_path.name} ({error})")
        return RawItem(name, data, caption)


def open_source(settings: DataSettings, seed: int) -> Source:
    """The source a recipe names. Raises StorageError."""
    if settings.source == "digits":
        return DigitScenes(settings.num_scenes, settings.partition_rows, seed)
    folder = Path(settings.source.removeprefix("folder:")).expanduser().absolute()
    return ImageFolder.scan(folder, settings.partition_rows)
