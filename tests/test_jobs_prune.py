"""Pruning: what must stay stays, whatever the policy; bytes go only when nobody points at them."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import repeatable
from chaos_s3 import ChaosS3, endpoint
from hypothesis import given
from hypothesis import strategies as st
from test_platform_copies import make_snapshot
from typer.testing import CliRunner

from pixart_cluster.cli import cli
from pixart_jobs.prune import Policy, Pruned, PruneRefused, choose, prune
from pixart_platform import object_store
from pixart_platform.copies import publish
from pixart_platform.errors import StorageError
from pixart_platform.registry import PARENT_TAG, Registry, Version
from pixart_platform.storage import Folder
from pixart_platform.tracking import Tracker, sqlite_uri

DAY = 86_400.0
SIZE = 1000


def version(number: int, stage: str, parent: int | None = None, age_days: float = 100) -> Version:
    tags = {"stage": stage, PARENT_TAG: str(parent or "")}
    return Version("digits", number, f"/nowhere/{number}", tags, at=-age_days * DAY)


def numbers(chosen: list[Version]) -> list[int]:
    return [v.number for v in chosen]


def test_the_newest_of_each_stage_stay_and_what_is_young() -> None:
    versions = [version(n, "align" if n % 2 else "pixels", age_days=10 - n) for n in range(1, 9)]
    assert numbers(choose(Policy(1), versions, (), now=0)) == [1, 2, 3, 4, 5, 6]
    assert numbers(choose(Policy(3), versions, (), now=0)) == [1, 2]
    assert numbers(choose(Policy(1, 7), versions, (), now=0)) == [1, 2, 3]
    assert numbers(choose(Policy(1, 100), versions, (), now=0)) == []


def test_whatever_is_kept_keeps_what_it_was_trained_from() -> None:
    versions = [
        version(1, "pixels"), version(2, "pixels"), version(3, "pixels"),
        version(4, "align", 1), version(5, "align", 2), version(6, "aesthetics", 4),
    ]  # fmt: skip
    assert numbers(choose(Policy(1), versions, (), now=0)) == []
    newer = [*versions, version(7, "aesthetics", 5)]
    assert numbers(choose(Policy(1), newer, (), now=0)) == [1, 4, 6]
    assert numbers(choose(Policy(1), newer, (6,), now=0)) == []


@st.composite
def histories(draw: st.DrawFn) -> list[Version]:
    versions: list[Version] = []
    for number in range(1, draw(st.integers(1, 12)) + 1):
        parent = draw(st.none() | st.integers(1, number))  # a loop of one at worst
        stage, age = draw(st.sampled_from("abc")), draw(st.floats(0, 50))
        versions.append(version(number, stage, parent, age))
    return versions


@repeatable
@given(histories(), st.integers(1, 4), st.floats(0, 60), st.sets(st.integers(1, 14)))
def test_no_policy_takes_what_must_stay(
    versions: list[Version], keep: int, days: float, pinned: set[int]
) -> None:
    gone = set(numbers(choose(Policy(keep, days), versions, pinned, now=0)))
    assert not gone & pinned
    for stage in "abc":
        of_stage = [v.number for v in versions if v.tags["stage"] == stage]
        assert not gone & set(of_stage[-keep:])
    for v in versions:
        if v.number not in gone and v.tags[PARENT_TAG]:
            assert int(v.tags[PARENT_TAG]) not in gone
        assert v.number not in gone or -v.at >= days * DAY


@pytest.mark.parametrize("policy", [(0, 0), (-1, 0), (1, -1), (1, float("nan"))])
def test_a_policy_that_means_nothing_is_refused(policy: tuple[int, float]) -> None:
    with pytest.raises(PruneRefused, match=r"--(keep|older-than)"):
        Policy(*policy)


@dataclass
class Shelf:
    """A registry of versions on S3, of one stage, with a tracker of the same experiment."""

    folder: Path
    bucket: Folder
    registry: Registry
    tracker: Tracker

    def add(self, name: str, stage: str = "align", **tags: str) -> int:
        """Register the snapshot that is called ``name``."""
        made, kept = self.folder / name, self.bucket / name
        if not made.exists():
            make_snapshot(made, {"model.safetensors": name.encode() * (SIZE // len(name))})
            publish(made, kept)
        known = self.registry.register(kept, self.tracker.run_id, {"stage": stage} | tags)
        return known.number

    def prune(self, keep: int = 1, *, really: bool = True) -> list[Pruned]:
        return [*prune(self.registry, Policy(keep), really=really)]

    @property
    def left(self) -> list[int]:
        return [v.number for v in self.registry.versions()]


@pytest.fixture
def shelf(tmp_path: Path, bucket: Folder) -> Shelf:
    uri = sqlite_uri(tmp_path)
    tracker = Tracker.start(uri, "digits", "align:x", "align", artifacts=tmp_path)
    return Shelf(tmp_path, bucket, Registry(uri, "digits"), tracker)


def type_in(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_a_dry_run_tells_and_yes_deletes_with_the_bytes(shelf: Shelf, tmp_path: Path) -> None:
    for name in ("aaaa", "bbbb", "cccc"):
        shelf.add(name)
    told = type_in("registry", "prune", "--keep", "2", "--root", tmp_path)
    line = f"digits version 1, stage align, 1,000 bytes in {shelf.bucket.uri}/aaaa\n"
    assert told == f"would delete {line}1 versions, 1,000 bytes; --yes deletes them\n"
    assert shelf.left == [1, 2, 3]
    assert type_in("registry", "prune", "--older-than", "1", "--keep", "1", "--root", tmp_path) == (
        "0 versions, 0 bytes\n"
    )
    told = type_in("registry", "prune", "--keep", "2", "--yes", "--root", tmp_path)
    assert told == f"deleted {line}1 versions, 1,000 bytes\n"
    assert shelf.left == [2, 3]
    assert shelf.bucket.children() == ["bbbb", "cccc"]
    assert type_in("registry", "prune", "--keep", "2", "--yes", "--root", tmp_path) == (
        "0 versions, 0 bytes\n"
    )


def test_what_an_alias_names_stays_and_so_does_what_it_came_from(shelf: Shelf) -> None:
    shelf.add("aaaa", "pixels")
    shelf.add("bbbb", "align", **{PARENT_TAG: "1"})
    for name in ("cccc", "dddd"):
        shelf.add(name, "pixels")
        shelf.add(name * 2, "align")
    shelf.registry.set_alias("previous", shelf.registry.get("2"))
    assert [p.version.number for p in shelf.prune()] == [3, 4]
    assert shelf.left == [1, 2, 5, 6]


def test_what_a_pipeline_under_way_made_or_trains_from_stays(shelf: Shelf, tmp_path: Path) -> None:
    for name in ("aaaa", "bbbb", "cccc", "dddd"):
        shelf.add(name, recipe_digest="r1" if name < "c" else "r2")
    place = (shelf.registry.uri, "digits")
    pipeline = Tracker.start(*place, "pipeline:r1", "pipeline", artifacts=tmp_path)
    stage = Tracker.start(*place, "align:y", "align", artifacts=tmp_path)
    stage.set_tags({PARENT_TAG: "3"})
    assert [p.version.number for p in shelf.prune()] == [1]
    stage.finish()
    assert [p.version.number for p in shelf.prune()] == [3]
    pipeline.finish()
    assert [p.version.number for p in shelf.prune()] == [2]
    assert shelf.left == [4]


def test_shared_bytes_stay_until_the_last_who_points_at_them_is_gone(shelf: Shelf) -> None:
    shelf.add("aaaa")
    shelf.add("bbbb")
    other = Registry(shelf.registry.uri, "others")
    other.register(shelf.bucket / "aaaa", shelf.tracker.run_id, {})
    dry, really = shelf.prune(really=False), shelf.prune()
    assert dry == really
    assert [(p.num_bytes, p.note) for p in really] == [(0, "shared with others version 1")]
    other.get("1").verify()
    shelf.add("aaaa")
    other.register(shelf.bucket / "bbbb", shelf.tracker.run_id, {})
    assert [p.num_bytes for p in prune(other, Policy(1), really=True)] == [0]
    assert shelf.left == [2, 3]
    assert [(p.version.number, p.num_bytes) for p in shelf.prune()] == [(2, 0)]
    shelf.add("cccc")
    assert [(p.version.number, p.num_bytes) for p in shelf.prune()] == [(3, SIZE)]
    assert shelf.bucket.children() == ["bbbb", "cccc"]


def test_other_bytes_in_its_place_are_left_alone(shelf: Shelf, tmp_path: Path) -> None:
    shelf.add("aaaa")
    shelf.add("bbbb")
    (shelf.bucket / "aaaa").delete("manifest.json")
    make_snapshot(tmp_path / "new", {"model.safetensors": b"new"})
    publish(tmp_path / "new", shelf.bucket / "aaaa")
    [gone] = shelf.prune()
    assert (gone.num_bytes, shelf.left) == (0, [2])
    assert "its files are left alone" in gone.note
    assert (shelf.bucket / "aaaa").read("model.safetensors") == b"new"


def test_an_alias_that_moves_there_meanwhile_saves_a_version(shelf: Shelf) -> None:
    for name in ("aaaa", "bbbb", "cccc"):
        shelf.add(name)
    going = prune(shelf.registry, Policy(1), really=True)
    assert next(going).version.number == 1
    shelf.registry.set_alias("champion", shelf.registry.get("2"))
    assert [*going] == []
    assert shelf.left == [2, 3]


def test_bytes_that_cannot_be_deleted_are_named_and_the_version_is_gone(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf.add("aaaa")
    shelf.add("bbbb")
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    server = ChaosS3(1.0, 1, ["InternalError"])
    with server, endpoint(server.uri), pytest.raises(StorageError) as caught:
        shelf.prune()
    assert "digits version 1 is forgotten, but its bytes are not all deleted" in str(caught.value)
    assert f"delete {shelf.bucket.uri}/aaaa by hand" in str(caught.value)
    assert shelf.left == [2]


def test_a_model_without_versions_is_refused_by_name(shelf: Shelf) -> None:
    with pytest.raises(PruneRefused, match="model 'digits' has no versions"):
        shelf.prune()
