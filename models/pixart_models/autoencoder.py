"""The autoencoder between pixels and latents: diffusers' AutoencoderKL, loaded and applied.

Tables store *moments* (mean and log-variance, unscaled and unsampled), so that scaling, sampling
and flips happen when they are read.

Legend: B batch, C latent channels, H, W pixels; f the factor between pixels and latents.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pixart_models.text import (
    ModelSpec,
    explain_failure,
    find_model,
    hash_tensors,
    require_all_weights,
)

BUILTIN = "builtin:digits"
SPEC = ModelSpec(
    "autoencoder", "AutoencoderKL", part="vae", stem="diffusion_pytorch_model",
    mark=("_class_name", "AutoencoderKL"),
)  # fmt: skip


@dataclass
class Autoencoder:
    """A frozen AutoencoderKL. ``digest`` identifies its weights."""

    source: str
    model: Any
    digest: str

    @property
    def factor(self) -> int:
        """Pixels a side for one latent position."""
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    @property
    def channels(self) -> int:
        return int(self.model.config.latent_channels)

    @property
    def scale(self) -> float:
        """Latents are multiplied by this before the transformer sees them."""
        return float(self.model.config.scaling_factor)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1..1 -> moments (B, 2C, H/f, W/f): means, then log-variances."""
        moments: Tensor = self.model.encode(pixels.to(self.model.dtype)).latent_dist.parameters
        return moments

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Scaled latents (B, C, h, w) -> pictures (B, h*f, w*f, 3) uint8."""
        decoded = self.model.decode(latents.to(self.model.dtype) / self.scale).sample
        pixels = (decoded.float() / 2 + 0.5).clamp(0, 1) * 255
        pictures: NDArray[np.uint8] = pixels.round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return pictures


def sample_moments(moments: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Draw scaled latents (B, C, h, w) from moments (B, 2C, h, w) with given normal noise."""
    mean, log_variance = moments.chunk(2, dim=1)
    deviation = torch.exp(0.5 * log_variance.clamp(-30, 20))
    return (mean + deviation * noise) * scale


def load_autoencoder(source: str, device: str = "cpu") -> Autoencoder:
    """Load ``builtin:digits``, or an AutoencoderKL (or its pipeline) by local folder or hub id.

    Always fp32: it is small, and some published ones overflow fp16. Raises ModelNotFound.
    """
    from diffusers import AutoencoderKL

    builtin = str(files("pixart_models") / "assets/autoencoder")
    found = find_model(SPEC, builtin if source == BUILTIN else source)
    with explain_failure(SPEC, source):
        model, report = AutoencoderKL.from_pretrained(
            found.folder, torch_dtype=torch.float32, use_safetensors=True,
            low_cpu_mem_usage=False, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    require_all_weights(SPEC, source, report)
    digest = hashlib.sha256()
    hash_tensors(digest, model)
    model = model.to(device).eval().requires_grad_(False)
    return Autoencoder(source, model, digest.hexdigest()[:16])
