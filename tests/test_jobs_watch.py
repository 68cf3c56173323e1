"""Watching a training: which states are drawn, once each, and which is the best of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image
from processes import MINI
from small_states import save
from stages import plan_stage, write_tables

from pixart_cluster.recipe import read_recipe
from pixart_jobs.stage import StagePlan, build_index, start_network
from pixart_jobs.watch import Look, _Watcher, watch
from pixart_platform.batches import RowIndex
from pixart_platform.checkpoint import Progress
from pixart_platform.tracking import Tracker, sqlite_uri

if TYPE_CHECKING:
    from torch import Tensor

BATCH, EVERY, TOTAL = 16, 64, 168  # images; the end, in whole batches, is at 160
SIDE = 4  # of a picture here


@pytest.fixture
def stage(tmp_path: Path) -> StagePlan:
    """A class-conditional stage of the miniature recipe, on rows of noise; none is trained."""
    recipe = read_recipe(
        str(MINI),
        [f"train.preview_every_images={EVERY}", "train.evaluate_images=8", "train.keep_states=99",
         f"stages.pixels.images={TOTAL}", f"stages.pixels.batch_images={BATCH}"],
    )  # fmt: skip
    return plan_stage(recipe, "pixels", write_tables(recipe, tmp_path / "tables", 16), tmp_path)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def tracker(store: Path, request: pytest.FixtureRequest) -> Tracker:
    name = request.node.name
    return Tracker.start(sqlite_uri(store), "mini", name, name, artifacts=store)


def make_watcher(stage: StagePlan, tracker: Tracker, progress: list[int] | None = None) -> _Watcher:
    """Without Ray, as long as it asks for nothing."""
    index = cast(ray.ObjectRef[RowIndex], build_index(stage))
    return _Watcher(stage, tracker, (progress if progress is not None else []).append, index)


def look(loss: float | None = None, shade: int = 0) -> Look:
    picture = np.full((SIDE, SIDE, 3), shade, np.uint8)
    losses = {} if loss is None else {"evaluation_loss": loss}
    return Look({"class_0": picture, "class_1": picture + 1}, losses)


def drawn(stage: StagePlan) -> list[int]:
    return sorted(int(path.stem) for path in stage.preview_folder.glob("*.png"))


def logged(tracker: Tracker, metric: str = "evaluation_loss") -> list[int]:
    """Where a metric was logged, as often as it was."""
    found = MlflowClient(tracker.uri).get_metric_history(tracker.run_id, metric)
    return sorted(m.step for m in found)


def test_one_state_an_interval_is_due_and_the_last(stage: StagePlan, tracker: Tracker) -> None:
    """States are saved more often, to resume from; a multiple between batches counts too."""
    assert make_watcher(stage, tracker)._due() == []
    for images_seen in (16, 48, 64, 80, 128, 144, 160):
        save(stage.states, images_seen)
    (stage.states.folder / "192").write("dead-00000.safetensors", b"no manifest")
    assert make_watcher(stage, tracker)._due() == [64, 128, 160]


def test_what_is_drawn_is_not_due_again_and_nothing_older_is(
    stage: StagePlan, tracker: Tracker
) -> None:
    watcher = make_watcher(stage, tracker)
    for images_seen in (64, 128):
        save(stage.states, images_seen)
    watcher._keep(look(), 128)
    assert make_watcher(stage, tracker)._due() == [], "64 was passed over by an earlier attempt"
    save(stage.states, 160)
    assert make_watcher(stage, tracker)._due() == [160]


def test_a_preview_is_one_strip_of_pictures_and_a_grid_in_the_run(
    stage: StagePlan, tracker: Tracker, store: Path
) -> None:
    make_watcher(stage, tracker)._keep(look(loss=0.5, shade=100), 64)
    strip = np.asarray(Image.open(stage.preview_folder / "000000064.png"))
    assert strip.shape == (SIDE, 2 * SIDE, 3)
    assert (strip[:, :SIDE] == 100).all()
    assert (strip[:, SIDE:] == 101).all()
    assert tracker.history("evaluation_loss") == [(64, 0.5)]
    names = [path.name for path in (store / "artifacts" / tracker.run_id).rglob("*.png")]
    assert {key for key in ("class_0", "class_1") if any(key in name for name in names)} == {
        "class_0", "class_1",
    }  # fmt: skip


def test_the_best_state_is_kept_when_others_go(stage: StagePlan, tracker: Tracker) -> None:
    watcher = make_watcher(stage, tracker)
    for images_seen, loss in ((64, 0.5), (96, 0.3), (128, 0.4), (144, None), (160, float("nan"))):
        save(stage.states, images_seen)
        watcher._keep(look(loss), images_seen)
    states = stage.states
    type(states)(states.folder, states.settings_digest, keep=1).prune()
    assert states.complete() == [96, 160]


def test_a_tracker_that_is_away_loses_no_picture(
    stage: StagePlan, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    gone = Tracker(tracker.uri, "no such run")
    make_watcher(stage, gone)._keep(look(loss=0.5), 64)
    assert drawn(stage) == [64]
    assert "the preview at 64 images is in the run's folder only: MLflow at " in caplog.text


def test_progress_is_what_the_curve_has_reached(stage: StagePlan, tracker: Tracker) -> None:
    told: list[int] = []
    watcher = make_watcher(stage, tracker, told)
    watcher.poll()
    for images_seen in (16, 32):
        tracker.log_metrics({"loss": 1.0}, images_seen)
        watcher.poll()
    assert told == [16, 32]
    make_watcher(stage, Tracker(tracker.uri, "no such run"), told).poll()
    assert told == [16, 32], "what does not answer is asked again in the next round"


@pytest.fixture(scope="module")
def _ray() -> Iterator[None]:
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def save_network(stage: StagePlan, images_seen: int, size: float) -> None:
    """A state whose average predicts noise of ``size``, which is more wrong the larger it is."""
    torch.manual_seed(0)
    network = start_network(stage.snapshot.network, None)
    values: dict[str, Tensor] = {}
    for name, parameter in network.named_parameters():
        values[name] = -(parameter + size * torch.randn(parameter.shape)).detach().flatten()
    cut = [(name, 0, len(flat)) for name, flat in values.items()]
    save(stage.states, Progress(images_seen), [cut], values)


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_states_are_drawn_and_measured_in_tasks_once(
    stage: StagePlan, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    """Two while training goes on, the last after it; a second watch finds all done."""
    with watch(stage, tracker, lambda _: None, ray.put(build_index(stage))):
        for images_seen, size in ((64, 0.05), (80, 0.0), (128, 0.0), (160, 0.1)):
            save_network(stage, images_seen, size)
    assert drawn(stage) == [64, 128, 160]
    assert logged(tracker) == [64, 128, 160]
    assert len(set(tracker.history("evaluation_loss_0.125"))) == 3
    strip = Image.open(stage.preview_folder / "000000128.png")
    assert strip.size == (8 * 32, 32), "eight classes"
    best = stage.states.best()
    assert best
    assert best[0] == 128
    with watch(stage, tracker, lambda _: None, ray.put(build_index(stage))):
        pass
    assert logged(tracker) == [64, 128, 160]
    assert "no preview" not in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("_ray")
def test_a_state_that_cannot_be_drawn_stops_nothing(
    stage: StagePlan, tracker: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    save(stage.states, 64)  # of another network
    save_network(stage, 128, 0.0)
    with watch(stage, tracker, lambda _: None, ray.put(build_index(stage))):
        pass
    assert drawn(stage) == [128]
    assert "no preview at 64 images" in caplog.text
