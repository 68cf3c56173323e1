"""Folders that hold tables, checkpoints and snapshots.

One rule carries everything above it: a file appears whole or not at all, and a commit happens
once. Locally that is a rename and a hard link. ``s3://`` has a seam here (conditional put) and
arrives with the data plane; until then it is refused by name.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pixart_platform.errors import StorageError

_CHUNK = 1 << 20


def open_folder(uri: str | Path) -> Path:
    """The folder behind a path or ``file://`` URI. Raises StorageError for other schemes."""
    text = str(uri).removeprefix("file://")
    if "://" in text:
        scheme = text.split("://")[0]
        raise StorageError(f"{uri}: {scheme}:// folders are not supported yet; use a local path")
    return Path(text).absolute()


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` so that readers see the old file or the new one, never a part."""
    with _stage(path, data) as staged:
        os.replace(staged, path)


def create_once(path: Path, data: bytes) -> bool:
    """Like write_atomic, but only if ``path`` is absent; returns whether this call made it."""
    with _stage(path, data) as staged:
        try:
            os.link(staged, path)
        except FileExistsError:
            return False
        return True


@contextmanager
def _stage(path: Path, data: bytes) -> Iterator[Path]:
    """``data`` in a durable file beside ``path``, gone afterwards. Raises StorageError."""
    staged = path.parent / f".{path.name}.{uuid.uuid4().hex}"
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


def publish_folder(staging: Path, target: Path) -> None:
    """Move a finished folder into place; whatever unfinished thing was there is replaced."""
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(staging, target)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
