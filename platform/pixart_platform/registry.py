"""The model registry: every stage's snapshot is a version; aliases say which one counts.

A version points at a snapshot, in a folder or on S3, and carries its digest, so whoever loads it
can tell that the bytes are the ones that were registered. Weights never pass through MLflow.
"""

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pixart_platform.copies import fetch
from pixart_platform.errors import ManifestError, RegistryError
from pixart_platform.manifest import load_manifest, verify_folder
from pixart_platform.storage import Folder, LocalFolder, open_folder
from pixart_platform.tracking import hide_password, quiet_mlflow, reachable

if TYPE_CHECKING:
    from mlflow.entities.model_registry import RegisteredModel

DIGEST_TAG = "digest"
_JOURNAL = ".moves"
_ENTRY = "entry"  # a tag
_ATTEMPTS = 6
PARENT_TAG = "parent_version"  # the number of the version it was trained from
_reachable = partial(reachable, what="the registry", kind=RegistryError)
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Version:
    """An immutable registered snapshot."""

    name: str
    number: int
    source: str
    """Where the snapshot lies, as ``open_folder`` takes it."""
    tags: dict[str, str]
    run_id: str = ""
    at: float = 0.0
    """Unix seconds of its registration."""

    @property
    def folder(self) -> Folder:
        """Raises StorageError for a source that we cannot read."""
        return open_folder(self.source)

    @property
    def digest(self) -> str:
        """Of the snapshot's manifest, as it was registered."""
        return self.tags.get(DIGEST_TAG, "")

    def verify(self) -> None:
        """Check every byte where it lies against the registered digest.

        Raises RegistryError, and StorageError if the bytes cannot be had now.
        """
        with self._named():
            found = verify_folder(self.folder).digest
            if found != self.digest:
                raise ManifestError(
                    f"{self.source} has digest {found}, registered was {self.digest}; restore the "
                    f"snapshot"
                )

    def fetch(self) -> Path:
        """The snapshot as a folder of this machine, every byte checked: in its place, or a copy.

        Raises RegistryError, and StorageError if the bytes cannot be had now.
        """
        folder = self.folder
        if isinstance(folder, LocalFolder):
            self.verify()
            return folder.path
        with self._named():
            return fetch(folder, self.digest)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ManifestError as error:
            raise RegistryError(f"{self.name} version {self.number}: {error}") from error


