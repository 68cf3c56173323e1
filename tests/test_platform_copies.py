"""Snapshots copied to S3 and back: whole, proved, fetched once, and continued where cut off."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from chaos_s3 import ChaosS3, endpoint

from pixart_platform import copies, object_store
from pixart_platform.copies import cache_folder, delete, fetch, make_room, publish
from pixart_platform.errors import ManifestError, RegistryError, StorageError
from pixart_platform.manifest import MANIFEST_FILE, FileRecord, Manifest, load_manifest
from pixart_platform.registry import Version
from pixart_platform.storage import Folder, LocalFolder

FILES = {"config.json": b'{"a": 1}', "model.safetensors": bytes(range(256)) * 2000}


def make_snapshot(folder: Path, files: dict[str, bytes] | None = None) -> str:
    """A finished snapshot; its digest."""
    folder.mkdir(parents=True)
    for name, data in (files or FILES).items():
        (folder / name).write_bytes(data)
    records = tuple(FileRecord.of(path) for path in sorted(folder.iterdir()))
    return Manifest("snapshot/1", {}, {}, records).commit_to(folder).digest


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_snapshot(tmp_path / "made")
    return tmp_path / "made"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def kept(bucket: Folder, made: Path) -> Folder:
    """The snapshot on S3."""
    publish(made, bucket / "kept")
    return bucket / "kept"


@pytest.fixture
def calls(bucket: Folder) -> Iterator[ChaosS3]:  # noqa: ARG001  # the buckets are shared
    """What is asked of S3 from here on."""
    with ChaosS3() as server, endpoint(server.uri):
        yield server


def digest_of(folder: Path) -> str:
    return load_manifest(folder).digest


def flip(folder: Folder, name: str, place: int) -> None:
    data = bytearray(folder.read(name))
    data[place] ^= 1
    folder.write(name, bytes(data))


def test_a_snapshot_comes_back_as_it_went_and_is_fetched_once(
    made: Path, kept: Folder, cache: Path, calls: ChaosS3
) -> None:
    for _ in range(2):
        place = fetch(kept, digest_of(made))
        assert place == cache / digest_of(made)
        assert {p.name: p.read_bytes() for p in place.iterdir() if p.name in FILES} == FILES
        assert calls.calls["GET"] == 3, "each file and the manifest, once"


def test_many_at_once_fetch_it_once(made: Path, kept: Folder, cache: Path, calls: ChaosS3) -> None:
    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: fetch(kept, digest_of(made)), range(8)))
    assert places == {cache / digest_of(made)}
    assert calls.calls["GET"] == 3


def test_publishing_again_writes_nothing_and_a_torn_one_is_continued(
    made: Path, bucket: Folder, calls: ChaosS3
) -> None:
    dest = bucket / "kept"
    dest.write("config.json", FILES["config.json"])
    dest.write("model.safetensors", FILES["model.safetensors"][:-1] + b"?")  # not these bytes
    calls.calls.clear()
    publish(made, dest)
    assert calls.calls["PUT"] == 2, "the damaged file and the manifest"
    assert dest.read("model.safetensors") == FILES["model.safetensors"]
    publish(made, dest)
    assert calls.calls["PUT"] == 2


def test_no_manifest_is_written_before_every_file_is_there(
    made: Path, bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    for seed in range(6):
        dest = bucket / f"kept{seed}"
        with ChaosS3(0.5, seed, ["InternalError"]) as server, endpoint(server.uri):
            try:
                publish(made, dest)
            except StorageError:
                assert server.faults["InternalError"]
        if dest.find(MANIFEST_FILE):
            assert {name: dest.read(name) for name in FILES} == FILES
        publish(made, dest)
        assert load_manifest(dest).digest == digest_of(made)


def test_what_is_damaged_or_taken_is_not_published(
    tmp_path: Path, made: Path, bucket: Folder
) -> None:
    flip(LocalFolder(made), "config.json", 0)
    with pytest.raises(ManifestError, match=r"config.json: its bytes are not"):
        publish(made, bucket / "kept")
    assert not list(bucket.walk())
    make_snapshot(tmp_path / "other", {"model.safetensors": b"other"})
    publish(tmp_path / "other", bucket / "kept")
    flip(LocalFolder(made), "config.json", 0)
    with pytest.raises(ManifestError, match=r"holds a snapshot with digest .* another folder"):
        publish(made, bucket / "kept")


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
@pytest.mark.parametrize("place", [0, -2])
@pytest.mark.usefixtures("cache")
def test_a_flipped_bit_of_the_copy_is_fetched_again_and_one_on_s3_is_refused(
    made: Path, kept: Folder, name: str, place: int
) -> None:
    version = Version("digits", 7, kept.uri, {"digest": digest_of(made)})
    copy = version.fetch()
    flip(LocalFolder(copy), name, place)
    assert version.fetch() == copy
    assert {n: (copy / n).read_bytes() for n in FILES} == FILES
    flip(kept, name, place)
    with pytest.raises(RegistryError, match=rf"digits version 7: .*{name}"):
        version.verify()
    version.fetch()  # which is whole, and the one that was registered
    shutil.rmtree(copy)
    with pytest.raises(RegistryError, match="digits version 7: "):
        version.fetch()
    assert not copy.exists()
    kept.delete(name)
    for prove in (version.verify, version.fetch):
        with pytest.raises(RegistryError, match="digits version 7: "):
            prove()


def test_a_snapshot_replaced_whole_is_refused(
    tmp_path: Path, made: Path, kept: Folder, cache: Path
) -> None:
    version = Version("digits", 7, kept.uri, {"digest": digest_of(made)})
    make_snapshot(tmp_path / "other", {"model.safetensors": b"other"})
    kept.delete(MANIFEST_FILE)
    publish(tmp_path / "other", kept)
    for prove in (version.verify, version.fetch):
        with pytest.raises(RegistryError, match=f"registered was {version.digest}"):
            prove()
    assert not (cache / version.digest).exists()


def test_a_fetch_that_was_killed_is_continued(
    made: Path, kept: Folder, cache: Path, calls: ChaosS3
) -> None:
    digest = digest_of(made)
    half = cache / f"{digest}.part"
    half.mkdir(parents=True)
    (half / "config.json").write_bytes(FILES["config.json"])
    (half / "model.safetensors").write_bytes(FILES["model.safetensors"][:1000])
    place = fetch(kept, digest)
    assert {n: (place / n).read_bytes() for n in FILES} == FILES
    assert calls.calls["GET"] == 2, "the manifest, and the file that was cut off"
    assert not half.exists()


def test_an_outage_is_no_fault_of_the_version(
    made: Path, kept: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    version = Version("digits", 7, kept.uri, {"digest": digest_of(made)})
    with ChaosS3(1.0, 1, ["InternalError"]) as server, endpoint(server.uri):
        for prove in (version.verify, version.fetch):
            with pytest.raises(StorageError, match="S3 answered"):
                prove()
    version.verify()
    assert version.fetch() == cache / version.digest


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "", "..", "a/b", MANIFEST_FILE])
def test_names_and_digests_from_outside_become_no_paths(bucket: Folder, name: str) -> None:
    record = FileRecord(name, 4, "0" * 64)
    digest = Manifest("snapshot/1", {}, {}, (record,)).commit_to(bucket).digest
    with pytest.raises(ManifestError, match="no file of a snapshot's own"):
        fetch(bucket, digest)
    with pytest.raises(ManifestError, match="no file of a snapshot's own"):
        delete(bucket, digest)
    for outside in ("", "..", f"../{digest[3:]}", digest + "\n"):
        with pytest.raises(ManifestError, match="no digest of a manifest"):
            fetch(bucket, outside)
    assert bucket.find(MANIFEST_FILE)


@pytest.mark.usefixtures("cache")
def test_a_disk_too_small_is_named_before_anything_is_fetched(
    made: Path, kept: Folder, calls: ChaosS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(made)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(StorageError, match=r"do not fit, 1,000 are free; have PIXART_CACHE name"):
        fetch(kept, digest_of(made))
    assert calls.calls["GET"] == 1


def test_snapshots_make_room_but_for_one_that_is_being_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, name in enumerate(("new", "older", "oldest", "busy.part")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200))  # room for 300
    with copies._alone(tmp_path / "busy", wait=True):
        make_room(tmp_path, 100)
    left = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert left == {"new", "busy.part"}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away, as CI is")
def test_the_folder_of_another_user_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIXART_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.chown(cache_folder(), 65534, 65534)
    with pytest.raises(StorageError, match="is another user's"):
        cache_folder()


def test_deleting_leaves_what_the_manifest_does_not_list(made: Path, kept: Folder) -> None:
    num_bytes = sum(map(len, FILES.values()))
    kept.write("notes.txt", b"mine")
    with pytest.raises(ManifestError, match="its files are left alone"):
        delete(kept, "0" * 16)
    assert delete(kept, digest_of(made)) == num_bytes
    assert [entry.name for entry in kept.walk()] == ["notes.txt"]
    assert delete(kept, digest_of(made)) == 0
    assert json.loads((made / MANIFEST_FILE).read_text())
    assert delete(LocalFolder(made), digest_of(made)) == num_bytes
    assert not made.exists()
