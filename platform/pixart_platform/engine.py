"""The only file that knows DeepSpeed: ZeRO sharding, the optimizer step, collective means, shards.

A torch optimizer is passed in, so nothing is compiled at start. DeepSpeed's checkpoints are
pickles: they are written and read only as this run's own resume state, never registered, served
or accepted from elsewhere.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pixart_platform.recipe import Count, Section


class OptimizerSettings(Section):
    """AdamW with a constant rate after warm-up, and an optional linear decay to zero at the end."""

    learning_rate: float = Field(gt=0, le=1)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    gradient_clip: float = Field(1.0, gt=0)
    """Largest global gradient norm."""
    warmup_images: Count = Field(0, ge=0)
    decay_share: float = Field(0.0, ge=0, le=1)
    """Last share of the stage over which the rate falls to zero; 0 keeps it constant."""

    def rate_at(self, images_seen: int, total_images: int) -> float:
        """Learning rate of the step that starts after ``images_seen`` images."""
        warm = min(1.0, (images_seen + 1) / self.warmup_images) if self.warmup_images else 1.0
        tail = self.decay_share * total_images
        cool = min(1.0, (total_images - images_seen) / tail) if tail else 1.0
        return self.learning_rate * warm * cool


class Engine:
    """One worker's view of the sharded model. Construct it on every rank of a process group."""

    def __init__(
        self,
        model: nn.Module,
        settings: OptimizerSettings,
        *,
        zero_stage: Literal[0, 1, 2],
        micro_batch: int,
        device: torch.device,
    ) -> None:
        import deepspeed

        if device.type == "cpu":
            # Its shared-memory all-reduce costs a minute of g++ at first use and serves inference
            # only; gloo does our reductions.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, betas=settings.betas,
            eps=settings.eps, weight_decay=settings.weight_decay,
        )  # fmt: skip
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": settings.gradient_clip,
            "zero_optimization": {"stage": zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": device.type == "cuda"},  # this project's CPUs are faster in fp32
            "steps_per_print": 10**9,
        }
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.device = device
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    @property
    def module(self) -> nn.Module:
        """Call this to run the forward pass that ``step`` will differentiate."""
        wrapped: nn.Module = self._engine
        return wrapped

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Whole named parameters, as every rank holds them under ZeRO 0-2."""
        named: Iterator[tuple[str, Tensor]] = self._engine.module.named_parameters()
        return named

    def set_learning_rate(self, rate: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss)

    def step(self) -> None:
        self._engine.step()

    def gradient_norm(self) -> float:
        """Global norm before clipping, of the last step."""
        norm = self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def mean(self, value: Tensor) -> float:
        """Mean of a scalar over ranks, equal on all of them."""
        total = value.detach().float().clone()
        torch.distributed.all_reduce(total)
        return float(total) / self.world_size

    def barrier(self) -> None:
        torch.distributed.barrier()

    def save(self, folder: Path) -> None:
        """Write this rank's shards into ``folder``, which all ranks share. Collective."""
        self._engine.save_checkpoint(str(folder), tag="shards", save_latest=False)

    def load(self, folder: Path) -> None:
        """Load what ``save`` wrote for the same world size. Collective."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag="shards")
        assert loaded, f"{folder} was listed complete but DeepSpeed found no shards in it"


def choose_accelerator() -> torch.device:
    """The accelerator Ray gave this worker, or the CPU; call before DeepSpeed is imported."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return torch.device("cpu")
