"""Digit scenes: real scans composed into small colour pictures, the demo's "pile of web images".

The 1,797 handwritten digits that scikit-learn carries (UCI optical recognition set, 8x8 pixels, 17
grey levels) are drawn in named colours on a dark ground: one digit, or two in a relation. Each
scene carries what the web would give (a poor raw caption), and its truth, which only the
evaluation and the accuracy report may read. A scene is a pure function of (split, seed, index),
so any partition can be composed anywhere, in any order.

Scans are split by index into disjoint train and test sets, and prompts into two: training shows no
digit in the one colour that ``is_unseen_pair`` names, no two digits in a relation that
``is_unseen_relation`` names, and of the other prompts all but one in ten (by hash). Evaluation
draws only prompts that are held out, so it tells what was learned from what was repeated.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixart_models.crowds import Crowd
from pixart_models.digits import COLORS, DIGIT_NAMES, RELATIONS, Reading, describe, load_scans

Split = Literal["train", "test"]

SCENE_SIZE = 48  # pixels a side
PAIR_SHARE = 0.5  # of scenes with two digits
NOISY_SHARE = 0.2  # of scenes with visible sensor noise, which stage 3's curation drops


Shown = TypeVar("Shown", Reading, Crowd)


@dataclass(frozen=True)
class Scene(Generic[Shown]):
    """One composed picture with everything known about it."""

    image: NDArray[np.uint8]  # (side, side, 3)
    reading: Shown
    raw_caption: str

    @property
    def label(self) -> int | None:
        return self.reading.label

    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, format="png", compress_level=1)
        return buffer.getvalue()

    def truth(self) -> str:
        return json.dumps(asdict(self.reading))


@cache
def _scans_by_digit(split: Split) -> tuple[NDArray[np.float32], ...]:
    scans, labels = load_scans(split)
    return tuple(scans[labels == digit] for digit in range(10))


def is_unseen_pair(digit: int, color: str) -> bool:
    """Whether training never shows this digit in this colour: one colour in seven of each digit."""
    return list(COLORS).index(color) == (3 * digit + 1) % len(COLORS)


def is_unseen_relation(reading: Reading) -> bool:
    """Whether training never shows these two digits so related: one in ten of such triples."""
    if reading.relation is None:
        return False
    first, second = reading.digits
    return (first + 2 * second + 5 * RELATIONS.index(reading.relation)) % 10 == 0


def is_held_out(reading: Reading) -> bool:
    """Whether this prompt belongs to evaluation."""
    return (
        any(map(is_unseen_pair, reading.digits, reading.colors))
        or is_unseen_relation(reading)
        or hashlib.sha256(describe(reading).encode()).digest()[0] % 10 == 0
    )


def sample_reading(rng: np.random.Generator, *, held_out: bool) -> Reading:
    """A random scene description from the training prompts, or from the held-out ones."""
    pair = rng.random() < PAIR_SHARE
    count = 2 if pair else 1
    while True:
        reading = Reading(
            digits=tuple(int(d) for d in rng.integers(0, 10, count)),
            colors=tuple(str(c) for c in rng.choice(list(COLORS), count)),
            relation=RELATIONS[rng.integers(len(RELATIONS))] if pair else None,
        )
        if is_held_out(reading) == held_out:
            return reading


def _paint_digit(
    canvas: NDArray[np.float32],
    scan: NDArray[np.float32],
    color: str,
    size: int,
    center: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    """Blend one scan into ``canvas`` (H, H, 3), values in 0-255, ``center`` as (row, column)."""
    alpha_image = Image.fromarray((scan * 255).astype(np.uint8)).resize(
        (size, size), Image.Resampling.BICUBIC
    )
    alpha = np.asarray(alpha_image, np.float32)[..., None] / 255
    top, left = (int(np.clip(round(c - size / 2), 0, len(canvas) - size)) for c in center)
    ink = np.clip(np.array(COLORS[color], np.float32) + rng.normal(0, 8, 3), 0, 255)
    window = canvas[top : top + size, left : left + size]
    window += alpha * (ink.astype(np.float32) - window)


def paint(
    shown: Sequence[tuple[int, str]], centers: Sequence[tuple[float, float]],
    sizes: tuple[int, int], side: int, split: Split, rng: np.random.Generator,
) -> NDArray[np.uint8]:  # fmt: skip
    """Random scans of digits in colours, their sizes from a range of pixels, near ``centers`` as
    (row, column), on a ground with noise: (side, side, 3)."""
    canvas = np.full((side, side, 3), rng.uniform(8, 40), np.float32)
    for (digit, color), (row, column) in zip(shown, centers, strict=True):
        scans = _scans_by_digit(split)[digit]
        scan = scans[rng.integers(len(scans))]
        shift = rng.uniform(-1.5, 1.5, 2)
        center = (row + float(shift[0]), column + float(shift[1]))
        _paint_digit(canvas, scan, color, int(rng.integers(*sizes)), center, rng)
    noise = rng.uniform(10, 16) if rng.random() < NOISY_SHARE else rng.uniform(0, 2)
    canvas += rng.normal(0, noise, canvas.shape).astype(np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _raw_caption(reading: Reading, rng: np.random.Generator) -> str:
    """What the web would say: file names, a missing colour, a forgotten second digit."""
    number = int(rng.integers(1, 9999))
    first, color = DIGIT_NAMES[reading.digits[0]], reading.colors[0]
    choices = [f"IMG_{number:04d}.png", f"scan {first}", f"{first} {number}.jpg", f"digit {color}"]
    if len(reading.digits) == 2:
        choices.append(f"{first} and {DIGIT_NAMES[reading.digits[1]]}")
    return str(rng.choice(choices))


def compose(reading: Reading, split: Split, rng: np.random.Generator) -> Scene[Reading]:
    """Draw ``reading`` with random scans of ``split``, sizes, places, ground and noise."""
    middle, offset = SCENE_SIZE / 2, SCENE_SIZE / 4
    if reading.relation is None:
        centers, sizes = [(middle, middle)], (26, 29)
    elif reading.relation == "left of":
        centers, sizes = [(middle, middle - offset), (middle, middle + offset)], (21, 23)
    else:
        centers, sizes = [(middle - offset, middle), (middle + offset, middle)], (21, 23)
    shown = list(zip(reading.digits, reading.colors, strict=True))
    image = paint(shown, centers, sizes, SCENE_SIZE, split, rng)
    return Scene(image, reading, _raw_caption(reading, rng))


def compose_scene(index: int, *, seed: int, split: Split = "train") -> Scene[Reading]:
    """Scene ``index`` of the endless set ``(split, seed)``; never a held-out prompt in train."""
    rng = np.random.default_rng([seed, 0 if split == "train" else 1, index])
    return compose(sample_reading(rng, held_out=split == "test"), split, rng)
