"""Crowds: up to four digits in the places of a square, to be counted, related or placed.

The harder of the two sample tasks, for where digit scenes (``digits``) are learned to the end: what
a caption says of a crowd depends on what it is. All alike, they are counted and stand anywhere; two
that differ, side by side or one above the other, are related; all others are placed one by one.
The reader sees pixels only, as that of digit scenes, whose classifier it uses.

Legend: H, W picture height and width in pixels.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pixart_models.digits import (
    DIGIT_NAMES,
    DigitReader,
    Piece,
    Reading,
    UnreadableImage,
    describe,
    find_ink,
)

PLACES = ("top left", "top right", "bottom left", "bottom right")
NUMBERS = {2: "two", 3: "three", 4: "four"}
_LEAST_INK = 0.02  # share of a place's pixels that are bright; noise makes none, a thin one 5 %
_RELATIONS = {
    (0, 1): "to the left of", (2, 3): "to the left of", (0, 2): "above", (1, 3): "above",
}  # fmt: skip
Kind = Literal["alike", "related", "placed"]
Shown = tuple[int, str]
"""A digit and the name of its colour."""


@dataclass(frozen=True)
class Crowd:
    """What each of ``PLACES`` shows, if anything; at least one does."""

    places: tuple[Shown | None, ...]

    @classmethod
    def load(cls, places: Sequence[Sequence[Any] | None]) -> "Crowd":
        """From JSON, which has no tuples."""
        return cls(tuple((int(p[0]), str(p[1])) if p else None for p in places))

    @property
    def taken(self) -> tuple[int, ...]:
        """Which places show something, in reading order."""
        return tuple(i for i, shown in enumerate(self.places) if shown)

    @property
    def shown(self) -> list[Shown]:
        """In reading order."""
        return [shown for shown in self.places if shown]

    @property
    def label(self) -> int | None:
        """Class 0-9 where all digits are the same; else None."""
        digits = {digit for digit, _ in self.shown}
        return digits.pop() if len(digits) == 1 else None

    @property
    def kind(self) -> Kind:
        if len(self.shown) > 1 and len(set(self.shown)) == 1:
            return "alike"
        return "related" if self.relation else "placed"

    @property
    def relation(self) -> str | None:
        """Of two that stand side by side or one above the other."""
        return _RELATIONS.get(self.taken) if len(self.taken) == 2 else None


def describe_crowd(crowd: Crowd) -> str:
    """The dense caption, for example ``three green fives on a dark picture``."""
    names = [f"a {color} {DIGIT_NAMES[digit]}" for digit, color in crowd.shown]
    if crowd.kind == "alike":
        digit, color = crowd.shown[0]
        plural = DIGIT_NAMES[digit] + ("es" if DIGIT_NAMES[digit].endswith(("o", "x")) else "s")
        return f"{NUMBERS[len(names)]} {color} {plural} on a dark picture"
    if crowd.kind == "related":
        return f"{names[0]} {crowd.relation} {names[1]} on a dark picture"
    placed = [f"{name} at the {PLACES[i]}" for i, name in zip(crowd.taken, names, strict=True)]
    head, last = ", ".join(placed[:-1]), placed[-1]
    return f"{head} and {last} on a dark picture" if head else f"{last} of a dark picture"


def describe_truth(truth: str) -> str:
    """The dense caption of a sample scene, from the JSON that its row carries."""
    raw = json.loads(truth)
    if "places" in raw:
        return describe_crowd(Crowd.load(raw["places"]))
    return describe(Reading(tuple(raw["digits"]), tuple(raw["colors"]), raw["relation"]))


class CrowdReader:
    """Reads crowds with the classifier of a reader of digit scenes."""

    def __init__(self, digits: DigitReader) -> None:
        self._digits = digits

    def read(self, image: NDArray[np.uint8]) -> Crowd:
        """Read one picture (H, W, 3). Raises UnreadableImage when it shows no digit."""
        ink, height, width = find_ink(image), image.shape[0] // 2, image.shape[1] // 2
        pieces = dict[int, Piece]()
        for i in range(len(PLACES)):
            rows = slice(height) if i < 2 else slice(height, None)
            columns = slice(width) if i % 2 == 0 else slice(width, None)
            if (ink[rows, columns] > 0.5).mean() > _LEAST_INK:
                pieces[i] = image[rows, columns], ink[rows, columns]
        if not pieces:
            raise UnreadableImage("no digit found: the picture has no bright strokes")
        named = dict(zip(pieces, self._digits.name(list(pieces.values())), strict=True))
        return Crowd(tuple(named.get(i) for i in range(len(PLACES))))
