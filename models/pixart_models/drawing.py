"""From prompts to pictures: the plain offline way, and the pieces the serving engine reuses.

A picture is a function of (snapshot, prompt, negative prompt, seed, steps, guidance, its interval
and rescale, size): its noise, a solver's fresh noise too, comes from generators of its own, so it
does not depend on what else is in the batch.

What decides the shape of a batch (timesteps, scales, who is guided now) lives on the CPU and goes
to the device in small asynchronous copies, so that choosing it never waits for the device.

Legend: B rows, L text tokens, Dt text width, C latent channels, h, w latent size.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixart_models.autoencoder import Autoencoder, load_autoencoder
from pixart_models.config import ModelInputError
from pixart_models.diffusion import NUM_TIMESTEPS, ObjectiveName
from pixart_models.dit import DiT
from pixart_models.layers import pack_text
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, SnapshotError, load_network
from pixart_models.solvers import (
    SolverName,
    build_schedule,
    guide,
    need_noise,
    rescale,
    solver_step,
)
from pixart_models.text import TextEncoder, load_text_encoder

DEFAULT_STEPS = 12
DEFAULT_GUIDANCE = 2.5
EVERYWHERE = (0.0, float(NUM_TIMESTEPS))  # a guidance interval that leaves nothing out

_Shape = tuple[int, int, int]  # of one picture's latents: C, h, w
_Value = TypeVar("_Value", float, str)


class DrawingError(ModelInputError):
    """A picture that was asked for and cannot be drawn."""


@dataclass(frozen=True)
class Guidance:
    """How strongly a row is guided, and when; a scale of 1 is no guidance.

    The interval (low, high) is in timesteps as the network is told them, ends included: 0 is
    clean, 1000 noise. Guidance in the middle alone keeps the variety that the noisy end decides,
    and costs one row, not two, outside (Kynkaanniemi et al. 2024, arXiv 2404.07724, section 3,
    who count in sigma: flow's timestep is 1000 sigma / (1 + sigma)).

    ``rescale``, 0 to 1, takes back that share of the contrast that guidance adds (see
    ``solvers.rescale``), so that a larger scale keeps colours as they are.
    """

    scale: float
    interval: tuple[float, float] = EVERYWHERE
    rescale: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.interval
        if not math.isfinite(self.scale):
            raise DrawingError(f"guidance = {self.scale}: must be a finite number")
        if not 0 <= low <= high <= NUM_TIMESTEPS:
            raise DrawingError(
                f"guidance_interval = {self.interval}: must be timesteps (low, high) with "
                f"0 <= low <= high <= {NUM_TIMESTEPS}"
            )
        if not 0 <= self.rescale <= 1:
            raise DrawingError(f"guidance_rescale = {self.rescale}: must be 0 to 1")

    def at(self, timestep: float) -> float:
        """The scale now: 1 outside the interval."""
        low, high = self.interval
        return self.scale if low <= timestep <= high else 1.0


@dataclass
class Drawer:
    """A loaded snapshot with its encoder and decoder."""

    config: SnapshotConfig
    network: PixArt
    autoencoder: Autoencoder
    text_encoder: TextEncoder

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def latent_shape(self, width: int, height: int) -> _Shape:
        """(C, h, w) of a picture in pixels. Raises DrawingError off the grid."""
        step = self.autoencoder.factor * self.config.network.patch
        for name, side in (("width", width), ("height", height)):
            if side < step or side % step:
                raise DrawingError(f"{name} = {side} px: must be a positive multiple of {step}")
        factor = self.autoencoder.factor
        return self.config.network.latent_channels, height // factor, width // factor

    @torch.inference_mode()
    def check(self) -> None:
        """Draw two steps of a picture. Raises DrawingError if they are not finite."""
        side, config = self.config.resolution, self.config
        features, sizes = self.text_encoder.encode([""]), picture_sizes(side, side, 1)

        def predict_at(x: Tensor, timesteps: Tensor, _lines: Tensor) -> Tensor:
            return predict(self.network, x, timesteps, features, features, [2.0], sizes)

        x = initial_noise(0, self.latent_shape(side, side))[None].to(self.device)
        x = solve(predict_at, x, config.objective, 2, config.solver, [0])
        if not bool(torch.isfinite(x).all()):
            raise DrawingError("the weights draw numbers that are not finite")

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = DEFAULT_STEPS,
        guidance: float | Sequence[float] = DEFAULT_GUIDANCE,
        guidance_interval: tuple[float, float] = EVERYWHERE,
        guidance_rescale: float = 0.0,
        negative_prompt: str | Sequence[str] = "",
        size: tuple[int, int] | None = None,
    ) -> NDArray[np.uint8]:
        """Draw one picture a prompt, (B, H, W, 3); ``size`` is (width, height) in pixels.

        ``guidance`` and ``negative_prompt`` are one for all or one a prompt; guidance acts at
        timesteps within ``guidance_interval``, and ``guidance_rescale`` takes back of its contrast
        (see Guidance). Raises DrawingError or
        SolverError for what cannot be drawn.
        """
        width, height = size or (self.config.resolution, self.config.resolution)
        shape = self.latent_shape(width, height)
        scales = _per_prompt("guidance", guidance, len(prompts))
        guided = [Guidance(scale, guidance_interval, guidance_rescale) for scale in scales]
        negatives = _per_prompt("negative_prompt", negative_prompt, len(prompts))
        if len(seeds) != len(prompts):
            raise DrawingError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one each")
        texts = list(dict.fromkeys([*prompts, *negatives]))
        features = dict(zip(texts, self.text_encoder.encode(texts), strict=True))
        wanted, unwanted = [features[p] for p in prompts], [features[n] for n in negatives]
        sizes = picture_sizes(width, height, len(prompts))

        def predict_at(x: Tensor, timesteps: Tensor, lines: Tensor) -> Tensor:
            now = [g.at(t) for g, t in zip(guided, timesteps.tolist(), strict=True)]
            shares = [g.rescale for g in guided]
            return predict(self.network, x, timesteps, wanted, unwanted, now, sizes, lines, shares)

        x = torch.stack([initial_noise(seed, shape) for seed in seeds]).to(self.device)
        config = self.config
        return self.autoencoder.decode(
            solve(predict_at, x, config.objective, steps, config.solver, seeds)
        )


def _per_prompt(name: str, value: _Value | Sequence[_Value], count: int) -> list[_Value]:
    """One value a prompt, from one for all or a sequence. Raises DrawingError."""
    if isinstance(value, str | float | int):
        return [value] * count
    if len(value) != count:
        raise DrawingError(f"{name} holds {len(value)} values for {count} prompts: give one each")
    return list(value)


def picture_sizes(width: int, height: int, count: int) -> Tensor:
    """What a size-conditioned network is told, (count, 3): height and width in px, height/width."""
    return torch.tensor([[height, width, height / width]]).expand(count, -1)


def initial_noise(seed: int, shape: _Shape) -> Tensor:
    """Noise (C, h, w) of one picture, from its own CPU generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fresh_noise(
    lines: Tensor, seeds: Sequence[int], steps: Sequence[int], x: Tensor
) -> Tensor | None:
    """Noise like x (B, C, h, w) where solver lines (B, 6) noise rows again; None if nowhere.

    A row's noise is a function of its seed and its step alone.
    """
    rows = need_noise(lines)
    if not rows:
        return None
    noise = torch.zeros(x.shape)
    for i in rows:
        name = hashlib.blake2b(f"{seeds[i]} {steps[i]}".encode(), digest_size=8).digest()
        noise[i] = initial_noise(int.from_bytes(name, "big") >> 1, (*x.shape[1:],))
    return noise.to(x.dtype).to(x.device, non_blocking=True)


def solve(
    predict_at: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    objective: ObjectiveName,
    steps: int,
    solver: SolverName = "dpm++2m",
    seeds: Sequence[int] = (),
) -> Tensor:
    """Carry noise x (B, C, h, w) to clean latents in ``steps`` network evaluations.

    ``predict_at(x, timesteps, lines)`` gets its timesteps (B,) and lines (B, 6) of the solver's
    table on the CPU; lcm needs the rows' seeds.
    """
    schedule = build_schedule(objective, steps, solver)
    x0 = torch.zeros_like(x)
    for step, (timestep, line) in enumerate(zip(schedule.timesteps, schedule.table, strict=True)):
        lines = line.expand(len(x), -1)
        output = predict_at(x, timestep.expand(len(x)), lines)
        noise = fresh_noise(lines, seeds, [step] * len(x), x)
        x, x0 = solver_step(x, output, x0, lines, noise)
    return x


@torch.inference_mode()
def draw_classes(
    network: DiT,
    autoencoder: Autoencoder,
    objective: ObjectiveName,
    labels: Sequence[int],
    seeds: Sequence[int],
    *,
    steps: int = DEFAULT_STEPS,
    guidance: float = DEFAULT_GUIDANCE,
) -> NDArray[np.uint8]:
    """Draw one picture a class label with a DiT at its native size, (B, H, W, 3)."""
    config, device = network.config, next(network.parameters()).device
    shape = (config.latent_channels, config.sample_size, config.sample_size)
    classes = torch.tensor([*labels, *([config.num_classes] * len(labels))], device=device)
    scale = torch.full((len(labels),), guidance, device=device)

    def predict_at(x: Tensor, timesteps: Tensor, _lines: Tensor) -> Tensor:
        times = timesteps.repeat(2).to(x.device, non_blocking=True)
        output = network(x.repeat(2, 1, 1, 1), times, classes)[:, : x.shape[1]]
        conditional, unconditional = output.chunk(2)
        return guide(conditional, unconditional, scale)

    x = torch.stack([initial_noise(seed, shape) for seed in seeds]).to(device)
    return autoencoder.decode(solve(predict_at, x, objective, steps))


def predict(
    network: PixArt,
    x: Tensor,
    timesteps: Tensor,
    features: Sequence[Tensor],
    negatives: Sequence[Tensor],
    scale: Sequence[float],
    sizes: Tensor | None = None,
    lines: Tensor | None = None,
    shares: Sequence[float] = (),
) -> Tensor:
    """Guided network output (B, C, h, w): conditional and unconditional rows in one forward.

    timesteps (B,), sizes (B, 3) and the solver's lines (B, 6) are on the CPU; features and
    negatives are rows (L_i, Dt); rows whose ``scale`` is 1 cost one row, not two. A
    size-conditioned network needs ``sizes``, and rescaling by ``shares`` needs ``lines``.
    """

    def upload(values: Tensor) -> Tensor:
        return values.to(x.device, non_blocking=True)

    guided = [i for i, s in enumerate(scale) if s != 1]
    rows = torch.tensor([*range(len(x)), *guided])
    again = upload(rows[len(x) :])
    latents = torch.cat([x, x[again]]) if guided else x
    text = pack_text([*features, *(negatives[i] for i in guided)]).to(x.device, x.dtype)
    told = None if sizes is None else upload(sizes[rows])
    output: Tensor = network(latents, upload(timesteps[rows]), text, sizes=told)
    conditional, unconditional = output[:, : x.shape[1]].tensor_split([len(x)])
    if not guided:
        return conditional
    others = conditional.index_copy(0, again, unconditional)  # itself where there is no guidance
    output = guide(conditional, others, upload(torch.tensor(scale)))
    if not any(shares):
        return output
    assert lines is not None, "rescaling needs the solver's lines"
    return rescale(x, conditional, output, lines, torch.tensor(shares))


def load_drawer(folder: Path, device: str = "cpu", like: "Drawer | None" = None) -> Drawer:
    """Load a PixArt snapshot with everything it draws with.

    ``like`` lends its autoencoder and text encoder when they are the same ones, so that a second
    version costs only its transformer. Raises SnapshotError when the snapshot is not a PixArt or
    an encoder's digest differs from the one it was trained with.
    """
    config, network = load_network(folder, device)
    if not isinstance(network, PixArt):
        raise SnapshotError(f"{folder} holds a class-conditional DiT: only PixArt draws prompts")
    same_text = like and like.config.text_encoder_digest == config.text_encoder_digest
    if like and same_text and like.text_encoder.max_tokens == config.network.max_tokens:
        text_encoder = like.text_encoder
    else:
        text_encoder = load_text_encoder(config.text_encoder, config.network.max_tokens, device)
    if like and like.config.autoencoder_digest == config.autoencoder_digest:
        autoencoder = like.autoencoder
    else:
        autoencoder = load_autoencoder(config.autoencoder, device)
    for kind, wanted, found in (
        ("text encoder", config.text_encoder_digest, text_encoder.digest),
        ("autoencoder", config.autoencoder_digest, autoencoder.digest),
    ):
        if wanted != found:
            raise SnapshotError(
                f"{folder}: trained with {kind} {wanted}, but the one at hand is {found}; "
                f"restore the weights it was trained with"
            )
    network.eval().requires_grad_(False)
    return Drawer(config, network, autoencoder, text_encoder)
