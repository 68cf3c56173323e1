"""Beside a stage's training, on the driver: its progress, and what its states are worth.

At every preview interval the averaged weights are read from the state that the workers saved,
the fixed prompts are drawn and the loss at fixed timesteps is measured, in a Ray task of its own,
so that no training worker waits and any node may do it. (Ray Train's ValidationConfig would do as
much, but only for checkpoints that its controller knows of, at a barrier of all workers each.)
A preview is a picture and its losses in the run's folder: what is there is not drawn again.
"""

import io
import json
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from PIL import Image

from pixart_jobs.stage import StagePlan, average_of, make_task
from pixart_models.autoencoder import load_autoencoder
from pixart_models.dit import DiT
from pixart_models.drawing import Drawer, draw_classes
from pixart_models.pixart import PixArt
from pixart_models.text import load_text_encoder
from pixart_platform.batches import RowIndex
from pixart_platform.engine import choose_accelerator
from pixart_platform.errors import PixartError, TrackingError
from pixart_platform.seeds import SampleDraws, derive_seed
from pixart_platform.storage import write_atomic
from pixart_platform.tracking import Tracker

_WATCH_SECONDS = 3.0
_QUANTILES = (0.125, 0.375, 0.625, 0.875)  # of training's timesteps
_log = logging.getLogger(__name__)
Picture = NDArray[np.uint8]


class Look(NamedTuple):
    """What a state draws, by prompt, and its losses by quantile of noise."""

    pictures: dict[str, Picture]
    losses: dict[str, float]


@contextmanager
def watch(
    stage: StagePlan, tracker: Tracker, on_progress: Callable[[int], None],
    index: ray.ObjectRef[RowIndex],
) -> Iterator[None]:  # fmt: skip
    """Watch a stage while it is trained, and draw what is left when it ends."""
    watcher, ended = _Watcher(stage, tracker, on_progress, index), threading.Event()

    def poll() -> None:
        while not ended.wait(_WATCH_SECONDS):
            watcher.poll()

    thread = threading.Thread(target=poll, name="watch-training", daemon=True)
    thread.start()
    try:
        yield
        ended.set()
        thread.join()
        watcher.finish()
    finally:
        ended.set()


