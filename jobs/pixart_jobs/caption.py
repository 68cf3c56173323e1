"""Captioning: image table -> caption table, on a pool of captioner actors.

Another captioner, prompt or image table makes another caption table; the old one stays.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from PIL import Image

from pixart_jobs.pictures import PictureError, read_pictures
from pixart_jobs.recipe import CaptionSettings, Recipe
from pixart_models.captioner import RAW, SPEC, VLLM, Caption, captioner_revision, load_captioner
from pixart_models.concepts import ConceptDensity, measure_concepts
from pixart_models.config import ModelInputError
from pixart_models.crowds import describe_truth
from pixart_models.revision import check_revision
from pixart_platform.errors import StorageError
from pixart_platform.partitions import Progress, Sink, run_partitions
from pixart_platform.storage import Folder
from pixart_platform.tables import OK, SCHEMAS, Table, TableWriter, open_cached

SCHEMA = "captions/2"
_MANY = 16


def plan(recipe: Recipe, root: Folder, tables: dict[str, Table]) -> TableWriter:
    """The writer of this recipe's caption table; ``tables`` are ``images`` and ``selection``."""
    asked = {"prompts", "show_raw", "keep_raw", "max_new_tokens", "max_side"}
    asked = set() if recipe.captioner == RAW else asked
    settings = recipe.caption.model_dump(mode="json", include=asked)
    settings |= {"captioner": recipe.captioner, "revision": captioner_revision(recipe.captioner)}
    return TableWriter.under(root, "captions", SCHEMA, settings, tables)


def run(recipe: Recipe, tables: dict[str, Table], writer: TableWriter) -> Progress:
    """Caption the unfinished partitions."""
    settings = recipe.caption
    asked = {
        "source": recipe.captioner, "settings": settings, "revision": writer.settings["revision"],
    }  # fmt: skip
    engine = None
    if recipe.captioner.startswith(VLLM):
        from pixart_jobs import caption_vllm

        engine = caption_vllm.build(**asked)
    return run_partitions(
        read=_Read(
            tables["images"].folder.uri,
            tables["selection"].folder.uri,
            None if recipe.captioner == RAW else settings.max_side,
        ),
        transform=_Caption,
        transform_kwargs=asked,
        engine=engine,
        sinks=[Sink.of(writer, SCHEMAS[SCHEMA].names)],
        num_readers=settings.num_readers,
        num_actors=settings.num_workers,
        num_gpus=settings.num_gpus,
        nodes=settings.nodes,
        reader_nodes=recipe.data.nodes,
    )


@dataclass(frozen=True)
class _Read:
    """A partition with its pictures decoded and shrunk, on CPUs alone; None looks at none."""

    images: str  # URIs: manifests are too large to send with every task
    selection: str
    max_side: int | None

    def __call__(self, k: int) -> pa.Table:
        blind = self.max_side is None
        columns = ["id", "raw_caption", *(() if blind else ("bytes", "uri"))]
        rows = open_cached(self.images).read(k, columns)
        rows = rows.append_column("status", open_cached(self.selection).read(k, ["status"])[0])
        items = rows.to_pylist()
        fields = [(name, pa.string()) for name in ("id", "status", "raw_caption")]
        fields += [("pixels", pa.large_binary()), ("width", pa.int32()), ("height", pa.int32())]
        pictures = repeat(None) if blind else read_pictures(items)
        found = list(map(self._prepare, items, pictures))
        return pa.Table.from_pylist(found, pa.schema(fields))

    def _prepare(
        self, item: dict[str, Any], picture: NDArray[np.uint8] | PictureError | None
    ) -> dict[str, Any]:
        row = {name: item[name] for name in ("id", "status", "raw_caption")}
        row |= {"pixels": b"", "width": 0, "height": 0}
        if picture is None:
            return row
        if isinstance(picture, PictureError):
            return row | {"status": f"rejected: {picture}"}
        assert self.max_side
        image = Image.fromarray(picture)
        if max(image.size) > self.max_side:
            image.thumbnail((self.max_side, self.max_side), Image.Resampling.BICUBIC)
        return row | {"pixels": image.tobytes(), "width": image.width, "height": image.height}


