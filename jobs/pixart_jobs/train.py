"""Runs a training stage: Ray Train workers, DeepSpeed ZeRO, one loop, one snapshot.

Workers only train and save states; the driver watches, rewinds, and makes the snapshot from the
last state. So nothing but the store of states (and the tables) must be reachable from all nodes,
any worker or the driver may die at any moment, and a state of 2 workers goes on with 1.
"""

import json
import logging
import math
import time
import uuid
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.train
import ray.train.collective
import torch
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import ScalingConfig  # ray.train's own has the types of V1
from torch import nn

from pixart_jobs.stage import (
    StagePlan,
    average_of,
    build_index,
    load_flat,
    make_task,
    publish_snapshot,
    start_network,
)
from pixart_jobs.stage_task import LatentTask
from pixart_jobs.watch import watch
from pixart_models.config import ModelInputError
from pixart_models.ema import ema_decay
from pixart_models.snapshot import build_network
from pixart_platform import train_loop
from pixart_platform.accounting import recognise
from pixart_platform.batches import RowIndex
from pixart_platform.checkpoint import Progress, Saver, State, StateStore
from pixart_platform.engine import WEIGHT, Engine, choose_accelerator
from pixart_platform.errors import PixartError, StorageError, TrainingError
from pixart_platform.machine import watched
from pixart_platform.order import Order
from pixart_platform.seeds import SampleDraws, derive_seed
from pixart_platform.storage import FileAbsent, Folder
from pixart_platform.tracking import Outbox, Tracker
from pixart_platform.train_loop import Derailed, LoopSettings, Skip

_TROUBLE, _SKIPS = "trouble.json", "skips.json"  # beside the states
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """What all workers begin with, made once and put where they find it."""

    weights: ray.ObjectRef[Any]
    """By name."""
    index: ray.ObjectRef[RowIndex]
    """Made by each worker, it would ask S3 for every partition too often: at 64 workers and 49,000
    partitions for 19 minutes (``cluster/scale.md``)."""


def run(
    stage: StagePlan,
    tracker: Tracker,
    scratch: Path,
    on_progress: Callable[[int], None],
    note: Callable[[str], None],
) -> None:
    """Train ``stage`` to its snapshot; at once if it is there. Raises TrainingError.

    ``scratch`` is for Ray's own files, which nothing needs afterwards.
    """
    if stage.is_finished:
        return
    if complete := stage.states.complete():
        note(f"{stage.name} goes on at {complete[-1]} images, the newest of its states")
    given = prepare(stage)  # once: a copied parent may make room in the meantime
    with watch(stage, tracker, on_progress, given.index):
        while (last := stage.states.find_newest(stage.num_images)) is None:
            _fit(stage, tracker, scratch / f"train-{time.time_ns()}", given)
            if trouble := _read_trouble(stage):
                note(_rewind(stage, trouble))
    tracker.catch_up(last.progress.history)
    publish_snapshot(stage, average_of(stage, last))


