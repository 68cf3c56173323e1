"""AdamW that carries a running average of the weights, and the schedule of its rate.

The average is one more state beside the moments, so whatever shards, offloads, saves or resumes
an optimizer does so with it: under ZeRO each rank averages the fp32 masters of its own partition,
at the cost of one pass over them. (Averaging the module's weights instead would sum up bf16's
rounding: of a small move, more than a third was lost.)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from pixart_platform.recipe import Count, Section

AVERAGE = "average"
KINDS = ("exp_avg", "exp_avg_sq", AVERAGE)  # states of a parameter's own shape


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


class AveragingAdamW(torch.optim.AdamW):
    """AdamW whose state holds an average, moved to the new weights by ``average_share`` a step."""

    def __init__(self, parameters: Any, settings: OptimizerSettings, *, clips: bool) -> None:
        """With ``clips`` it clips gradients itself, as nobody else keeps their norm for ZeRO 0."""
        super().__init__(
            parameters, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps,
            weight_decay=settings.weight_decay, fused=True,
        )  # fmt: skip
        self.average_share = 0.0
        self._clip = settings.gradient_clip if clips else None

    def prepare(self, parameter: Tensor, num_steps: int = 0) -> dict[str, Tensor]:
        """The state of ``parameter`` after ``num_steps``; what is missing is made.

        AdamW makes it at the first step, too late to restore into, and to run out of memory.
        """
        state: dict[str, Tensor] = self.state[parameter]
        for kind in KINDS:
            if kind not in state:
                value = parameter.detach()
                state[kind] = value.clone() if kind == AVERAGE else torch.zeros_like(value)
        state["step"] = torch.tensor(float(num_steps), device=parameter.device)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch also returns the closure's loss, here always None
        if self._clip is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self._global_grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self._clip))
            if not math.isfinite(self._global_grad_norm):
                return  # as DeepSpeed's own optimizers do
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter][AVERAGE].lerp_(parameter, self.average_share)
