"""What a training stage learns: the bridge between the loop, which knows no pictures, and models.

Decodes table rows to latents and conditions, and gives the objective's loss with every draw taken
from the samples' own generators.

Legend: B samples of this rank, C latent channels, K captions a row, Dt text feature width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pixart_models.autoencoder import sample_moments
from pixart_models.config import ModelInputError
from pixart_models.diffusion import NUM_TIMESTEPS, get_objective
from pixart_models.forecast import step_flops
from pixart_models.layers import PackedText, pack_text
from pixart_models.snapshot import SnapshotConfig
from pixart_models.token_drop import Route, TokenDrop, take_patches
from pixart_platform.seeds import SampleDraws
from pixart_platform.train_loop import Losses


@dataclass
class LatentBatch:
    """One rank's samples: moments (B, 2C, h, w), and labels (B,) or a caption of each."""

    moments: Tensor
    labels: Tensor | None = None
    features: Tensor | None = None  # (sum of num_tokens, Dt) bf16, captions one after the other
    num_tokens: list[int] | None = None
    sizes: Tensor | None = None  # (B, 3), of a size-conditioned network


@dataclass
class LatentTask:
    """Denoising latents, conditioned on class (DiT) or text (PixArt)."""

    snapshot: SnapshotConfig
    latent_scale: float
    null_features: Tensor  # (L0, Dt): what a dropped caption becomes
    condition_drop: float
    flow_location: float
    device: torch.device
    min_snr_gamma: float | None = None
    token_drop: TokenDrop | None = None
    finish_at: int = 0  # images, whole batches: from there on all tokens are kept
    caption_weights: tuple[float, ...] = ()  # of a row's captions; empty is all alike

    def __post_init__(self) -> None:
        name = self.snapshot.objective
        self._objective = get_objective(name, self.flow_location, self.min_snr_gamma)

    def decode(self, columns: dict[str, list[Any]], draws: SampleDraws) -> LatentBatch:
        """Rows of one bucket; their payloads are copied once, of the captions only one each."""
        shape = (columns["latents.bucket_h"][0], columns["latents.bucket_w"][0])
        packed = _gather(columns["latents.moments"], torch.float16)
        channels = 2 * self.snapshot.network.latent_channels
        moments = packed.view(-1, channels, *shape).float()  # (B, 2C, h, w)
        if "text.features" not in columns:
            null = self.snapshot.network.num_classes
            labels = [null if label is None else label for label in columns["images.label"]]
            return LatentBatch(moments, labels=torch.tensor(labels))
        width = self.snapshot.network.text_width
        counts = np.array(columns["text.num_tokens"])  # (B, K)
        chosen = np.arange(len(counts)), choose_captions(counts, self.caption_weights, draws)
        ends, num_tokens = counts.cumsum(axis=1)[chosen], counts[chosen]
        spans = zip(columns["text.features"], ends - num_tokens, ends, strict=True)
        token = 2 * width  # bytes
        captions = [memoryview(row)[token * start : token * end] for row, start, end in spans]
        features = _gather(captions, torch.bfloat16, pinned=self.device.type == "cuda")
        batch = LatentBatch(moments, None, features.view(-1, width), num_tokens.tolist())
        if self.snapshot.network.size_condition:
            numbers = (columns[f"latents.{n}"] for n in ("height", "width", "bucket_h", "bucket_w"))
            sizes = [[y, x, h / w] for y, x, h, w in zip(*numbers, strict=True)]
            batch.sizes = torch.tensor(sizes)
        return batch

    def loss(self, model: nn.Module, batch: LatentBatch, draws: SampleDraws) -> Losses:
        """Objective in fp32 and noise level of this rank's samples; their draws' order is fixed."""
        noises, uniform = self._draw_noises(batch, draws), draws.uniform()
        dropped = draws.uniform() < self.condition_drop
        timesteps = self._objective.sample_timesteps(uniform)
        route = self._choose_route(batch, draws)
        losses = self._denoise(model, batch, noises, timesteps, dropped, route)
        return losses._replace(flops=self._count_flops(batch, route))

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, batch: LatentBatch, seed: int, quantile: float) -> Tensor:
        """Losses (B,) at the timestep below which ``quantile`` of training's lie, with noise that
        is a function of ``seed`` and a sample's place, all conditions kept and all tokens.
        """
        count = len(batch.moments)
        draws = SampleDraws(seed, list(range(count)))
        timesteps = self._objective.sample_timesteps(torch.full((count,), quantile))
        kept = torch.zeros(count, dtype=torch.bool)
        noises = self._draw_noises(batch, draws)
        return self._denoise(model, batch, noises, timesteps, kept, None).values

    def _count_flops(self, batch: LatentBatch, route: Route | None) -> float:
        """Of forward and backward, by formula, recomputed blocks left out: what MFU counts."""
        height, width = batch.moments.shape[2:]
        count, drop = len(batch.moments), self.token_drop if route else None
        text = sum(batch.num_tokens or ()) / max(count, 1)
        return count * step_flops(self.snapshot.network, height, width, text, drop)

    def _draw_noises(self, batch: LatentBatch, draws: SampleDraws) -> tuple[Tensor, Tensor]:
        """The autoencoder's noise and the objective's, (B, C, h, w)."""
        shape = (batch.moments.shape[1] // 2, *batch.moments.shape[2:])
        return draws.normal(shape), draws.normal(shape)

    def _denoise(
        self,
        model: nn.Module,
        batch: LatentBatch,
        noises: tuple[Tensor, Tensor],
        timesteps: Tensor,
        dropped: Tensor,
        route: Route | None,
    ) -> Losses:
        x0, noise = sample_moments(batch.moments, noises[0], self.latent_scale), noises[1]
        x_t = self._objective.add_noise(x0, noise, timesteps)
        levels = self._upload(timesteps) / NUM_TIMESTEPS
        x0, noise, x_t, timesteps = map(self._upload, (x0, noise, x_t, timesteps))
        dtype = next(model.parameters()).dtype
        condition = self._condition(batch, dropped, dtype)
        told = {} if batch.sizes is None else {"sizes": self._upload(batch.sizes)}
        output = model(x_t.to(dtype), timesteps, condition, route=route, **told).float()
        if route and route.stop is None:
            patch = self.snapshot.network.patch
            x0, noise, x_t = (take_patches(v, route.kept, patch) for v in (x0, noise, x_t))
        return Losses(self._objective.loss(output, x0, noise, x_t, timesteps), levels)

    def _upload(self, values: Tensor) -> Tensor:
        return values.to(self.device, non_blocking=True)

    def _choose_route(self, batch: LatentBatch, draws: SampleDraws) -> Route | None:
        """The tokens that this batch keeps; None in the finish, and without a token drop."""
        if self.token_drop is None or draws.positions[0] >= self.finish_at:
            return None
        num_tokens = batch.moments[0, 0].numel() // self.snapshot.network.patch**2
        route = self.token_drop.choose(draws.normal((num_tokens,)))
        return route._replace(kept=self._upload(route.kept))

    def _condition(
        self, batch: LatentBatch, dropped: Tensor, dtype: torch.dtype
    ) -> Tensor | PackedText:
        if batch.labels is not None:
            null = self.snapshot.network.num_classes
            return self._upload(torch.where(dropped, null, batch.labels))
        assert batch.features is not None
        assert batch.num_tokens is not None
        empty = self._upload(self.null_features)
        captions = torch.split(self._upload(batch.features), batch.num_tokens)
        kept = zip(captions, dropped.tolist(), strict=True)
        return pack_text([empty if drop else f for f, drop in kept]).to(self.device, dtype)


def choose_captions(
    num_tokens: NDArray[np.int64], weights: tuple[float, ...], draws: SampleDraws
) -> NDArray[np.int64]:
    """Which of its captions (B, K) each row is learned with, (B,): by weight among those that have
    tokens, alike if these weigh nothing. Where K is 1 nothing is drawn. Raises ModelInputError.
    """
    num_captions = num_tokens.shape[1]
    if num_captions == 1:
        return np.zeros(len(num_tokens), np.int64)
    if weights and len(weights) != num_captions:
        raise ModelInputError(
            f"caption.weights = {list(weights)}: the text table has {num_captions} captions a row; "
            f"give as many"
        )
    present = num_tokens > 0
    shares = present * np.array(weights or [1.0] * num_captions)
    totals = np.where(shares.any(axis=1, keepdims=True), shares, present).cumsum(axis=1)
    places = draws.uniform().double().numpy()[:, None] * totals[:, -1:]
    chosen: NDArray[np.int64] = np.argmax(totals > places, axis=1)
    return chosen


def _gather(payloads: list[Any], dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """Payloads one after the other, (values,): the one copy between storage and a step.

    Pinned memory is kept by torch for the next batch, other memory by pyarrow's pool: with new
    pages for every batch a copy takes three times as long.
    """
    num_bytes = sum(map(len, payloads))
    if pinned:
        flat = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    else:
        flat = torch.frombuffer(pa.allocate_buffer(num_bytes), dtype=torch.uint8)
    np.concatenate([np.frombuffer(p, np.uint8) for p in payloads], out=flat.numpy())
    return flat.view(dtype)
