"""Runs and the registry, on one real MLflow store."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from builders import write_table
from mlflow import MlflowClient
from processes import wait_for

from pixart_cluster.server import free_port
from pixart_platform.errors import PixartError, RegistryError, TrackingError
from pixart_platform.manifest import FileRecord, Manifest
from pixart_platform.registry import Registry
from pixart_platform.tracking import Outbox, Point, Tracker, hide_password, sqlite_uri

if TYPE_CHECKING:
    from mlflow_server import MlflowServer, Mood


@dataclass(frozen=True)
class Store:
    """An MLflow store in a folder whose name has a space, as users' folders do."""

    folder: Path
    uri: str

    def start(self, identity: str, **changes: object) -> Tracker:
        parent = changes.get("parent")
        assert parent is None or isinstance(parent, Tracker)
        return Tracker.start(
            self.uri, "digits", identity, "align", artifacts=self.folder, parent=parent,
            params={"stage": {"images": 5, "where": "x" * 600}, "seed": 0},
        )  # fmt: skip

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.uri)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("my runs") / "with space"
    folder.mkdir()
    return Store(folder, sqlite_uri(folder))


def test_a_run_is_found_again_and_its_curve_goes_on(store: Store) -> None:
    first = store.start("align:unbroken")
    first.log_metrics({"loss": 3.0}, 64)
    first.log_metrics({"loss": 2.0}, 128)
    second = store.start("align:unbroken")
    assert second.run_id == first.run_id
    second.log_metrics({"loss": 1.0}, 192)
    assert second.history("loss") == [(64, 3.0), (128, 2.0), (192, 1.0)]
    assert store.start("align:another").run_id != first.run_id


def test_a_curve_is_sorted_and_a_repeated_step_keeps_its_last_value(store: Store) -> None:
    tracker = store.start("align:repeated")
    for images_seen, loss in ((128, 9.0), (64, 3.0), (128, 2.0), (1000, 1.0)):
        tracker.log_metrics({"loss": loss}, images_seen)
    assert tracker.history("loss") == [(64, 3.0), (128, 2.0), (1000, 1.0)]
    assert tracker.history("never logged") == []


def test_a_new_run_shows_its_parameters_name_and_parent(store: Store) -> None:
    parent = store.start("pipeline:1")
    run = store.client.get_run(store.start("align:child", parent=parent).run_id)
    assert run.data.params["stage.images"] == "5"
    assert run.data.params["seed"] == "0"
    assert run.data.params["stage.where"] == "x" * 500
    assert run.info.run_name == "align"
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_table_is_logged_as_a_dataset_once_however_often(store: Store, tmp_path: Path) -> None:
    table = write_table(tmp_path / "captions-1", "captions/2", [[{"captions": ["a"]}]])
    tracker = store.start("align:datasets")
    tracker.log_table(table, "training")
    tracker.log_table(table, "training")
    inputs = store.client.get_run(tracker.run_id).inputs
    assert inputs is not None
    (found,) = inputs.dataset_inputs
    assert (found.dataset.name, found.dataset.digest) == ("captions-1", table.digest)
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "training")]


def test_pictures_are_kept_in_the_runs_own_folder(store: Store) -> None:
    tracker = store.start("align:pictures")
    tracker.log_image(np.zeros((4, 4, 3), np.uint8), "a red three", 64)
    assert list((store.folder / "artifacts").rglob("*.png"))


@pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
def test_a_finished_run_says_how_it_ended_and_runs_again_when_started(
    store: Store, status: str
) -> None:
    tracker = store.start(f"align:ends {status}")
    tracker.finish(status)
    assert store.client.get_run(tracker.run_id).info.status == status
    store.start(f"align:ends {status}")
    assert store.client.get_run(tracker.run_id).info.status == "RUNNING"


def test_tags_are_set(store: Store) -> None:
    tracker = store.start("align:tags")
    tracker.set_tags({"git_commit": "abc", "workspace": "/runs"})
    tags = store.client.get_run(tracker.run_id).data.tags
    assert (tags["git_commit"], tags["workspace"]) == ("abc", "/runs")


