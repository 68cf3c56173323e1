"""What a training stage learns: the bridge between the loop, which knows no pictures, and models.

Decodes table rows to latents and conditions, gives the objective's loss with every draw taken
from the samples' own generators, and draws the fixed prompts along the way.

Legend: B samples of this rank, C latent channels, K captions a row, Dt text feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pixart_models.autoencoder import load_autoencoder, sample_moments
from pixart_models.config import ModelInputError
from pixart_models.diffusion import get_objective
from pixart_models.drawing import Drawer, draw_classes
from pixart_models.layers import PackedText, pack_text
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, build_network
from pixart_models.text import load_text_encoder
from pixart_models.token_drop import Route, TokenDrop, take_patches
from pixart_platform.seeds import SampleDraws, derive_seed
from pixart_platform.train_loop import Average

LogImage = Callable[[NDArray[np.uint8], str, int], None]


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
    preview_prompts: tuple[str, ...]
    preview_folder: Path
    log_image: LogImage
    min_snr_gamma: float | None = None
    token_drop: TokenDrop | None = None
    finish_at: int = 0  # images, whole batches: from there on all tokens are kept
    caption_weights: tuple[float, ...] = ()  # of a row's captions; empty is all alike

    def __post_init__(self) -> None:
        name = self.snapshot.objective
        self._objective = get_objective(name, self.flow_location, self.min_snr_gamma)
        self._previewer: Callable[[nn.Module], dict[str, NDArray[np.uint8]]] | None = None

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

    def loss(self, model: nn.Module, batch: LatentBatch, draws: SampleDraws) -> Tensor:
        """Mean objective, in fp32, over this rank's samples; the draws' sequence is fixed."""
        shape = (batch.moments.shape[1] // 2, *batch.moments.shape[2:])
        x0 = sample_moments(batch.moments, draws.normal(shape), self.latent_scale)
        noise, uniform = draws.normal(shape), draws.uniform()
        dropped = draws.uniform() < self.condition_drop
        timesteps = self._objective.sample_timesteps(uniform)
        x_t = self._objective.add_noise(x0, noise, timesteps)
        x0, noise, x_t, timesteps = map(self._upload, (x0, noise, x_t, timesteps))
        dtype = next(model.parameters()).dtype
        route = self._choose_route(batch, draws)
        condition = self._condition(batch, dropped, dtype)
        told = {} if batch.sizes is None else {"sizes": self._upload(batch.sizes)}
        output = model(x_t.to(dtype), timesteps, condition, route=route, **told).float()
        if route and route.stop is None:
            patch = self.snapshot.network.patch
            x0, noise, x_t = (take_patches(v, route.kept, patch) for v in (x0, noise, x_t))
        return self._objective.loss(output, x0, noise, x_t, timesteps).mean()

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

    def preview(self, average: Average, images_seen: int) -> None:
        """Draw the fixed prompts (or each class) with fixed seeds; save and log the pictures."""
        if self.snapshot.network.architecture == "pixart" and not self.preview_prompts:
            return
        if self._previewer is None:
            self._previewer = self._load_previewer()
        with torch.device(self.device):
            network = build_network(self.snapshot.network)
        network.load_state_dict(average.tensors)
        pictures = self._previewer(network.eval())
        strip = np.concatenate(list(pictures.values()), axis=1)
        self.preview_folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(strip).save(self.preview_folder / f"{images_seen:09d}.png")
        for key, picture in pictures.items():
            self.log_image(picture, key, images_seen)

    def _load_previewer(self) -> Callable[[nn.Module], dict[str, NDArray[np.uint8]]]:
        device, config = str(self.device), self.snapshot
        autoencoder = load_autoencoder(config.autoencoder, device)
        if config.network.architecture == "dit":
            labels = list(range(min(config.network.num_classes, 8)))
            seeds = [derive_seed("preview", label) for label in labels]

            def draw_labels(network: nn.Module) -> dict[str, NDArray[np.uint8]]:
                drawn = draw_classes(network, autoencoder, config.objective, labels, seeds)  # type: ignore[arg-type]
                return {f"class_{i}": picture for i, picture in zip(labels, drawn, strict=True)}

            return draw_labels
        prompts = self.preview_prompts
        encoder = load_text_encoder(config.text_encoder, config.network.max_tokens, device)
        seeds = [derive_seed("preview", prompt) for prompt in prompts]

        def draw_prompts(network: nn.Module) -> dict[str, NDArray[np.uint8]]:
            assert isinstance(network, PixArt)
            drawn = Drawer(config, network, autoencoder, encoder).draw(prompts, seeds)
            keys = [prompt.replace(" ", "_")[:80] for prompt in prompts]
            return dict(zip(keys, drawn, strict=True))

        return draw_prompts


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
