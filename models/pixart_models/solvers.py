"""Solvers as tables: every step of every solver here is one linear update of a row.

    x0     = p x + q out               (what the network's output says about the clean latent)
    x_next = a x + b (x0 + k (x0 - x0_before)) + n z

dpm++2m: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), k = h / (2 h_before).
euler:   of flow's straight paths, k = 0. ddim: of epsilon (Song et al. 2020, eq. 12, eta 0), k = 0.
lcm:     of distilled weights (Luo et al. 2023, arXiv 2310.04378): jump to x0, then noise z again,
         a = 0; its boundary scaling c_skip x + c_out x0 is folded into p and q.

So a schedule is six coefficients and a timestep per step, gathered per row: rows at different
steps, of different step counts and solvers, advance in one vectorised update. Tables stay on the
CPU, where choosing lines costs the device no wait; a step's lines go over in one small copy.

Legend: B rows, S steps.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pixart_models.config import ModelInputError
from pixart_models.diffusion import IDDPM, NUM_TIMESTEPS, ObjectiveName

SolverName = Literal["dpm++2m", "euler", "ddim", "lcm"]
SOLVERS: dict[ObjectiveName, tuple[SolverName, ...]] = {
    "flow": ("dpm++2m", "euler", "lcm"),
    "iddpm": ("dpm++2m", "ddim", "lcm"),
}
MAX_STEPS = 1000
LCM_GRID = 50  # steps of the solver that consistency distillation skips along
_NOISE = 5  # column n of a table


class SolverError(ModelInputError):
    """A schedule that does not exist."""


@dataclass(frozen=True)
class Schedule:
    """``timesteps`` (S,), whole, 0-999; ``table`` (S, 6) = p, q, a, b, k, n; both on the CPU."""

    timesteps: Tensor
    table: Tensor

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def _noise_levels(objective: ObjectiveName, solver: SolverName, num_steps: int) -> Tensor:
    """Where each step starts, (S,) float64: sigma of flow, or a whole timestep of IDDPM.

    Both are diffusers': linspace, "trailing" for ddim, the distillation's grid for lcm. Flow starts
    at sigma = 0.999: 1 has no signal, and its log-SNR is infinite.
    """
    grid = LCM_GRID if solver == "lcm" else num_steps
    left = grid - torch.arange(num_steps) * grid // num_steps  # steps, with this one
    if objective == "flow":  # numpy's linspace, as diffusers': torch's differs in the last bit
        return 1 - torch.from_numpy(np.linspace(1, 1 / NUM_TIMESTEPS, grid + 1))[left]
    if solver == "dpm++2m":
        return (left.double() * ((NUM_TIMESTEPS - 1) / num_steps)).round()
    return (NUM_TIMESTEPS * left.double() / grid).round() - 1


@lru_cache(maxsize=256)
def build_schedule(
    objective: ObjectiveName, num_steps: int, solver: SolverName = "dpm++2m"
) -> Schedule:
    """The schedule of ``num_steps`` network evaluations: 1 to 1000, with lcm to 50.

    Flow's sigmas are exact, its timesteps cut to whole ones as diffusers cuts them: an exported
    pipeline draws the same picture, and the network sees t off by less than 1/1000.

    Raises SolverError outside, or when the solver does not fit the objective.
    """
    check_solver(objective, solver)
    limit = LCM_GRID if solver == "lcm" else MAX_STEPS
    if not 1 <= num_steps <= limit:
        raise SolverError(f"num_inference_steps = {num_steps}: must be 1 to {limit} with {solver}")
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    levels = _noise_levels(objective, solver, num_steps)
    if objective == "flow":  # out = e - x0, x = alpha x0 + sigma e
        timesteps = (levels * NUM_TIMESTEPS).floor()
        sigma = torch.cat([levels, zero])  # (S + 1,); the last entry is clean
        alpha = 1 - sigma
        p, q = torch.ones_like(levels), -levels
    else:  # out = e
        timesteps = levels
        cumulative = IDDPM().alphas_cumprod[levels.long()]
        alpha = torch.cat([cumulative.sqrt(), one])  # (S + 1,)
        sigma = torch.cat([(1 - cumulative).sqrt(), zero])
        p, q = 1 / alpha[:-1], -sigma[:-1] / alpha[:-1]
    if solver == "lcm":
        rest = _consistent(timesteps, p, q, alpha, sigma)
    else:
        rest = _deterministic(p, q, alpha, sigma, second_order=solver == "dpm++2m")
    return Schedule(timesteps.float(), torch.stack(rest, dim=1).float())


def check_solver(objective: ObjectiveName, solver: str) -> None:
    """Raise SolverError unless ``solver`` solves ``objective``."""
    if solver not in SOLVERS[objective]:
        raise SolverError(
            f"solver = {solver!r}: must be one of {', '.join(SOLVERS[objective])} with {objective}"
        )


def _deterministic(
    p: Tensor, q: Tensor, alpha: Tensor, sigma: Tensor, *, second_order: bool
) -> list[Tensor]:
    """Columns of DPM-Solver++; its first order is DDIM and, on flow, Euler."""
    a = sigma[1:] / sigma[:-1]
    b = alpha[1:] - alpha[:-1] * a
    k = torch.zeros_like(a)
    if second_order:
        log_snr = (alpha / sigma).log()[:-1]  # lambda, of all but the clean end
        h = log_snr[1:] - log_snr[:-1]
        ratio = h[1:] / (2 * h[:-1])  # h is 0 where 1000 rounded steps repeat a timestep
        k[1:-1] = torch.where(h[:-1] > 0, ratio, 0)  # first and last steps stay first order
    return [p, q, a, b, k, torch.zeros_like(a)]


def _consistent(
    timesteps: Tensor, p: Tensor, q: Tensor, alpha: Tensor, sigma: Tensor
) -> list[Tensor]:
    """Columns of a consistency function's multistep sampling: x_next = alpha' x0 + sigma' z."""
    scaled, sigma_data = 10 * timesteps, 0.5  # the published implementation's constants
    c_skip = sigma_data**2 / (scaled**2 + sigma_data**2)
    c_out = scaled / (scaled**2 + sigma_data**2).sqrt()
    nothing = torch.zeros_like(p)
    return [c_out * p + c_skip, c_out * q, nothing, alpha[1:], nothing, sigma[1:]]


