"""Encoding: captions -> text features, pictures -> latent moments, from one decode.

Text features are trimmed to their true length and stored once for all resolutions and stages; a
latent table per resolution holds the autoencoder's moments, unscaled and unsampled. Pictures are
scaled to cover a square and centre-cropped; aspect buckets widen this later.
"""

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixart_jobs.ingest import Progress, decode_image
from pixart_jobs.recipe import EncodeSettings, Recipe
from pixart_models.autoencoder import load_autoencoder
from pixart_models.text import load_text_encoder
from pixart_platform.partitions import Sink, run_partitions
from pixart_platform.tables import OK, Table, TableWriter


def plan(
    recipe: Recipe, root: Path, images: Table, captions: Table
) -> tuple[TableWriter, dict[int, TableWriter]]:
    """The writers of the text table and of each resolution's latent table."""
    settings = recipe.encode
    inputs = {"images": images.digest}
    text = TableWriter.under(
        root, "text", "text/1",
        {"text_encoder": settings.text_encoder, "max_tokens": settings.max_tokens},
        inputs | {"captions": captions.digest},
    )  # fmt: skip
    latents = {
        resolution: TableWriter.under(
            root, f"latents-{resolution}px", "latents/1",
            {"autoencoder": settings.autoencoder, "resolution": resolution}, inputs,
        )
        for resolution in settings.resolutions
    }  # fmt: skip
    return text, latents


def run(
    recipe: Recipe,
    images: Table,
    captions: Table,
    text: TableWriter,
    latents: dict[int, TableWriter],
) -> Progress:
    """Encode the unfinished partitions."""

    def read(k: int) -> pa.Table:
        columns = images.read(k, ["id", "status", "bytes"]).append_column(
            "caption", captions.read(k, ["caption"])["caption"]
        )
        return columns.append_column("caption_status", captions.read(k, ["status"])["status"])

    sinks = [
        Sink(text, {"id": "id", "status": "text_status", "features": "features",
                    "num_tokens": "num_tokens"})
    ]  # fmt: skip
    for resolution, writer in latents.items():
        columns = {name: f"{name}_{resolution}" for name in ("moments", "bucket_h", "bucket_w")}
        same = {name: name for name in ("id", "status", "width", "height")}
        sinks.append(Sink(writer, same | columns))
    return run_partitions(
        num_partitions=images.num_partitions,
        read=read,
        transform=_Encode,
        transform_kwargs={"settings": recipe.encode},
        sinks=sinks,
        num_actors=recipe.encode.num_workers,
        num_gpus=recipe.encode.num_gpus,
    )


def describe_encoders(settings: EncodeSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What consumers must know of both encoders: the manifests' ``extra`` of text and latents."""
    text = load_text_encoder(settings.text_encoder, settings.max_tokens)
    autoencoder = load_autoencoder(settings.autoencoder)
    null = base64.b64encode(pack_features(text.encode([""])[0])).decode()
    return (
        {"digest": text.digest, "width": text.width, "null_features": null},
        {
            "digest": autoencoder.digest,
            "factor": autoencoder.factor,
            "channels": autoencoder.channels,
            "scale": autoencoder.scale,
        },
    )


class _Encode:
    def __init__(self, settings: EncodeSettings) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._settings, self._device = settings, device
        self._text = load_text_encoder(settings.text_encoder, settings.max_tokens, device)
        self._autoencoder = load_autoencoder(settings.autoencoder, device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        items = rows.to_pylist()
        out = [self._empty(item) for item in items]
        good = [i for i, item in enumerate(items) if item["status"] == OK]
        for start in range(0, len(good), self._settings.batch_images):
            chosen = good[start : start + self._settings.batch_images]
            pictures = [decode_image(items[i]["bytes"]) for i in chosen]
            for i, picture in zip(chosen, pictures, strict=True):
                out[i]["height"], out[i]["width"] = picture.shape[:2]
            self._encode_pictures(out, chosen, pictures)
        said = [i for i, item in enumerate(items) if item["caption_status"] == OK]
        for start in range(0, len(said), self._settings.batch_images):
            chosen = said[start : start + self._settings.batch_images]
            features = self._text.encode([items[i]["caption"] for i in chosen])
            for i, feature in zip(chosen, features, strict=True):
                out[i]["features"], out[i]["num_tokens"] = pack_features(feature), len(feature)
        return pa.Table.from_pylist(out)

    def _encode_pictures(
        self, out: list[dict[str, Any]], chosen: list[int], pictures: list[NDArray[np.uint8]]
    ) -> None:
        for resolution in self._settings.resolutions:
            pixels = torch.stack([fit_square(p, resolution) for p in pictures]).to(self._device)
            moments = self._autoencoder.encode(pixels).cpu()
            for i, row in zip(chosen, moments, strict=True):
                out[i][f"moments_{resolution}"] = row.to(torch.float16).numpy().tobytes()
                out[i][f"bucket_h_{resolution}"] = row.shape[1]
                out[i][f"bucket_w_{resolution}"] = row.shape[2]

    def _empty(self, item: dict[str, Any]) -> dict[str, Any]:
        row = {"id": item["id"], "status": item["status"], "text_status": item["caption_status"]}
        row |= {"features": b"", "num_tokens": 0, "width": 0, "height": 0}
        for resolution in self._settings.resolutions:
            row |= {f"moments_{resolution}": b""}
            row |= {f"bucket_{side}_{resolution}": 0 for side in "hw"}
        return row


def fit_square(picture: NDArray[np.uint8], side: int) -> Tensor:
    """Picture (H, W, 3) -> pixels (3, side, side) in -1..1: scaled to cover, centre-cropped."""
    image = Image.fromarray(picture)
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    array = np.array(image.crop((left, top, left + side, top + side)), np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def pack_features(features: Tensor) -> bytes:
    """Features (L, Dt) -> raw little-endian bf16 bytes (Arrow has no bfloat16)."""
    return features.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def unpack_features(data: bytes, width: int) -> Tensor:
    """Inverse of pack_features: (L, width) bf16."""
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(-1, width)
