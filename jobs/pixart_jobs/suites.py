"""Suites: what a version is asked to draw, and how the pictures are judged.

A suite names prompts and a judge, which looks at pictures in workers and writes down what it saw;
``measure`` then makes figures of all that was seen. ``digits`` asks for prompts that no training
scene shows and reads them; ``prompts:FILE`` counts objects as GenEval does; ``fidelity``, which has
a file of its own, compares distributions.

The digit reader is fitted on the test scans, which neither the captioner nor any training scene
used; its own accuracy, on scenes of scans it has not seen, stands beside every score it gives.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from pixart_jobs import geneval
from pixart_jobs.certainty import Figure, measure
from pixart_jobs.recipe import Recipe
from pixart_jobs.scenes import compose, is_unseen_pair, sample_reading
from pixart_models.digits import READER, Reading, UnreadableImage, describe, evaluation_reader
from pixart_platform.partitions import Progress, Sink, run_partitions
from pixart_platform.storage import Folder
from pixart_platform.tables import OK, SCHEMAS, Table, TableWriter

_READER_SCENES = 2000
_READER_SEED = 8

Picture = NDArray[np.uint8]
Row = dict[str, Any]
"""A row of a judgements table."""
Seen = tuple[str, bytes]
"""What a judge saw, as JSON, and features (fp32), either of which may be empty."""
Judge = Callable[[Sequence[Picture], Sequence[str]], list[Seen]]
"""Pictures and the prompts they were drawn for -> what is seen in each."""
Outcomes = dict[str, list[list[float]]]
"""Of each metric, for each prompt in order, what was right and out of how much."""


@dataclass(frozen=True)
class Measured:
    """What a suite found: all figures, and those made of outcomes prompt by prompt."""

    figures: dict[str, Figure]
    outcomes: Outcomes = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Suite(Protocol):
    """One way to evaluate a version."""

    @property
    def name(self) -> str:
        """Of its folder and of the version's tag."""
        ...

    @property
    def revision(self) -> int:
        """Moves on when the same pictures would be judged otherwise."""
        ...

    @property
    def prompts(self) -> Sequence[str]: ...

    @property
    def copies(self) -> int:
        """Pictures of each prompt."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its figures beside prompts and pictures."""
        ...

    @property
    def num_references(self) -> int:
        """Pictures that ``prepare`` judges."""
        ...

    def prepare(self, root: Folder, workers: "Workers") -> Progress:
        """Make, under ``root``, what pictures are compared with, unless it is there."""
        ...

    def make_judge(self) -> Judge:
        """Called once a worker, where the suite comes by pickle."""
        ...

    def measure(self, rows: list[Row], root: Folder) -> Measured:
        """Figures of all judgements, ``copies`` a prompt, in order; ``root`` is ``prepare``'s."""
        ...


@dataclass(frozen=True)
class Workers:
    """Who does a job: how many, with how many GPUs each."""

    count: int
    num_gpus: float
    nodes: Mapping[str, str]

    @classmethod
    def of(cls, recipe: Recipe) -> "Workers":
        count = recipe.evaluate.num_workers or recipe.train.num_workers
        return cls(count, 1 if recipe.train.use_gpu else 0, recipe.evaluate.nodes)


def judge_pictures(
    suite: Suite, read: Callable[[int], pa.Table], writer: TableWriter, workers: Workers
) -> Progress:
    """Judge what ``read`` finds for each unfinished partition: ``id``, ``prompt`` and ``png``."""
    return run_partitions(
        read=read, transform=_Judging, transform_kwargs={"suite": suite},
        sinks=[Sink.of(writer, ("id", "status", "seen", "features"))],
        num_readers=min(workers.count, writer.num_partitions), num_actors=workers.count,
        num_gpus=workers.num_gpus, nodes=workers.nodes,
    )  # fmt: skip


