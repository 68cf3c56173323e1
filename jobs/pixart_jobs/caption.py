"""Captioning: image table -> caption table, on a pool of captioner actors.

Another captioner, prompt or image table makes another caption table; the old one stays.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pixart_jobs.ingest import Progress, decode_image
from pixart_jobs.recipe import Recipe
from pixart_models.captioner import load_captioner
from pixart_models.digits import Reading, describe
from pixart_platform.partitions import Sink, run_partitions
from pixart_platform.tables import OK, SCHEMAS, Table, TableWriter

SCHEMA = "captions/1"


def plan(recipe: Recipe, root: Path, images: Table) -> TableWriter:
    """The writer of this recipe's caption table."""
    settings = recipe.caption.model_dump(mode="json", include={"prompt", "max_new_tokens"})
    settings |= {"captioner": recipe.captioner}
    return TableWriter.under(root, "captions", SCHEMA, settings, {"images": images.digest})


def run(recipe: Recipe, images: Table, writer: TableWriter) -> Progress:
    """Caption the unfinished partitions."""
    settings = recipe.caption

    def read(k: int) -> pa.Table:
        return images.read(k, ["id", "status", "bytes", "raw_caption"])

    return run_partitions(
        num_partitions=images.num_partitions,
        read=read,
        transform=_Caption,
        transform_kwargs={
            "source": recipe.captioner,
            "prompt": settings.prompt,
            "max_new_tokens": settings.max_new_tokens,
            "batch_images": settings.batch_images,
        },
        sinks=[Sink(writer, {name: name for name in SCHEMAS[SCHEMA].names})],
        num_actors=settings.num_workers,
        num_gpus=settings.num_gpus,
    )


class _Caption:
    def __init__(self, source: str, prompt: str, max_new_tokens: int, batch_images: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._captioner = load_captioner(
            source, prompt=prompt, max_new_tokens=max_new_tokens, device=device
        )
        self._batch_images = batch_images

    def __call__(self, rows: pa.Table) -> pa.Table:
        items = rows.to_pylist()
        found: list[dict[str, Any]] = [
            {"id": item["id"], "status": item["status"], "caption": ""} for item in items
        ]
        usable = [i for i, item in enumerate(items) if item["status"] == OK]
        for start in range(0, len(usable), self._batch_images):
            chosen = usable[start : start + self._batch_images]
            captions = self._captioner.caption(
                [decode_image(items[i]["bytes"]) for i in chosen],
                [items[i]["raw_caption"] for i in chosen],
            )
            for i, caption in zip(chosen, captions, strict=True):
                found[i]["caption"] = caption.text
                if caption.problem:
                    found[i]["status"] = f"rejected: no caption ({caption.problem})"
        return pa.Table.from_pylist(found, SCHEMAS[SCHEMA])


def measure_accuracy(images: Table, captions: Table) -> float | None:
    """Share of captions that say exactly the truth; None for sources that know no truth."""
    right = total = 0
    for k in range(images.num_partitions):
        truths = images.read(k, ["truth"])["truth"].to_pylist()
        written = captions.read(k, ["caption"])["caption"].to_pylist()
        for truth, caption in zip(truths, written, strict=True):
            if truth is not None:
                raw = json.loads(truth)
                reading = Reading(tuple(raw["digits"]), tuple(raw["colors"]), raw["relation"])
                right += caption == describe(reading)
                total += 1
    return right / total if total else None