def test_a_store_that_cannot_be_opened_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database at all " * 100)
    for uri in ("redis://localhost", sqlite_uri(tmp_path)):
        with pytest.raises(PixartError, match=f"MLflow at {uri}: "):
            Tracker.start(uri, "digits", "x", "x", artifacts=tmp_path)
        with pytest.raises(RegistryError, match=f"the registry at {uri}: "):
            Registry(uri, "digits")


def make_snapshot(folder: Path, weights: bytes = b"weights" * 40) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights)
    record = FileRecord.of(folder / "model.safetensors")
    Manifest("snapshot/1", {}, {}, (record,)).commit_to(folder)
    return folder


@dataclass(frozen=True)
class Family:
    """A registry with two versions; version 1 is champion."""

    registry: Registry
    folders: tuple[Path, Path]


@pytest.fixture(scope="module")
def family(store: Store) -> Family:
    registry = Registry(store.uri, "digits")
    run_id = store.start("align:registered").run_id
    folders = tuple(make_snapshot(store.folder / f"v {n}", bytes([n]) * 300) for n in (1, 2))
    for number, folder in enumerate(folders, start=1):
        version = registry.register(folder, run_id, {"stage": "align"})
        assert version.number == number
    registry.set_alias("champion", registry.get("1"))
    return Family(registry, (folders[0], folders[1]))


def test_a_version_is_got_by_number_and_by_alias(family: Family) -> None:
    for reference in ("1", "champion"):
        version = family.registry.get(reference)
        assert (version.number, version.source) == (1, str(family.folders[0]))
        assert version.tags["stage"] == "align"
    assert family.registry.aliases() == {"champion": 1}


def test_registering_the_same_snapshot_again_makes_no_new_version(
    family: Family, store: Store
) -> None:
    run_id = store.start("align:registered").run_id
    again = family.registry.register(family.folders[0], run_id, {"stage": "align"})
    assert again.number == 1
    assert [v.number for v in family.registry.versions()] == [1, 2]


@pytest.mark.parametrize("reference", ["challenger", "99", "", "0"])
def test_an_unknown_version_or_alias_names_what_there_is(family: Family, reference: str) -> None:
    with pytest.raises(RegistryError) as caught:
        family.registry.get(reference)
    assert f"no version or alias {reference!r}" in str(caught.value)
    assert "champion (version 1), version 1, version 2" in str(caught.value)


def test_a_model_nobody_registered_is_named(store: Store) -> None:
    nobody = Registry(store.uri, "nobody")
    with pytest.raises(RegistryError, match=r"model 'nobody' has .*nothing registered yet"):
        nobody.get("champion")
    assert nobody.aliases() == {}
    assert nobody.versions() == []


def test_tags_are_added_to_a_version(family: Family) -> None:
    family.registry.tag(family.registry.get("2"), {"digit_accuracy": "0.91"})
    tags = family.registry.get("2").tags
    assert (tags["digit_accuracy"], tags["stage"]) == ("0.91", "align")


def test_verifying_finds_one_flipped_bit(store: Store) -> None:
    registry = Registry(store.uri, "flipped")
    folder = make_snapshot(store.folder / "flipped")
    version = registry.register(folder, store.start("align:flipped").run_id, {})
    version.verify()
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[100] ^= 4
    weights.write_bytes(data)
    with pytest.raises(RegistryError, match=r"flipped version 1: .*model.safetensors: its bytes"):
        version.verify()


def test_verifying_finds_a_snapshot_replaced_whole(store: Store) -> None:
    registry = Registry(store.uri, "replaced")
    folder = make_snapshot(store.folder / "replaced")
    version = registry.register(folder, store.start("align:replaced").run_id, {})
    os.rename(folder, store.folder / "original")
    make_snapshot(folder, b"other weights")
    with pytest.raises(RegistryError, match=r"replaced version 1: .*registered was"):
        version.verify()


def test_verifying_finds_a_snapshot_that_is_gone(store: Store) -> None:
    registry = Registry(store.uri, "gone")
    folder = make_snapshot(store.folder / "gone")
    version = registry.register(folder, store.start("align:gone").run_id, {})
    os.rename(folder, store.folder / "elsewhere")
    with pytest.raises(RegistryError, match=r"gone version 1: .* it has no manifest.json"):
        version.verify()


