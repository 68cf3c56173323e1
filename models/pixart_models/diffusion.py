"""Training objectives: how a clean latent is noised, and what the network must predict.

Two, behind one signature: rectified flow (the demo's default: it learned digits to 98 % where the
paper's objective reached 34 % in the same steps) and the paper's IDDPM. Both are told the timestep
on one scale, 0-1000, so that a network moves between them and re-parameterises at t = 500.

Legend: B batch, C latent channels; x0 clean latents (B, C, H, W), e standard normal noise.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor

from pixart_models.config import ModelInputError

NUM_TIMESTEPS = 1000
MIN_SNR_GAMMA = 5.0  # what Hang et al. 2023 use throughout
ObjectiveName = Literal["flow", "iddpm"]


class Objective(Protocol):
    """A noising process with its loss. ``uniform`` (B,) in (0, 1) decides the timesteps."""

    @property
    def name(self) -> ObjectiveName: ...

    @property
    def predicts_variance(self) -> bool: ...

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        """(B,) floats in 0-1000 as the network is told them."""
        ...

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, C, H, W)."""
        ...

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, timesteps: Tensor
    ) -> Tensor:
        """Loss of each sample, (B,)."""
        ...


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) in the dtype of ``like``."""
    return values.to(like.dtype).view(-1, 1, 1, 1)


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight paths from data to noise (Liu et al. 2022; timesteps: Esser et al. 2024, eq. 19).

    ``spread`` and ``location`` shape the logit-normal distribution of t.
    """

    location: float = 0.0
    spread: float = 1.0
    name: ObjectiveName = "flow"
    predicts_variance: bool = False

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        normal = math.sqrt(2) * torch.erfinv(2 * uniform.clamp(1e-6, 1 - 1e-6) - 1)
        return NUM_TIMESTEPS * torch.sigmoid(self.location + self.spread * normal)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        t = _per_row(timesteps / NUM_TIMESTEPS, x0)
        return (1 - t) * x0 + t * noise  # x_t = (1 - t) x0 + t e

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, timesteps: Tensor
    ) -> Tensor:
        return (output - (noise - x0)).square().mean(dim=(1, 2, 3))  # v = e - x0


