"""Evaluation: a suite's prompts drawn with a version, judged, and made into figures.

Three tables below ``evaluations``: drawings (of a snapshot, prompts, seeds and the way to draw, for
all suites that judge them), judgements, and what a suite compares with. Each is made partition by
partition on any number of workers, from where it was left, and its bytes depend on none of that. A
partition is what is drawn in one batch. ``result.json``, written last, says all that was found.
"""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pixart_jobs.certainty import Figure
from pixart_jobs.crowd_suite import CrowdsSuite
from pixart_jobs.fidelity import FidelitySuite
from pixart_jobs.promote import RESULT_FILE, evaluation_tag
from pixart_jobs.recipe import DrawSettings, Recipe, check_suite
from pixart_jobs.suites import (
    DigitsSuite,
    PromptsSuite,
    Suite,
    Workers,
    encode_png,
    judge_pictures,
    read_rows,
)
from pixart_models.drawing import load_drawer
from pixart_models.snapshot import load_config
from pixart_platform.errors import PixartError
from pixart_platform.manifest import load_manifest
from pixart_platform.partitions import Sink, run_partitions
from pixart_platform.recipe import digest_of
from pixart_platform.registry import Registry, Version
from pixart_platform.seeds import derive_seed
from pixart_platform.storage import Folder, open_folder, write_atomic
from pixart_platform.tables import OK, Table, TableWriter
from pixart_platform.tracking import Tracker

_SHEET_COLUMNS, _SHEET_ROWS = 8, 4
_LOGGED_PICTURES = 16
_MAX_PICTURES = 1_000_000


class EvaluationError(PixartError):
    """An evaluation that cannot be made as asked."""


