"""Following an alias in a real registry: what is good goes live, what is not never does."""

import gc
import shutil
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
from chaos_s3 import ChaosS3, endpoint
from mlflow import MlflowClient
from test_serve_engine import ask, assert_drawn_as_alone, eventually
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_models.drawing import Drawer
from pixart_models.snapshot import WEIGHTS_FILE
from pixart_platform import object_store
from pixart_platform.copies import publish
from pixart_platform.errors import RegistryError, StorageError
from pixart_platform.registry import Registry, Version
from pixart_platform.storage import Folder
from pixart_platform.tracking import Tracker, sqlite_uri
from pixart_serve.engine import DrawingEngine
from pixart_serve.follower import Follower
from pixart_serve.versions import VersionRefused, VersionUnavailable

_NUMBERS = count()


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    """A run in a fresh SQLite store; making the store takes MLflow seconds, so it is shared."""
    folder = tmp_path_factory.mktemp("registry")
    return Tracker.start(sqlite_uri(folder), "serve", "tests", "tests", artifacts=folder)


@dataclass
class Family:
    """A registered model of its own, an engine, and what keeps the two together."""

    folder: Path
    tracker: Tracker
    registry: Registry
    engine: DrawingEngine
    follower: Follower

    def register(self, drawer: Drawer) -> Version:
        folder = write_snapshot(self.folder / str(next(_NUMBERS)), drawer)
        return self.registry.register(folder, self.tracker.run_id, {})

    def promote(self, version: Version) -> None:
        self.registry.set_alias("champion", version)

    @property
    def live(self) -> int | None:
        return self.engine.live.number if self.engine.live else None


@pytest.fixture
def family(tracker: Tracker, tmp_path: Path) -> Iterator[Family]:
    registry = Registry(tracker.uri, f"digits-{next(_NUMBERS)}")
    engine = DrawingEngine(max_rows=4, max_queued=4)
    follower = Follower(registry, "champion", engine, poll_seconds=0.05)
    yield Family(tmp_path, tracker, registry, engine, follower)
    follower.close()
    engine.close()


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)


def test_an_alias_nobody_set_is_an_error_at_start(family: Family) -> None:
    version = family.register(build_drawer())
    with pytest.raises(RegistryError, match=f"'champion'.*version {version.number}"):
        family.follower.load_first()
    assert family.live is None


def test_the_engine_moves_with_the_alias(family: Family) -> None:
    first, second = build_drawer(seed=1), build_drawer(seed=2)
    family.promote(family.register(first))
    family.follower.load_first()
    family.follower.start()
    drawing = family.engine.submit(ask()).result(timeout=10)
    assert drawing.version == 1
    assert_drawn_as_alone(drawing, first, ask())
    family.promote(family.register(second))
    eventually(lambda: family.live == 2)
    drawing = family.engine.submit(ask()).result(timeout=10)
    assert drawing.version == 2
    assert_drawn_as_alone(drawing, second, ask())


def test_versions_share_their_encoders(family: Family) -> None:
    family.promote(family.register(build_drawer(seed=1)))
    family.follower.load_first()
    before = family.engine.live
    family.promote(family.register(build_drawer(seed=2)))
    family.follower.poll()
    after = family.engine.live
    assert before
    assert after
    assert after.drawer.text_encoder is before.drawer.text_encoder
    assert after.drawer.autoencoder is before.drawer.autoencoder


def test_one_flipped_bit_is_refused_once_and_a_good_version_follows(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    family.promote(family.register(build_drawer(seed=1)))
    family.follower.load_first()
    bad = family.register(build_drawer(seed=2))
    flip_one_bit(Path(bad.source) / WEIGHTS_FILE)
    family.promote(bad)
    for _ in range(3):
        family.follower.poll()
    assert (family.live, family.follower.refused) == (1, 2)
    assert len([r for r in caplog.records if "not the ones the manifest lists" in r.message]) == 1
    assert family.engine.submit(ask()).result(timeout=10).version == 1
    family.promote(family.register(build_drawer(seed=3)))
    family.follower.poll()
    assert (family.live, family.follower.refused) == (3, None)


def test_moving_the_alias_away_and_back_tries_a_restored_version_again(family: Family) -> None:
    good = family.register(build_drawer(seed=1))
    family.promote(good)
    family.follower.load_first()
    bad = family.register(build_drawer(seed=2))
    flip_one_bit(Path(bad.source) / WEIGHTS_FILE)
    family.promote(bad)
    family.follower.poll()
    flip_one_bit(Path(bad.source) / WEIGHTS_FILE)
    for version in (good, bad):
        family.promote(version)
        family.follower.poll()
    assert (family.live, family.follower.refused) == (2, None)


def test_weights_that_draw_nonsense_are_refused(family: Family) -> None:
    family.promote(family.register(build_drawer(seed=1)))
    family.follower.load_first()
    nonsense = build_drawer(seed=2)
    nonsense.network.final_layer.linear.weight.mul_(1e38)
    family.promote(family.register(nonsense))
    family.follower.poll()
    assert (family.live, family.follower.refused) == (1, 2)


def test_a_bad_version_cannot_be_started_from(family: Family) -> None:
    bad = family.register(build_drawer())
    flip_one_bit(Path(bad.source) / WEIGHTS_FILE)
    family.promote(bad)
    with pytest.raises(VersionRefused, match=r"version 1.*restore the file"):
        family.follower.load_first()


def test_a_version_number_pins(family: Family) -> None:
    family.register(build_drawer(seed=1))
    family.promote(family.register(build_drawer(seed=2)))
    pinned = Follower(family.registry, "1", family.engine)
    pinned.load_first()
    pinned.poll()
    assert family.live == 1


def test_moving_the_alias_back_reads_no_file(family: Family) -> None:
    first = build_drawer(seed=1)
    versions = [family.register(first), family.register(build_drawer(seed=2))]
    family.promote(versions[0])
    family.follower.load_first()
    family.promote(versions[1])
    family.follower.poll()
    for version in versions:
        shutil.rmtree(version.source)
    for version in (versions[0], versions[1], versions[0]):
        family.promote(version)
        family.follower.poll()
        assert family.live == version.number
    assert_drawn_as_alone(family.engine.submit(ask()).result(timeout=10), first, ask())


def test_a_version_on_s3_waits_out_an_outage_and_is_refused_for_its_bytes_alone(
    family: Family, bucket: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path / "cache"))
    family.promote(family.register(build_drawer(seed=1)))
    family.follower.load_first()

    def register(name: str, seed: int) -> Version:
        publish(write_snapshot(tmp_path / name, build_drawer(seed)), bucket / name)
        return family.registry.register(bucket / name, family.tracker.run_id, {})

    family.promote(register("good", 2))
    with monkeypatch.context() as patch, ChaosS3(1.0, 1, ["InternalError"]) as server:
        patch.setattr(object_store, "_ATTEMPTS", 1)
        with endpoint(server.uri):
            with pytest.raises(StorageError, match="S3 answered InternalError"):
                family.follower.poll()
            with pytest.raises(VersionUnavailable, match="cannot be read now"):
                family.follower.fetch("2").result(timeout=20)
    assert (family.live, family.follower.refused) == (1, None)
    family.follower.poll()
    assert (family.live, family.follower.refused) == (2, None)

    bad = register("bad", 3)
    data = bytearray((bucket / "bad").read(WEIGHTS_FILE))
    data[-100] ^= 1
    (bucket / "bad").write(WEIGHTS_FILE, bytes(data))
    family.promote(bad)
    family.follower.poll()
    assert (family.live, family.follower.refused) == (2, bad.number)