def prepare(stage: StagePlan) -> Given:
    """Raises PixartError for tables that cannot be read or do not fit together."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(stage.recipe.seed, stage.name, "init"))
        network = start_network(stage.snapshot.network, stage.inputs.parent)
    return Given(ray.put(network.state_dict()), ray.put(build_index(stage)))


def _fit(stage: StagePlan, tracker: Tracker, storage: Path, given: Given) -> None:
    """One attempt by Ray Train, which restarts lost workers; all that counts is in the states."""
    settings, batch = stage.recipe.train, stage.settings.batch_images
    stage.states.folder.delete(_TROUBLE)
    least = settings.min_workers or settings.num_workers
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "stage": stage, "place": (tracker.uri, tracker.run_id), "given": given,
        },
        scaling_config=ScalingConfig(
            num_workers=settings.num_workers if least == settings.num_workers
            else (min(least, batch), settings.num_workers),
            use_gpu=settings.use_gpu,
            label_selector=settings.nodes or None,
            elastic_resize_monitor_interval_s=settings.resize_every_seconds,
        ),
        run_config=RunConfig(
            name=stage.folder.name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=settings.max_failures),
        ),
    )  # fmt: skip
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        if _read_trouble(stage):
            return
        raise TrainingError(
            f"stage {stage.name}: its workers died more often than train.max_failures = "
            f"{settings.max_failures} allows, at last: {error}; run again to go on"
        ) from error


def _read_trouble(stage: StagePlan) -> dict[str, Any] | None:
    """Why the workers stopped by themselves, if they did."""
    try:
        found: dict[str, Any] = json.loads(stage.states.folder.read(_TROUBLE))
    except FileAbsent:
        return None
    return found


def read_skips(folder: Folder) -> tuple[Skip, ...]:
    """Batches that the states in ``folder`` leave out."""
    try:
        return tuple(Skip(*pair) for pair in json.loads(folder.read(_SKIPS)))
    except FileAbsent:
        return ()


def _rewind(stage: StagePlan, trouble: dict[str, Any]) -> str:
    """Leave out what derailed the stage, and say so. Raises TrainingError if that is no help."""
    message, bad = f"stage {stage.name}: {trouble['message']}", trouble["images_seen"]
    skips, most = read_skips(stage.states.folder), stage.recipe.train.max_rewinds
    if bad is None or len(skips) >= most:
        used = f"; train.max_rewinds = {most} are used up" if bad is not None and most else ""
        raise TrainingError(message + used)
    newest = stage.states.find_newest()
    back = newest.progress.images_seen if newest else 0
    loop = loop_settings(stage, skips, 1)
    skip = Skip(back, loop.batch_at(bad) + 1 - loop.batch_at(back))
    kept = [s for s in skips if s.images_seen <= back]
    stage.states.folder.write(_SKIPS, json.dumps([*kept, skip]).encode())
    return f"{message}; going back to {back} images, leaving out {skip.num_batches} batches"


def _peak_tflops() -> float:
    """Of this process's GPU, if there is one that is known."""
    kind = recognise(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return kind.tflops if kind else 0.0


def _train_worker(config: dict[str, Any]) -> None:
    """Runs on every Ray Train worker. The stage's own errors are final, not retried.

    What one worker alone meets is raised, for the others wait for it until Ray Train takes them
    down; started again, all find the reason and end.
    """
    stage = cast(StagePlan, config["stage"])
    if _read_trouble(stage):
        return
    try:
        _train_stage(stage, config["place"], config["given"])
    except Derailed as error:  # on all workers alike
        if ray.train.get_context().get_world_rank() == 0:
            _leave_trouble(stage, str(error), error.images_seen)
    except (PixartError, ModelInputError) as error:
        with suppress(StorageError):  # then Ray Train tries again
            _leave_trouble(stage, str(error), None)
        raise


def _leave_trouble(stage: StagePlan, message: str, images_seen: int | None) -> None:
    trouble = {"message": message, "images_seen": images_seen}
    stage.states.folder.write(_TROUBLE, json.dumps(trouble).encode())


def _train_stage(stage: StagePlan, place: tuple[str, str], given: Given) -> None:
    device = choose_accelerator()
    recipe, settings, train = stage.recipe, stage.settings, stage.recipe.train
    context = ray.train.get_context()
    lead, world_size = context.get_world_rank() == 0, context.get_world_size()
    newest, token = _agree_on_start(stage.states, lead)
    network = build_network(stage.snapshot.network)
    network.checkpoint_blocks = train.recompute_blocks
    load_flat(network, newest.read(WEIGHT) if newest else ray.get(given.weights))
    loop = loop_settings(stage, read_skips(stage.states.folder), world_size)
    engine = Engine(
        network, settings.optimizer, zero_stage=train.zero_stage, accumulate=loop.accumulate,
        device=device,
    )  # fmt: skip
    if newest:
        engine.set_num_steps(newest.progress.images_seen // settings.batch_images)
        newest.restore(engine.fragments(share=False))
    progress = newest.progress if newest else Progress()
    if lead:
        how = "resuming at %d images, the newest complete state" if newest else "beginning at %d"
        _log.warning(f"%s: {how}, %d workers", stage.name, progress.images_seen, world_size)
    outbox = Outbox(*place, progress.history) if lead else None
    index, task = ray.get(given.index), make_task(stage, device)
    if train.compile:
        network.compile()
        _warm_up(network, task, index, settings.batch_images // world_size // loop.accumulate)
    order_seed = derive_seed(recipe.seed, "order")
    with watched(place) if context.get_local_rank() == 0 else nullcontext():
        train_loop.train(
            task=task,
            engine=engine,
            optimizer=settings.optimizer,
            settings=loop,
            index=index,
            order=Order.over(
                index.counts, batch_images=settings.batch_images, seed=order_seed
            ),
            progress=progress,
            saver=Saver(stage.states, engine.rank, world_size, token, progress.images_seen),
            average_share=lambda seen: 1 - ema_decay(
                settings.ema_half_life_images, settings.batch_images, seen
            ),
            log_metrics=outbox.log_metrics if outbox else lambda *_: None,
            has_notice=lambda: ray.train.get_preemption_info() is not None,
        )  # fmt: skip
    if outbox:
        outbox.close()


def _warm_up(network: nn.Module, task: LatentTask, index: RowIndex, images: int) -> None:
    """Compile forward and backward for every bucket, before the first step is timed or awaited.

    Gradients are asked for by name, past the hooks with which DeepSpeed collects them.
    """
    for bucket, counts in index.counts.items():
        samples = np.arange(min(images, sum(counts)))
        draws = SampleDraws(0, samples.tolist())
        losses = task.loss(network, task.decode(index.fetch(bucket, samples), draws), draws)
        torch.autograd.grad(losses.values.sum(), list(network.parameters()), allow_unused=True)


def _agree_on_start(states: StateStore, lead: bool) -> tuple[State | None, str]:
    """The state to resume from and this attempt's name: rank 0 decides for all."""
    found = None
    if lead:
        newest = states.find_newest()
        found = (newest.progress.images_seen if newest else None, uuid.uuid4().hex[:8])
    images_seen, token = ray.train.collective.broadcast_from_rank_zero(found)
    return None if images_seen is None else states.open(images_seen), token


def loop_settings(stage: StagePlan, skips: tuple[Skip, ...], world_size: int) -> LoopSettings:
    """The loop's part of a stage's settings."""
    settings, train = stage.settings, stage.recipe.train
    return LoopSettings(
        total_images=settings.images,
        batch_images=settings.batch_images,
        save_every_images=train.save_every_images,
        preview_every_images=train.preview_every_images,
        log_every_images=train.log_every_images,
        seed=derive_seed(stage.recipe.seed, stage.name),
        accumulate=train.accumulate_of(settings.batch_images, world_size),
        spike_sigmas=train.spike_sigmas or math.inf,
        peak_tflops=_peak_tflops(),
        skips=skips,
    )
