"""The one training loop of all stages. It knows nothing of pictures.

It takes a task (decode rows, give a loss, draw previews), an engine, an order and a state store.
Progress, schedules and intervals are counted in images. Resuming is running again: the newest
complete state decides where the order goes on, and every random draw is a function of (run seed,
sample position), so a killed run ends with the very weights of an undisturbed one.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pixart_platform.batches import RowIndex, map_ahead
from pixart_platform.checkpoint import StateStore
from pixart_platform.engine import Engine, OptimizerSettings
from pixart_platform.errors import TrainingError
from pixart_platform.order import Order, slice_of_rank
from pixart_platform.seeds import SampleDraws

_AHEAD = 4  # batches that are being read
_log = logging.getLogger(__name__)


class Average(Protocol):
    """A running average of the weights, held by rank 0."""

    tensors: dict[str, Tensor]

    def update(
        self, parameters: Iterable[tuple[str, Tensor]], *, batch_images: int, images_seen: int
    ) -> None: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...


class Task(Protocol):
    """What a stage trains. ``Batch`` is its own business."""

    def decode(self, columns: dict[str, list[Any]], draws: SampleDraws) -> Any:
        """Rows of the index -> a batch on the CPU; runs on the prefetch threads."""
        ...

    def loss(self, model: nn.Module, batch: Any, draws: SampleDraws) -> Tensor:
        """Mean loss of this rank's samples."""
        ...

    def preview(self, average: Average, images_seen: int) -> None:
        """Draw the fixed prompts with the averaged weights. Rank 0 only."""
        ...


@dataclass(frozen=True)
class LoopSettings:
    """Intervals and lengths, all in images."""

    total_images: int
    batch_images: int
    save_every_images: int
    preview_every_images: int
    log_every_images: int
    seed: int

    @property
    def num_batches(self) -> int:
        return self.total_images // self.batch_images

    def is_due(self, every: int, images_seen: int) -> bool:
        """Whether the step that reached ``images_seen`` crossed a multiple of ``every``."""
        return images_seen // every > (images_seen - self.batch_images) // every


LogMetrics = Callable[[dict[str, float], int], None]


class _Meter:
    """Means over the images since the last report."""

    def __init__(self) -> None:
        self._started, self._images, self._losses = time.monotonic(), 0, list[float]()

    def add(self, loss: float, images: int) -> None:
        self._losses.append(loss)
        self._images += images

    def report(self) -> dict[str, float]:
        seconds = time.monotonic() - self._started
        mean = sum(self._losses) / len(self._losses)
        metrics = {"loss": mean, "images_per_second": self._images / seconds}
        self.__init__()  # type: ignore[misc]
        return metrics


def train(
    *,
    task: Task,
    engine: Engine,
    optimizer: OptimizerSettings,
    settings: LoopSettings,
    index: RowIndex,
    order: Order,
    states: StateStore,
    average: Average,
    log_metrics: LogMetrics,
) -> None:
    """Train to ``settings.total_images``. Collective; rank 0's average holds the result.

    Raises TrainingError on a non-finite loss, before the step it would have spoiled.
    """
    images_seen = states.find_newest() or 0
    if images_seen:
        average_tensors = states.load(engine, images_seen)
        if engine.rank == 0:
            average.load(average_tensors)
            _log.warning("resuming at %d images, the newest complete state", images_seen)
    lead = engine.rank == 0
    batch_images = settings.batch_images

    def make(n: int) -> tuple[Any, SampleDraws]:
        bucket, samples = order.batch(n)
        mine = slice_of_rank(samples, engine.rank, engine.world_size)
        positions = range(n * batch_images, (n + 1) * batch_images)[mine]
        draws = SampleDraws(settings.seed, list(positions))
        return task.decode(index.fetch(bucket, samples[mine]), draws), draws

    meter = _Meter()
    first = images_seen // batch_images
    for batch, draws in map_ahead(make, range(first, settings.num_batches), _AHEAD):
        rate = optimizer.rate_at(images_seen, settings.total_images)
        engine.set_learning_rate(rate)
        loss = task.loss(engine.module, batch, draws)
        mean_loss = engine.mean(loss)
        if not math.isfinite(mean_loss):
            raise TrainingError(
                f"loss is {mean_loss} after {images_seen} images; no step was taken. Resume with "
                f"a lower learning_rate (now {rate:g}) or gradient_clip"
            )
        engine.backward(loss)
        engine.step()
        images_seen += batch_images
        meter.add(mean_loss, batch_images)
        if lead:
            average.update(engine.parameters(), batch_images=batch_images, images_seen=images_seen)
            if settings.is_due(settings.log_every_images, images_seen):
                metrics = meter.report() | {
                    "learning_rate": rate,
                    "gradient_norm": engine.gradient_norm(),
                }
                log_metrics(metrics, images_seen)
        at_end = images_seen >= settings.num_batches * batch_images
        if lead and (at_end or settings.is_due(settings.preview_every_images, images_seen)):
            task.preview(average, images_seen)
        if at_end or settings.is_due(settings.save_every_images, images_seen):
            states.save(engine, images_seen, average.tensors if lead else None)
