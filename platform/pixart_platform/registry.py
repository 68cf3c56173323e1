"""The model registry: every stage's snapshot is a version; aliases say which one counts.

A version points at a snapshot folder and carries its digest, so whoever loads it can tell that
the bytes are the ones that were registered. Weights never pass through MLflow.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pixart_platform.errors import ManifestError, RegistryError
from pixart_platform.manifest import load_manifest, verify_folder
from pixart_platform.tracking import hide_password, quiet_mlflow

DIGEST_TAG = "digest"
_UNKNOWN = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True)
class Version:
    """An immutable registered snapshot."""

    name: str
    number: int
    folder: Path
    tags: dict[str, str]

    def verify(self) -> None:
        """Check every byte against the registered digest. Raises RegistryError."""
        try:
            manifest = verify_folder(self.folder)
        except ManifestError as error:
            raise RegistryError(f"{self.name} version {self.number}: {error}") from error
        if manifest.digest != self.tags.get(DIGEST_TAG):
            raise RegistryError(
                f"{self.name} version {self.number}: {self.folder} has digest {manifest.digest}, "
                f"registered was {self.tags.get(DIGEST_TAG)}; restore the snapshot"
            )


@contextmanager
def _reachable(uri: str) -> Iterator[None]:
    """Turn what MLflow and its database raise when they cannot answer into a RegistryError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        first = str(error).splitlines()[0]
        told = f"the registry at {uri} does not answer: {first}"  # which may name it again
        raise RegistryError(told.replace(uri, hide_password(uri))) from error


class Registry:
    """The versions of one model family. Every method raises RegistryError if it is unreachable."""

    def __init__(self, uri: str, name: str) -> None:
        quiet_mlflow()
        from mlflow import MlflowClient

        self.uri, self.name = uri, name
        with _reachable(uri):
            self._client = MlflowClient(uri)

    def register(self, folder: Path, run_id: str, tags: Mapping[str, str]) -> Version:
        """Register a snapshot; the same bytes from the same run are one version, however often."""
        from mlflow.exceptions import MlflowException

        digest = load_manifest(folder).digest
        with _reachable(self.uri):
            try:
                self._client.create_registered_model(self.name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        for version in self.versions():
            if version.tags.get(DIGEST_TAG) == digest and version.folder == folder:
                return version
        with _reachable(self.uri):
            made = self._client.create_model_version(
                self.name, folder.as_uri(), run_id=run_id, tags={**tags, DIGEST_TAG: digest}
            )
        return self.get(str(made.version))

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        with _reachable(self.uri):
            found = self._client.search_model_versions(f"name = '{self.name}'")
        return sorted((_version(v) for v in found), key=lambda v: v.number)

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
        from mlflow.exceptions import MlflowException

        with _reachable(self.uri):
            try:
                model = self._client.get_registered_model(self.name)
            except MlflowException as error:
                if error.error_code not in _UNKNOWN:
                    raise
                return {}
        return {alias: int(number) for alias, number in model.aliases.items()}

    def _known(self) -> str:
        aliases = [f"{a} (version {n})" for a, n in sorted(self.aliases().items())]
        return ", ".join([*aliases, *(f"version {v.number}" for v in self.versions()[-5:])])

    def set_alias(self, alias: str, version: Version) -> None:
        """Point ``alias`` at ``version``, wherever it pointed before."""
        with _reachable(self.uri):
            self._client.set_registered_model_alias(self.name, alias, str(version.number))

    def tag(self, version: Version, tags: Mapping[str, str]) -> None:
        """Add tags to a version."""
        with _reachable(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.name, str(version.number), key, value)


def _version(raw: object) -> Version:
    from mlflow.entities.model_registry import ModelVersion

    assert isinstance(raw, ModelVersion)
    folder = Path(unquote(str(raw.source).removeprefix("file://")))
    return Version(raw.name, int(raw.version), folder, dict(raw.tags))
