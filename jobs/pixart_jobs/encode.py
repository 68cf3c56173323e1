"""Encoding: captions -> text features, pictures -> latent moments, from one decode.

Text features are trimmed to their true length and stored once for all resolutions and stages; a
latent table per resolution holds the autoencoder's moments, unscaled and unsampled. A picture is
scaled to cover its shape and centre-cropped: the resolution's square, or with ``aspect_buckets``
the nearest of a few shapes of about that area. The crop itself is not stored: it follows from the
picture's size and the bucket (``pixart_models.buckets.cover``).

Models work on full batches of like size: pictures are taken by ratio, captions by length.
"""

import base64
from collections.abc import Mapping, Sequence
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
from pixart_models.buckets import MAX_RATIO, Size, buckets, cover, is_extreme, nearest_bucket
from pixart_models.config import PRESETS
from pixart_models.text import load_text_encoder
from pixart_platform.partitions import Sink, run_partitions
from pixart_platform.tables import OK, Table, TableWriter


def plan(
    recipe: Recipe, root: Path, images: Table, captions: Table
) -> tuple[TableWriter, dict[int, TableWriter]]:
    """The writers of the text table and of each resolution's latent table."""
    settings = recipe.encode
    inputs = {"images": images.digest}
    # An option that is off leaves no trace, so tables made before it existed are still found.
    precision = {"text_encoder_8bit": True} if settings.text_encoder_8bit else {}
    shapes = {"aspect_buckets": True, "patch": _patch(recipe)} if settings.aspect_buckets else {}
    text = TableWriter.under(
        root, "text", "text/1",
        {"text_encoder": settings.text_encoder, "max_tokens": settings.max_tokens} | precision,
        inputs | {"captions": captions.digest},
    )  # fmt: skip
    latents = {
        resolution: TableWriter.under(
            root, f"latents-{resolution}px", "latents/1",
            {"autoencoder": settings.autoencoder, "resolution": resolution} | shapes, inputs,
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
    """Encode the unfinished partitions. Raises ModelInputError for a base side without buckets."""

    def read(k: int) -> pa.Table:
        columns = images.read(k, ["id", "status", "bytes", "width", "height"]).append_column(
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
        transform_kwargs={
            "settings": recipe.encode, "shapes": choose_shapes(recipe.encode, _patch(recipe)),
        },
        sinks=sinks,
        num_actors=recipe.encode.num_workers,
        num_gpus=recipe.encode.num_gpus,
    )  # fmt: skip


def _patch(recipe: Recipe) -> int:
    return PRESETS[recipe.train.network].patch


def choose_shapes(settings: EncodeSettings, patch: int) -> dict[int, tuple[Size, ...]]:
    """The shapes of each resolution's pictures: buckets the network's patches divide, or a square.

    Raises ModelInputError for a resolution they do not divide.
    """
    if not settings.aspect_buckets:
        return {side: (Size(side, side),) for side in settings.resolutions}
    multiple = load_autoencoder(settings.autoencoder).factor * patch
    return {side: buckets(side, multiple) for side in settings.resolutions}


def describe_encoders(settings: EncodeSettings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What consumers must know of both encoders: the manifests' ``extra`` of text and latents."""
    device = _choose_device()
    eight_bit = settings.text_encoder_8bit and device != "cpu"  # workers may have what we lack
    text = load_text_encoder(
        settings.text_encoder, settings.max_tokens, device, eight_bit=eight_bit
    )
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
    def __init__(self, settings: EncodeSettings, shapes: Mapping[int, Sequence[Size]]) -> None:
        device = _choose_device()
        self._settings, self._shapes, self._device = settings, shapes, device
        self._text = load_text_encoder(
            settings.text_encoder, settings.max_tokens, device, eight_bit=settings.text_encoder_8bit
        )
        self._autoencoder = load_autoencoder(settings.autoencoder, device)

    def __call__(self, rows: pa.Table) -> pa.Table:
        items = rows.to_pylist()
        out = [self._empty(item) for item in items]
        good = [i for i, row in enumerate(out) if row["status"] == OK]
        if self._settings.aspect_buckets:
            good.sort(key=lambda i: items[i]["height"] / items[i]["width"])
        for start in range(0, len(good), self._settings.batch_images):
            chosen = good[start : start + self._settings.batch_images]
            self._encode_pictures(
                [out[i] for i in chosen], [decode_image(items[i]["bytes"]) for i in chosen]
            )
        said = [i for i, item in enumerate(items) if item["caption_status"] == OK]
        captions = [items[i]["caption"] for i in said]
        for batch in self._text.group_by_length(captions, self._settings.batch_images):
            features = self._text.encode([captions[place] for place in batch])
            for place, feature in zip(batch, features, strict=True):
                row = out[said[place]]
                row["features"], row["num_tokens"] = pack_features(feature), len(feature)
        return pa.Table.from_pylist(out)

    def _encode_pictures(
        self, rows: list[dict[str, Any]], pictures: list[NDArray[np.uint8]]
    ) -> None:
        """Fill in the rows' moments at each resolution, a bucket at a time."""
        for resolution, shapes in self._shapes.items():
            places: dict[Size, list[int]] = {}
            for i, picture in enumerate(pictures):
                height, width = picture.shape[:2]
                places.setdefault(nearest_bucket(height, width, shapes), []).append(i)
            for bucket, chosen in places.items():
                pixels = torch.stack([fit(pictures[i], bucket) for i in chosen])
                moments = self._autoencoder.encode(pixels.to(self._device)).cpu()
                for i, row in zip(chosen, moments, strict=True):
                    rows[i] |= {
                        f"moments_{resolution}": row.to(torch.float16).numpy().tobytes(),
                        f"bucket_h_{resolution}": row.shape[1],
                        f"bucket_w_{resolution}": row.shape[2],
                    }

    def _empty(self, item: dict[str, Any]) -> dict[str, Any]:
        status, height, width = item["status"], item["height"], item["width"]
        if status == OK and self._settings.aspect_buckets and is_extreme(height, width):
            status = f"rejected: {width}x{height} is longer than {MAX_RATIO}:1"
        row = {"id": item["id"], "status": status, "text_status": item["caption_status"]}
        row |= {"features": b"", "num_tokens": 0, "width": width, "height": height}
        for resolution in self._settings.resolutions:
            row |= {f"moments_{resolution}": b""}
            row |= {f"bucket_{side}_{resolution}": 0 for side in "hw"}
        return row


def _choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit(picture: NDArray[np.uint8], bucket: Size) -> Tensor:
    """Picture (H, W, 3) -> pixels (3, *bucket) in -1..1: scaled to cover it, centre-cropped."""
    image = Image.fromarray(picture)
    crop = cover(image.height, image.width, bucket)
    if (crop.width, crop.height) != image.size:
        image = image.resize((crop.width, crop.height), Image.Resampling.BICUBIC)
    box = (crop.left, crop.top, crop.left + bucket.width, crop.top + bucket.height)
    array = np.array(image.crop(box), np.float32)
    return torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


def pack_features(features: Tensor) -> bytes:
    """Features (L, Dt) -> raw little-endian bf16 bytes (Arrow has no bfloat16)."""
    return features.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def unpack_features(data: bytes, width: int) -> Tensor:
    """Inverse of pack_features: (L, width) bf16."""
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(-1, width)
