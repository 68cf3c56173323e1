"""What a training stage learns: the bridge between the loop, which knows no pictures, and models.

Decodes table rows to latents and conditions, gives the objective's loss with every draw taken
from the samples' own generators, and draws the fixed prompts along the way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from pixart_jobs.encode import unpack_features
from pixart_models.autoencoder import load_autoencoder, sample_moments
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
    """One rank's samples: moments (B, 2C, h, w), and labels (B,) or features of each row."""

    moments: Tensor
    labels: Tensor | None = None
    features: list[Tensor] | None = None
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

    def __post_init__(self) -> None:
        name = self.snapshot.objective
        self._objective = get_objective(name, self.flow_location, self.min_snr_gamma)
        self._previewer: Callable[[nn.Module], dict[str, NDArray[np.uint8]]] | None = None

    def decode(self, columns: dict[str, list[Any]]) -> LatentBatch:
        channels = 2 * self.snapshot.network.latent_channels
        rows = zip(
            columns["latents.moments"], columns["latents.bucket_h"], columns["latents.bucket_w"],
            strict=True,
        )  # fmt: skip
        moments = torch.stack(
            [
                torch.frombuffer(bytearray(m), dtype=torch.float16).view(channels, h, w).float()
                for m, h, w in rows
            ]
        )
        if "text.features" in columns:
            width = self.snapshot.network.text_width
            features = [unpack_features(f, width).float() for f in columns["text.features"]]
            if not self.snapshot.network.size_condition:
                return LatentBatch(moments, features=features)
            numbers = (columns[f"latents.{n}"] for n in ("height", "width", "bucket_h", "bucket_w"))
            sizes = [[y, x, h / w] for y, x, h, w in zip(*numbers, strict=True)]
            return LatentBatch(moments, features=features, sizes=torch.tensor(sizes))
        null = self.snapshot.network.num_classes
        labels = [null if label is None else label for label in columns["images.label"]]
        return LatentBatch(moments, labels=torch.tensor(labels))

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
        kept = zip(batch.features, dropped.tolist(), strict=True)
        packed = pack_text([self.null_features if drop else f for f, drop in kept])
        return packed.to(self.device, dtype)

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