def test_old_versions_leave_memory(family: Family) -> None:
    follower = Follower(family.registry, "champion", family.engine, max_versions=3)
    family.promote(family.register(build_drawer(seed=1)))
    follower.load_first()
    loaded = follower.versions.get(1)
    assert loaded
    network = weakref.ref(loaded.drawer.network)
    del loaded
    for seed in (2, 3, 4):
        family.promote(family.register(build_drawer(seed)))
        follower.poll()
    assert set(follower.versions.numbers) == {2, 3, 4}
    gc.collect()
    assert network() is None


def test_a_challenger_is_loaded_beside_and_never_goes_live_by_itself(family: Family) -> None:
    second = build_drawer(seed=2)
    family.promote(family.register(build_drawer(seed=1)))
    follower = Follower(
        family.registry, "champion", family.engine, challenger="next", challenger_share=1.0
    )
    follower.load_first()
    follower.poll()
    assert follower.choose(5) is None, "nobody has set the alias"
    family.registry.set_alias("next", family.register(second))
    follower.poll()
    chosen = follower.choose(5)
    assert chosen
    assert (family.live, chosen.number) == (1, 2)
    [future] = family.engine.submit_all([ask()], chosen)
    assert_drawn_as_alone(future.result(timeout=10), second, ask())
    bad = family.register(build_drawer(seed=3))
    flip_one_bit(Path(bad.source) / WEIGHTS_FILE)
    family.registry.set_alias("next", bad)
    follower.poll()
    assert (family.live, follower.choose(5), follower.refused) == (1, None, None)
    family.registry.set_alias("next", family.registry.get("2"))
    follower.poll()
    assert follower.choose(5) is chosen
    MlflowClient(family.tracker.uri).delete_registered_model_alias(family.registry.name, "next")
    follower.poll()
    assert follower.choose(5) is None


def test_a_seed_decides_and_the_share_holds(family: Family) -> None:
    family.promote(family.register(build_drawer(seed=1)))
    family.registry.set_alias("next", family.register(build_drawer(seed=2)))
    family.follower.load_first()

    def drawn_by_challenger(share: float) -> set[int]:
        follower = Follower(
            family.registry, "champion", family.engine, challenger="next", challenger_share=share
        )
        follower.poll()
        return {seed for seed in range(10_000) if follower.choose(seed)}

    some, more = drawn_by_challenger(0.1), drawn_by_challenger(0.3)
    assert len(some) == pytest.approx(1000, rel=0.1)
    assert len(more) == pytest.approx(3000, rel=0.1)
    assert some < more, "raising the share takes nobody back"
    assert drawn_by_challenger(0.0) == set()
    assert drawn_by_challenger(1.0) == set(range(10_000))


def test_a_lost_registry_changes_nothing(family: Family, caplog: pytest.LogCaptureFixture) -> None:
    family.promote(family.register(build_drawer()))
    family.follower.load_first()
    store = family.folder / "mlflow.db"
    shutil.copy(family.tracker.uri.removeprefix("sqlite:///"), store)
    registry = Registry(sqlite_uri(family.folder), family.registry.name)
    assert registry.get("champion").number == 1
    store.write_bytes(b"not a database " * 1000)
    lost = Follower(registry, "champion", family.engine, poll_seconds=0.01)
    lost.start()
    eventually(lambda: any("serving on" in record.message for record in caplog.records))
    time.sleep(0.1)
    assert len([r for r in caplog.records if "serving on" in r.message]) == 1, "logged once"
    assert family.engine.submit(ask()).result(timeout=10).version == 1
    lost.close()