class _Watcher:
    """Draws states one at a time, oldest first."""

    def __init__(
        self, stage: StagePlan, tracker: Tracker, on_progress: Callable[[int], None],
        index: ray.ObjectRef[RowIndex],
    ) -> None:  # fmt: skip
        self._stage, self._tracker, self._on_progress = stage, tracker, on_progress
        self._index = index
        self._drawn = {int(path.stem) for path in stage.preview_folder.glob("*.json")}
        self._asked: tuple[int, ray.ObjectRef[Look]] | None = None
        best = stage.states.best()
        self._best = best[1] if best else float("inf")

    def poll(self) -> None:
        """One round; what does not answer is asked again in the next."""
        try:
            points = self._tracker.history("loss")
            if points:
                self._on_progress(points[-1][0])
            self._collect(timeout=0)
            self._ask()
        except PixartError as error:
            _log.info("not now: %s", error)

    def finish(self) -> None:
        """Draw what is still missing."""
        while self._asked or self._due():
            self._ask()
            self._collect(timeout=None)

    def _due(self) -> list[int]:
        """States that are to be drawn: at each interval, and at the end."""
        stage, every = self._stage, self._stage.recipe.train.preview_every_images
        batch, newest = stage.settings.batch_images, max(self._drawn, default=0)
        return [
            n
            for n in stage.states.complete()
            if n > newest and (n == stage.num_images or n // every > (n - batch) // every)
        ]

    def _ask(self) -> None:
        if self._asked is None and (due := self._due()):
            gpus = self._stage.recipe.train.preview_gpus
            asked = _look.options(num_gpus=gpus).remote(self._stage, due[0], self._index)
            self._asked = due[0], asked

    def _collect(self, timeout: float | None) -> None:
        if self._asked is None or not ray.wait([self._asked[1]], timeout=timeout)[0]:
            return
        images_seen, asked = self._asked
        self._asked = None
        self._drawn.add(images_seen)
        try:
            look = ray.get(asked)
        except ray.exceptions.RayTaskError as error:  # the state may be gone, or the memory
            _log.warning("no preview at %d images: %s", images_seen, error.cause)
            return
        self._keep(look, images_seen)

    def _keep(self, look: Look, images_seen: int) -> None:
        """Log everything; save the pictures in one strip, and the losses, which come last."""
        loss = look.losses.get("evaluation_loss", float("inf"))
        if loss < self._best:
            self._best = loss
            self._stage.states.mark_best(images_seen, loss)
        try:
            self._tracker.log_metrics(look.losses, images_seen)
            for key, picture in look.pictures.items():
                self._tracker.log_image(picture, key, images_seen)
        except TrackingError as error:
            _log.warning("the preview at %d images is in the run's folder only: %s",
                         images_seen, error)  # fmt: skip
        place = self._stage.preview_folder / f"{images_seen:09d}"
        if look.pictures:
            strip, file = np.concatenate(list(look.pictures.values()), axis=1), io.BytesIO()
            Image.fromarray(strip).save(file, "png")
            write_atomic(place.with_suffix(".png"), file.getvalue())
        write_atomic(place.with_suffix(".json"), json.dumps(look.losses).encode())


@ray.remote(num_cpus=0)
def _look(stage: StagePlan, images_seen: int, index: RowIndex) -> Look:
    """Draw and measure one state."""
    device = choose_accelerator()
    network = average_of(stage, stage.states.open(images_seen)).to(device)
    return Look(_draw(stage, network, device), _measure(stage, network, device, index))


def _draw(stage: StagePlan, network: PixArt | DiT, device: torch.device) -> dict[str, Picture]:
    """The fixed prompts, or the first classes, with fixed seeds."""
    config, prompts = stage.snapshot, stage.recipe.train.preview_prompts
    autoencoder = _load_once(load_autoencoder, config.autoencoder, str(device))
    if isinstance(network, DiT):
        labels = list(range(min(config.network.num_classes, 8)))
        seeds = [derive_seed("preview", label) for label in labels]
        drawn = draw_classes(network, autoencoder, config.objective, labels, seeds)
        return {f"class_{i}": picture for i, picture in zip(labels, drawn, strict=True)}
    if not prompts:
        return {}
    encoder = _load_once(
        load_text_encoder, config.text_encoder, config.network.max_tokens, str(device)
    )
    seeds = [derive_seed("preview", prompt) for prompt in prompts]
    drawn = Drawer(config, network, autoencoder, encoder).draw(prompts, seeds)
    keys = [prompt.replace(" ", "_")[:80] for prompt in prompts]
    return dict(zip(keys, drawn, strict=True))


def _measure(
    stage: StagePlan, network: PixArt | DiT, device: torch.device, index: RowIndex
) -> dict[str, float]:
    """The mean loss of fixed samples at fixed timesteps with fixed noise, whatever is trained on.

    They are samples of the training table: the figure compares runs and tells of a stage's
    progress; what a model makes of unseen prompts is evaluation's business.
    """
    task = make_task(stage, device)
    shape, counts = next(iter(index.counts.items()))
    count = min(stage.recipe.train.evaluate_images, sum(counts))
    if not count:
        return {}
    samples = np.linspace(0, sum(counts) - 1, count).astype(np.int64)
    seed, batch_images = derive_seed("evaluate", stage.recipe.seed), stage.settings.batch_images
    losses = dict[float, list[float]]((quantile, []) for quantile in _QUANTILES)
    for first in range(0, count, batch_images):
        some = samples[first : first + batch_images]
        batch = task.decode(index.fetch(shape, some), SampleDraws(seed, some.tolist()))
        for quantile in _QUANTILES:
            losses[quantile] += task.evaluate(network, batch, seed + first, quantile).tolist()
    means = {f"evaluation_loss_{q:g}": float(np.mean(found)) for q, found in losses.items()}
    return means | {"evaluation_loss": float(np.mean(list(means.values())))}


@lru_cache(maxsize=4)
def _load_once(load: Callable[..., Any], *arguments: Any) -> Any:
    """A frozen model, kept for the next preview: Ray uses a worker process again."""
    return load(*arguments)
