"""Manifests: what a folder holds, from what, by whom, and the digest of every byte.

Written last, once. A folder without one did not happen, and consumers refuse it.
"""

import json
import subprocess
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pixart_platform.errors import ManifestError
from pixart_platform.recipe import digest_of
from pixart_platform.storage import create_once, sha256_file

MANIFEST_FILE = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """One file: its name in the folder, size, SHA-256, and rows by status where it has rows."""

    name: str
    num_bytes: int
    sha256: str
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, counts: dict[str, int] | None = None) -> "FileRecord":
        return cls(path.name, path.stat().st_size, sha256_file(path), counts or {})


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

    def commit_to(self, folder: Path) -> "Manifest":
        """Write it, once. If another writer won with other content, raises ManifestError."""
        document = asdict(self) | {
            "producer": f"pixart-ray {version('pixart-ray')}",
            "commit": current_commit(),
        }
        data = json.dumps(document, indent=1, sort_keys=True).encode()
        if not create_once(folder / MANIFEST_FILE, data):
            existing = load_manifest(folder)
            if existing.digest != self.digest:
                raise ManifestError(
                    f"{folder}: another writer has committed digest {existing.digest}, this one "
                    f"has {self.digest}; nothing was overwritten, give one of them another folder"
                )
        return load_manifest(folder)


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of ``folder``. Raises ManifestError when missing or malformed."""
    path = folder / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text())
        raw["files"] = tuple(FileRecord(**record) for record in raw["files"])
        return Manifest(**raw)
    except FileNotFoundError as error:
        state = "is unfinished or not ours" if folder.is_dir() else "does not exist"
        raise ManifestError(
            f"{folder} {state}: it has no {MANIFEST_FILE}; run the job that writes it"
        ) from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ManifestError(f"{path}: unreadable ({error}); restore it or redo the job") from error


def verify_folder(folder: Path) -> Manifest:
    """Check every file against the manifest. Raises ManifestError naming the first that differs."""
    manifest = load_manifest(folder)
    for record in manifest.files:
        path = folder / record.name
        if not path.is_file():
            raise ManifestError(f"{path}: missing, though the manifest lists it")
        if path.stat().st_size != record.num_bytes or sha256_file(path) != record.sha256:
            raise ManifestError(
                f"{path}: its bytes are not the ones the manifest lists (sha256 "
                f"{record.sha256[:12]}...); restore the file"
            )
    return manifest


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
