"""Exponential moving average of weights, with its half-life in images, not steps.

So that the average spans the same data whatever the batch size. Early on the half-life is capped
at a share of the images seen (as in EDM2, Karras et al. 2023, section 3), which replaces a warm-up.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

RAMP_UP = 0.05  # the half-life never exceeds this share of the images seen so far


def ema_decay(half_life_images: float, batch_images: int, images_seen: int) -> float:
    """Weight kept by the average when ``batch_images`` have just brought it to ``images_seen``."""
    half_life = min(half_life_images, RAMP_UP * images_seen)
    return float(0.5 ** (batch_images / max(half_life, 1e-8)))


class Ema:
    """Averages named tensors in fp32."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], half_life_images: float) -> None:
        self.half_life_images = half_life_images
        self.tensors = {n: p.detach().to(torch.float32, copy=True) for n, p in parameters}

    @torch.no_grad()
    def update(
        self, parameters: Iterable[tuple[str, Tensor]], *, batch_images: int, images_seen: int
    ) -> None:
        decay = ema_decay(self.half_life_images, batch_images, images_seen)
        named = dict(parameters)
        averages = list(self.tensors.values())
        currents = [named[name].detach().float() for name in self.tensors]
        torch._foreach_lerp_(averages, currents, 1 - decay)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore exactly. Raises KeyError when a name is missing."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])