def solver_step(
    x: Tensor, output: Tensor, x0_before: Tensor, lines: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Advance rows one step: returns (x_next, x0), each (B, C, H, W).

    lines (B, 6), on the CPU, are each row's line of its schedule's table; ``x0_before`` is ignored
    where k = 0, so a row's first step may pass anything finite. ``noise`` (B, C, H, W) must be
    given when ``need_noise`` names any row, and counts in those rows alone.
    """
    assert noise is not None or not need_noise(lines), "rows that are noised again need noise"
    columns = lines.to(x.dtype).to(x.device, non_blocking=True)[:, :, None, None, None]
    p, q, a, b, k, n = columns.unbind(1)
    x0 = p * x + q * output
    x_next = a * x + b * (x0 + k * (x0 - x0_before))
    return x_next if noise is None else x_next + n * noise, x0


def need_noise(lines: Tensor) -> list[int]:
    """Which rows of ``lines`` (B, 6) are noised again in this step."""
    return [i for i, n in enumerate(lines[:, _NOISE].tolist()) if n != 0]


def guide(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022, eq. 6) with a scale per row (B,)."""
    return unconditional + scale.to(conditional).view(-1, 1, 1, 1) * (conditional - unconditional)


def rescale(
    x: Tensor, conditional: Tensor, guided: Tensor, lines: Tensor, shares: Tensor
) -> Tensor:
    """Guided output whose clean latents have the deviation of unguided ones, by a share per row.

    Guidance widens what it predicts, which saturates colours (Lin et al. 2023, arXiv 2305.08891,
    section 3.4, eq. 15-16). They rescale the output; of flow and epsilon that is mostly noise, and
    measured worse (jobs/LOG.md). x and outputs (B, C, H, W); lines (B, 6) and shares (B,), 0 to 1,
    on the CPU; rows with share 0 come back as they are.
    """
    columns = torch.cat([lines[:, :2], shares[:, None]], dim=1).to(x.dtype)
    p, q, share = columns.to(x.device, non_blocking=True)[:, :, None, None, None].unbind(1)
    told, found = p * x + q * conditional, p * x + q * guided  # x0
    narrower = _deviation(told) / _deviation(found).clamp_min(torch.finfo(x.dtype).tiny)
    factor = 1 + share * (narrower - 1)
    return torch.where(share > 0, (factor * found - p * x) / q, guided)


def _deviation(x: Tensor) -> Tensor:
    """Of all values of a row, (B, 1, 1, 1)."""
    return x.std(dim=(1, 2, 3), keepdim=True)
