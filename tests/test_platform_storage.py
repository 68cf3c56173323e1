"""Files that appear whole or not at all, and commits with one winner: one contract, two storages.

Tests that take ``folder`` run on a local folder and on S3; those below them are about one of both.
"""

import io
import multiprocessing
import os
import random
import resource
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import repeatable
from hypothesis import given, settings
from hypothesis import strategies as st
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from pixart_platform.errors import StorageError
from pixart_platform.storage import (
    FileAbsent,
    Folder,
    LocalFolder,
    open_folder,
    publish_folder,
    sha256_of,
    write_atomic,
)

BIG = 1 << 20


@pytest.fixture
def folder(root: Folder) -> Folder:
    """An empty folder, below others."""
    return root / "deep" / "tables"


def names_of(folder: Folder, prefix: str = "") -> list[str]:
    return [entry.name for entry in folder.walk(prefix)]


def test_a_file_is_read_as_it_was_last_written(folder: Folder) -> None:
    for data in (b"one", b"", bytes(range(256)) * 50):
        folder.write("a/b/file", data)
        assert folder.read("a/b/file") == data
    folder.write("a/b/file", memoryview(b"from a view")[5:])
    assert folder.read("a/b/file") == b"a view"
    assert names_of(folder) == ["a/b/file"]


def test_a_folder_is_named_by_its_uri_and_has_a_parent(folder: Folder) -> None:
    assert folder.name == "tables"
    assert folder.uri.endswith("/deep/tables")
    assert folder.parent / "tables" == folder
    assert (folder / "x" / "y").parent.parent == folder
    assert open_folder(folder.uri) == folder
    (folder / "x").write("y/z", b"below")
    assert folder.read("x/y/z") == b"below"


def test_an_absent_folder_is_empty(folder: Folder) -> None:
    nowhere = folder / "nowhere"
    assert names_of(nowhere) == []
    assert nowhere.children() == []
    assert nowhere.find("file") is None
    nowhere.delete("file")


def test_what_is_not_a_file_is_absent(folder: Folder) -> None:
    folder.write("sub/file", b"x")
    for name in ("nothing", "sub", "sub/file/below", "sub/fil"):
        assert folder.find(name) is None, name
        for look in (folder.read, folder.open):
            with pytest.raises(FileAbsent, match=f"deep/tables/{name}: no such file"):
                look(name)


def test_walking_finds_files_at_any_depth_sorted_by_name(folder: Folder) -> None:
    names = ["a", "a-b/c", "a.b", "a/b", "a/b-", "b/c/d/e", "b/c0", "caf\u00e9 \u2615/x y+&=%.txt"]
    for name in reversed(names):
        folder.write(name, name.encode()) if name != "a" else None
    names.remove("a")
    assert names_of(folder) == sorted(names)
    assert folder.children() == ["a", "a-b", "b", "caf\u00e9 \u2615"]
    assert names_of(folder, "a/") == ["a/b", "a/b-"]
    assert names_of(folder, "a/b") == ["a/b", "a/b-"]
    assert names_of(folder, "b/c/") == ["b/c/d/e"]
    assert names_of(folder, "none/") == []
    for name in names:
        assert folder.read(name) == name.encode()


def test_a_neighbour_with_a_longer_name_is_not_in_the_folder(folder: Folder) -> None:
    (folder.parent / "tables-2").write("file", b"x")
    folder.write("mine", b"x")
    assert names_of(folder) == ["mine"]
    assert folder.parent.children() == ["tables", "tables-2"]


def test_an_entry_tells_size_and_whether_the_bytes_changed(folder: Folder) -> None:
    folder.write("file", b"12345")
    first = folder.find("file")
    assert first is not None
    assert (first.name, first.num_bytes) == ("file", 5)
    assert list(folder.walk()) == [first] == [folder.find("file")]
    folder.write("file", b"54321")
    assert folder.find("file") != first


def test_a_deleted_file_is_gone_and_deleting_it_again_is_no_fault(folder: Folder) -> None:
    folder.write("file", b"x")
    folder.delete("file")
    folder.delete("file")
    assert folder.find("file") is None
    assert names_of(folder) == []


places = st.tuples(st.integers(0, 160_000), st.sampled_from([0, 1, 2]), st.integers(-1, 200_000))


@settings(repeatable, max_examples=12)
@given(st.lists(places, max_size=6))
def test_an_open_file_reads_and_seeks_like_any_other(
    folder: Folder, steps: list[tuple[int, int, int]]
) -> None:
    data = random.Random(0).randbytes(150_000)
    if folder.find("file") is None:
        folder.write("file", data)
    known = io.BytesIO(data)
    with folder.open("file") as file:
        for place, whence, length in steps:
            offset = place - (0, known.tell(), len(data))[whence]
            assert file.seek(offset, whence) == known.seek(offset, whence)
            assert file.read(length) == known.read(length)
            assert file.tell() == known.tell()
        assert file.seek(0) == 0
        assert file.read() == data


