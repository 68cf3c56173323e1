"""Averages of weights over training: one chosen before the run, or any chosen after it.

Training keeps one in its optimizer's state (``pixart_platform.optimizer``); ``ema_decay`` gives its
half-life in images, not steps, so that it spans the same data whatever the batch size. Early on the
half-life is capped at a share of the images seen (as in EDM2, Karras et al. 2023, arXiv 2312.02696,
section 3), which replaces a warm-up.

``PowerEma`` keeps EDM2's power-function averages (section 3.1): at time t (images) the weights of
time s count as s^gamma, so an average spans the same share of a run however long: ``sigma_rel``,
its profile's standard deviation over t. From two widths stored now and then, ``reconstruct`` makes
any other: the blend of stored profiles nearest to it (appendix C). Unlike the paper's, our blends
sum to 1: with 8 stored times a free sum, and so every weight, is 2 % short at sigma_rel 0.2.
The profile's error in L2, both widths stored at 8 (16) even times: under 1.4 % (0.4 %) for 0.05 to
0.12, and 8 % (2.3 %) at 0.2.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pixart_models.config import ModelInputError

Named = Iterable[tuple[str, Tensor]]
RAMP_UP = 0.05  # the half-life never exceeds this share of the images seen so far
WIDTHS = (0.05, 0.10)  # sigma_rel of the averages that EDM2 keeps
MAX_ERROR = 0.1  # of a reconstructed profile, in L2 relative to the wanted one


class Profile(NamedTuple):
    """Which power-function average: its relative width, and the images seen when it was taken."""

    sigma_rel: float
    images_seen: int


def ema_decay(half_life_images: float, batch_images: int, images_seen: int) -> float:
    """Weight kept by the average when ``batch_images`` have just brought it to ``images_seen``."""
    half_life = min(half_life_images, RAMP_UP * images_seen)
    return float(0.5 ** (batch_images / max(half_life, 1e-8)))


def _pull(averages: dict[str, Tensor], named: dict[str, Tensor], share: float) -> None:
    """Move averages by ``share`` of the way to the tensors of their names."""
    currents = [named[name].detach().float() for name in averages]
    torch._foreach_lerp_(list(averages.values()), currents, share)


class PowerEma:
    """Power-function averages of named tensors in fp32, one of each width.

    An update counts the weights as those of all the time since the last one, so every eighth batch
    is often enough, at an eighth of the cost.
    """

    def __init__(self, parameters: Named, widths: Sequence[float] = WIDTHS) -> None:
        self.images_seen = 0
        first = {n: p.detach().float() for n, p in parameters}
        self.tensors = {width: {n: p.clone() for n, p in first.items()} for width in widths}

    @property
    def stored(self) -> dict[Profile, dict[str, Tensor]]:
        """What to store now, by profile; the tensors are the live ones."""
        return {Profile(width, self.images_seen): t for width, t in self.tensors.items()}

    def update(self, parameters: Named, *, images_seen: int) -> None:
        """Bring the averages from their ``images_seen`` to this larger one."""
        assert images_seen > self.images_seen
        named, left = dict(parameters), self.images_seen / images_seen
        for width, tensors in self.tensors.items():
            _pull(tensors, named, 1 - left ** (gamma_of(width) + 1))  # eq. 2
        self.images_seen = images_seen

    @torch.no_grad()
    def load(self, stored: Mapping[Profile, Mapping[str, Tensor]]) -> None:
        """Restore exactly what ``stored`` gave. Raises KeyError when anything is missing."""
        (self.images_seen,) = {profile.images_seen for profile in stored}
        for width, tensors in self.tensors.items():
            for name, average in tensors.items():
                average.copy_(stored[Profile(width, self.images_seen)][name])


@lru_cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent with this relative width, (g+1) = s^2 (g+2)^2 (g+3). Raises ModelInputError."""
    if not 0 < sigma_rel <= 12**-0.5:  # gamma 0, the plain mean of the run
        raise ModelInputError(f"sigma_rel = {sigma_rel}: must be above 0 and at most 0.2886")
    t = sigma_rel**-2
    return max(0.0, float(np.roots([1, 7, 16 - t, 12 - t]).real.max()))


def _overlap(a: Profile, b: Profile) -> float:
    """Inner product over time of two profiles (gamma + 1) s^gamma / t^(gamma + 1), s in 0..t."""
    a, b = sorted((a, b), key=lambda profile: profile.images_seen)
    ga, gb, left = gamma_of(a.sigma_rel), gamma_of(b.sigma_rel), a.images_seen / b.images_seen
    return float((ga + 1) * (gb + 1) * left**gb / ((ga + gb + 1) * b.images_seen))


def blend(stored: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Weights that sum to 1, nearest to ``wanted`` in L2, and the relative error of the profile."""
    norm = _overlap(wanted, wanted)
    gram = np.array([[_overlap(a, b) for b in stored] for a in stored]) / norm
    towards = np.array([_overlap(a, wanted) for a in stored]) / norm
    system = np.pad(gram, (0, 1), constant_values=1.0)  # a Lagrangian's border: the sum is 1
    system[-1, -1] = 0
    weights = np.linalg.lstsq(system, np.append(towards, 1.0))[0][:-1]
    error = math.sqrt(max(0.0, 1 - 2 * weights @ towards + weights @ gram @ weights))
    return weights.tolist(), error


def reconstruct(
    stored: Mapping[Profile, Callable[[], Mapping[str, Tensor]]], wanted: Profile
) -> dict[str, Tensor]:
    """The average ``wanted``, in fp32, from stored ones, loaded one at a time.

    Raises ModelInputError when no blend comes within MAX_ERROR, KeyError when one lacks a tensor.
    """
    weights, error = blend(list(stored), wanted)
    if error > MAX_ERROR:
        raise ModelInputError(
            f"sigma_rel = {wanted.sigma_rel} at {wanted.images_seen} images: {len(stored)} stored "
            f"averages come within {error:.0%} only; choose a nearer one, or store more often"
        )
    total: dict[str, Tensor] = {}
    for weight, load in zip(weights, stored.values(), strict=True):
        tensors = load()
        total = total or {n: torch.zeros_like(t, dtype=torch.float32) for n, t in tensors.items()}
        for name, so_far in total.items():
            so_far.add_(tensors[name].float(), alpha=weight)
    return total
