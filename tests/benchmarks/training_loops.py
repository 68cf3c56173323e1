"""The loops that ours is measured against, and the turns that all take (see bench_training).

They train the same network with the same optimizer, average and objective on batches that are
decoded in memory, with noise from one draw. One is PyTorch alone, the other accelerate + DeepSpeed.
"""

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from pixart_jobs.stage import StagePlan, build_index, make_task, start_network
from pixart_jobs.stage_task import LatentBatch
from pixart_models.autoencoder import sample_moments
from pixart_models.diffusion import get_objective
from pixart_models.ema import ema_decay
from pixart_models.layers import pack_text
from pixart_platform.order import Order
from pixart_platform.seeds import SampleDraws

_HELD_BATCHES = 16
_CPU = torch.device("cpu")
Step = Callable[[LatentBatch], Tensor]


class Turn:
    """A run's end of the line to the referee, who says how many steps it may take."""

    def __init__(self, port: int, name: str) -> None:
        self._line = socket.create_connection(("127.0.0.1", port)).makefile("rw")
        self._name, self._left = name, 0
        self._times = list[tuple[float, float]]()
        self.saves = list[float]()  # seconds that each blocked

    def may_step(self) -> bool:
        """Call it before every step; it waits for a turn, and is False when there are no more."""
        self._times.append((time.monotonic(), time.thread_time()))
        if self._left == 0:
            reply = json.dumps([*zip(*self._times, strict=True), self.saves])
            self._line.write((self._name or reply) + "\n")
            self._line.flush()
            self._left, self._name = int(self._line.readline()), ""
            self._times, self.saves = [(time.monotonic(), time.thread_time())], []
        self._left -= 1
        return self._left >= 0


def run_bare(stage: StagePlan, port: int) -> None:
    """Everything by hand."""
    torch.set_num_threads(1)
    network, loss_of = start_network(stage.snapshot.network, None), _make_loss(stage)
    parameters, optimizer = list(network.parameters()), _make_optimizer(stage, network)

    def step(batch: LatentBatch) -> Tensor:
        loss = loss_of(network, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, stage.settings.optimizer.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    _run(stage, Turn(port, "bare"), parameters, step)


def run_peer(stage: StagePlan, port: int) -> None:
    """accelerate with DeepSpeed, of our settings; it has no average of its own."""
    torch.set_num_threads(1)
    os.environ.update({
        "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "RANK": "0",
        "LOCAL_RANK": "0", "WORLD_SIZE": "1",
    })  # fmt: skip
    with tempfile.NamedTemporaryFile() as meet:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meet.name}", rank=0, world_size=1
        )
        import deepspeed
        from accelerate import Accelerator, DeepSpeedPlugin

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiles, as in our engine
        settings = {
            "train_micro_batch_size_per_gpu": stage.settings.batch_images,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": stage.settings.optimizer.gradient_clip,
            "zero_optimization": {"stage": stage.recipe.train.zero_stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        plugin = DeepSpeedPlugin(hf_ds_config=settings)
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision="no")
        started, loss_of = start_network(stage.snapshot.network, None), _make_loss(stage)
        network, optimizer = accelerator.prepare(started, _make_optimizer(stage, started))
        assert network.zero_optimization_stage() == stage.recipe.train.zero_stage

        def step(batch: LatentBatch) -> Tensor:
            loss = loss_of(network, batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        _run(stage, Turn(port, "peer"), list(network.parameters()), step)


def _run(stage: StagePlan, turn: Turn, parameters: Sequence[Tensor], step: Step) -> None:
    """Steps, the average, and a mean loss, until there are no more turns."""
    averages, batches = [p.detach().clone() for p in parameters], cycle(_hold_batches(stage))
    size, seen, total = stage.settings.batch_images, 0, 0.0
    while turn.may_step():
        total += float(step(next(batches)).detach())
        seen += size
        decay = ema_decay(stage.settings.ema_half_life_images, size, seen)
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)


def _hold_batches(stage: StagePlan) -> list[LatentBatch]:
    """The first batches of an order, decoded."""
    index, task = build_index(stage), make_task(stage, _CPU)
    size = stage.settings.batch_images
    order = Order.over(index.counts, batch_images=size, seed=0)
    draws = SampleDraws(0, list(range(size)))
    return [task.decode(index.fetch(*order.batch(n)), draws) for n in range(_HELD_BATCHES)]


def _make_loss(stage: StagePlan) -> Callable[[Any, LatentBatch], Tensor]:
    """The stage's loss as one would write it for one process."""
    objective = get_objective("flow", stage.recipe.train.flow_location)
    task, drop_share = make_task(stage, _CPU), stage.settings.condition_drop
    null = task.null_features

    def loss(network: Any, batch: LatentBatch) -> Tensor:
        assert batch.features is not None
        assert batch.num_tokens is not None
        noise = torch.randn_like(batch.moments)  # for the autoencoder, and the objective's
        x0 = sample_moments(batch.moments, noise.chunk(2, dim=1)[0], task.latent_scale)
        noise, timesteps = noise.chunk(2, dim=1)[1], objective.sample_timesteps(torch.rand(len(x0)))
        captions = torch.split(batch.features.float(), batch.num_tokens)
        dropped = (torch.rand(len(x0)) < drop_share).tolist()
        text = pack_text([null if d else c for c, d in zip(captions, dropped, strict=True)])
        x_t = objective.add_noise(x0, noise, timesteps)
        return objective.loss(network(x_t, timesteps, text), x0, noise, x_t, timesteps).mean()

    return loss


def _make_optimizer(stage: StagePlan, network: torch.nn.Module) -> torch.optim.AdamW:
    settings = stage.settings.optimizer
    return torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, betas=settings.betas, eps=settings.eps,
        weight_decay=settings.weight_decay, fused=True,
    )  # fmt: skip
