"""Makes the demo's AutoencoderKL: a real diffusers VAE, small enough to ship (under 1 MB).

    python -m pixart_jobs.tiny_autoencoder models/pixart_models/assets/autoencoder

The weights in the package were made by exactly this command (about 10 minutes on 2 cores), so that
a demo's minutes go to the transformer. Train-split scenes only, at the demo's two resolutions;
mean squared error plus a light KL term (Kingma & Welling 2013, eq. 10), AdamW, cosine decay.
The scaling factor is 1 / (standard deviation of the latents), as in latent diffusion (Rombach et
al. 2022, appendix G).
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pixart_jobs.scenes import compose_scene

BATCH = 64
KL_WEIGHT = 2e-4
PEAK_LR = 3e-3
SEED = 20


def build() -> AutoencoderKL:
    """A factor-4 autoencoder with 8 latent channels, about 0.3 M parameters."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        block_out_channels=(16, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def load_pixels(step: int, resolution: int) -> torch.Tensor:
    """One batch (BATCH, 3, resolution, resolution) in -1..1."""
    scenes = [compose_scene(step * BATCH + i, seed=SEED).image for i in range(BATCH)]
    if resolution != scenes[0].shape[0]:
        size = (resolution, resolution)
        scenes = [
            np.asarray(Image.fromarray(s).resize(size, Image.Resampling.BICUBIC)) for s in scenes
        ]
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(model: AutoencoderKL, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(SEED)
    started = time.time()
    for step in range(steps):
        pixels = load_pixels(step, 32 if step % 3 else 48)
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.sample(generator)).sample
        error = (decoded - pixels).square().mean()
        loss = error + KL_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            print(
                f"{step:5d} mse {error:.5f} kl {kl:.3f} {time.time() - started:.0f} s", flush=True
            )


@torch.no_grad()
def measure_scaling_factor(model: AutoencoderKL) -> float:
    """1 / standard deviation of sampled latents over unseen batches at both resolutions."""
    generator = torch.Generator().manual_seed(SEED + 1)
    latents = [
        model.encode(load_pixels(10**6 + i, r)).latent_dist.sample(generator).flatten()
        for i, r in enumerate((32, 48, 32, 48))
    ]
    return round(1 / float(torch.cat(latents).std()), 4)


def main(folder: Path, steps: int = 1200) -> None:
    model = build()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    fit(model, steps)
    model.register_to_config(scaling_factor=measure_scaling_factor(model))
    model.to(torch.float16).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