def test_a_password_in_a_store_address_is_never_shown() -> None:
    shown = hide_password("postgresql://ada:s3cret@db:5432/mlflow")
    assert shown == "postgresql://ada:***@db:5432/mlflow"
    assert hide_password("sqlite:////data/mlflow.db") == "sqlite:////data/mlflow.db"


@pytest.fixture(scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> "Iterator[MlflowServer]":
    from mlflow_server import MlflowServer  # takes seconds to import

    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(_server: "MlflowServer", monkeypatch: pytest.MonkeyPatch) -> "Iterator[MlflowServer]":
    """A server that is up; its clients leave trying again to us."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    _server.calls.clear()
    yield _server
    _server.mood = "up"


def start_run(server: "MlflowServer", name: str) -> Tracker:
    return Tracker.start(server.uri, "outbox", name, name, artifacts=Path("unused").absolute())


def point(images_seen: int) -> Point:
    return images_seen, {"loss": 1000.0 / images_seen, "gradient_norm": 2.0 * images_seen}


def logged(tracker: Tracker, metric: str = "loss") -> list[tuple[int, float]]:
    """Everything that was logged, in the order in which it was, what came twice too."""
    found = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, metric)
    return [(m.step, m.value) for m in sorted(found, key=lambda m: m.timestamp)]


def expected(*places: int) -> list[tuple[int, float]]:
    return [(n, 1000.0 / n) for n in places]


@pytest.mark.parametrize("mood", ["up", "away", "lost answer", "page"])
def test_every_point_is_logged_once_and_in_order_whatever_became_of_the_server(
    server: "MlflowServer", mood: "Mood"
) -> None:
    tracker = start_run(server, f"bad days: {mood}")
    outbox = Outbox(server.uri, tracker.run_id, [])
    for images_seen in (7, 14, 21):
        if images_seen == 14:
            wait_for(lambda: len(logged(tracker)) == 1, "the first point")
            server.mood = mood
            server.calls.clear()
        outbox.log_metrics(point(images_seen)[1], images_seen)
    wait_for(lambda: server.calls[mood] > 1, "calls")
    server.mood = "up"
    outbox.log_metrics(point(28)[1], 28)
    outbox.close(60)
    assert logged(tracker) == expected(7, 14, 21, 28)
    assert [value for _, value in logged(tracker, "gradient_norm")] == [14, 28, 42, 56]


def test_a_resumed_curve_has_what_was_missing_and_no_point_twice(server: "MlflowServer") -> None:
    """Two points were logged after the state that is resumed from, and will come again."""
    tracker = start_run(server, "resumed")
    for images_seen in (7, 14, 21, 28):
        tracker.log_metrics(point(images_seen)[1], images_seen)
    outbox = Outbox(server.uri, tracker.run_id, [point(7), point(14)])
    for images_seen in (21, 28, 35):
        outbox.log_metrics(point(images_seen)[1], images_seen)
    outbox.close(60)
    assert logged(tracker) == expected(7, 14, 21, 28, 35)


def test_what_a_killed_attempt_could_not_send_comes_with_the_state(server: "MlflowServer") -> None:
    tracker = start_run(server, "killed")
    tracker.log_metrics(point(7)[1], 7)
    outbox = Outbox(server.uri, tracker.run_id, [point(7), point(14), point(21)])
    outbox.close(60)
    assert logged(tracker) == expected(7, 14, 21)


def test_closing_gives_up_on_a_server_that_stays_away(server: "MlflowServer") -> None:
    tracker = start_run(server, "gone")
    server.mood = "away"
    outbox = Outbox(server.uri, tracker.run_id, [])
    outbox.log_metrics(point(7)[1], 7)
    wait_for(lambda: server.calls["away"] > 0, "a call")
    outbox.close(0.1)
    server.mood = "up"
    outbox.close(60)  # it never stopped trying
    assert logged(tracker) == expected(7)


def test_a_server_that_is_not_there_is_named_in_one_line_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    port = free_port()
    tracker = Tracker(f"http://ada:s3cret@127.0.0.1:{port}", "run")
    for call in (
        lambda: tracker.log_metrics({"loss": 1.0}, 7),
        lambda: tracker.history("loss"),
        tracker.finish,
    ):
        with pytest.raises(TrackingError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"MLflow at http://ada:***@127.0.0.1:{port}: ")
        assert "Connection refused" in message
        assert "s3cret" not in message
        assert "\n" not in message
