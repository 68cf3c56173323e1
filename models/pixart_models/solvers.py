"""Solvers as tables: every step of every solver here is one linear update of a row.

    x0     = p x + q out               (what the network's output says about the clean latent)
    x_next = a x + b (x0 + k (x0 - x0_before))

DDIM and Euler have k = 0; DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) has
k = h / (2 h_before). So a schedule is five coefficients and a timestep per step, gathered per row:
rows at different steps, of different step counts, advance in one vectorised update.

Legend: B rows, S steps.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from pixart_models.diffusion import IDDPM, NUM_TIMESTEPS, ObjectiveName

SolverName = Literal["dpm++2m", "euler"]
MAX_STEPS = 1000
_FLOW_START = 0.999  # t = 1 has no signal, where log-SNR is infinite


@dataclass(frozen=True)
class Schedule:
    """Coefficients by step: ``timesteps`` (S,) in 0-1000 and ``table`` (S, 5) = p, q, a, b, k."""

    timesteps: Tensor
    table: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def _signal_and_noise(objective: ObjectiveName, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps (S,), alpha (S + 1,) and sigma (S + 1,) in float64; the last entry is clean."""
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    if objective == "flow":
        sigma = torch.linspace(_FLOW_START, 0, num_steps + 1, dtype=torch.float64)
        return sigma[:-1] * NUM_TIMESTEPS, 1 - sigma, sigma
    steps = torch.linspace(NUM_TIMESTEPS - 1, 0, num_steps + 1, dtype=torch.float64).round()[:-1]
    cumulative = IDDPM().alphas_cumprod[steps.long()]
    return steps, torch.cat([cumulative.sqrt(), one]), torch.cat([(1 - cumulative).sqrt(), zero])


@lru_cache(maxsize=256)
def build_schedule(
    objective: ObjectiveName, num_steps: int, solver: SolverName = "dpm++2m"
) -> Schedule:
    """The schedule of ``num_steps`` (1-1000) network evaluations. Raises ValueError outside."""
    if not 1 <= num_steps <= MAX_STEPS:
        raise ValueError(f"num_inference_steps = {num_steps}: must be 1 to {MAX_STEPS}")
    timesteps, alpha, sigma = _signal_and_noise(objective, num_steps)
    if objective == "flow":  # out = e - x0, x = alpha x0 + sigma e
        p, q = torch.ones(num_steps, dtype=torch.float64), -sigma[:-1]
    else:  # out = e
        p, q = 1 / alpha[:-1], -sigma[:-1] / alpha[:-1]
    a = sigma[1:] / sigma[:-1]
    b = alpha[1:] - alpha[:-1] * a
    k = torch.zeros(num_steps, dtype=torch.float64)
    if solver == "dpm++2m":
        log_snr = (alpha / sigma).log()[:-1]  # lambda, of all but the clean end
        h = log_snr[1:] - log_snr[:-1]
        ratio = h[1:] / (2 * h[:-1])  # h is 0 where 1000 rounded steps repeat a timestep
        k[1:-1] = torch.where(h[:-1] > 0, ratio, 0)  # first and last steps stay first order
    return Schedule(timesteps.float(), torch.stack([p, q, a, b, k], dim=1).float())


def solver_step(
    x: Tensor, output: Tensor, x0_before: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance rows one step: returns (x_next, x0), each (B, C, H, W).

    coefficients (B, 5) are each row's line of its schedule's table; ``x0_before`` is ignored
    where k = 0, so a row's first step may pass anything finite.
    """
    p, q, a, b, k = coefficients.to(x)[:, :, None, None, None].unbind(1)
    x0 = p * x + q * output
    return a * x + b * (x0 + k * (x0 - x0_before)), x0


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) with a scale per row (B,)."""
    return unconditional + scale.to(conditional).view(-1, 1, 1, 1) * (conditional - unconditional)
