"""Encoding: captions -> text features, pictures -> latent moments, from one decode.

Text features are trimmed to their true length and stored once for all resolutions and stages; a
latent table per resolution holds the autoencoder's moments, unscaled and unsampled. A picture is
scaled to cover its shape and centre-cropped: the resolution's square, or with ``aspect_buckets``
the nearest of a few shapes of about that area. The crop itself is not stored: it follows from the
picture's size and the bucket (``pixart_models.buckets.cover``).

CPU tasks decode and crop, actors encode, so the accelerator never waits for a JPEG. The models work
on full batches of like size: pictures are taken by bucket, captions by length.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pixart_jobs.pictures import PictureError, read_pictures
from pixart_jobs.recipe import EncodeSettings, Recipe
from pixart_models.autoencoder import SPEC as AUTOENCODER
from pixart_models.autoencoder import load_autoencoder
from pixart_models.buckets import MAX_RATIO, Size, buckets, cover, is_extreme, nearest_bucket
from pixart_models.config import PRESETS
from pixart_models.revision import check_revision, model_revision
from pixart_models.text import T5, load_text_encoder
from pixart_platform.partitions import Progress, Sink, run_partitions
from pixart_platform.storage import Folder
from pixart_platform.tables import OK, Table, TableWriter, open_cached

Inputs = dict[str, Table]  # images, selection, captions


def plan(
    recipe: Recipe, root: Folder, tables: Inputs
) -> tuple[TableWriter, dict[int, TableWriter]]:
    """The writers of the text table and of each resolution's latent table."""
    settings = recipe.encode
    # An option that is off leaves no trace, so tables made before it existed are still found.
    precision = {"text_encoder_8bit": True} if settings.text_encoder_8bit else {}
    text = TableWriter.under(
        root, "text", "text/2",
        {
            "text_encoder": settings.text_encoder, "max_tokens": settings.max_tokens,
            "revision": model_revision(T5, settings.text_encoder),
        } | precision,
        tables,
    )  # fmt: skip
    latents = {
        resolution: TableWriter.under(
            root, f"latents_{resolution}px", "latents/1",
            {
                "autoencoder": settings.autoencoder, "resolution": resolution,
                "revision": model_revision(AUTOENCODER, settings.autoencoder),
            } | _describe_shapes(recipe, resolution),
            {kind: tables[kind] for kind in ("images", "selection")},
        )
        for resolution in settings.resolutions
    }  # fmt: skip
    return text, latents


def run(
    recipe: Recipe, tables: Inputs, text: TableWriter, latents: dict[int, TableWriter]
) -> Progress:
    """Encode what is not there. Raises ModelInputError for a base side without buckets.

    A partition that has its latents but not its text costs no autoencoder, and the other way round.
    """
    shapes = choose_shapes(recipe.encode, _patch(recipe))
    written = {side: writer.written() for side, writer in latents.items()}
    said = text.written()
    lacking: dict[tuple[bool, tuple[int, ...]], list[int]] = {}
    for k in range(text.num_partitions):
        sides = tuple(side for side in latents if k not in written[side])
        if k not in said or sides:
            lacking.setdefault((k not in said, sides), []).append(k)
    places = {kind: table.folder.uri for kind, table in tables.items()}
    for (wants_text, sides), partitions in lacking.items():
        mine = {side: latents[side] for side in sides}
        yield from run_partitions(
            read=_Read(
                places, {side: shapes[side] for side in sides}, bool(recipe.encode.bucketed)
            ),
            transform=_Encode,
            transform_kwargs={
                "settings": recipe.encode, "sides": sides, "text": wants_text,
                "text_revision": text.settings["revision"],
                "autoencoder_revision": next(iter(latents.values())).settings["revision"],
            },
            sinks=make_sinks(text if wants_text else None, mine),
            num_readers=recipe.encode.num_readers,
            num_actors=recipe.encode.num_workers,
            num_gpus=recipe.encode.num_gpus,
            nodes=recipe.encode.nodes,
            reader_nodes=recipe.data.nodes,
            only=partitions,
        )  # fmt: skip


def make_sinks(text: TableWriter | None, latents: Mapping[int, TableWriter]) -> list[Sink]:
    """Which columns of the encoders' rows go to which table."""
    columns = {name: name for name in ("id", "features", "num_tokens")} | {"status": "text_status"}
    sinks = [Sink(text, columns)] if text else []
    for side, writer in latents.items():
        payload = {name: f"{name}_{side}" for name in ("moments", "bucket_h", "bucket_w")}
        sinks.append(Sink(writer, {n: n for n in ("id", "status", "width", "height")} | payload))
    return sinks


def _patch(recipe: Recipe) -> int:
    return PRESETS[recipe.train.network].patch


def _describe_shapes(recipe: Recipe, resolution: int) -> dict[str, Any]:
    """What tells a latent table's shapes. Where any has buckets, all lack the longest pictures."""
    if resolution in recipe.encode.bucketed:
        return {"aspect_buckets": True, "patch": _patch(recipe)}
    return {"longest_rejected": True} if recipe.encode.bucketed else {}