class Registry:
    """The versions of one model family. Every method raises RegistryError if it is unreachable."""

    def __init__(self, uri: str, name: str) -> None:
        quiet_mlflow()
        from mlflow import MlflowClient

        self.uri, self.name = uri, name
        with _reachable(uri):
            self._client = MlflowClient(uri)

    def register(self, place: Path | Folder, run_id: str, tags: Mapping[str, str]) -> Version:
        """Register a snapshot; the same bytes in the same place are one version, however often."""
        folder = open_folder(place)
        source = folder.path.as_uri() if isinstance(folder, LocalFolder) else folder.uri
        check_source(self.uri, folder)
        digest = load_manifest(folder).digest
        self._create(self.name)
        for version in self.versions():
            if version.digest == digest and version.source == folder.uri:
                return version
        with _reachable(self.uri):
            made = self._client.create_model_version(
                self.name, source, run_id=run_id, tags={**tags, DIGEST_TAG: digest}
            )
        return self.get(str(made.version))

    def _create(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        with _reachable(self.uri):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        return self._search(self.name)

    def _search(self, name: str) -> list[Version]:
        found, token = [], None
        while token is None or token:
            with _reachable(self.uri):
                page = self._client.search_model_versions(f"name = '{name}'", page_token=token)
            found += [_version(v) for v in page]
            token = page.token or ""
        return sorted(found, key=lambda v: v.number)

    def get(self, reference: str) -> Version:
        """The version behind a number or alias. Raises RegistryError, naming what there is."""
        from mlflow.exceptions import MlflowException

        with _reachable(self.uri):
            try:
                if reference.isdecimal():
                    return _version(self._client.get_model_version(self.name, reference))
                return _version(self._client.get_model_version_by_alias(self.name, reference))
            except MlflowException as error:
                if error.error_code not in _UNKNOWN:
                    raise
        raise RegistryError(
            f"model {self.name!r} has no version or alias {reference!r}; it has "
            f"{self._known() or 'nothing registered yet'}"
        )

    def aliases(self) -> dict[str, int]:
        """Version number by alias; empty for a model nobody has registered."""
        model = self._model()
        return {alias: int(n) for alias, n in model.aliases.items()} if model else {}

    def _model(self) -> "RegisteredModel | None":
        from mlflow.exceptions import MlflowException

        with _reachable(self.uri):
            try:
                return self._client.get_registered_model(self.name)
            except MlflowException as error:
                if error.error_code not in _UNKNOWN:
                    raise
                return None

    def _known(self) -> str:
        aliases = [f"{a} (version {n})" for a, n in sorted(self.aliases().items())]
        return ", ".join([*aliases, *(f"version {v.number}" for v in self.versions()[-5:])])

    def set_alias(self, alias: str, version: Version) -> None:
        """Point ``alias`` at ``version``, wherever it pointed before."""
        with _reachable(self.uri):
            self._client.set_registered_model_alias(self.name, alias, str(version.number))

    def append(self, version: Version, entry: str) -> None:
        """Add an entry about ``version`` to the model's journal, whole and after all others.

        The journal is a model of its own, ``NAME.moves``: the registry numbers its versions.
        """
        journal, about = f"{self.name}{_JOURNAL}", f"models:/{self.name}/{version.number}"
        self._create(journal)
        for patience in range(_ATTEMPTS):
            try:
                with _reachable(self.uri):
                    self._client.create_model_version(journal, about, tags={_ENTRY: entry})
                return
            except RegistryError as error:
                crowded = "Giving up after" in str(error) or "is locked" in str(error)
                if not crowded or patience + 1 == _ATTEMPTS:
                    raise
                time.sleep(random.uniform(0, 0.1 * 2**patience))

    def journal(self) -> list[str]:
        """The entries of the model's journal, oldest first."""
        found = self._search(f"{self.name}{_JOURNAL}")
        return [v.tags[_ENTRY] for v in found if _ENTRY in v.tags]

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Add tags to a version."""
        with _reachable(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, str(version.number), key, value)

    def delete(self, version: Version) -> None:
        """Forget a version; its snapshot stays."""
        with _reachable(self.uri):
            self._client.delete_model_version(self.name, str(version.number))

    def find_sharing(self, folder: Folder) -> list[Version]:
        """The versions, of any model that may be seen, whose snapshot is in ``folder``."""
        found, token = list[Version](), ""
        with _reachable(self.uri):
            while True:
                page = self._client.search_model_versions("", page_token=token or None)
                found += [_version(raw) for raw in page]
                if not (token := page.token):
                    break
        return [version for version in found if version.source.rstrip("/") == folder.uri]


def check_source(uri: str, folder: Folder) -> None:
    """Raise RegistryError if the server at ``uri`` cannot know a version in ``folder``."""
    if uri.startswith(("http://", "https://")) and isinstance(folder, LocalFolder):
        raise RegistryError(
            f"{folder.uri}: a server ({hide_password(uri)}) registers no folder of one machine; "
            f"set train.snapshots = s3://bucket/prefix"
        )


def _version(raw: object) -> Version:
    from mlflow.entities.model_registry import ModelVersion

    assert isinstance(raw, ModelVersion)
    source, at = str(raw.source), raw.creation_timestamp / 1000
    if source.startswith("file://"):
        source = unquote(source.removeprefix("file://"))
    return Version(raw.name, int(raw.version), source, dict(raw.tags), str(raw.run_id or ""), at)