def test_parquet_reads_columns_of_a_file_in_any_folder(folder: Folder) -> None:
    rows = pa.table({"a": range(50_000), "b": [str(i) for i in range(50_000)]})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, row_group_size=10_000)
    folder.write("part.parquet", memoryview(sink.getvalue()))
    with pq.ParquetFile(folder.open("part.parquet"), pre_buffer=True) as file:
        assert file.read_row_group(3, ["a"]).equals(rows.select(["a"]).slice(30_000, 10_000))
        assert file.read().equals(rows)


def test_a_file_larger_than_a_part_of_an_upload_is_whole(folder: Folder) -> None:
    data = random.Random(1).randbytes(70 << 20)
    folder.write("big", memoryview(data))
    entry = folder.find("big")
    assert entry is not None
    assert entry.num_bytes == len(data)
    assert folder.read("big") == data
    with folder.open("big") as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == data[-10:]


def test_what_was_created_once_stays(folder: Folder) -> None:
    assert folder.create_once("a/file", b"first")
    assert not folder.create_once("a/file", b"second")
    assert folder.read("a/file") == b"first"
    assert folder.create_once("a/file", b"first"), "its bytes are there, whoever put them"
    assert names_of(folder) == ["a/file"]


def test_what_was_deleted_may_be_created_again(folder: Folder) -> None:
    assert folder.create_once("file", b"first")
    folder.delete("file")
    assert folder.create_once("file", b"second")


def test_of_many_threads_one_creates_the_file(folder: Folder) -> None:
    for number in range(5):
        barrier = threading.Barrier(12)

        def create(
            data: bytes, name: str = f"{number}/manifest.json", barrier: threading.Barrier = barrier
        ) -> bool:
            barrier.wait()
            return folder.create_once(name, data)

        contents = [str(i).encode() * 1000 for i in range(12)]
        with ThreadPoolExecutor(12) as pool:
            won = list(pool.map(create, contents))
        assert won.count(True) == 1
        assert folder.read(f"{number}/manifest.json") == contents[won.index(True)]
        assert names_of(folder / str(number)) == ["manifest.json"]


def test_of_many_processes_one_creates_each_file(folder: Folder) -> None:
    names = [str(i) for i in range(20)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        tries = [
            (name, pool.submit(folder.create_once, name, str(n).encode()))
            for name in names for n in range(4)
        ]  # fmt: skip
        won = [name for name, outcome in tries if outcome.result()]
    assert sorted(won) == sorted(names)


def test_a_reader_sees_the_old_bytes_or_the_new_ones_and_never_a_mix(folder: Folder) -> None:
    contents = [bytes([letter]) * BIG for letter in b"ab"]
    folder.write("file", contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                folder.write("file", content)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            assert all(folder.read("file") in contents for _ in range(30))
        finally:
            stop.set()
        writing.result()


def test_a_digest_covers_files_larger_than_a_chunk(folder: Folder) -> None:
    folder.write("file", b"\0" * BIG + b"tail")
    longer = sha256_of(folder, "file")
    folder.write("file", b"\0" * BIG + b"tali")
    assert sha256_of(folder, "file") != longer
    folder.write("file", b"abc")
    assert sha256_of(folder, "file").startswith("ba7816bf8f01cfea")


# A folder of this machine.


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def create_once(path: Path, data: bytes) -> bool:
    return LocalFolder(path.parent).create_once(path.name, data)


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond ``num_bytes``: writes fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_users_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_atomic(tmp_path / "ours", b"x")
    create_once(tmp_path / "once", b"x")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "ours", "once")}
    assert len(modes) == 1


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with small_disk(1000), pytest.raises(StorageError, match=r"file: cannot be written .File too"):
        write_atomic(path, b"x" * BIG)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_a_full_disk_creates_nothing_and_the_next_try_wins(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with small_disk(1000), pytest.raises(StorageError, match="file: cannot be written"):
        create_once(path, b"x" * BIG)
    assert names_in(tmp_path) == []
    assert create_once(path, b"x" * BIG)


def test_writing_over_a_folder_is_refused_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match=r"taken: cannot be written .Is a directory"):
        write_atomic(tmp_path / "taken", b"x")
    assert names_in(tmp_path) == ["taken"]


