"""From prompts to pictures: the plain offline way, and the pieces the serving engine reuses.

A picture is a function of (snapshot, prompt, negative prompt, seed, steps, guidance, size): its
noise comes from its own generator, so it does not depend on what else is in the batch.

Legend: B rows, L text tokens, Dt text width, C latent channels, h, w latent size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixart_models.autoencoder import Autoencoder, load_autoencoder
from pixart_models.diffusion import ObjectiveName
from pixart_models.dit import DiT
from pixart_models.errors import ModelInputError
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, SnapshotError, load_network
from pixart_models.solvers import build_schedule, guide, solver_step
from pixart_models.text import TextEncoder, load_text_encoder, pad_features

DEFAULT_STEPS = 12
DEFAULT_GUIDANCE = 2.5


class DrawingError(ModelInputError):
    """A picture that was asked for and cannot be drawn."""


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

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(C, h, w) of a picture in pixels. Raises DrawingError off the grid."""
        step = self.autoencoder.factor * self.config.network.patch
        for name, side in (("width", width), ("height", height)):
            if side < step or side % step:
                raise DrawingError(f"{name} = {side} px: must be a positive multiple of {step}")
        factor = self.autoencoder.factor
        return self.config.network.latent_channels, height // factor, width // factor

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = DEFAULT_STEPS,
        guidance: float = DEFAULT_GUIDANCE,
        negative_prompt: str = "",
        size: tuple[int, int] | None = None,
    ) -> NDArray[np.uint8]:
        """Draw one picture a prompt, (B, H, W, 3); ``size`` is (width, height) in pixels."""
        width, height = size or (self.config.resolution, self.config.resolution)
        shape = self.latent_shape(width, height)
        features = self.text_encoder.encode([*prompts, negative_prompt])
        scale = torch.full((len(prompts),), guidance, device=self.device)

        def predict_at(x: Tensor, timesteps: Tensor) -> Tensor:
            return predict(self.network, x, timesteps, features[:-1], features[-1:] * len(x), scale)

        x = torch.stack([initial_noise(seed, shape) for seed in seeds]).to(self.device)
        return self.autoencoder.decode(solve(predict_at, x, self.config.objective, steps))


def initial_noise(seed: int, shape: tuple[int, int, int]) -> Tensor:
    """Noise (C, h, w) of one picture, from its own CPU generator."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def solve(
    predict_at: Callable[[Tensor, Tensor], Tensor], x: Tensor, objective: ObjectiveName, steps: int
) -> Tensor:
    """Carry noise x (B, C, h, w) to clean latents in ``steps`` network evaluations."""
    schedule = build_schedule(objective, steps)
    x0 = torch.zeros_like(x)
    for timestep, line in zip(schedule.timesteps, schedule.table, strict=True):
        output = predict_at(x, timestep.expand(len(x)).to(x.device))
        x, x0 = solver_step(x, output, x0, line.expand(len(x), -1))
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

    def predict_at(x: Tensor, timesteps: Tensor) -> Tensor:
        output = network(x.repeat(2, 1, 1, 1), timesteps.repeat(2), classes)[:, : x.shape[1]]
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
    scale: Tensor,
) -> Tensor:
    """Guided network output (B, C, h, w): conditional and unconditional rows in one forward.

    features and negatives are rows (L_i, Dt); rows whose scale (B,) is 1 cost one row, not two.
    """
    guided = (scale != 1).nonzero().flatten()
    text, mask = pad_features([*features, *(negatives[i] for i in guided.tolist())])
    latents = torch.cat([x, x[guided]])
    times = torch.cat([timesteps, timesteps[guided]])
    output: Tensor = network(latents, times, text.to(x.dtype), mask)[:, : x.shape[1]]
    conditional, unconditional = output[: len(x)], output[len(x) :]
    if len(guided) == 0:
        return conditional
    mixed = conditional.clone()
    mixed[guided] = guide(conditional[guided], unconditional, scale[guided])
    return mixed


def load_drawer(folder: Path, device: str = "cpu", like: "Drawer | None" = None) -> Drawer:
    """Load a PixArt snapshot with everything it draws with.

    ``like`` lends its autoencoder and text encoder when they are the same ones, so that a second
    version costs only its transformer. Raises SnapshotError when the snapshot is not a PixArt or
    an encoder's digest differs from the one it was trained with.
    """
    config, network = load_network(folder, device)
    if not isinstance(network, PixArt):
        raise SnapshotError(f"{folder} holds a class-conditional DiT: only PixArt draws prompts")
    if config.network.size_condition:
        raise SnapshotError(f"{folder} is conditioned on picture sizes, which cannot be drawn yet")
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
