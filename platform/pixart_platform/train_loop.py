"""The one training loop of all stages. It knows nothing of pictures.

It takes a task (decode rows, give each sample's loss), an engine, an order and a store of states.
Progress, schedules and intervals are counted in images. Resuming is running again: the newest
complete state decides where the order goes on, and every random draw is a function of (run seed,
sample position), so a killed run ends with the very weights of an undisturbed one, and a run on
fewer or more workers has the same batches.

One short all-reduce a step carries all that ranks must agree on, and is the only time the host
waits for the device before the step: the loss must be seen before it is followed. (DeepSpeed waits
for the gradients' norm in any case.)
"""

import logging
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pixart_platform.batches import RowIndex, map_ahead
from pixart_platform.checkpoint import Progress, Saver
from pixart_platform.engine import Engine
from pixart_platform.errors import TrainingError
from pixart_platform.optimizer import OptimizerSettings
from pixart_platform.order import Order, slice_of_rank
from pixart_platform.seeds import SampleDraws

NUM_BANDS = 4  # of timesteps, in the logged losses
_AHEAD = 4  # batches that are being read
_WINDOW = 128  # losses a spike is measured against
_NOTICE_SECONDS = 10.0  # between looks for a notice that a node goes
_ADVICE = "resume with a lower learning_rate or gradient_clip, or set train.max_rewinds"
_log = logging.getLogger(__name__)


class Losses(NamedTuple):
    """Of this rank's samples: each one's loss (B,), its noise level (B,) in 0 to 1, all FLOPs."""

    values: Tensor
    levels: Tensor
    flops: float = 0.0


class Task(Protocol):
    """What a stage trains. ``Batch`` is its own business."""

    def decode(self, columns: dict[str, list[Any]], draws: SampleDraws) -> Any:
        """Rows of the index -> a batch on the CPU; runs on the prefetch threads."""
        ...

    def loss(self, model: nn.Module, batch: Any, draws: SampleDraws) -> Losses: ...


class Skip(NamedTuple):
    """Batches that a run leaves out when it comes to ``images_seen``, after a rewind to there."""

    images_seen: int
    num_batches: int


class Derailed(TrainingError):
    """A loss or gradient that must not be followed; ``images_seen`` before its step."""

    def __init__(self, message: str, images_seen: int) -> None:
        super().__init__(message)
        self.images_seen = images_seen


@dataclass(frozen=True)
class LoopSettings:
    """Intervals and lengths, all in images."""

    total_images: int
    batch_images: int
    save_every_images: int
    preview_every_images: int
    log_every_images: int
    seed: int
    accumulate: int = 1
    """Backward passes a step: a rank's share of a batch is cut into as many parts."""
    spike_sigmas: float = math.inf
    peak_tflops: float = 0.0
    """Of a worker's accelerator, to measure utilisation against; 0 if unknown."""
    skips: Sequence[Skip] = ()
    patience_seconds: float = 600.0
    """How long the end of a run waits for its last state to be saved."""

    @property
    def num_batches(self) -> int:
        return self.total_images // self.batch_images

    def is_due(self, every: int, images_seen: int) -> bool:
        """Whether the step that reached ``images_seen`` crossed a multiple of ``every``."""
        return images_seen // every > (images_seen - self.batch_images) // every

    def wants_state(self, images_seen: int) -> bool:
        """Whether one is to be saved, to resume from or to draw, before the end."""
        every = (self.save_every_images, self.preview_every_images)
        return any(self.is_due(images, images_seen) for images in every)

    def batch_at(self, images_seen: int) -> int:
        """The number in the order of the batch that follows ``images_seen``."""
        left_out = sum(skip.num_batches for skip in self.skips if skip.images_seen <= images_seen)
        return images_seen // self.batch_images + left_out


LogMetrics = Callable[[dict[str, float], int], None]


class _Meter:
    """Means over the images since the last report."""

    def __init__(self) -> None:
        self._started, self._images, self._waited = time.monotonic(), 0, 0.0
        self._losses = list[float]()
        self._bands, self._counts = [0.0] * NUM_BANDS, [0.0] * NUM_BANDS

    def add(self, loss: float, bands: list[float], images: int, waited: float) -> None:
        self._losses.append(loss)
        for k in range(NUM_BANDS):
            self._bands[k] += bands[k]
            self._counts[k] += bands[NUM_BANDS + k]
        self._images, self._waited = self._images + images, self._waited + waited

    def report(self, flops: float, settings: "LoopSettings") -> dict[str, float]:
        """``flops`` is what this rank computes for a batch."""
        seconds = time.monotonic() - self._started
        metrics = {
            "loss": sum(self._losses) / len(self._losses),
            "images_per_second": self._images / seconds,
            "data_wait_share": self._waited / seconds,
            "worker_tflops": flops * len(self._losses) / seconds / 1e12,
            "memory_gib": peak_memory() / 2**30,
        }
        if settings.peak_tflops:
            metrics["mfu"] = metrics["worker_tflops"] / settings.peak_tflops
        metrics |= {
            f"loss_noise_{k / NUM_BANDS:g}": total / count
            for k, (total, count) in enumerate(zip(self._bands, self._counts, strict=True))
            if count
        }
        self.__init__()  # type: ignore[misc]  # begins anew
        return metrics