def choose_shapes(settings: EncodeSettings, patch: int) -> dict[int, tuple[Size, ...]]:
    """The shapes of each resolution's pictures: buckets the network's patches divide, or a square.

    Raises ModelInputError for a resolution they do not divide.
    """
    shapes: dict[int, tuple[Size, ...]] = {s: (Size(s, s),) for s in settings.resolutions}
    if settings.bucketed:
        multiple = load_autoencoder(settings.autoencoder).factor * patch
        shapes |= {side: buckets(side, multiple) for side in settings.bucketed}
    return shapes


def describe_text_encoder(settings: EncodeSettings) -> dict[str, Any]:
    """The text manifest's ``extra``: what consumers must know. Run it where the encoder fits."""
    device = _choose_device()
    eight_bit = settings.text_encoder_8bit and device != "cpu"
    text = load_text_encoder(
        settings.text_encoder, settings.max_tokens, device, eight_bit=eight_bit
    )
    null = base64.b64encode(pack_features(text.encode([""])[0])).decode()
    return {"digest": text.digest, "width": text.width, "null_features": null}


def describe_autoencoder(settings: EncodeSettings) -> dict[str, Any]:
    """The latent manifests' ``extra``."""
    found = load_autoencoder(settings.autoencoder)
    names = ("digest", "factor", "channels", "scale")
    return {name: getattr(found, name) for name in names}


def commit(recipe: Recipe, text: TableWriter, latents: dict[int, TableWriter]) -> None:
    """Write the manifests. The text encoder is described by a task with a worker's GPU: T5-XXL is
    too large for many a driver."""
    settings = recipe.encode
    if not text.is_committed:
        if settings.text_encoder.startswith("builtin:"):  # small: not worth a task's start
            text.commit(describe_text_encoder(settings))
        else:
            describe = ray.remote(num_gpus=settings.num_gpus, label_selector=settings.nodes)(
                describe_text_encoder
            )
            text.commit(ray.get(describe.remote(settings)))
    for writer in latents.values():
        if not writer.is_committed:
            writer.commit(describe_autoencoder(settings))


@dataclass(frozen=True)
class _Read:
    """Joins a partition's tables and prepares its rows; runs on CPUs alone."""

    places: Mapping[str, str]  # URIs: manifests are too large to send with tasks
    shapes: Mapping[int, Sequence[Size]]
    refuse_extreme: bool

    def __call__(self, k: int) -> pa.Table:
        images, selection, captions = (
            open_cached(self.places[kind]) for kind in ("images", "selection", "captions")
        )
        columns = ["id", "width", "height", *(("bytes", "uri") if self.shapes else ())]
        items = images.read(k, columns)
        said = captions.read(k, ["status", "captions"])
        items = items.append_column("status", selection.read(k, ["status"])[0])
        items = items.append_column("text_status", said["status"])
        items = items.append_column("captions", said["captions"])
        return prepare_rows(items.to_pylist(), self.shapes, refuse_extreme=self.refuse_extreme)


def prepare_rows(
    items: Sequence[dict[str, Any]],
    shapes: Mapping[int, Sequence[Size]],
    *,
    refuse_extreme: bool = False,
) -> pa.Table:
    """Rows with their pictures decoded, once, and cropped to a shape of each resolution.

    Pixels are RGB bytes of ``rows`` x ``columns``; a rejected row has none.
    """
    fields = [(name, pa.string()) for name in ("id", "status", "text_status")]
    fields += [("captions", pa.list_(pa.string()))]
    fields += [(name, pa.int32()) for name in ("width", "height")]
    for side in shapes:
        fields += [(f"pixels_{side}", pa.large_binary())]
        fields += [(f"{name}_{side}", pa.int32()) for name in ("rows", "columns")]
    blank = {f"{name}_{s}": value for s in shapes
             for name, value in (("pixels", b""), ("rows", 0), ("columns", 0))}  # fmt: skip
    kept = ("id", "status", "text_status", "captions", "width", "height")
    prepared = [{name: item[name] for name in kept} | blank for item in items]
    if refuse_extreme and shapes:
        for row in prepared:
            if row["status"] == OK and is_extreme(row["height"], row["width"]):
                size = f"{row['width']}x{row['height']}"
                row["status"] = f"rejected: longer than {MAX_RATIO}:1 ({size})"
    wanted = [item | {"status": row["status"]} for item, row in zip(items, prepared, strict=True)]
    pictures = read_pictures(wanted) if shapes else repeat(None)
    for row, picture in zip(prepared, pictures, strict=False):
        if isinstance(picture, PictureError):
            row["status"] = f"rejected: {picture}"
        elif picture is not None:
            row.update(_crop(picture, shapes))
    return pa.Table.from_pylist(prepared, pa.schema(fields))


def _crop(
    picture: NDArray[np.uint8], shapes: Mapping[int, Sequence[Size]]
) -> dict[str, bytes | int]:
    """The picture's pixels in its shape of each resolution."""
    found: dict[str, bytes | int] = {}
    for side, choice in shapes.items():
        bucket = nearest_bucket(picture.shape[0], picture.shape[1], choice)
        found |= {f"rows_{side}": bucket.height, f"columns_{side}": bucket.width}
        found[f"pixels_{side}"] = fit(picture, bucket).tobytes()
    return found


