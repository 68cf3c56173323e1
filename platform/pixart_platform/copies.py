"""Copies of what is kept elsewhere: snapshots to a team's storage, and back to this machine's disk.

A snapshot is copied file by file, its manifest last, and a copy that broke off is continued. What a
machine reads again and again lies in the folder that ``PIXART_CACHE`` names, in up to half of what
its disk has to spare; the copies used longest ago make room. Names and digests of a registry come
from outside, so neither becomes a path before it was looked at.
"""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa

from pixart_platform.errors import ManifestError, StorageError
from pixart_platform.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    load_manifest,
    verify_folder,
)
from pixart_platform.storage import FileAbsent, Folder, LocalFolder, sha256_of

_CHUNK = 16 << 20  # of a download: a request each
_LOCK = ".lock"
_UNFINISHED = ".part"


def publish(source: Path, dest: Folder) -> None:
    """Copy a finished snapshot to ``dest``, once; what an earlier try left there is taken over.

    Raises ManifestError if ``source`` is damaged, or ``dest`` holds something else; StorageError.
    """
    manifest = verify_folder(source)
    check_names(manifest, str(source))
    if dest.find(MANIFEST_FILE) is None:
        for record in manifest.files:
            if not _is_there(dest, record):
                with pa.memory_map(str(source / record.name)) as file:
                    dest.write(record.name, memoryview(file.read_buffer()))
        dest.create_once(MANIFEST_FILE, (source / MANIFEST_FILE).read_bytes())
    if (found := load_manifest(dest).digest) != manifest.digest:
        raise ManifestError(
            f"{dest.uri} holds a snapshot with digest {found}, not {manifest.digest} of {source}; "
            f"give another folder"
        )


def _is_there(dest: Folder, record: FileRecord) -> bool:
    found = dest.find(record.name)
    return (
        found is not None
        and found.num_bytes == record.num_bytes
        and sha256_of(dest, record.name) == record.sha256
    )


def check_names(manifest: Manifest, place: str) -> None:
    """Raise ManifestError unless every file it lists lies directly in its folder."""
    for record in manifest.files:
        if record.folder or record.name in (MANIFEST_FILE, "", ".", "..") or "/" in record.name:
            raise ManifestError(
                f"{place}/{MANIFEST_FILE}: lists {record.folder}/{record.name}, which is no file "
                f"of a snapshot's own; it is not one of ours"
            )


def delete(folder: Folder, digest: str) -> int:
    """Delete the snapshot with this digest, if it is there whole; the bytes that this freed.

    Nothing but what its manifest lists is touched. Raises ManifestError, StorageError.
    """
    if folder.find(MANIFEST_FILE) is None:
        return 0
    manifest = load_manifest(folder)
    check_names(manifest, folder.uri)
    if manifest.digest != digest:
        raise ManifestError(
            f"{folder.uri} has digest {manifest.digest}, not {digest}; its files are left alone"
        )
    folder.delete(MANIFEST_FILE)
    for record in manifest.files:
        folder.delete(record.name)
    if isinstance(folder, LocalFolder):
        with suppress(OSError):
            folder.path.rmdir()
    return size_of(manifest)


def size_of(manifest: Manifest) -> int:
    """Bytes of all its files."""
    return sum(record.num_bytes for record in manifest.files)


def fetch(source: Folder, digest: str) -> Path:
    """The snapshot in ``source`` as a folder of this machine, every byte proved just now.

    Fetched once, whoever asks; a copy that is damaged is fetched again. Raises ManifestError for
    bytes that are not those of ``digest``, StorageError for what cannot be had now.
    """
    if not re.fullmatch("[0-9a-f]{16}", digest):
        raise ManifestError(f"{source.uri}: {digest!r} is no digest of a manifest; register anew")
    place = cache_folder() / digest
    try:
        with _alone(place, wait=True):
            if not _is_whole(place, digest):
                shutil.rmtree(place, ignore_errors=True)
                _download(source, place, digest)
            os.utime(place)
    except FileAbsent as error:
        raise ManifestError(f"{error}; restore the snapshot") from error
    except OSError as error:
        raise StorageError(f"{place}: cannot be written ({error.strerror})") from error
    return place