def peak_memory() -> int:
    """Most bytes of the accelerator, or without one of this process, in use so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def _split(losses: Losses) -> Tensor:
    """Sums of losses and counts of samples by band of noise, (2 * NUM_BANDS,)."""
    bands = (losses.levels * NUM_BANDS).long().clamp(0, NUM_BANDS - 1)
    member = torch.nn.functional.one_hot(bands, NUM_BANDS).to(losses.values)  # (B, bands)
    return torch.cat([losses.values.detach() @ member, member.sum(0)])


def find_spike(loss: float, recent: Sequence[float], sigmas: float) -> bool:
    """Whether ``loss`` stands out of a full window of recent ones, by their spread."""
    if len(recent) < _WINDOW or not math.isfinite(sigmas):
        return False
    return loss > statistics.fmean(recent) + sigmas * statistics.pstdev(recent)


def train(  # noqa: PLR0915  # the one long function: a loop is read from top to bottom
    *,
    task: Task,
    engine: Engine,
    optimizer: OptimizerSettings,
    settings: LoopSettings,
    index: RowIndex,
    order: Order,
    progress: Progress,
    saver: Saver,
    average_share: Callable[[int], float],
    log_metrics: LogMetrics,
    has_notice: Callable[[], bool],
) -> None:
    """Train from ``progress`` to ``settings.total_images`` and save the last state. Collective.

    ``average_share`` of images seen is how far the average follows the weights in a step.
    ``has_notice`` tells on all ranks alike whether a node is about to go; then a state is saved.
    Raises Derailed on a loss or gradient that is not finite, or on a spike, with nothing saved
    since; TrainingError when the last state cannot be saved.
    """
    lead, batch_images = engine.rank == 0, settings.batch_images

    def make(step: int) -> list[tuple[Any, SampleDraws]]:
        """This rank's share of a step's batch, in ``accumulate`` parts."""
        n = settings.batch_at(step * batch_images)
        bucket, samples = order.batch(n)
        mine = slice_of_rank(samples, engine.rank, engine.world_size)
        parts = []
        for k in range(settings.accumulate):
            part = slice_of_rank(samples[mine], k, settings.accumulate)
            part = slice(mine.start + part.start, mine.start + part.stop)
            positions = range(n * batch_images, (n + 1) * batch_images)[part]
            draws = SampleDraws(settings.seed, list(positions))
            parts.append((task.decode(index.fetch(bucket, samples[part]), draws), draws))
        return parts

    def save_now() -> None:
        saver.wait(settings.patience_seconds)
        saver.start(progress, engine.fragments(share=True))
        saver.finish(settings.patience_seconds)

    meter, looked, notified = _Meter(), time.monotonic(), False
    steps = range(progress.images_seen // batch_images, settings.num_batches)
    batches = iter(map_ahead(make, steps, _AHEAD))
    for _ in steps:
        began = time.monotonic()
        parts = next(batches)
        waited = time.monotonic() - began
        after = progress.images_seen + batch_images
        rate = optimizer.rate_at(progress.images_seen, settings.total_images)
        engine.set_rates(rate, average_share(after))
        asks = (saver.is_busy, lead and began - looked > _NOTICE_SECONDS)
        bands, (num_busy, looks), flops = _forward_and_back(
            task, engine, parts, asks, settings, progress
        )
        engine.step()
        if not math.isfinite(norm := engine.gradient_norm()):
            where = f"after {progress.images_seen} images"
            raise Derailed(f"the gradient is {norm} {where}; {_ADVICE}", progress.images_seen)
        loss = sum(bands[:NUM_BANDS]) / batch_images
        progress.images_seen = after
        progress.recent = [*progress.recent[1 - _WINDOW :], loss]
        meter.add(loss, bands, batch_images, waited)
        if lead and settings.is_due(settings.log_every_images, after):
            metrics = meter.report(flops, settings) | {
                "learning_rate": rate, "gradient_norm": norm, "workers": engine.world_size,
            }  # fmt: skip
            progress.history.append((after, metrics))
            log_metrics(metrics, after)
        if looks:
            looked = time.monotonic()
            if has_notice() and not notified:
                notified = True
                save_now()
        if settings.wants_state(after):
            if num_busy:
                _log.warning("no state is saved at %d images: the last is still being saved", after)
            else:
                saver.start(progress, engine.fragments(share=True))
    save_now()


def _forward_and_back(
    task: Task,
    engine: Engine,
    parts: list[tuple[Any, SampleDraws]],
    asks: tuple[bool, bool],
    settings: LoopSettings,
    progress: Progress,
) -> tuple[list[float], list[float], float]:
    """Gradients of a batch, ready for the step.

    Returns its ``_split`` and ``asks``, both over all ranks, and this rank's FLOPs.

    Raises Derailed before the last backward pass if the loss must not be followed.
    """
    weight = engine.world_size * len(parts) / settings.batch_images  # backwards are averaged
    split, flops = torch.zeros(2 * NUM_BANDS, device=engine.device), 0.0
    for k, (batch, draws) in enumerate(parts, start=1):
        losses = task.loss(engine.module, batch, draws)
        split += _split(losses)
        flops += losses.flops
        if k == len(parts):
            found = engine.sum(torch.cat([split, split.new_tensor(asks)]))
            _check(sum(found[:NUM_BANDS]) / settings.batch_images, progress, settings)
        engine.backward(losses.values.sum() * weight)
        if k < len(parts):
            engine.step()
    return found[: 2 * NUM_BANDS], found[2 * NUM_BANDS :], flops


def _check(loss: float, progress: Progress, settings: LoopSettings) -> None:
    """Raise Derailed for a loss that must not be followed."""
    where = f"after {progress.images_seen} images; no step was taken"
    if not math.isfinite(loss):
        raise Derailed(f"loss is {loss} {where}; {_ADVICE}", progress.images_seen)
    if find_spike(loss, progress.recent, settings.spike_sigmas):
        usual = statistics.fmean(progress.recent)
        raise Derailed(f"loss jumped from {usual:g} to {loss:g} {where}", progress.images_seen)