@dataclass(frozen=True)
class IDDPM:
    """The paper's objective: epsilon plus a learned variance range (Nichol & Dhariwal 2021).

    Linear betas 1e-4..2e-2 over 1000 steps, t uniform; the variance term is the variational bound
    with the mean's gradient stopped, not rescaled, as in the released code. ``min_snr_gamma``
    weighs epsilon's error, and it alone, by min(SNR, gamma) / SNR (Hang et al. 2023, arXiv
    2303.09556), so that nearly clean inputs no longer rule the gradient.
    """

    min_snr_gamma: float | None = None
    name: ObjectiveName = "iddpm"
    predicts_variance: bool = True

    @cached_property
    def betas(self) -> Tensor:
        return torch.linspace(1e-4, 2e-2, NUM_TIMESTEPS, dtype=torch.float64)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return (1 - self.betas).cumprod(0)

    @cached_property
    def _posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Variance (log, clipped at t=0) and mean coefficients of q(x_{t-1} | x_t, x0)."""
        cumulative = self.alphas_cumprod
        previous = torch.cat([torch.ones(1, dtype=torch.float64), cumulative[:-1]])
        variance = self.betas * (1 - previous) / (1 - cumulative)
        log_variance = torch.cat([variance[1:2], variance[1:]]).log()
        of_x0 = self.betas * previous.sqrt() / (1 - cumulative)
        of_xt = (1 - previous) * (1 - self.betas).sqrt() / (1 - cumulative)
        return log_variance, of_x0, of_xt

    @cached_property
    def _epsilon_weight(self) -> Tensor:
        """Weight of epsilon's error at each timestep: min(SNR, gamma) / SNR, or 1."""
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        return snr.clamp(max=self.min_snr_gamma or math.inf) / snr

    def _at(self, table: Tensor, timesteps: Tensor, like: Tensor) -> Tensor:
        return _per_row(table.to(timesteps.device, non_blocking=True)[timesteps.long()], like)

    def sample_timesteps(self, uniform: Tensor) -> Tensor:
        return (uniform * NUM_TIMESTEPS).floor().clamp(max=NUM_TIMESTEPS - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        signal = self._at(self.alphas_cumprod, timesteps, x0)
        return signal.sqrt() * x0 + (1 - signal).sqrt() * noise  # eq. 4 of DDPM

    def loss(
        self, output: Tensor, x0: Tensor, noise: Tensor, x_t: Tensor, timesteps: Tensor
    ) -> Tensor:
        epsilon, variance = output.chunk(2, dim=1)  # loss = w |epsilon - e|^2 + bound
        squared = (epsilon - noise).square().mean(dim=(1, 2, 3))
        bound = self.variational_bound(epsilon.detach(), variance, x0, x_t, timesteps)
        return self._at(self._epsilon_weight, timesteps, squared).flatten() * squared + bound

    def variational_bound(
        self, epsilon: Tensor, variance: Tensor, x0: Tensor, x_t: Tensor, timesteps: Tensor
    ) -> Tensor:
        """One term of the bound in bits a dimension, (B,): KL, or the decoder's NLL at t = 0."""
        log_variance, of_x0, of_xt = self._posterior
        true_log = self._at(log_variance, timesteps, x_t)
        beta_log = self._at(self.betas.log(), timesteps, x_t)
        weight = (variance + 1) / 2
        log_var = weight * beta_log + (1 - weight) * true_log  # eq. 15 of IDDPM
        signal = self._at(self.alphas_cumprod, timesteps, x_t)
        predicted_x0 = (x_t - (1 - signal).sqrt() * epsilon) / signal.sqrt()
        mix_x0, mix_xt = self._at(of_x0, timesteps, x_t), self._at(of_xt, timesteps, x_t)
        mean = mix_x0 * predicted_x0 + mix_xt * x_t
        true_mean = mix_x0 * x0 + mix_xt * x_t
        squared = (true_mean - mean).square()
        kl = 0.5 * (
            log_var - true_log - 1 + (true_log - log_var).exp() + squared * (-log_var).exp()
        )
        nll = _discretized_gaussian_nll(x0, mean, 0.5 * log_var)
        per_sample = torch.where(_per_row(timesteps, x0) == 0, nll, kl).mean(dim=(1, 2, 3))
        return per_sample / math.log(2)


def _discretized_gaussian_nll(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Negative log-likelihood of x under a Gaussian integrated over bins of width 2/255."""

    def cdf(values: Tensor) -> Tensor:  # the tanh approximation the released code uses
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (values + 0.044715 * values**3)))

    inverse = torch.exp(-log_scale)
    upper = cdf(inverse * (x - mean + 1 / 255))
    lower = cdf(inverse * (x - mean - 1 / 255))
    inside = (upper - lower).clamp(min=1e-12).log()
    tail = torch.where(x > 0.999, (1 - lower).clamp(min=1e-12).log(), inside)
    return -torch.where(x < -0.999, upper.clamp(min=1e-12).log(), tail)


def get_objective(
    name: ObjectiveName, flow_location: float = 0.0, min_snr_gamma: float | None = None
) -> Objective:
    """The objective called ``name``; ``flow_location`` shifts flow's training timesteps only.

    ``min_snr_gamma`` (usually MIN_SNR_GAMMA) is IDDPM's; raises ModelInputError with flow, whose
    timestep distribution does the weighing, or when it is not a positive number.
    """
    if min_snr_gamma is not None and (name == "flow" or not 0 < min_snr_gamma < math.inf):
        raise ModelInputError(
            f"min_snr_gamma = {min_snr_gamma} with objective {name!r}: "
            f"must be a positive number with iddpm, and left out with flow"
        )
    return RectifiedFlow(flow_location) if name == "flow" else IDDPM(min_snr_gamma)
