"""Manifests: what a folder holds, from what, by whom, and the digest of every byte.

Written last, once. A folder without one did not happen, and consumers refuse it.
"""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pixart_platform.errors import ManifestError
from pixart_platform.recipe import digest_of
from pixart_platform.storage import FileAbsent, Folder, LocalFolder, open_folder, sha256_of

MANIFEST_FILE = "manifest.json"
_VERIFY_THREADS = 8


@dataclass(frozen=True)
class FileRecord:
    """One file: its name in the folder, size, SHA-256, and rows by status where it has rows.

    ``key`` names what a partition was made from. ``folder`` is empty, or the neighbour that holds
    the file: a table that grew refers to the partitions it took over instead of copying them.
    """

    name: str
    num_bytes: int
    sha256: str
    counts: dict[str, int] = field(default_factory=dict)
    key: str = ""
    folder: str = ""

    @classmethod
    def of(cls, path: Path, counts: dict[str, int] | None = None) -> "FileRecord":
        digest = sha256_of(LocalFolder(path.parent), path.name)
        return cls(path.name, path.stat().st_size, digest, counts or {})

    def home(self, folder: Folder) -> Folder:
        """The folder that holds the file of a manifest in ``folder``."""
        return folder.parent / self.folder if self.folder else folder


@dataclass(frozen=True)
class Manifest:
    """The content of a ``manifest.json``.

    ``settings`` is what the producer was asked, ``inputs`` the digests it read, ``extra`` small
    results consumers need. The digest covers these and the files, not who wrote them or when.
    """

    schema: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    files: tuple[FileRecord, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    producer: str = ""
    commit: str = ""

    @property
    def digest(self) -> str:
        content = asdict(self)
        del content["producer"], content["commit"]
        for record in content["files"]:  # where a file lies, and from what it was made, is not
            del record["key"], record["folder"]  # what it holds
        return digest_of(content)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by status over all files."""
        total: dict[str, int] = {}
        for record in self.files:
            for status, count in record.counts.items():
                total[status] = total.get(status, 0) + count
        return dict(sorted(total.items()))

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    def commit_to(self, place: Path | Folder) -> "Manifest":
        """Write it, once. If another writer won with other content, raises ManifestError."""
        folder = open_folder(place)
        document = asdict(self) | {
            "producer": f"pixart-ray {version('pixart-ray')}",
            "commit": current_commit(),
        }
        document["checksum"] = digest_of(document)
        data = json.dumps(document, indent=1, sort_keys=True).encode()
        if not folder.create_once(MANIFEST_FILE, data):
            existing = load_manifest(folder)
            if existing.digest != self.digest:
                raise ManifestError(
                    f"{folder.uri}: another writer has committed digest {existing.digest}, this "
                    f"one has {self.digest}; nothing was overwritten, give one another folder"
                )
        return load_manifest(folder)


def load_manifest(place: Path | Folder) -> Manifest:
    """Read the manifest of a folder. Raises ManifestError when missing or malformed.

    Raises StorageError where the storage does not answer, which says nothing of the manifest.
    """
    folder = open_folder(place)
    try:
        raw = json.loads(folder.read(MANIFEST_FILE))
        files = tuple(FileRecord(**record) for record in raw["files"])
        checksum = raw.pop("checksum", None)  # manifests of 0.1 have none
        if checksum not in (None, digest_of(raw)):
            raise ValueError("its content does not match its checksum")
        return Manifest(**raw | {"files": files})
    except FileAbsent as error:
        raise ManifestError(
            f"{folder.uri} is unfinished, not ours or not there: it has no {MANIFEST_FILE}; run "
            f"the job that writes it"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ManifestError(
            f"{folder.uri}/{MANIFEST_FILE}: unreadable ({error}); restore it or redo the job"
        ) from error


def verify_folder(place: Path | Folder) -> Manifest:
    """Check every file against the manifest. Raises ManifestError naming the first that differs."""
    folder = open_folder(place)
    manifest = load_manifest(folder)
    with ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        for fault in pool.map(partial(_find_fault, folder), manifest.files):
            if fault:
                raise ManifestError(fault)
    return manifest


def _find_fault(folder: Folder, record: FileRecord) -> str:
    home = record.home(folder)
    path = f"{home.uri}/{record.name}"
    found = home.find(record.name)
    if found is None:
        return f"{path}: missing, though the manifest lists it; restore the file"
    if found.num_bytes != record.num_bytes or sha256_of(home, record.name) != record.sha256:
        return (
            f"{path}: its bytes are not the ones the manifest lists (sha256 "
            f"{record.sha256[:12]}...); restore the file"
        )
    return ""


@cache
def current_commit() -> str:
    """Git commit of the code, or an empty string outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, timeout=5, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