class _Judging:
    def __init__(self, suite: Suite) -> None:
        self._judge = suite.make_judge()

    def __call__(self, rows: pa.Table) -> pa.Table:
        pictures = [np.asarray(Image.open(io.BytesIO(png))) for png in rows["png"].to_pylist()]
        seen = self._judge(pictures, rows["prompt"].to_pylist())
        judged = [
            {"id": id_, "status": OK, "seen": said, "features": features}
            for id_, (said, features) in zip(rows["id"].to_pylist(), seen, strict=True)
        ]
        return pa.Table.from_pylist(judged, SCHEMAS["judgements/1"])


def encode_png(picture: Picture) -> bytes:
    """The picture, (H, W, 3), as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png")
    return buffer.getvalue()


def read_rows(table: Table) -> list[Row]:
    """All rows of a judgements table, in order."""
    parts = (table.read(k) for k in range(table.num_partitions))
    return [row for part in parts for row in part.to_pylist()]


class NoReferences:
    """What suites share that compare with nothing."""

    num_references = 0

    def prepare(self, root: Folder, workers: "Workers") -> Progress:
        return ()


def held_out_prompts(count: int, seed: int) -> list[Reading]:
    """``count`` readings that no training scene shows, singles and pairs mixed."""
    rng = np.random.default_rng([seed, 7])
    return [sample_reading(rng, held_out=True) for _ in range(count)]


def judge_reading(want: Reading, got: Reading | None) -> dict[str, list[float]]:
    """Digits and colours drawn right, in their places, the relation, and the number of digits;
    and both, digit and colour, of pairs that training showed and of those that it never did.

    A picture that cannot be read, or shows another number of digits, is wrong in all.
    """
    count = len(want.digits)
    counted = got is not None and len(got.digits) == count
    digits, colors, related = [False] * count, [False] * count, False
    if got is not None and counted:
        digits = [a == b for a, b in zip(want.digits, got.digits, strict=True)]
        colors = [a == b for a, b in zip(want.colors, got.colors, strict=True)]
        related = want.relation is not None and want.relation == got.relation
    both = [d and c for d, c in zip(digits, colors, strict=True)]
    unseen = list(map(is_unseen_pair, want.digits, want.colors))
    right_unseen, num_unseen = sum(map(min, both, unseen)), sum(unseen)
    return {
        "digit_accuracy": [sum(digits), count],
        "color_accuracy": [sum(colors), count],
        "relation_accuracy": [int(related), int(want.relation is not None)],
        "count_accuracy": [int(counted), 1],
        "seen_pair_accuracy": [sum(both) - right_unseen, count - num_unseen],
        "unseen_pair_accuracy": [right_unseen, num_unseen],
    }


def collect(judged: Iterable[dict[str, list[float]]]) -> Outcomes:
    """Outcomes by metric; a metric that applies to no prompt is left out."""
    outcomes: Outcomes = {}
    for found in judged:
        for name, pair in found.items():
            outcomes.setdefault(name, []).append(pair)
    return {name: pairs for name, pairs in outcomes.items() if any(total for _, total in pairs)}


def figures_of(outcomes: Outcomes) -> dict[str, Figure]:
    """Each metric's ratio, with its interval over prompts."""
    return {name: measure(np.array(pairs, np.float64)) for name, pairs in outcomes.items()}


@cache
def measure_reader() -> Figure:
    """Digit accuracy of the evaluation's reader on scenes of *train* scans, unseen by it."""
    reader, rng = evaluation_reader(), np.random.default_rng(_READER_SEED)
    wanted = [sample_reading(rng, held_out=True) for _ in range(_READER_SCENES)]
    scenes = [compose(reading, "train", rng) for reading in wanted]
    seen = reader.read_many([scene.image for scene in scenes])
    pairs = [judge_reading(*both)["digit_accuracy"] for both in zip(wanted, seen, strict=True)]
    return measure(np.array(pairs, np.float64))


