"""The outside yardsticks of bench_proof: diffusers' own classes in its own training loop.

    python tests/benchmarks/proof_peers.py NAME --tflops N [--task crowds] [--seed 0] [--points 8]

The loop is that of diffusers' text-to-image example, on latents in memory: DDPM noise, timesteps
drawn evenly, squared error of epsilon, AdamW with constant rate after warm-up, EMAModel; pictures
by its DPMSolverMultistepScheduler in as many steps as ours, at our guidance and at the paper's, of
which the better counts. Scenes are those of our recipe with the same seed and resolution of its
second stage; captions are the true ones, not those read from pixels. FLOPs are counted by torch, as
ours without those of padding.

``diffusers``        PixArtTransformer2DModel of our shape, the paper's hyper-parameters scaled
``unet``             UNet2DConditionModel of our size, twice our FLOPs a picture, at a rate of 1e-3
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
)
from diffusers.optimization import get_constant_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart_cluster.recipe import read_recipe
from pixart_jobs.crowd_scenes import compose_crowd
from pixart_jobs.encode import fit
from pixart_jobs.evaluate import open_suite
from pixart_jobs.recipe import Recipe
from pixart_jobs.scenes import compose_scene
from pixart_jobs.suites import Picture
from pixart_models.autoencoder import Autoencoder, load_autoencoder, sample_moments
from pixart_models.buckets import Size
from pixart_models.config import get_preset
from pixart_models.crowds import describe_crowd
from pixart_models.digits import describe
from pixart_models.text import TextEncoder, load_text_encoder
from pixart_platform.seeds import derive_seed
from pixart_platform.storage import LocalFolder

TASKS: dict[str, tuple[Any, Any, str]] = {
    "digits": (compose_scene, describe, "digit_accuracy"),
    "crowds": (compose_crowd, describe_crowd, "attribute_accuracy"),
}
PAPER_GUIDANCE = 4.5
PAPER_WIDTH, PAPER_BATCH = 1152, 256  # rates go with 1 / width and the root of the batch


@dataclass(frozen=True)
class Hyper:
    """Of a peer's optimizer."""

    rate: float
    batch: int = 64
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-10
    decay: float = 0.03
    clip: float = 0.01
    warmup: int = 20  # steps; the paper's 1,000 are a 150th of its second stage
    average: float = 0.9999  # at most; it grows to it


def hyper_of(peer: str, recipe: Recipe) -> Hyper:
    """The paper's (table 4 and its released configuration), or ours."""
    if peer == "diffusers":
        width = get_preset(recipe.train.network).width
        batch = Hyper.batch
        return Hyper(2e-5 * (batch / PAPER_BATCH) ** 0.5 * PAPER_WIDTH / width)
    stage = recipe.stages["align"]
    ours = stage.optimizer
    return Hyper(
        UNET_RATE, stage.batch_images,
        ours.betas, ours.eps, ours.weight_decay, ours.gradient_clip,
        ours.warmup_images // stage.batch_images, 0.999,
    )  # fmt: skip


UNET_RATE = 1e-3


def build(peer: str, recipe: Recipe, side: int) -> Any:
    """The peer's network for latents of ``side``."""
    config = get_preset(recipe.train.network)
    if peer != "unet":
        return PixArtTransformer2DModel(
            num_attention_heads=config.heads, attention_head_dim=config.width // config.heads,
            in_channels=config.latent_channels, out_channels=2 * config.latent_channels,
            num_layers=config.depth, cross_attention_dim=config.width, sample_size=side,
            patch_size=config.patch, caption_channels=config.text_width, interpolation_scale=1,
        )  # fmt: skip
    return UNet2DConditionModel(
        sample_size=side, in_channels=config.latent_channels, out_channels=config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(48, 96), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=8, cross_attention_dim=config.text_width,
    )  # fmt: skip


class Data:
    """Latents and features of all scenes, in memory."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.autoencoder: Autoencoder = load_autoencoder(recipe.encode.autoencoder)
        self.texts: TextEncoder = load_text_encoder(
            recipe.encode.text_encoder, recipe.encode.max_tokens
        )
        side = recipe.stages["align"].resolution
        compose, say, _ = TASKS[recipe.data.source]
        scenes = [compose(i, seed=seed) for i in range(recipe.data.num_scenes)]
        moments, self.features = [], list[Tensor]()
        for first in range(0, len(scenes), 64):
            some = scenes[first : first + 64]
            pixels = np.stack([fit(scene.image, Size(side, side)) for scene in some])
            batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            moments.append(self.autoencoder.encode(batch))
            self.features += self.texts.encode([say(scene.reading) for scene in some])
        self.moments = torch.cat(moments)


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(B, L, D) and the mask of what is real (B, L)."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r)) for r in rows], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True), mask


def epsilon_of(network: Any, x: Tensor, timesteps: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """What either class predicts; PixArt's variance, which this loop does not learn, is cut off."""
    text, mask = pad(rows)
    told: dict[str, Any] = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
    if isinstance(network, PixArtTransformer2DModel):
        told["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    output: Tensor = network(x, timestep=timesteps, **told).sample
    return output[:, : x.shape[1]]


def count_flops(network: Any, data: Data) -> float:
    """Of training on a picture, forward and backward: the mean of 64, each with its own text."""
    some = zip(data.moments[:64], data.features, strict=False)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # counts no other
        for moments, row in some:
            x, at = moments[None].chunk(2, dim=1)[0], torch.tensor([500])
            torch.autograd.backward(epsilon_of(network, x, at, [row]).sum())
    network.zero_grad(set_to_none=True)
    return float(counter.get_total_flops()) / 64


@torch.inference_mode()
def draw(network: Any, data: Data, prompts: Sequence[str], seeds: Sequence[int],
         num_steps: int, guidance: float) -> list[Picture]:  # fmt: skip
    """As diffusers' pipelines do."""
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=2e-2
    )
    scheduler.set_timesteps(num_steps)
    shape = data.moments.shape[1] // 2, *data.moments.shape[2:]
    x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    rows = [*data.texts.encode(prompts), *data.texts.encode([""]) * len(prompts)]
    for timestep in scheduler.timesteps:
        both = epsilon_of(network, torch.cat([x, x]), timestep.expand(2 * len(x)), rows)
        told, untold = both.chunk(2)
        x = scheduler.step(untold + guidance * (told - untold), timestep, x).prev_sample
    return list(data.autoencoder.decode(x))


