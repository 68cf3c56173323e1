"""Runs and the registry, on one real MLflow store."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from builders import write_table
from mlflow import MlflowClient

from pixart_platform.errors import PixartError, RegistryError
from pixart_platform.manifest import FileRecord, Manifest
from pixart_platform.registry import Registry
from pixart_platform.tracking import Tracker, hide_password, sqlite_uri


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
        with pytest.raises(RegistryError, match=f"the registry at {uri} does not answer: "):
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
        assert (version.number, version.folder) == (1, family.folders[0])
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