@dataclass(frozen=True)
class DigitsSuite(NoReferences):
    """Held-out prompts of the sample scenes, read by the digit reader."""

    num_prompts: int
    seed: int
    name = "digits"
    revision = 3  # 2 had no pairs that training never shows
    copies = 1

    @property
    def wanted(self) -> list[Reading]:
        return held_out_prompts(self.num_prompts, self.seed)

    @property
    def prompts(self) -> Sequence[str]:
        return [describe(reading) for reading in self.wanted]

    @property
    def settings(self) -> dict[str, Any]:
        return {"reader": READER}

    def make_judge(self) -> Judge:
        reader = evaluation_reader()

        def read(picture: Picture) -> Seen:
            try:
                seen = reader.read(picture)
            except UnreadableImage:
                return "", b""
            return json.dumps([seen.digits, seen.colors, seen.relation]), b""

        return lambda pictures, _: [read(picture) for picture in pictures]

    def measure(self, rows: list[Row], root: Folder) -> Measured:
        seen = [parse_reading(row["seen"]) for row in rows]
        outcomes = collect(map(judge_reading, self.wanted, seen))
        return Measured(figures_of(outcomes) | {"reader_accuracy": measure_reader()}, outcomes)


def parse_reading(text: str) -> Reading | None:
    """What the judge of digits wrote; None for a picture it could not read."""
    if not text:
        return None
    digits, colors, relation = json.loads(text)
    return Reading(tuple(digits), tuple(colors), relation)


@dataclass(frozen=True)
class PromptsSuite(NoReferences):
    """The prompts of a file, their pictures judged by what a detector finds."""

    path: Path
    tasks: tuple[geneval.Task, ...]
    copies: int
    detector: str
    revision = 1

    @classmethod
    def open(cls, path: str, copies: int, detector: str) -> "PromptsSuite":
        """Raises PromptFileError, and DetectorError for one that cannot be loaded here."""
        place = Path(path).expanduser()
        tasks = tuple(geneval.read_tasks(place))
        geneval.load_detector(detector)
        return cls(place, tasks, copies, detector)

    @property
    def stem(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.path.stem.lower()).strip("-")[:40] or "file"

    @property
    def name(self) -> str:
        return f"prompts-{self.stem}"

    @property
    def prompts(self) -> Sequence[str]:
        return [task.prompt for task in self.tasks]

    @property
    def settings(self) -> dict[str, Any]:
        detector = [self.detector, geneval.detector_revision(self.detector)]
        return {"detector": detector, "tasks": geneval.digest_tasks(self.tasks)}

    def make_judge(self) -> Judge:
        detect = geneval.load_detector(self.detector)
        return lambda pictures, _: [(geneval.dump_objects(detect(p)), b"") for p in pictures]

    def measure(self, rows: list[Row], root: Folder) -> Measured:
        """A metric a tag, and ``overall``, whose outcomes weigh tags alike, not prompts."""
        right = [
            geneval.is_right(self.tasks[i // self.copies], geneval.load_objects(row["seen"]))
            for i, row in enumerate(rows)
        ]
        sums = np.array(right, np.float64).reshape(-1, self.copies).sum(axis=1)
        tags = [task.tag for task in self.tasks]
        counts, outcomes = Counter(tags), Outcomes()
        for tag in counts:
            mine = [float(own == tag) for own in tags]
            outcomes[f"{self.stem}_{tag}"] = [
                [s * one, self.copies * one] for s, one in zip(sums.tolist(), mine, strict=True)
            ]
        shares = [1 / counts[tag] for tag in tags]
        outcomes[f"{self.stem}_overall"] = [
            [s / self.copies * share, share] for s, share in zip(sums.tolist(), shares, strict=True)
        ]
        figures = figures_of(outcomes)
        if self.detector == geneval.BUILTIN:
            figures["reader_accuracy"] = measure_reader()
        return Measured(figures, outcomes)