def measure(network: Any, data: Data, recipe: Recipe) -> dict[str, float]:
    """The suite's figures at the better of two guidances."""
    suite = open_suite(recipe.suites[0], recipe, 0, Path("unused"), dict)
    target = TASKS[recipe.data.source][2]
    judge, best = suite.make_judge(), dict[str, float]()
    seeds = [derive_seed(recipe.evaluate.seed, "evaluate", i) for i in range(len(suite.prompts))]
    for guidance in (recipe.draw.guidance, PAPER_GUIDANCE):
        rows: list[dict[str, Any]] = []
        for first in range(0, len(seeds), 80):
            prompts = suite.prompts[first : first + 80]
            pictures = draw(network, data, prompts, seeds[first : first + 80],
                            recipe.draw.num_steps, guidance)  # fmt: skip
            rows += [{"seen": seen} for seen, _ in judge(pictures, prompts)]
        outcomes = suite.measure(rows, LocalFolder(Path("unused"))).outcomes
        found = {m: float(np.divide(*np.array(pairs, float).sum(axis=0)))
                 for m, pairs in outcomes.items()}  # fmt: skip
        if found[target] >= best.get(target, 0):
            best = found | {"guidance": guidance}
    return best


def train(peer: str, recipe: Recipe, seed: int, tflops: float, num_points: int) -> Iterator[
    dict[str, float]
]:  # fmt: skip
    """The loop of diffusers' example; gives compute and figures ``num_points`` times."""
    torch.manual_seed(seed)
    data, hyper = Data(recipe, seed), hyper_of(peer, recipe)
    network = build(peer, recipe, data.moments.shape[-1])
    each = count_flops(network, data)
    noise_scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=2e-2)
    optimizer = torch.optim.AdamW(
        network.parameters(), hyper.rate, hyper.betas, hyper.eps, hyper.decay
    )
    schedule = get_constant_schedule_with_warmup(optimizer, hyper.warmup)
    average = EMAModel(network.parameters(), decay=hyper.average)
    num_steps = max(1, round(tflops * 1e12 / each / hyper.batch))
    marks = {round(num_steps * (i + 1) / num_points) for i in range(num_points)}
    null, drop = data.texts.encode([""])[0], recipe.stages["align"].condition_drop
    order, seconds = torch.randperm(len(data.features)), 0.0
    for step in range(1, num_steps + 1):
        began = time.monotonic()
        if len(order) < hyper.batch:
            order = torch.cat([order, torch.randperm(len(data.features))])
        chosen, order = order[: hyper.batch], order[hyper.batch :]
        moments = data.moments[chosen]
        latents = sample_moments(
            moments, torch.randn_like(moments.chunk(2, dim=1)[0]), data.autoencoder.scale
        )
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        rows = [null if torch.rand(()) < drop else data.features[i] for i in chosen.tolist()]
        predicted = epsilon_of(network, noisy, timesteps, rows)
        torch.autograd.backward(torch.nn.functional.mse_loss(predicted, noise))
        torch.nn.utils.clip_grad_norm_(network.parameters(), hyper.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        average.step(network.parameters())
        seconds += time.monotonic() - began
        if step in marks:
            average.store(network.parameters())
            average.copy_to(network.parameters())
            found = measure(network.eval(), data, recipe)
            average.restore(network.parameters())
            network.train()
            images = step * hyper.batch
            size = sum(p.numel() for p in network.parameters())
            cost = {"tflops": images * each / 1e12, "images": images, "seconds": seconds}
            yield {"parameters": size, **cost, **found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["diffusers", "unet"])
    parser.add_argument("--tflops", type=float, required=True)
    parser.add_argument("--task", choices=[*TASKS], default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=8)
    told = parser.parse_args()
    for point in train(told.peer, read_recipe(told.task), told.seed, told.tflops, told.points):
        print(json.dumps(point), flush=True)


if __name__ == "__main__":
    main()