class _Caption:
    """Captions of a partition's pictures; ``revision`` is the captioner's that the table names.

    Raises ModelNotFound, also when this machine has another revision.
    """

    def __init__(self, source: str, settings: CaptionSettings, revision: str = "") -> None:
        check_revision(SPEC, source, revision)
        self._captioner = load_captioner(
            source,
            prompts=settings.prompts,
            show_raw=settings.show_raw,
            max_new_tokens=settings.max_new_tokens,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        self._batch_images, self._keep_raw = settings.batch_images, settings.keep_raw
        self._source, self._blind = source, source == RAW

    def __call__(self, rows: pa.Table) -> pa.Table:
        statuses = rows["status"].to_pylist()
        raws = [raw or "" for raw in rows["raw_caption"].to_pylist()]
        written: list[list[str]] = [[] for _ in statuses]
        usable = [i for i, status in enumerate(statuses) if status == OK]
        for start in range(0, len(usable), self._batch_images):
            chosen = usable[start : start + self._batch_images]
            answers = self._captioner.caption(
                [] if self._blind else [_view_picture(rows, i) for i in chosen],
                [raws[i] for i in chosen],
            )
            for i, captions in zip(chosen, answers, strict=True):
                statuses[i], written[i] = settle(captions, raws[i] if self._keep_raw else None)
        if not self._blind and len(usable) >= _MANY and not any(written[i] for i in usable):
            raise ModelInputError(  # more likely this machine's fault than that of every picture
                f"captioner {self._source}: not one of {len(usable)} pictures got a caption, the "
                f"first: {statuses[usable[0]]}; nothing was written of them"
            )
        return pa.table([rows["id"], statuses, written], schema=SCHEMAS[SCHEMA])


def _view_picture(rows: pa.Table, i: int) -> NDArray[np.uint8]:
    """Row ``i``'s pixels (H, W, 3), not copied: a partition of them is gigabytes."""
    height, width = rows["height"][i].as_py(), rows["width"][i].as_py()
    flat: NDArray[np.uint8] = np.frombuffer(rows["pixels"][i].as_buffer(), np.uint8)
    return flat.reshape(height, width, 3)


def settle(captions: Sequence[Caption], raw: str | None) -> tuple[str, list[str]]:
    """A row's status and captions: one a prompt, "" where that one failed, then ``raw`` if it is
    kept. Rejected, with the first problem as its reason, if none is left."""
    if not raw and not any(caption.text for caption in captions):
        return f"rejected: no caption ({captions[0].problem})", []
    return OK, [caption.text for caption in captions] + ([] if raw is None else [raw])


def measure_accuracy(images: Table, captions: Table) -> float:
    """Share of the sample scenes whose first caption says exactly the truth."""
    right = 0
    for k in range(images.num_partitions):
        truths = images.read(k, ["truth"])["truth"].to_pylist()
        written = captions.read(k, ["captions"])["captions"].to_pylist()
        for truth, texts in zip(truths, written, strict=True):
            right += texts[:1] == [describe_truth(truth)]
    return right / images.manifest.num_rows


def measure_density(images: Table, captions: Table, max_rows: int = 20_000) -> dict[str, float]:
    """The paper's Table 1 before and after captioning, over up to ``max_rows`` first rows.

    Kept beside the caption table, so it is measured once.
    """
    name = f"concepts-{max_rows}.json"
    if captions.folder.find(name):
        kept: dict[str, float] = json.loads(captions.folder.read(name))
        return kept
    raw, dense, rows = ConceptDensity(), ConceptDensity(), 0  # of the same pictures
    for k in range(images.num_partitions):
        if rows >= max_rows:
            break
        texts = images.read(k, ["raw_caption"])["raw_caption"].to_pylist()
        written = captions.read(k, ["captions"])["captions"].to_pylist()
        rows += len(texts)
        raw.merge(measure_concepts(t or "" for t, row in zip(texts, written, strict=True) if row))
        dense.merge(measure_concepts(row[0] for row in written if row))
    found = {
        f"{kind}_{figure}": round(float(getattr(density, figure)), 4)
        for kind, density in (("raw", raw), ("dense", dense))
        for figure in (
            "num_captions", "num_distinct", "num_valid", "valid_share", "nouns_per_caption",
        )
    }  # fmt: skip
    with suppress(StorageError):  # whoever may only read measures again
        captions.folder.write(name, json.dumps(found, indent=1).encode())
    return found
