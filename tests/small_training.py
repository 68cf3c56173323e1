"""A training run small enough for unit tests: a few rows, a small network, and real states.

``Alone`` is an engine for one worker without DeepSpeed, which takes ten seconds to start: what the
loop and the states do does not depend on it. ``test_platform_engine`` runs the same on the real
one, in processes of its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from builders import Row, write_table
from torch import Tensor, nn

from pixart_platform.batches import Condition, RowIndex
from pixart_platform.checkpoint import Progress, Saver, StateStore
from pixart_platform.engine import WEIGHT, Engine, Fragment
from pixart_platform.optimizer import KINDS, AveragingAdamW, OptimizerSettings
from pixart_platform.order import Order
from pixart_platform.seeds import SampleDraws
from pixart_platform.train_loop import LoopSettings, Losses, train

NUM_ROWS, BATCH, SEED = 20, 7, 5
OPTIMIZER = OptimizerSettings(learning_rate=0.01, weight_decay=0.01, warmup_images=21)


def make_network() -> nn.Module:
    """Odd sizes, so that partitions of ZeRO cut parameters and are padded."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 33), nn.GELU(), nn.Linear(33, 5), nn.LayerNorm(5))


def write_index(folder: Path) -> RowIndex:
    """Rows labelled by their numbers; written where they are not yet there."""
    rows: list[Row] = [{"label": i, "bucket_h": 1, "bucket_w": 1} for i in range(NUM_ROWS)]
    images, latents = (
        write_table(folder / schema, schema, [[{k: row[k] for k in columns} for row in rows]])
        for schema, columns in (("images/2", ["label"]), ("latents/1", ["bucket_h", "bucket_w"]))
    )
    return RowIndex({"images": (images, ["label"]), "latents": (latents, [])}, Condition(()))


@dataclass
class Guess:
    """Guesses a row's label from noise around it. ``poison`` changes losses at a place in the run.

    ``read`` holds which labels were read, by the places in the run that were asked for together.
    """

    poison: dict[int, float] = field(default_factory=dict)
    read: dict[tuple[int, ...], list[int]] = field(default_factory=dict)

    def decode(self, columns: dict[str, list[Any]], draws: SampleDraws) -> Tensor:
        self.read[tuple(draws.positions)] = columns["images.label"]
        return torch.tensor(columns["images.label"]) / NUM_ROWS

    def loss(self, model: nn.Module, batch: Tensor, draws: SampleDraws) -> Losses:
        guess = model(batch[:, None] + draws.normal((3,)) / 5)
        values = (guess - batch[:, None] * torch.arange(5)).square().mean(1)
        factors = torch.tensor([self.poison.get(p, 1.0) for p in draws.positions])
        return Losses(values * factors, draws.uniform())


class Alone(Engine):
    """One worker, on which nothing is sharded; it can pose as one of many, whose sums it lacks."""

    def __init__(
        self, network: nn.Module, *, accumulate: int = 1, rank: int = 0, world_size: int = 1
    ) -> None:
        self.device, self.zero_stage = torch.device("cpu"), 0
        self.rank, self.world_size = rank, world_size
        self._network, self._accumulate, self._num_backwards = network, accumulate, 0
        self._optimizer = AveragingAdamW(network.parameters(), OPTIMIZER, clips=True)
        self.set_num_steps(0)

    @property
    def module(self) -> nn.Module:
        return self._network

    def set_rates(self, learning_rate: float, average_share: float) -> None:
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.average_share = average_share

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss / self._accumulate)
        self._num_backwards += 1

    def step(self) -> None:
        if self._num_backwards == self._accumulate:
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._num_backwards = 0

    def gradient_norm(self) -> float:
        return self._optimizer._global_grad_norm

    def sum(self, values: Tensor) -> list[float]:
        found: list[float] = values.tolist()
        return found

    def set_num_steps(self, num_steps: int) -> None:
        for parameter in self._network.parameters():
            self._optimizer.prepare(parameter, num_steps)

    def fragments(self, *, share: bool) -> Iterator[Fragment]:
        for name, parameter in self._network.named_parameters():
            states = self._optimizer.state[parameter]
            whole = {WEIGHT: parameter.detach()} | {kind: states[kind] for kind in KINDS}
            yield Fragment(name, 0, {kind: value.view(-1) for kind, value in whole.items()})


def settings_of(total_images: int, **changes: Any) -> LoopSettings:
    """Of a run that saves at its end only, and logs every batch."""
    given: dict[str, Any] = {
        "total_images": total_images, "batch_images": BATCH, "save_every_images": 10**6,
        "preview_every_images": 10**6, "log_every_images": BATCH, "seed": SEED,
    }  # fmt: skip
    return LoopSettings(**given | changes)


def average_share(images_seen: int) -> float:
    return max(0.1, 1 / (1 + images_seen // BATCH))


def run(
    settings: LoopSettings,
    store: StateStore,
    index: RowIndex,
    make_engine: Callable[[nn.Module], Engine],
    *,
    task: Guess | None = None,
    token: str = "attempt",
    log_metrics: Callable[[dict[str, float], int], None] = lambda *_: None,
    has_notice: Callable[[], bool] = lambda: False,
) -> Progress:
    """Train from the newest state, or from the beginning, as a training worker does."""
    newest, network = store.find_newest(), make_network()
    if newest:
        weights = newest.read(WEIGHT)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(weights[name].view_as(parameter))
    engine = make_engine(network)
    progress = newest.progress if newest else Progress()
    if newest:
        engine.set_num_steps(progress.images_seen // settings.batch_images)
        newest.restore(engine.fragments(share=False))
    train(
        task=task or Guess(), engine=engine, optimizer=OPTIMIZER, settings=settings, index=index,
        order=Order.over(index.counts, batch_images=settings.batch_images, seed=SEED),
        progress=progress, average_share=average_share, log_metrics=log_metrics,
        saver=Saver(store, engine.rank, engine.world_size, token, progress.images_seen),
        has_notice=has_notice,
    )  # fmt: skip
    return progress


def read_state(store: StateStore, images_seen: int) -> dict[str, Tensor]:
    """All values of a state, by kind and parameter."""
    state = store.open(images_seen)
    return {
        f"{kind}|{name}": values
        for kind in (WEIGHT, *KINDS)
        for name, values in state.read(kind).items()
    }


def are_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest of a kind's and parameter's, as a share of its size."""
    assert one.keys() == other.keys()
    return max(float((one[key] - other[key]).norm() / one[key].norm()) for key in one)
