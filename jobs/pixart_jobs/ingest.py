"""Ingest: raw items -> the image table. Every item becomes a row; broken ones say why.

Row identity is the SHA-256 of the image bytes (of the item's name where there are none), carried
unchanged through every later table.
"""

import hashlib
import re
from typing import Any

import pyarrow as pa

from pixart_jobs.pictures import PictureError, decode_image, hash_picture, measure_quality
from pixart_jobs.recipe import DataSettings, Recipe
from pixart_jobs.sources import RawItem, Source
from pixart_platform.partitions import Progress, Sink, run_partitions
from pixart_platform.storage import Folder
from pixart_platform.tables import OK, SCHEMAS, TableWriter

SCHEMA = "images/2"
MAX_CAPTION_CHARACTERS = 10_000
_UNPRINTABLE = re.compile("[\\x00-\\x08\\x0e-\\x1b\\x7f-\\x84\\x86-\\x9f\\ud800-\\udfff\\ufeff]")


def plan(recipe: Recipe, root: Folder, source: Source) -> TableWriter:
    """The writer of this recipe's image table, over the source as it is now."""
    judged_by = {"min_side", "max_pixels", "max_aspect", "copy_bytes"}
    settings = recipe.data.model_dump(mode="json", include=judged_by)
    settings |= {"_source": recipe.data.source, "_fingerprint": source.fingerprint()}
    return TableWriter.under(root, "images", SCHEMA, settings, {}, source.parts())


def run(recipe: Recipe, source: Source, writer: TableWriter) -> Progress:
    """Ingest the unfinished partitions."""

    def read(k: int) -> pa.Table:
        items = source.read(k)
        fields = ("source", "data", "raw_caption", "label", "truth", "problem", "uri")
        return pa.table({name: [getattr(item, name) for item in items] for name in fields})

    return run_partitions(
        read=read,
        transform=_Inspect,
        transform_kwargs={"settings": recipe.data},
        sinks=[Sink.of(writer, SCHEMAS[SCHEMA].names)],
        num_readers=recipe.data.num_workers,
        num_actors=recipe.data.num_workers,
        nodes=recipe.data.nodes,
        reader_nodes=recipe.data.nodes,
    )


class _Inspect:
    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings

    def __call__(self, rows: pa.Table) -> pa.Table:
        found = [inspect_item(RawItem(**row), self._settings) for row in rows.to_pylist()]
        return pa.Table.from_pylist(found, SCHEMAS[SCHEMA])


def inspect_item(item: RawItem, settings: DataSettings) -> dict[str, Any]:
    """One row of the image table; ``status`` is ``ok`` or ``rejected: kind (detail)``."""
    name = item.source.encode(errors="backslashreplace")  # a table holds UTF-8 only
    row = {
        "id": hashlib.sha256(item.data or name).hexdigest(),
        "status": OK,
        "source": name.decode(),
        "uri": "" if settings.copy_bytes else item.uri,
        "bytes": b"",
        "width": 0,
        "height": 0,
        "raw_caption": clean_text(item.raw_caption),
        "label": item.label,
        "quality": None,
        "phash": 0,
        "truth": item.truth,
    }
    try:
        if item.problem:
            raise PictureError(clean_text(item.problem))
        pixels = decode_image(
            item.data, settings.min_side, settings.max_pixels, settings.max_aspect
        )
    except PictureError as error:
        return row | {"status": f"rejected: {error}"}
    height, width = pixels.shape[:2]
    return row | {
        "bytes": item.data if settings.copy_bytes or not item.uri else b"",
        "width": width,
        "height": height,
        "quality": measure_quality(pixels),
        "phash": hash_picture(pixels),
    }


def clean_text(text: str) -> str:
    """One line of text that is safe to store: no control characters, no lone surrogates.

    More than 10,000 characters are cut at a word's end rather than refused: the picture is sound,
    no text encoder reads more than some hundred words, and ``select.max_caption_words`` refuses.
    """
    line = " ".join(_UNPRINTABLE.sub("", text).split())
    if len(line) <= MAX_CAPTION_CHARACTERS:
        return line
    return line[: MAX_CAPTION_CHARACTERS + 1].rpartition(" ")[0] or line[:MAX_CAPTION_CHARACTERS]
