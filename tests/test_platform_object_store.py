"""S3 on its bad days: every fault a request can meet, over real HTTP, and what a user is told."""

import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from chaos_s3 import FAULTS, ChaosS3, endpoint

from pixart_platform import object_store
from pixart_platform.errors import StorageError
from pixart_platform.storage import FileAbsent, Folder

DATA = random.Random(0).randbytes(300_000)


@contextmanager
def bad_day(kind: str, share: float = 1.0, *, stall_seconds: float = 0.3) -> Iterator[ChaosS3]:
    """This process speaks to a server with the same buckets and one kind of fault."""
    server = ChaosS3(share, 1, [kind], stall_seconds=[stall_seconds])
    with server, endpoint(server.uri):
        yield server


@pytest.fixture
def few_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving up takes a second rather than a minute."""
    monkeypatch.setattr(object_store, "_ATTEMPTS", 2)


@pytest.mark.parametrize("kind", [*FAULTS, "flipped bit"])
def test_every_kind_of_fault_is_overcome(bucket: Folder, kind: str) -> None:
    for i in range(8):
        bucket.write(f"old/{i}", DATA)

    def work(i: int) -> None:
        assert bucket.create_once(f"once/{i}", b"%d" % i)
        assert not bucket.create_once(f"once/{i}", b"other")
        bucket.write(f"new/{i}", DATA)
        assert bucket.read(f"old/{i}") == DATA
        assert [entry.name for entry in bucket.walk("old/")] == [f"old/{j}" for j in range(8)]
        assert bucket.find(f"new/{i}") is not None
        bucket.delete(f"old/x{i}")
        if kind != "flipped bit":  # a part of a file has no checksum of its own
            with bucket.open(f"old/{i}") as file:
                file.seek(1000)
                assert file.read(100_000) == DATA[1000:101_000]

    with bad_day(kind, 0.25) as server, ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert server.faults[kind] >= 3
    for i in range(8):
        assert bucket.read(f"new/{i}") == DATA
        assert bucket.read(f"once/{i}") == b"%d" % i


def test_a_big_upload_is_whole_though_parts_of_it_are_torn(bucket: Folder) -> None:
    big = random.Random(1).randbytes(68 << 20)
    with bad_day("torn upload", 0.4) as server:
        bucket.write("big", memoryview(big))
    assert server.faults["torn upload"]
    assert bucket.read("big") == big


def test_a_download_that_breaks_off_is_continued_where_it_broke(bucket: Folder) -> None:
    bucket.write("file", DATA)
    with bad_day("torn download", 0.8) as server:
        assert bucket.read("file") == DATA
    assert server.faults["torn download"] >= 2
    assert server.sent_bytes == len(DATA)


def test_a_put_whose_answer_was_lost_is_ours(bucket: Folder) -> None:
    with bad_day("lost answer", 0.6):
        assert bucket.create_once("manifest.json", b"ours")
        assert not bucket.create_once("manifest.json", b"theirs")
    assert bucket.read("manifest.json") == b"ours"


def test_a_server_that_stays_silent_is_left_and_asked_again(
    bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "_READ_SECONDS", 0.5)
    with bad_day("stall", 0.5, stall_seconds=2) as server:
        bucket.write("file", DATA)
        assert bucket.read("file") == DATA
        while not server.faults["stall"]:
            assert bucket.find("file")
    assert bucket.read("file") == DATA


@pytest.mark.usefixtures("few_attempts")
@pytest.mark.parametrize(
    ("kind", "told"),
    [("InternalError", "S3 answered InternalError Try again"),
     ("SlowDown", "S3 answered SlowDown"),
     ("torn upload", "Connection was closed"),
     ("stall", "Connection was closed")],
)  # fmt: skip
def test_when_every_attempt_failed_the_place_and_reason_are_told(
    bucket: Folder, kind: str, told: str
) -> None:
    with bad_day(kind), pytest.raises(StorageError, match=rf"{bucket.uri}/file: .*{told}"):
        bucket.write("file", DATA)
    assert bucket.find("file") is None


@pytest.mark.usefixtures("few_attempts")
@pytest.mark.parametrize("kind", ["torn download", "flipped bit"])
def test_a_download_that_never_arrives_is_told(bucket: Folder, kind: str) -> None:
    bucket.write("file", DATA)
    with bad_day(kind), pytest.raises(StorageError, match="/file: arrived broken 2 times"):
        bucket.read("file")


@pytest.mark.usefixtures("few_attempts")
def test_a_record_that_others_hold_all_the_time_is_told(bucket: Folder) -> None:
    with (
        bad_day("ConditionalRequestConflict"),
        pytest.raises(StorageError, match="record: other writers held it"),
    ):
        bucket.create_once("record", b"x")


@pytest.mark.usefixtures("few_attempts")
def test_an_endpoint_where_nobody_listens_is_named(bucket: Folder) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with endpoint(uri), pytest.raises(StorageError, match=f"/file: .*connect.*{uri}"):
            bucket.read("file")


def test_an_endpoint_without_scheme_is_refused_by_name(bucket: Folder) -> None:
    with endpoint("localhost:9000"), pytest.raises(StorageError, match="localhost:9000"):
        bucket.read("file")


def test_without_credentials_the_way_out_is_told(
    bucket: Folder, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # whoever runs this may have a profile
    with endpoint(s3_endpoint):
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(
            StorageError, match=r"/file: no credentials; set AWS_ACCESS_KEY_ID"
        ) as e:
            bucket.read("file")
        monkeypatch.undo()
    assert not isinstance(e.value, FileAbsent)


def test_a_profile_that_is_not_there_is_named(
    bucket: Folder, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_PROFILE", "nobodys")
    with endpoint(s3_endpoint), pytest.raises(StorageError, match=r"/file: .*nobodys"):
        bucket.read("file")


@pytest.mark.usefixtures("s3_endpoint")
def test_a_bucket_name_s3_does_not_allow_is_named() -> None:
    with pytest.raises(StorageError, match="no_such bucket"):
        object_store.S3Folder("no_such bucket", "x").read("file")
