"""The suite ``crowds``: held-out captions of the harder sample task, read by the crowd reader.

Digits and colours count in reading order; of a relation and of places it matters that they hold;
a picture with another number of digits is wrong in all. ``attribute_accuracy`` is the share of all
that a caption says, the number of digits among it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pixart_jobs.crowd_scenes import sample_crowd
from pixart_jobs.scenes import is_unseen_pair
from pixart_jobs.suites import (
    Judge,
    Measured,
    NoReferences,
    Picture,
    Row,
    Seen,
    collect,
    figures_of,
    measure_reader,
)
from pixart_models.crowds import Crowd, CrowdReader, describe_crowd
from pixart_models.digits import READER, UnreadableImage, evaluation_reader
from pixart_platform.storage import Folder


def held_out_crowds(count: int, seed: int) -> list[Crowd]:
    """``count`` crowds that no training scene shows, of all kinds."""
    rng = np.random.default_rng([seed, 11])
    return [sample_crowd(rng, held_out=True) for _ in range(count)]


def judge_crowd(want: Crowd, got: Crowd | None) -> dict[str, list[float]]:
    """What was right of each attribute, and out of how much."""
    count = len(want.shown)
    counted = got is not None and len(got.shown) == count
    digits, colors, arranged = [False] * count, [False] * count, False
    if got is not None and counted:
        both = list(zip(want.shown, got.shown, strict=True))
        digits = [a[0] == b[0] for a, b in both]
        colors = [a[1] == b[1] for a, b in both]
        arranged = (
            want.relation == got.relation if want.kind == "related" else want.taken == got.taken
        )
    right = [d and c for d, c in zip(digits, colors, strict=True)]
    unseen = [is_unseen_pair(*shown) for shown in want.shown]
    right_unseen = sum(map(min, right, unseen))
    outcomes: dict[str, list[float]] = {
        "digit_accuracy": [sum(digits), count],
        "color_accuracy": [sum(colors), count],
        "relation_accuracy": _if(want.kind == "related", arranged),
        "place_accuracy": _if(want.kind == "placed", arranged),
        "count_accuracy": [int(counted), 1],
    }
    said = np.sum(list(outcomes.values()), axis=0)
    return outcomes | {
        "attribute_accuracy": said.tolist(),
        "seen_pair_accuracy": [sum(right) - right_unseen, count - sum(unseen)],
        "unseen_pair_accuracy": [right_unseen, sum(unseen)],
    }


def _if(asked: bool, right: bool) -> list[float]:
    return [int(asked and right), int(asked)]


@dataclass(frozen=True)
class CrowdsSuite(NoReferences):
    """Held-out captions of crowds."""

    num_prompts: int
    seed: int
    name = "crowds"
    revision = 1
    copies = 1

    @property
    def wanted(self) -> list[Crowd]:
        return held_out_crowds(self.num_prompts, self.seed)

    @property
    def prompts(self) -> Sequence[str]:
        return [describe_crowd(crowd) for crowd in self.wanted]

    @property
    def settings(self) -> dict[str, Any]:
        return {"reader": READER}

    def make_judge(self) -> Judge:
        reader = CrowdReader(evaluation_reader())

        def read(picture: Picture) -> Seen:
            try:
                return json.dumps(reader.read(picture).places), b""
            except UnreadableImage:
                return "", b""

        return lambda pictures, _: [read(picture) for picture in pictures]

    def measure(self, rows: list[Row], root: Folder) -> Measured:
        seen = [Crowd.load(json.loads(row["seen"])) if row["seen"] else None for row in rows]
        outcomes = collect(map(judge_crowd, self.wanted, seen))
        return Measured(figures_of(outcomes) | {"reader_accuracy": measure_reader()}, outcomes)