def test_writing_below_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"x")
    for below in ("plain/file", "plain/deep/file"):
        with pytest.raises(StorageError, match=f"{below}: cannot be written"):
            write_atomic(tmp_path / below, b"y")
        with pytest.raises(StorageError, match=f"{below}: cannot be written"):
            create_once(tmp_path / below, b"y")
    assert (tmp_path / "plain").read_bytes() == b"x"


def test_what_a_killed_writer_left_is_no_file_of_the_folder(tmp_path: Path) -> None:
    child = os.fork()
    if not child:  # dies where a file is staged and not yet named
        try:
            vars(os)["link"] = lambda *_: os._exit(9)
            create_once(tmp_path / "00007.json", b"{}")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(names_in(tmp_path)) == 1
    assert names_of(LocalFolder(tmp_path)) == []
    assert create_once(tmp_path / "00007.json", b"{}")
    assert names_of(LocalFolder(tmp_path)) == ["00007.json"]


def test_a_folder_that_cannot_be_listed_does_not_look_empty() -> None:
    unlistable = LocalFolder(Path("/", "x" * 300))
    for look in (unlistable.children, lambda: list(unlistable.walk())):
        with pytest.raises(StorageError, match=r"xxx: cannot be listed .File name too long"):
            look()


def test_publishing_replaces_the_unfinished_whole(tmp_path: Path) -> None:
    staging, target = tmp_path / "staging", tmp_path / "deep" / "target"
    for folder, name in ((staging, "new"), (target, "half-written")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    publish_folder(staging, target)
    assert names_in(target) == ["new"]
    assert not staging.exists()


@pytest.mark.parametrize("uri", ["gs://bucket", "hdfs://host/x", "http://host/x"])
def test_a_folder_elsewhere_is_refused_by_name(uri: str) -> None:
    with pytest.raises(StorageError, match=rf"{uri}: .*not supported; use a local path or s3://"):
        open_folder(uri)


def test_a_bucket_must_be_named() -> None:
    for uri in ("s3://", "s3:///tables"):
        with pytest.raises(StorageError, match=f"{uri}: names no bucket; write s3://bucket/prefix"):
            open_folder(uri)


def test_a_folder_may_be_given_as_path_uri_or_folder(tmp_path: Path) -> None:
    assert open_folder(tmp_path) == open_folder(str(tmp_path)) == LocalFolder(tmp_path)
    assert open_folder(f"file://{tmp_path}") == LocalFolder(tmp_path)
    assert open_folder("runs") == LocalFolder(Path.cwd() / "runs")
    assert open_folder("~/runs") == LocalFolder(Path.home() / "runs")
    assert open_folder(open_folder("s3://b/a/c/")).uri == "s3://b/a/c"
    assert open_folder("s3://b").uri == "s3://b"
    assert open_folder("s3://b").parent == open_folder("s3://b")


# A bucket.


def test_folders_and_files_of_a_whole_bucket_are_listed(bucket: Folder) -> None:
    bucket.write("top", b"x")
    (bucket / "tables").write("file", b"x")
    assert names_of(bucket) == ["tables/file", "top"]
    assert bucket.children() == ["tables"]
    assert (bucket / "tables").parent == bucket
    assert bucket.name == bucket.uri.removeprefix("s3://")


def test_the_mark_of_an_empty_folder_is_no_file(bucket: Folder) -> None:
    bucket.write("_records/", b"")
    bucket.write("_records/00000.json", b"{}")
    assert names_of(bucket, "_records/") == ["_records/00000.json"]


def test_a_listing_longer_than_a_page_is_complete(bucket: Folder) -> None:
    names = [f"{k:05d}" for k in range(2100)]
    for name in names:  # straight into the server's memory: 2100 calls are 20 s
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(bucket.name, name, b"")
    assert names_of(bucket) == names


USES: dict[str, Callable[[Folder], object]] = {
    "walk": lambda folder: list(folder.walk()),
    "children": lambda folder: folder.children(),
    "read": lambda folder: folder.read("file"),
    "write": lambda folder: folder.write("file", b"x"),
    "write big": lambda folder: folder.write("file", bytes(65 << 20)),
    "create_once": lambda folder: folder.create_once("file", b"x"),
    "delete": lambda folder: folder.delete("file"),
}


@pytest.mark.usefixtures("s3_endpoint")
@pytest.mark.parametrize("use", USES)
def test_a_bucket_that_is_not_there_is_named(use: str) -> None:
    with pytest.raises(StorageError, match=r"s3://nobodys/x.*: there is no bucket 'nobodys'") as e:
        USES[use](open_folder("s3://nobodys/x"))
    assert not isinstance(e.value, FileAbsent)