@dataclass(frozen=True)
class Evaluation:
    """What a suite found of a snapshot, and a sheet of the first pictures."""

    suite: str
    basis: str
    figures: dict[str, Figure]
    prompts: tuple[str, ...]
    sheet: Path
    notes: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        return {name: figure.value for name, figure in self.figures.items()}


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation, in a folder named by the digest of everything that decides its figures."""

    folder: Path
    snapshot: Path
    settings: dict[str, Any]
    suite: Suite

    @property
    def result_path(self) -> Path:
        return self.folder / "result.json"

    @property
    def is_finished(self) -> bool:
        return self.result_path.is_file()

    @property
    def num_drawn(self) -> int:
        return len(self.suite.prompts) * self.suite.copies

    @property
    def tables(self) -> Folder:
        """Where drawings, judgements and references are, beside those of other evaluations."""
        return open_folder(self.folder.parent)


def require_suites(names: Sequence[str]) -> Sequence[str]:
    """``names``, if all are suites. Raises EvaluationError, listing what there is."""
    try:
        for name in names:
            check_suite(name)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    if not names:
        raise EvaluationError("evaluate.suites names none; give --suite digits, prompts:FILE, ...")
    return names


def open_suite(
    name: str, recipe: Recipe, side: int, root: Path, find: Callable[[], dict[str, Table]]
) -> Suite:
    """A suite by name, for pictures of ``side`` pixels; ``find`` looks for reference tables, where
    one needs them.

    Raises EvaluationError for an unknown one, and PixartError or ModelInputError as suites do.
    """
    kind, _, path = require_suites([name])[0].partition(":")
    asked = recipe.evaluate
    if kind == "prompts":
        return PromptsSuite.open(path, asked.prompt_images, asked.detector)
    if kind == "fidelity":
        return FidelitySuite.open(recipe, side, find(), root)
    sample = CrowdsSuite if kind == "crowds" else DigitsSuite
    return sample(asked.num_prompts, asked.seed)


def plan(
    recipe: Recipe,
    name: str,
    snapshot: Path,
    root: Path,
    find_tables: Callable[[], dict[str, Table]],
) -> EvaluationPlan:
    """Suite ``name`` on a snapshot, below ``root``. Raises as ``open_suite`` does."""
    config = load_config(snapshot)
    if config.network.architecture != "pixart":
        raise EvaluationError(
            f"{snapshot} holds a {config.network.architecture}, which draws classes; evaluate a "
            f"version that draws prompts"
        )
    suite = open_suite(name, recipe, config.resolution, root, find_tables)
    if len(suite.prompts) * suite.copies > _MAX_PICTURES:
        raise EvaluationError(
            f"{name}: {len(suite.prompts)} prompts, {suite.copies} pictures each, are more than "
            f"{_MAX_PICTURES} pictures; lower evaluate.prompt_images"
        )
    settings = {
        "suite": f"{suite.name}/{suite.revision}",
        "seed": recipe.evaluate.seed,
        "draw": recipe.draw.model_dump(mode="json"),
        "copies": suite.copies,
        "batch_images": recipe.evaluate.batch_images,
        **suite.settings,
    }
    basis = digest_of(settings | {"prompts": list(suite.prompts)})[:8]
    settings |= {"basis": basis, "snapshot": load_manifest(snapshot).digest}
    folder = root / f"{suite.name}-{digest_of(settings)[:8]}"
    return EvaluationPlan(folder, snapshot, settings, suite)


def run(recipe: Recipe, plan: EvaluationPlan, on_progress: Callable[[int], None]) -> None:
    """Draw, judge, measure; ``on_progress`` hears how many pictures are drawn, of ``num_drawn``."""
    suite, workers = plan.suite, Workers.of(recipe)
    drawings = _draw(recipe, plan, workers, on_progress)
    for _ in suite.prepare(plan.tables, workers):
        pass
    asked = {"judge": plan.settings["suite"], "settings": suite.settings}
    judged = TableWriter.under(
        plan.tables, "judgements", "judgements/1", asked, {"drawings": drawings}
    )
    if not judged.is_committed:
        judged.adopt()
        read = _ReadDrawings(drawings.folder.uri)
        for _ in judge_pictures(suite, read, judged, workers):
            pass
        judged.commit()
    measured = suite.measure(read_rows(Table.open(judged.folder)), plan.tables)
    _write_sheet(
        plan.folder / "sheet.png", [*islice(_pictures(drawings), _SHEET_COLUMNS * _SHEET_ROWS)]
    )
    document = plan.settings | {
        "drawings": drawings.folder.name,
        "prompts": list(suite.prompts),
        "figures": {name: asdict(figure) for name, figure in measured.figures.items()},
        "outcomes": measured.outcomes,
        "notes": list(measured.notes),
    }
    write_atomic(plan.result_path, json.dumps(document, indent=1, allow_nan=False).encode())


def load(plan: EvaluationPlan) -> Evaluation:
    """A finished evaluation, read back."""
    raw = json.loads(plan.result_path.read_text())
    figures = {name: Figure(**figure) for name, figure in raw["figures"].items()}
    return Evaluation(
        raw["suite"].partition("/")[0], raw["basis"], figures, tuple(raw["prompts"]),
        plan.folder / "sheet.png", tuple(raw["notes"]),
    )  # fmt: skip


def _draw(
    recipe: Recipe, plan: EvaluationPlan, workers: Workers, on_progress: Callable[[int], None]
) -> Table:
    suite, size = plan.suite, recipe.evaluate.batch_images
    prompts = [prompt for prompt in suite.prompts for _ in range(suite.copies)]
    seed = recipe.evaluate.seed
    seeds = [derive_seed(seed, "evaluate", i) for i in range(len(prompts))]
    parts = [
        digest_of({"prompts": prompts[s : s + size], "seeds": seeds[s : s + size]})
        for s in range(0, len(prompts), size)
    ]
    asked = {
        "snapshot": plan.settings["snapshot"], "draw": plan.settings["draw"],
        "_pictures": digest_of({"parts": parts}),
    }  # fmt: skip
    writer = TableWriter.under(plan.tables, "drawings", "drawings/1", asked, {}, parts)
    if not writer.is_committed:
        done = size * (writer.adopt() + len(writer.written()))
        for _ in run_partitions(
            read=_ReadPrompts(tuple(prompts), tuple(seeds), size), transform=_Draw,
            transform_kwargs={"snapshot": plan.snapshot, "draw": recipe.draw},
            sinks=[Sink.of(writer, ("id", "status", "prompt", "seed", "png"))],
            num_readers=min(workers.count, len(parts)), num_actors=workers.count,
            num_gpus=workers.num_gpus, nodes=workers.nodes,
        ):  # fmt: skip
            done += size
            on_progress(min(done, len(prompts)))
        writer.commit()
    return Table.open(writer.folder)


@dataclass(frozen=True)
class _ReadPrompts:
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    size: int

    def __call__(self, k: int) -> pa.Table:
        mine = range(k * self.size, min((k + 1) * self.size, len(self.prompts)))
        return pa.table({
            "id": [f"{i:016x}" for i in mine],
            "prompt": [self.prompts[i] for i in mine],
            "seed": pa.array([self.seeds[i] for i in mine], pa.int64()),
        })  # fmt: skip


class _Draw:
    def __init__(self, snapshot: Path, draw: DrawSettings) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._drawer, self._draw = load_drawer(snapshot, device), draw

    def __call__(self, rows: pa.Table) -> pa.Table:
        pictures = self._drawer.draw(
            rows["prompt"].to_pylist(), rows["seed"].to_pylist(),
            steps=self._draw.num_steps, guidance=self._draw.guidance,
            guidance_rescale=self._draw.guidance_rescale,
        )  # fmt: skip
        rows = rows.append_column("status", pa.array([OK] * rows.num_rows))
        return rows.append_column("png", pa.array(map(encode_png, pictures), pa.binary()))


@dataclass(frozen=True)
class _ReadDrawings:
    drawings: str

    def __call__(self, k: int) -> pa.Table:
        return Table.open(self.drawings).read(k, ["id", "prompt", "png"])


def _pictures(drawings: Table) -> Iterator[bytes]:
    """PNG files, in order."""
    for k in range(drawings.num_partitions):
        yield from drawings.read(k, ["png"])["png"].to_pylist()


def _write_sheet(path: Path, pngs: Sequence[bytes]) -> None:
    """The first pictures side by side, row by row."""
    pictures = [Image.open(io.BytesIO(png)) for png in pngs]
    width, height = pictures[0].size
    rows = -(-len(pictures) // _SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * _SHEET_COLUMNS, height * rows))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % _SHEET_COLUMNS * width, i // _SHEET_COLUMNS * height))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def record(registry: Registry, version: Version, plan: EvaluationPlan, tracker: Tracker) -> None:
    """Put a finished evaluation into its run and on the version, unless it is there already.

    The step is the images the version's stage had seen, so that runs line up.
    """
    raw = json.loads(plan.result_path.read_text())
    figures = {name: Figure(**figure) for name, figure in raw["figures"].items()}
    tag = evaluation_tag(plan.suite.name, raw["basis"], tracker.run_id, figures)
    if tag.items() <= version.tags.items():
        return
    images = _images_seen(version, tracker.uri)
    tracker.set_tags({"suite": raw["suite"], "version": f"{version.name}/{version.number}"})
    tracker.log_text(json.dumps(raw), RESULT_FILE)
    for name, figure in figures.items():
        ends = {f"{name}_low": figure.low, f"{name}_high": figure.high}
        tracker.log_metrics({name: figure.value} | ends, images)
    drawings = Table.open(plan.tables / raw["drawings"])
    firsts = islice(_pictures(drawings), 0, _LOGGED_PICTURES * plan.suite.copies, plan.suite.copies)
    for i, png in enumerate(firsts):
        picture = np.asarray(Image.open(io.BytesIO(png)))
        tracker.log_image(picture, f"prompt_{i:03d}", images)
    registry.tag(version, tag)


def _images_seen(version: Version, uri: str) -> int:
    """By its stage; of versions registered before that was kept, where its loss ends."""
    if told := version.tags.get("images_seen"):
        return int(told)
    losses = Tracker(uri, version.run_id).history("loss") if version.run_id else []
    return losses[-1][0] if losses else 0
