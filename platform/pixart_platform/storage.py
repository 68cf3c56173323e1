"""Folders that hold tables, checkpoints and snapshots: a local path, or ``s3://bucket/prefix``.

One rule carries everything above: a file appears whole or not at all, and what must happen once is
created once. Locally that is a rename and a hard link; on S3 a put, and a put on the condition that
nothing is there (``object_store``). Readers see files with ``seek``, so Parquet reads the bytes it
needs from either.
"""

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from pixart_platform.errors import StorageError

_CHUNK = 8 << 20  # on S3 a request each
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_STAGED = ".staged-"  # begins the names of files that are not there yet; a killed writer leaves one
CHANGED = "changed since it was listed; run again"


class FileAbsent(StorageError):
    """A file that is not there."""


class FileRefused(StorageError):
    """A file that this process may not read or look at."""


@dataclass(frozen=True, order=True)
class Entry:
    """A file of a folder: its name within it, its size, and a tag that changes with its bytes."""

    name: str
    num_bytes: int
    tag: str


class Folder(Protocol):
    """A place for files, cheap to copy and to send to workers. Names may hold ``/``.

    Every method raises StorageError for what the storage refuses or cannot do, after retries.
    """

    @property
    def uri(self) -> str: ...

    @property
    def name(self) -> str:
        """The last part of the URI."""
        ...

    @property
    def parent(self) -> "Folder": ...

    def __truediv__(self, name: str) -> "Folder": ...

    def children(self) -> list[str]:
        """Names of the folders directly in this one, sorted; none if it does not exist."""
        ...

    def walk(self, prefix: str = "") -> Iterator[Entry]:
        """Files at any depth whose names begin with ``prefix``, sorted by name.

        Links to folders are followed, but for those that lead back above themselves.
        """
        ...

    def find(self, name: str) -> Entry | None:
        """The file's entry, or None when it is not there."""
        ...

    def read(self, name: str) -> bytes:
        """The whole file. Raises FileAbsent."""
        ...

    def open(self, name: str) -> IO[bytes]:
        """The file for reading with ``seek``. Raises FileAbsent."""
        ...

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a file so that readers see the old one or the new one, never a part."""
        ...

    def create_once(self, name: str, data: bytes) -> bool:
        """Like write, but only if the file is absent; returns whether these bytes are in it now."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine, or of a file system that all machines mount."""

    path: Path

    @property
    def uri(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> "LocalFolder":
        return LocalFolder(self.path.parent)

    def __truediv__(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / name)

    def children(self) -> list[str]:
        _, names, _ = next(os.walk(self.path, onerror=_refuse_unless_absent), ("", [], []))
        return sorted(names)

    def walk(self, prefix: str = "") -> Iterator[Entry]:
        found = []
        start = self.path / prefix.rpartition("/")[0]
        for folder, below, files in os.walk(start, onerror=_refuse_unless_absent, followlinks=True):
            if os.path.islink(folder) and _leads_back(folder):
                below.clear()
                continue
            for file in files:
                name = (Path(folder) / file).relative_to(self.path).as_posix()
                if name.startswith(prefix) and not file.startswith(_STAGED):
                    found += [entry] if (entry := self.find(name)) else []
        yield from sorted(found)

    def find(self, name: str) -> Entry | None:
        try:
            found = (self.path / name).stat()
        except _ABSENT:
            return None
        except PermissionError as error:
            raise FileRefused(f"{self.path / name}: {error.strerror}") from error
        except OSError as error:
            raise StorageError(f"{self.path / name}: {error.strerror}") from error
        if stat.S_ISDIR(found.st_mode):
            return None
        return Entry(name, found.st_size, str(found.st_mtime_ns))

    def read(self, name: str) -> bytes:
        try:
            with self.open(name) as file:
                return file.read()
        except OSError as error:
            raise StorageError(f"{self.path / name}: cannot be read ({error.strerror})") from error

    def open(self, name: str) -> IO[bytes]:
        try:
            return (self.path / name).open("rb")
        except _ABSENT as error:
            raise FileAbsent(f"{self.path / name}: no such file") from error
        except PermissionError as error:
            raise FileRefused(f"{self.path / name}: cannot be read ({error.strerror})") from error
        except OSError as error:
            raise StorageError(f"{self.path / name}: cannot be read ({error.strerror})") from error

    def write(self, name: str, data: bytes | memoryview) -> None:
        write_atomic(self.path / name, data)

    def create_once(self, name: str, data: bytes) -> bool:
        path = self.path / name
        with _stage(path, data) as staged:
            try:
                os.link(staged, path)
            except FileExistsError:
                return path.read_bytes() == data
            return True

    def delete(self, name: str) -> None:
        try:
            (self.path / name).unlink()
        except _ABSENT:
            return
        except OSError as error:
            raise StorageError(f"{self.path / name}: {error.strerror}") from error


def _refuse_unless_absent(error: OSError) -> None:
    """What cannot be listed must not look empty."""
    if not isinstance(error, _ABSENT):
        raise StorageError(f"{error.filename}: cannot be listed ({error.strerror})") from error


def _leads_back(link: str) -> bool:
    return os.path.realpath(link) in map(os.path.realpath, Path(link).parents)


def open_folder(place: str | Path | Folder) -> Folder:
    """The folder behind a path, a ``file://`` or an ``s3://`` URI. Raises StorageError."""
    if not isinstance(place, str | Path):
        return place
    text = str(place).removeprefix("file://")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return LocalFolder(Path(text).expanduser().absolute())
    if scheme != "s3":
        raise StorageError(f"{place}: {scheme}:// is not supported; use a local path or s3://")
    from pixart_platform.object_store import S3Folder

    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise StorageError(f"{place}: names no bucket; write s3://bucket/prefix")
    return S3Folder(bucket, prefix.strip("/"))


@contextmanager
def reading(folder: Folder, name: str) -> Iterator[None]:
    """Reading what was listed: StorageError with the way out for all that is not its bytes' fault.

    That passes: ValueError and the like, and OSError without a number (Arrow's) or for a seek to
    where no file goes. FileAbsent stays one.
    """
    try:
        yield
    except FileAbsent as error:
        raise FileAbsent(f"{folder.uri}/{name} {CHANGED}") from error
    except FileRefused as error:
        raise FileRefused(f"{error}; give read permission or move it away") from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):
            raise
        raise StorageError(f"{folder.uri}/{name}: cannot be read ({error.strerror})") from error


def sha256_of(folder: Folder, name: str) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with folder.open(name) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` so that readers see the old file or the new one, never a part."""
    with _stage(path, data) as staged:
        os.replace(staged, path)


@contextmanager
def _stage(path: Path, data: bytes | memoryview) -> Iterator[Path]:
    """``data`` in a durable file beside ``path``, gone afterwards. Raises StorageError."""
    staged = path.parent / f"{_STAGED}{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield staged
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):
            staged.unlink()


def delete_folder(folder: Folder, first: str) -> None:
    """Delete all that is in a folder, beginning with the file that makes it count."""
    folder.delete(first)
    for entry in folder.walk():
        folder.delete(entry.name)
    if isinstance(folder, LocalFolder):
        shutil.rmtree(folder.path, ignore_errors=True)  # staged files, and folders now empty


def publish_folder(staging: Path, target: Path) -> None:
    """Move a finished folder into place; whatever unfinished thing was there is replaced."""
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staging, target)
