"""Evaluation and its gates: draw held-out prompts with a version, read the pictures, count what is
right; a version that passes becomes what services draw with.

The reader is fitted on the test scans, which neither the captioner nor any training scene used;
the prompts are the one in ten that no training scene shows. The reader's own error on real test
scenes is reported beside every score, since no score can be trusted beyond it.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from numpy.typing import NDArray
from PIL import Image
from ray.data import ActorPoolStrategy, DataContext

from pixart_jobs.recipe import DrawSettings, Recipe
from pixart_jobs.scenes import compose, sample_reading
from pixart_models.digits import DigitReader, Reading, UnreadableImage, describe
from pixart_models.drawing import load_drawer
from pixart_platform.errors import PixartError
from pixart_platform.manifest import load_manifest
from pixart_platform.recipe import digest_of
from pixart_platform.registry import Registry, Version
from pixart_platform.seeds import derive_seed
from pixart_platform.storage import write_atomic

CHAMPION = "champion"
PREVIOUS = "previous"
_SHEET_COLUMNS = 8
_SHEET_ROWS = 4
_READER_SCENES = 200


@dataclass(frozen=True)
class Evaluation:
    """Metrics in 0-1, and a sheet of the first pictures with their prompts."""

    metrics: dict[str, float]
    prompts: tuple[str, ...]
    sheet: Path


def held_out_prompts(count: int, seed: int) -> list[Reading]:
    """``count`` readings that no training scene shows, singles and pairs mixed."""
    rng = np.random.default_rng([seed, 7])
    return [sample_reading(rng, held_out=True) for _ in range(count)]


def score(wanted: list[Reading], seen: list[Reading | None]) -> dict[str, float]:
    """Share of digits and colours drawn right, in their places, and of relations.

    A picture that cannot be read, or shows another number of digits, is wrong in all.
    """
    digits = colors = relations = total = pairs = 0
    for want, got in zip(wanted, seen, strict=True):
        total += len(want.digits)
        pairs += want.relation is not None
        if got is None or len(got.digits) != len(want.digits):
            continue
        digits += sum(a == b for a, b in zip(want.digits, got.digits, strict=False))
        colors += sum(a == b for a, b in zip(want.colors, got.colors, strict=False))
        relations += want.relation is not None and want.relation == got.relation
    found = {"digit_accuracy": digits / total, "color_accuracy": colors / total}
    if pairs:
        found["relation_accuracy"] = relations / pairs
    return found


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation named by the digest of everything that decides its figures."""

    folder: Path
    snapshot: Path
    settings: dict[str, Any]

    @property
    def result_path(self) -> Path:
        return self.folder / "result.json"

    @property
    def is_finished(self) -> bool:
        return self.result_path.is_file()


def plan(recipe: Recipe, snapshot: Path, root: Path) -> EvaluationPlan:
    """The digits suite on a snapshot."""
    settings = {
        "suite": "digits/1",
        "snapshot": load_manifest(snapshot).digest,
        "draw": recipe.draw.model_dump(mode="json"),
        "num_prompts": recipe.evaluate.num_prompts,
        "seed": recipe.seed,
    }
    return EvaluationPlan(root / f"digits-{digest_of(settings)[:8]}", snapshot, settings)


def run(recipe: Recipe, plan: EvaluationPlan, on_progress: Callable[[int], None]) -> None:
    """Draw, read and score; the result is written last."""
    wanted = held_out_prompts(recipe.evaluate.num_prompts, recipe.seed)
    prompts = [describe(reading) for reading in wanted]
    rows = _draw_and_read(recipe, plan.snapshot, prompts, on_progress)
    seen = [_parse(row["reading"]) for row in rows]
    metrics = score(wanted, seen) | {"reader_accuracy": measure_reader(recipe.seed)}
    _write_sheet(plan.folder / "sheet.png", [row["png"] for row in rows])
    document = plan.settings | {"metrics": metrics, "prompts": prompts}
    write_atomic(plan.result_path, json.dumps(document, indent=1).encode())


def load(plan: EvaluationPlan) -> Evaluation:
    """A finished evaluation, read back."""
    document = json.loads(plan.result_path.read_text())
    return Evaluation(document["metrics"], tuple(document["prompts"]), plan.folder / "sheet.png")