class _Encode:
    """Pixels -> moments a bucket at a time, captions -> features by length."""

    def __init__(
        self, settings: EncodeSettings, sides: tuple[int, ...], text: bool,
        text_revision: str = "", autoencoder_revision: str = "",
    ) -> None:  # fmt: skip
        self._device = _choose_device()
        self._settings, self._sides = settings, sides
        if sides:
            check_revision(AUTOENCODER, settings.autoencoder, autoencoder_revision)
            self._autoencoder = load_autoencoder(settings.autoencoder, self._device)
        self._text = None
        if text:
            check_revision(T5, settings.text_encoder, text_revision)
            self._text = load_text_encoder(
                settings.text_encoder, settings.max_tokens, self._device,
                eight_bit=settings.text_encoder_8bit,
            )  # fmt: skip

    def __call__(self, rows: pa.Table) -> pa.Table:
        for side in self._sides:
            rows = self._encode_pictures(rows, side)
        return self._encode_captions(rows) if self._text else rows

    def _encode_pictures(self, rows: pa.Table, side: int) -> pa.Table:
        pixels = rows[f"pixels_{side}"].combine_chunks()
        sizes = zip(*(rows[f"{n}_{side}"].to_pylist() for n in ("rows", "columns")), strict=True)
        places: dict[tuple[int, int], list[int]] = {}
        for i, size in enumerate(sizes):
            if size[0]:
                places.setdefault(size, []).append(i)
        moments = [b""] * rows.num_rows
        latent = np.zeros((2, rows.num_rows), np.int32)
        for size, chosen in places.items():
            for batch in _batches(chosen, self._settings.batch_images):
                encoded = self._encode_batch([pixels[i].as_buffer() for i in batch], size)
                for i, row in zip(batch, encoded, strict=True):
                    moments[i] = row.tobytes()
                latent[:, batch] = np.array(encoded.shape[2:])[:, None]
        rows = rows.drop_columns([f"{n}_{side}" for n in ("pixels", "rows", "columns")])
        rows = rows.append_column(f"moments_{side}", pa.array(moments, pa.binary()))
        for name, values in zip(("bucket_h", "bucket_w"), latent, strict=True):
            rows = rows.append_column(f"{name}_{side}", pa.array(values))
        return rows

    def _encode_batch(
        self, pictures: Sequence[pa.Buffer], size: tuple[int, int]
    ) -> NDArray[np.float16]:
        """RGB bytes of pictures of one size -> moments (B, 2C, h, w)."""
        arrays = [np.frombuffer(p, np.uint8).reshape(*size, 3) for p in pictures]
        pixels = torch.from_numpy(np.stack(arrays)).to(self._device)
        pixels = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # (B, 3, H, W)
        moments = self._autoencoder.encode(pixels).to(torch.float16).cpu()
        return np.asarray(moments.numpy(), np.float16)

    def _encode_captions(self, rows: pa.Table) -> pa.Table:
        assert self._text is not None
        captions = rows["captions"].to_pylist()
        said = [
            (i, place)
            for i, status in enumerate(rows["text_status"].to_pylist()) if status == OK
            for place, caption in enumerate(captions[i]) if caption
        ]  # fmt: skip
        features = [[b""] * len(row) for row in captions]
        lengths = [[0] * len(row) for row in captions]
        texts = [captions[i][place] for i, place in said]
        for batch in self._text.group_by_length(texts, self._settings.batch_images):
            encoded = self._text.encode([texts[n] for n in batch])
            for n, feature in zip(batch, encoded, strict=True):
                i, place = said[n]
                features[i][place], lengths[i][place] = pack_features(feature), len(feature)
        joined = pa.array([b"".join(row) for row in features], pa.large_binary())
        rows = rows.drop_columns(["captions"]).append_column("features", joined)
        return rows.append_column("num_tokens", pa.array(lengths, pa.list_(pa.int32())))


def _batches(places: list[int], size: int) -> Iterator[list[int]]:
    return (places[start : start + size] for start in range(0, len(places), size))


def _choose_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fit(picture: NDArray[np.uint8], bucket: Size) -> NDArray[np.uint8]:
    """Picture (H, W, 3) -> (*bucket, 3): scaled to cover it, centre-cropped."""
    image = Image.fromarray(picture)
    crop = cover(image.height, image.width, bucket)
    if (crop.width, crop.height) != image.size:
        image = image.resize((crop.width, crop.height), Image.Resampling.BICUBIC)
    box = (crop.left, crop.top, crop.left + bucket.width, crop.top + bucket.height)
    return np.asarray(image.crop(box))


def pack_features(features: Tensor) -> bytes:
    """Features (L, Dt) -> raw little-endian bf16 bytes (Arrow has no bfloat16)."""
    return features.to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def unpack_features(data: bytes, width: int) -> Tensor:
    """Inverse of pack_features: (L, width) bf16."""
    return torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(-1, width)
