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
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, build_network
from pixart_models.text import load_text_encoder, pad_features
from pixart_platform.seeds import SampleDraws, derive_seed
from pixart_platform.train_loop import Average

LogImage = Callable[[NDArray[np.uint8], str, int], None]


@dataclass
class LatentBatch:
    """One rank's samples: moments (B, 2C, h, w), and labels (B,) or features of each row."""

    moments: Tensor
    labels: Tensor | None = None
    features: list[Tensor] | None = None


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

    def __post_init__(self) -> None:
        self._objective = get_objective(self.snapshot.objective, self.flow_location)
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
            return LatentBatch(moments, features=features)
        null = self.snapshot.network.num_classes
        labels = [null if label is None else label for label in columns["images.label"]]
        return LatentBatch(moments, labels=torch.tensor(labels))

    def loss(self, model: nn.Module, batch: LatentBatch, draws: SampleDraws) -> Tensor:
        """Mean objective over this rank's samples; the draws' sequence is part of the recipe."""
        shape = (batch.moments.shape[1] // 2, *batch.moments.shape[2:])
        x0 = sample_moments(batch.moments, draws.normal(shape), self.latent_scale)
        noise, uniform = draws.normal(shape), draws.uniform()
        dropped = draws.uniform() < self.condition_drop
        timesteps = self._objective.sample_timesteps(uniform)
        x_t = self._objective.add_noise(x0, noise, timesteps)
        x0, noise, x_t, timesteps = (v.to(self.device) for v in (x0, noise, x_t, timesteps))
        output = model(x_t, timesteps, *self._condition(batch, dropped))
        return self._objective.loss(output, x0, noise, x_t, timesteps).mean()

    def _condition(self, batch: LatentBatch, dropped: Tensor) -> tuple[Tensor, ...]:
        if batch.labels is not None:
            null = self.snapshot.network.num_classes
            return (torch.where(dropped, null, batch.labels).to(self.device),)
        assert batch.features is not None
        kept = zip(batch.features, dropped.tolist(), strict=True)
        text, mask = pad_features([self.null_features if drop else f for f, drop in kept])
        return text.to(self.device), mask.to(self.device)

    def preview(self, average: Average, images_seen: int) -> None:
        """Draw the fixed prompts (or each class) with fixed seeds; save and log the pictures."""
        if self._previewer is None:
            self._previewer = self._load_previewer()
        with torch.device(self.device):
            network = build_network(self.snapshot.network)
        network.load_state_dict(average.tensors, strict=False)
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
