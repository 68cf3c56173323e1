"""States: which one is resumed from, what is kept, and saving through storage's bad days."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from processes import wait_for
from small_states import (
    HALVES,
    PATIENCE,
    VALUES,
    WHOLE,
    Cut,
    blank,
    cut_out,
    is_whole,
    newest,
    open_store,
    save,
    values_of,
)

from pixart_platform import checkpoint, object_store
from pixart_platform.checkpoint import Progress, Saver
from pixart_platform.engine import Fragment
from pixart_platform.errors import StorageError, TrainingError
from pixart_platform.manifest import MANIFEST_FILE
from pixart_platform.storage import Folder, LocalFolder

if TYPE_CHECKING:
    from chaos_s3 import ChaosS3


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(checkpoint, "_RETRY_SECONDS", (0.01, 0.02))


def data_file(place: Folder) -> str:
    (name,) = (entry.name for entry in place.walk() if entry.name.endswith(".safetensors"))
    return name


def test_what_is_saved_is_read_back_with_its_progress(root: Folder) -> None:
    history = [(7, {"loss": 0.1 + 0.2, "gradient_norm": 1e-9}), (14, {"loss": 3.0})]
    progress = Progress(21, history, [0.1, 1 / 3])
    save(open_store(root), progress, HALVES)
    found = open_store(root).find_newest()
    assert found is not None
    assert found.progress == progress, "to the last bit of every number"
    assert is_whole(found)
    fragments = blank(WHOLE)
    found.restore(fragments)
    for fragment in fragments:
        assert torch.equal(fragment.views["weight"], VALUES[fragment.parameter])
        assert torch.equal(fragment.views["average"], -VALUES[fragment.parameter])


def test_the_newest_state_is_found_by_number_not_by_name(root: Folder) -> None:
    store = open_store(root)
    assert newest(store) is None
    for images_seen in (900, 1000, 64):
        save(store, images_seen)
    assert newest(store) == 1000
    assert newest(store, least=1000) == 1000
    assert newest(store, least=1001) is None
    assert store.complete() == [64, 900, 1000]
    assert newest(open_store(root / "nowhere")) is None


def lose_manifest(place: Folder) -> None:
    place.delete(MANIFEST_FILE)


def flip_bit(place: Folder) -> None:
    data = bytearray(place.read(data_file(place)))
    data[-3] ^= 1
    place.write(data_file(place), bytes(data))


def cut_off(place: Folder) -> None:
    place.write(data_file(place), place.read(data_file(place))[:-4])


def lose_file(place: Folder) -> None:
    place.delete(data_file(place))


def cut_manifest(place: Folder) -> None:
    place.write(MANIFEST_FILE, place.read(MANIFEST_FILE)[:50])


@pytest.mark.parametrize("damage", [lose_manifest, flip_bit, cut_off, lose_file, cut_manifest])
def test_an_incomplete_or_damaged_state_is_passed_over_and_named(
    root: Folder, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(root)
    save(store, 100)
    for place in [save(store, images_seen) for images_seen in (200, 300)]:
        damage(place)
    assert newest(store) == 100
    for images_seen in (200, 300):
        assert f"state {root.uri}/{images_seen} is passed over: {root.uri}" in caplog.text
    if damage is not lose_manifest:
        # Training comes by there again; what it saves replaces the damaged one.
        save(store, 300, HALVES, token="next")
        assert newest(store) == 300
        assert is_whole(store.open(300))


def test_a_state_of_other_settings_is_passed_over_and_named(
    root: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    save(open_store(root), 100)
    save(open_store(root, "another run"), 200)
    assert newest(open_store(root)) == 100
    assert f"state {root.uri}/200 is passed over" in caplog.text
    assert newest(open_store(root, "third run")) is None


def test_stray_files_and_folders_do_no_harm(tmp_path: Path) -> None:
    store = open_store(LocalFolder(tmp_path))
    save(store, 100)
    (tmp_path / "200.tmp").mkdir()
    (tmp_path / "300 (copy)").mkdir()
    (tmp_path / "400").touch()
    (tmp_path / "skips.json").write_text("[]")
    assert newest(store) == 100
    store.prune()
    assert newest(store) == 100


def test_the_newest_the_best_and_every_so_many_images_are_kept(root: Folder) -> None:
    store = open_store(root, keep=2, keep_every_images=100)
    kept = {
        30: [30], 60: [30, 60], 90: [60, 90], 120: [90, 120], 150: [120, 150],
        180: [120, 150, 180], 210: [120, 180, 210], 240: [120, 210, 240], 270: [120, 210, 240, 270],
    }  # fmt: skip
    for images_seen, expected in kept.items():
        save(store, images_seen)
        assert store.complete() == expected
    store.mark_best(240, 0.5)
    for images_seen in (300, 330, 360):
        save(store, images_seen)
    assert store.complete() == [120, 210, 240, 300, 330, 360]
    store.mark_best(360, 0.4)
    save(store, 390)
    assert store.complete() == [120, 210, 300, 360, 390], "the former best has had its day"


def test_what_killed_saves_left_is_cleared_before_the_newest_state_only(root: Folder) -> None:
    store = open_store(root, keep=2)
    for images_seen in (100, 200, 300, 400):
        save(store, images_seen)
    for images_seen in (50, 350, 500):
        (root / str(images_seen)).write("dead-00001.safetensors", b"half")
    store.prune()
    assert {int(name) for name in root.children()} == {300, 400, 500}
    assert [entry.name for entry in (root / "500").walk()] == ["dead-00001.safetensors"]


def test_without_a_complete_state_nothing_is_cleared(root: Folder) -> None:
    (root / "50").write("dead-00001.safetensors", b"half")
    open_store(root, keep=1).prune()
    assert root.children() == ["50"]


def test_a_damaged_state_ahead_does_not_cost_the_sound_one_that_was_just_saved(
    root: Folder,
) -> None:
    store = open_store(root, keep=1)
    flip_bit(save(store, 300))
    save(store, 250, token="next")
    assert newest(store) == 250


def test_half_precision_views_are_kept_in_fp32(tmp_path: Path) -> None:
    store = open_store(LocalFolder(tmp_path))
    weights = torch.tensor([1.0, 1 / 3, -5], dtype=torch.bfloat16)
    saver = Saver(store, 0, 1, "token")
    saver.start(Progress(1), [Fragment("a", 0, {"weight": weights})])
    saver.finish(PATIENCE)
    assert torch.equal(store.open(1).read("weight")["a"], weights.float())


def test_saving_copies_so_that_training_may_go_on(tmp_path: Path) -> None:
    (tmp_path / "states").write_text("in the way, until the weights have changed")
    store = open_store(LocalFolder(tmp_path / "states"))
    weights = torch.ones(4)
    progress = Progress(7, [(7, {"loss": 1.0})], [1.0])
    saver = Saver(store, 0, 1, "token")
    saver.start(progress, [Fragment("a", 0, {"weight": weights})])
    weights.zero_()
    progress.history.append((14, {"loss": 9.0}))
    progress.images_seen = 14
    assert saver.is_busy
    (tmp_path / "states").unlink()
    saver.finish(PATIENCE)
    state = store.open(7)
    assert state.read("weight")["a"].tolist() == [1, 1, 1, 1]
    assert state.progress == Progress(7, [(7, {"loss": 1.0})], [1.0])


def test_a_state_that_is_there_is_not_saved_again(root: Folder) -> None:
    store = open_store(root)
    place = save(store, 100)
    before = list(place.walk())
    saver = Saver(store, 0, 1, "next", resumed=100)
    saver.start(Progress(100), cut_out(VALUES, WHOLE))
    saver.finish(PATIENCE)
    assert list(place.walk()) == before


def test_what_a_dead_attempt_left_never_mixes_with_the_next(root: Folder) -> None:
    """Its second rank had written, its first had not; the next attempt's have other halves."""
    store = open_store(root)
    wrong = values_of({"blocks.0.bias": 3, "blocks.0.weight": 10})
    dead = Saver(store, 1, 2, "dead")
    dead.start(Progress(100), cut_out(wrong, HALVES[1]))
    dead.finish(PATIENCE)
    first = Saver(store, 0, 2, "live")
    first.start(Progress(100), cut_out(VALUES, HALVES[0]))
    with pytest.raises(TrainingError, match="other ranks have not written theirs"):
        first.finish(0.3)
    assert newest(store) is None
    second = Saver(store, 1, 2, "live")
    second.start(Progress(100), cut_out(VALUES, HALVES[1]))
    for saver in (second, first):
        saver.finish(PATIENCE)
    assert newest(store) == 100
    assert is_whole(store.open(100))


@contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``num_bytes``, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_tried_again_until_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(LocalFolder(tmp_path))
    values = values_of({"large": 1 << 20})
    saver = Saver(store, 0, 1, "token")
    with no_room(1 << 20):
        saver.start(Progress(7), cut_out(values, [("large", 0, 1 << 20)]))
        wait_for(lambda: caplog.text.count("state at 7 images is not saved yet") > 1, "retries")
        with pytest.raises(TrainingError, match=r"within 0 s \(.*/7/.*File too large.*make room"):
            saver.finish(0)
    saver.finish(PATIENCE)
    assert is_whole(store.open(7), values)
    left = {path.name for path in (tmp_path / "7").iterdir()}
    assert left == {MANIFEST_FILE, "token-00000.safetensors"}, "what was begun takes no room"


@contextmanager
def s3_that(refuses: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple["ChaosS3", Folder]]:
    """A bucket of a server that fails calls for which ``refuses`` (method, path), not retried."""
    from chaos_s3 import ChaosS3, endpoint, make_bucket

    class Server(ChaosS3):
        def _draw(self, environ: dict[str, Any]) -> str:
            self.kinds = ("InternalError",)
            self.share = float(refuses(environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            return super()._draw(environ)

    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    with Server() as server, endpoint(server.uri):
        yield server, make_bucket(f"states-{id(server)}")


def test_an_s3_that_is_away_is_tried_again_until_it_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    away = False
    with s3_that(lambda *_: away, monkeypatch) as (_, bucket):
        store = open_store(bucket)
        away = True
        savers = [Saver(store, rank, 2, "token") for rank in range(2)]
        for saver, cut in zip(savers, HALVES, strict=True):
            saver.start(Progress(7), cut_out(VALUES, cut))
        wait_for(lambda: caplog.text.count("state at 7 images is not saved yet") > 4, "retries")
        for saver in savers:
            with pytest.raises(TrainingError, match=r"S3 answered InternalError.*mend the storage"):
                saver.finish(0)
        away = False
        for saver in savers:
            saver.finish(PATIENCE)
        assert is_whole(store.open(7))


def test_states_are_complete_through_a_bad_s3(s3_endpoint: str) -> None:
    from chaos_s3 import ChaosS3, endpoint, make_bucket

    bucket = make_bucket("states-chaos")
    with ChaosS3(share=0.1, seed=4, stall_seconds=(0.1,)) as server, endpoint(server.uri):
        store = open_store(bucket, keep=2)
        for images_seen in (7, 14, 21, 28):
            save(store, images_seen, HALVES)
        assert newest(store) == 28
        assert sum(server.faults.values()) > 0
    with endpoint(s3_endpoint):
        assert store.complete() == [21, 28]
        assert all(is_whole(store.open(images_seen)) for images_seen in (21, 28))


def test_a_state_whose_leftovers_cannot_be_cleared_is_complete_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once the manifest is there, nobody may wait for what has been cleared before."""
    refused: list[str] = []

    def refuses(method: str, path: str) -> bool:
        if method == "DELETE" and path.endswith("00002.safetensors.json") and not refused:
            refused.append(path)
            return True
        return False

    cuts: list[Cut] = [[("blocks.0.weight", 0, 4)], [("blocks.0.weight", 4, 10)], [WHOLE[1]]]
    with s3_that(refuses, monkeypatch) as (_, bucket):
        save(open_store(bucket), 7, cuts)
        assert refused
        assert is_whole(open_store(bucket).open(7))


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beginning anew, or from an older state, would cost what has been learned since."""
    away = False
    with s3_that(
        lambda method, path: away and method == "GET" and path.endswith(MANIFEST_FILE), monkeypatch
    ) as (_, bucket):
        store = open_store(bucket)
        save(store, 7)
        save(store, 14)
        away = True  # just after it was listed
        with pytest.raises(StorageError, match="S3 answered InternalError"):
            store.find_newest()
        away = False
        assert newest(store) == 14


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_save_that_broke_off_is_not_taken_for_a_state(tmp_path: Path) -> None:
    store = open_store(LocalFolder(tmp_path))
    saver = Saver(store, 0, 1, "token")
    unfit: Any = [(7, {"loss": np.float32(1)})]  # which JSON does not know
    saver.start(Progress(7, unfit), cut_out(VALUES, WHOLE))
    with pytest.raises(TrainingError, match="state at 7 images was not saved"):
        saver.finish(PATIENCE)
    saver.start(Progress(7), cut_out(VALUES, WHOLE))
    saver.finish(PATIENCE)
    assert newest(store) == 7
