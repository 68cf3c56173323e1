"""Forgetting versions: which may go by a policy, and letting go of them with their bytes.

The newest of each stage stay, what an alias names, what a running pipeline builds on, and whatever
any of these was trained from, back to the first. A version is forgotten before its bytes are
deleted, so that nothing registered ever points at half a snapshot.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pixart_platform.copies import delete, size_of
from pixart_platform.errors import ManifestError, PixartError, RegistryError, StorageError
from pixart_platform.manifest import load_manifest
from pixart_platform.registry import PARENT_TAG, Registry, Version
from pixart_platform.tracking import IDENTITY_TAG, bury, running

_DAY = 86_400.0
_PIPELINE = "pipeline:"  # begins the identity of a pipeline's run; its digest follows


class PruneRefused(PixartError):
    """Versions that cannot be pruned as asked."""


@dataclass(frozen=True)
class Policy:
    """What may go: all but the ``keep`` newest of each stage that are older than so many days."""

    keep: int
    older_than_days: float = 0.0

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise PruneRefused(f"--keep {self.keep}: at least 1, or a stage would have no version")
        if not self.older_than_days >= 0:
            raise PruneRefused(f"--older-than {self.older_than_days:g}: days, 0 or more")


@dataclass(frozen=True)
class Pruned:
    """A version that goes, and what becomes of its bytes."""

    version: Version
    num_bytes: int
    note: str = ""
    """Why its bytes stay, if they do."""


def choose(
    policy: Policy, versions: Iterable[Version], pinned: Iterable[int], now: float
) -> list[Version]:
    """What may go, oldest first. ``pinned`` are numbers that must stay."""
    known = {version.number: version for version in versions}
    stages: dict[str, list[int]] = {}
    for number, version in sorted(known.items(), reverse=True):
        stages.setdefault(version.tags.get("stage", ""), []).append(number)
    staying = {n for numbers in stages.values() for n in numbers[: policy.keep]} | set(pinned)
    limit = now - policy.older_than_days * _DAY
    staying |= {n for n, version in known.items() if version.at > limit}
    waiting = [known[n] for n in staying if n in known]
    while waiting:  # and their ancestors
        parent = waiting.pop().tags.get(PARENT_TAG, "")
        if parent.isdecimal() and int(parent) in known and int(parent) not in staying:
            staying.add(int(parent))
            waiting.append(known[int(parent)])
    return [known[n] for n in sorted(set(known) - staying)]


def find_pinned(registry: Registry) -> set[int]:
    """Numbers that an alias names, or that pipelines under way have made or train from."""
    pinned, newest = set(registry.aliases().values()), dict[tuple[str, str], int]()
    versions = registry.versions()
    bury(registry.uri, registry.name)  # what died without saying so builds on nothing
    for tags in running(registry.uri, registry.name):
        if tags.get(PARENT_TAG, "").isdecimal():
            pinned.add(int(tags[PARENT_TAG]))
        kind, _, recipe = tags.get(IDENTITY_TAG, "").partition(":")
        for version in versions if f"{kind}:" == _PIPELINE else ():
            if version.tags.get("recipe_digest") == recipe:
                newest[recipe, version.tags.get("stage", "")] = version.number
    return pinned | set(newest.values())


def prune(registry: Registry, policy: Policy, *, really: bool) -> Iterator[Pruned]:
    """Each version that goes, once it is gone; unless ``really``, as it would go.

    Raises PruneRefused, RegistryError, and StorageError for bytes that are left behind.
    """
    versions = registry.versions()
    if not versions:
        raise PruneRefused(f"model {registry.name!r} has no versions; nothing to prune")
    gone: set[int] = set()
    for version in choose(policy, versions, find_pinned(registry), time.time()):
        if really:
            if version.number in find_pinned(registry):  # somebody has promoted it meanwhile
                continue
            registry.delete(version)
        gone.add(version.number)
        yield _let_go(registry, version, gone, really)


def _let_go(registry: Registry, version: Version, gone: set[int], really: bool) -> Pruned:
    try:
        folder = version.folder
        others = [
            other for other in registry.find_sharing(folder)
            if other.name != version.name or other.number not in gone
        ]  # fmt: skip
        if others:
            return Pruned(version, 0, f"shared with {others[0].name} version {others[0].number}")
        if really:
            return Pruned(version, delete(folder, version.digest))
        manifest = load_manifest(folder)
        same = manifest.digest == version.digest
        return Pruned(version, size_of(manifest) if same else 0, "" if same else "another's bytes")
    except ManifestError as error:
        return Pruned(version, 0, str(error))
    except (StorageError, RegistryError) as error:
        if not really:
            return Pruned(version, 0, str(error))
        raise StorageError(
            f"{version.name} version {version.number} is forgotten, but its bytes are not all "
            f"deleted: {error}; delete {version.source} by hand"
        ) from error
