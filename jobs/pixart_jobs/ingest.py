"""Ingest: raw items -> the image table. Every item becomes a row; broken ones say why.

Row identity is the SHA-256 of the image bytes (of the item's name where there are none), carried
unchanged through every later table.
"""

import hashlib
import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pixart_jobs.recipe import Recipe
from pixart_jobs.sources import RawItem, open_source
from pixart_platform.partitions import Sink, run_partitions
from pixart_platform.tables import OK, SCHEMAS, TableWriter

SCHEMA = "images/1"
Progress = Iterable[tuple[int, dict[str, int]]]


def plan(recipe: Recipe, root: Path) -> tuple[TableWriter, int]:
    """The writer of this recipe's image table, and how many partitions it has."""
    source = open_source(recipe.data, recipe.seed)
    settings = recipe.data.model_dump(mode="json", exclude={"num_workers"})
    settings |= {"fingerprint": source.fingerprint()}
    return TableWriter.under(root, "images", SCHEMA, settings, {}), source.num_partitions


def run(recipe: Recipe, writer: TableWriter) -> Progress:
    """Ingest the unfinished partitions."""
    source = open_source(recipe.data, recipe.seed)

    def read(k: int) -> pa.Table:
        items = source.read(k)
        fields = ("source", "data", "raw_caption", "label", "truth", "problem")
        return pa.table({name: [getattr(item, name) for item in items] for name in fields})

    return run_partitions(
        num_partitions=source.num_partitions,
        read=read,
        transform=_Inspect,
        transform_kwargs={
            "min_side": recipe.data.min_side,
            "max_pixels": recipe.data.max_pixels,
        },
        sinks=[Sink(writer, {name: name for name in SCHEMAS[SCHEMA].names})],
        num_actors=recipe.data.num_workers,
    )


class _Inspect:
    def __init__(self, min_side: int, max_pixels: int) -> None:
        self._min_side, self._max_pixels = min_side, max_pixels

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = [
            inspect_item(RawItem(**row), self._min_side, self._max_pixels)
            for row in rows.to_pylist()
        ]
        return pa.Table.from_pylist(found, SCHEMAS[SCHEMA])


def inspect_item(item: RawItem, min_side: int, max_pixels: int) -> dict[str, Any]:
    """One row of the image table; ``status`` is ``ok`` or ``rejected: reason``."""
    row = {
        "id": hashlib.sha256(item.data or item.source.encode()).hexdigest(),
        "status": OK,
        "source": item.source,
        "bytes": b"",
        "width": 0,
        "height": 0,
        "raw_caption": item.raw_caption,
        "label": item.label,
        "quality": None,
        "truth": item.truth,
    }
    try:
        if item.problem:
            raise ValueError(item.problem)
        pixels = decode_image(item.data, min_side, max_pixels)
    except ValueError as error:
        return row | {"status": f"rejected: {error}"}
    height, width = pixels.shape[:2]
    quality = measure_quality(pixels)
    return row | {"bytes": item.data, "width": width, "height": height, "quality": quality}


def decode_image(data: bytes, min_side: int = 1, max_pixels: int = 10**9) -> NDArray[np.uint8]:
    """Decode to upright RGB (H, W, 3). Raises ValueError with the reason it cannot be used.

    The size is checked from the header, before any pixel is decoded; transparency is laid on
    white; of an animation the first frame is used.
    """
    if not data:
        raise ValueError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > max_pixels:
                raise ValueError(
                    f"{image.width}x{image.height} is over data.max_pixels = {max_pixels}"
                )
            if min(image.size) < min_side:
                raise ValueError(
                    f"{image.width}x{image.height} is under data.min_side = {min_side}"
                )
            upright = _to_8_bits(ImageOps.exif_transpose(image))
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return np.asarray(upright.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise ValueError(f"decompression bomb ({error})") from error
    except UnidentifiedImageError as error:
        raise ValueError("not an image Pillow can read") from error
    except ValueError:
        raise
    except Exception as error:  # Pillow's readers raise anything on damaged bytes, struct.error too
        raise ValueError(f"broken image ({error})") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Deep grey scaled to 0-255, where Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 bits")
    return image


def measure_quality(pixels: NDArray[np.uint8]) -> float:
    """How free of noise a picture is, 1 (clean) to 0: 1 / (1 + sigma / 8), sigma in grey levels.

    sigma is Immerkaer's estimate (1996): the mean absolute response to a Laplacian difference,
    here with the median in place of the mean, so that strokes do not count as noise.
    """
    grey = pixels.astype(np.float32).mean(axis=2)
    if min(grey.shape) < 3:
        return 0.0
    rows = grey[:-2] - 2 * grey[1:-1] + grey[2:]
    response = np.abs(rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:])
    sigma = float(np.median(response)) / (0.6745 * 6)
    return round(1 / (1 + sigma / 8), 4)