def _is_whole(place: Path, digest: str) -> bool:
    try:
        return verify_folder(place).digest == digest
    except (ManifestError, StorageError):
        return False


def _download(source: Folder, place: Path, digest: str) -> None:
    unfinished = place.with_suffix(_UNFINISHED)
    unfinished.mkdir(exist_ok=True)
    (unfinished / MANIFEST_FILE).write_bytes(source.read(MANIFEST_FILE))
    manifest = load_manifest(unfinished)
    if manifest.digest != digest:
        raise ManifestError(
            f"{source.uri} has digest {manifest.digest}, registered was {digest}; restore it"
        )
    check_names(manifest, source.uri)
    missing = [r for r in manifest.files if not _is_there_locally(unfinished, r)]
    num_bytes = sum(record.num_bytes for record in missing)
    make_room(place.parent, num_bytes)
    if num_bytes > (free := shutil.disk_usage(place.parent).free):
        raise StorageError(
            f"{place.parent}: {num_bytes:,} bytes of {source.uri} do not fit, {free:,} are free; "
            f"have PIXART_CACHE name a folder on a larger disk"
        )
    for record in missing:
        _download_file(source, record, unfinished / record.name)
    os.replace(unfinished, place)


def _is_there_locally(folder: Path, record: FileRecord) -> bool:
    path = folder / record.name
    return path.is_file() and FileRecord.of(path).sha256 == record.sha256


def _download_file(source: Folder, record: FileRecord, path: Path) -> None:
    found = hashlib.sha256()
    with source.open(record.name) as remote, path.open("wb") as file:
        while chunk := remote.read(_CHUNK):
            found.update(chunk)
            file.write(chunk)
    if found.hexdigest() != record.sha256:
        path.unlink()
        raise ManifestError(
            f"{source.uri}/{record.name}: its bytes are not the ones the manifest lists (sha256 "
            f"{record.sha256[:12]}...); restore the file"
        )


def cache_folder() -> Path:
    """Where this machine keeps copies, made if need be. Raises StorageError."""
    named = os.environ.get("PIXART_CACHE")
    cache = Path(named or f"{tempfile.gettempdir()}/pixart-{os.getuid()}")
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        mine = named or cache.stat().st_uid == os.getuid()
    except OSError as error:
        raise StorageError(f"PIXART_CACHE = {cache}: {error.strerror}") from error
    if not mine:  # anybody may make a folder in /tmp
        raise StorageError(f"{cache} is another user's; have PIXART_CACHE name a folder of yours")
    return cache


def make_room(cache: Path, num_bytes: int) -> None:
    """Delete copies, those used longest ago first; whoever has a file of one mapped keeps it."""
    copies = []
    for path in cache.iterdir():  # what killed processes were writing too
        with suppress(FileNotFoundError, NotADirectoryError):  # others make room too
            stat = path.stat()
            files = path.iterdir() if path.is_dir() else [path]
            copies.append((stat.st_mtime, sum(f.stat().st_size for f in files), path))
    held = sum(size for _, size, _ in copies)
    limit = (held + shutil.disk_usage(cache).free) / 2
    for _, size, path in sorted(copies):
        if held + num_bytes <= limit:
            break
        if path.suffix != _LOCK and _delete(path):
            held -= size


def _delete(path: Path) -> bool:
    """Whether the copy is gone: nobody was fetching it."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return True
    try:
        with _alone(path, wait=False):
            shutil.rmtree(path, ignore_errors=True)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _alone(place: Path, *, wait: bool) -> Iterator[None]:
    """For the block, no other process or thread has this lock. Raises BlockingIOError."""
    with place.with_suffix(_LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
