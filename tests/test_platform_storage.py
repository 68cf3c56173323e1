"""Files that appear whole or not at all, and commits with one winner."""

import multiprocessing
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from pixart_platform.errors import StorageError
from pixart_platform.storage import (
    create_once,
    open_folder,
    publish_folder,
    sha256_file,
    write_atomic,
)

BIG = 1 << 20


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def small_disk(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond ``num_bytes``: writes fail half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names_in(path.parent) == ["file"]


def test_other_users_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    write_atomic(tmp_path / "ours", b"x")
    create_once(tmp_path / "once", b"x")
    modes = {(tmp_path / name).stat().st_mode for name in ("plain", "ours", "once")}
    assert len(modes) == 1


def test_a_reader_sees_the_old_bytes_or_the_new_ones_and_never_a_mix(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([letter]) * BIG for letter in b"ab"]
    write_atomic(path, contents[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for content in contents:
                write_atomic(path, content)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            assert all(path.read_bytes() in contents for _ in range(100))
        finally:
            stop.set()
        writing.result()


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


def test_of_many_threads_one_creates_the_file(tmp_path: Path) -> None:
    for round_ in range(5):
        path = tmp_path / str(round_) / "manifest.json"
        barrier = threading.Barrier(12)

        def create(data: bytes, path: Path = path, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return create_once(path, data)

        contents = [str(i).encode() * 1000 for i in range(12)]
        with ThreadPoolExecutor(12) as pool:
            won = list(pool.map(create, contents))
        assert won.count(True) == 1
        assert path.read_bytes() == contents[won.index(True)]
        assert names_in(path.parent) == ["manifest.json"]


def test_of_many_processes_one_creates_each_file(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(20)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context) as pool:
        tries = [(path, pool.submit(create_once, path, b"x")) for path in paths for _ in range(4)]
        won = [path for path, outcome in tries if outcome.result()]
    assert sorted(won) == sorted(paths)


def test_what_was_created_once_stays(tmp_path: Path) -> None:
    assert create_once(tmp_path / "file", b"first")
    assert not create_once(tmp_path / "file", b"second")
    assert (tmp_path / "file").read_bytes() == b"first"
    assert names_in(tmp_path) == ["file"]


def test_publishing_replaces_the_unfinished_whole(tmp_path: Path) -> None:
    staging, target = tmp_path / "staging", tmp_path / "deep" / "target"
    for folder, name in ((staging, "new"), (target, "half-written")):
        folder.mkdir(parents=True)
        (folder / name).touch()
    publish_folder(staging, target)
    assert names_in(target) == ["new"]
    assert not staging.exists()


@pytest.mark.parametrize("uri", ["s3://bucket/tables", "gs://bucket", "hdfs://host/x"])
def test_a_remote_folder_is_refused_by_name(uri: str) -> None:
    with pytest.raises(StorageError, match=f"{uri}: .*not supported yet; use a local path"):
        open_folder(uri)


def test_a_local_folder_may_be_given_as_path_or_uri(tmp_path: Path) -> None:
    assert open_folder(tmp_path) == open_folder(str(tmp_path)) == tmp_path
    assert open_folder(f"file://{tmp_path}") == tmp_path
    assert open_folder("runs") == Path.cwd() / "runs"


def test_a_digest_covers_files_larger_than_a_chunk(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\0" * BIG + b"tail")
    longer = sha256_file(path)
    path.write_bytes(b"\0" * BIG + b"tali")
    assert sha256_file(path) != longer
    path.write_bytes(b"abc")
    assert sha256_file(path).startswith("ba7816bf8f01cfea")