def _draw_and_read(
    recipe: Recipe, snapshot: Path, prompts: list[str], on_progress: Callable[[int], None]
) -> list[dict[str, Any]]:
    """One row a prompt, in order: what the reader saw, and the picture as PNG."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = None
    size = recipe.evaluate.batch_images
    starts = range(0, len(prompts), size)
    items = [
        {"start": s, "prompts": prompts[s : s + size]} for s in starts
    ]  # one block each: a batch is the unit of work
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _DrawAndRead,
        fn_constructor_args=(snapshot, recipe.draw, recipe.seed),
        compute=ActorPoolStrategy(size=min(recipe.train.num_workers, len(items))),
        batch_format="pyarrow",
        batch_size=None,
        num_gpus=1 if recipe.train.use_gpu else 0,
    )
    rows: list[dict[str, Any]] = []
    for row in dataset.iter_rows():
        rows.append(row)
        on_progress(len(rows))
    return sorted(rows, key=lambda row: int(row["index"]))


class _DrawAndRead:
    def __init__(self, snapshot: Path, draw: DrawSettings, seed: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._drawer = load_drawer(snapshot, device)
        self._reader = DigitReader("test")
        self._draw, self._seed = draw, seed

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = []
        for item in batch.to_pylist():
            indices = [item["start"] + i for i in range(len(item["prompts"]))]
            seeds = [derive_seed(self._seed, "evaluate", i) for i in indices]
            pictures = self._drawer.draw(
                item["prompts"], seeds, steps=self._draw.num_steps, guidance=self._draw.guidance
            )
            for index, picture in zip(indices, pictures, strict=True):
                rows.append({"index": index, "reading": self._read(picture), "png": _png(picture)})
        return pa.Table.from_pylist(rows)

    def _read(self, picture: NDArray[np.uint8]) -> str:
        try:
            reading = self._reader.read(picture)
        except UnreadableImage:
            return ""
        return json.dumps([reading.digits, reading.colors, reading.relation])


def _parse(text: str) -> Reading | None:
    if not text:
        return None
    digits, colors, relation = json.loads(text)
    return Reading(tuple(digits), tuple(colors), relation)


def _png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png")
    return buffer.getvalue()


def measure_reader(seed: int) -> float:
    """Digit accuracy of the evaluation's reader on real scenes of *train* scans, unseen by it."""
    reader = DigitReader("test")
    rng = np.random.default_rng([seed, 8])
    scenes = [
        compose(sample_reading(rng, held_out=True), "train", rng) for _ in range(_READER_SCENES)
    ]
    seen: list[Reading | None] = [*reader.read_many([scene.image for scene in scenes])]
    return score([scene.reading for scene in scenes], seen)["digit_accuracy"]


def _write_sheet(path: Path, pngs: list[bytes]) -> None:
    """The first pictures side by side, row by row."""
    pictures = [Image.open(io.BytesIO(png)) for png in pngs[: _SHEET_COLUMNS * _SHEET_ROWS]]
    width, height = pictures[0].size
    rows = -(-len(pictures) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * _SHEET_COLUMNS, height * rows))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % _SHEET_COLUMNS * width, i // _SHEET_COLUMNS * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


class PromotionRefused(PixartError):
    """A version that did not pass a gate; aliases are as they were."""


def check_gates(recipe: Recipe, version: Version, metrics: dict[str, float]) -> None:
    """Raise PromotionRefused naming each gate that fails and by how much."""
    failures = []
    for name, minimum in recipe.evaluate.minimum.items():
        value = metrics.get(name)
        if value is None:
            failures.append(f"{name} was not measured (it has {', '.join(sorted(metrics))})")
        elif not value >= minimum:  # so that nan fails, too
            failures.append(f"{name} = {value:.3f} is below {minimum:g} by {minimum - value:.3f}")
    if failures:
        raise PromotionRefused(
            f"{version.name} version {version.number} is not promoted: {'; '.join(failures)}. "
            f"Train longer, or lower evaluate.minimum"
        )


def promote(
    recipe: Recipe, registry: Registry, version: Version, metrics: dict[str, float]
) -> None:
    """Verify the snapshot, check the gates, move ``champion`` and keep ``previous``."""
    version.verify()
    check_gates(recipe, version, metrics)
    standing = registry.aliases().get(CHAMPION)
    if standing == version.number:
        return
    if standing is not None:
        registry.set_alias(PREVIOUS, registry.get(str(standing)))
    registry.set_alias(CHAMPION, version)
