"""Reading digit scenes from pixels: find the digits, name them, their colours and relation.

This is the demo's stand-in for a vision-language model, and it sees what one would: pixels only.
Two readers exist and never share a scan: the captioner is fitted on the train scans, the
evaluator on the test scans, bent a little too since they are few. Fitting takes a few seconds.

Legend: H, W picture height and width in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 80, 235),
    "yellow": (230, 215, 40),
    "purple": (200, 50, 215),
    "cyan": (40, 210, 220),
    "white": (235, 235, 235),
}
READER = "2"  # revision of all that is read; 1 looked at pixels, not at their gradients
_SIDE, _CELLS, _TURNS = 16, 4, 8  # of a digit that is classified: pixels, and bins of its strokes
_AT_ONCE = 256  # digits, for the processor's caches
_PAIR_EXTENT = 0.63  # of the picture: no single digit of the set is drawn wider or taller


Relation = Literal["left of", "above"]
RELATIONS: tuple[Relation, ...] = ("left of", "above")


@dataclass(frozen=True)
class Reading:
    """What a scene shows, in reading order (left to right, or top to bottom)."""

    digits: tuple[int, ...]
    colors: tuple[str, ...]
    relation: Relation | None = None

    @property
    def label(self) -> int | None:
        """Class 0-9 of a single digit; None for a pair, as web images seldom have one."""
        return self.digits[0] if len(self.digits) == 1 else None


@dataclass(frozen=True)
class FoundDigit:
    """A digit in a picture; its box is (left, top, right, bottom) in pixels."""

    digit: int
    color: str
    box: tuple[int, int, int, int]


Piece = tuple[NDArray[np.uint8], NDArray[np.float32]]
"""A part of a picture with one digit, (H, W, 3), and its ink (H, W) in 0-1."""


class UnreadableImage(ValueError):
    """No digit could be found in a picture."""


def describe(reading: Reading) -> str:
    """The dense caption of a scene, for example ``a red three to the left of a blue seven``."""
    nouns = [f"a {c} {DIGIT_NAMES[d]}" for d, c in zip(reading.digits, reading.colors, strict=True)]
    if reading.relation is None:
        return f"{nouns[0]} in the middle of a dark picture"
    relation = "to the left of" if reading.relation == "left of" else "above"
    return f"{nouns[0]} {relation} {nouns[1]} on a dark picture"


@cache
def load_scans(split: Literal["train", "test"]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scans (N, 8, 8) in 0-1 and labels (N,): two thirds train, every third scan test."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    is_test = np.arange(len(data.target)) % 3 == 2
    chosen = is_test if split == "test" else ~is_test
    scans = np.asarray(data.images[chosen] / 16, np.float32)
    return scans, np.asarray(data.target[chosen], np.int64)


def find_ink(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Brightness of a picture (H, W, 3) above the median of its border, (H, W) in 0-1."""
    peak = image.max(axis=-1).astype(np.float32)
    border = np.concatenate([peak[0], peak[-1], peak[:, 0], peak[:, -1]])
    ground = float(np.median(border))
    reach = max(float(np.quantile(peak, 0.99)) - ground, 60.0)
    ink: NDArray[np.float32] = np.clip((peak - ground) / reach, 0, 1).astype(np.float32)
    return ink


def _extent(profile: NDArray[np.float32], threshold: float) -> tuple[int, int]:
    """First and one-past-last index where ``profile`` exceeds ``threshold``."""
    above = np.flatnonzero(profile > threshold)
    if len(above) == 0:
        raise UnreadableImage("no digit found: the picture has no bright strokes")
    return int(above[0]), int(above[-1]) + 1


def _box(ink: NDArray[np.float32]) -> tuple[slice, slice]:
    """Bounding box of the strokes: two bright pixels in a row or column make it part of one."""
    rows = np.sort(ink, axis=1)[:, -2:].mean(axis=1)
    columns = np.sort(ink, axis=0)[-2:].mean(axis=0)
    return slice(*_extent(rows, 0.4)), slice(*_extent(columns, 0.4))


def _centre(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """One digit, cropped, in the middle of a square, scaled to ``_SIDE`` pixels and to 1."""
    crop = ink[_box(ink)]
    side = max(crop.shape)
    square = np.zeros((side, side), np.float32)
    top, left = (side - crop.shape[0]) // 2, (side - crop.shape[1]) // 2
    square[top : top + crop.shape[0], left : left + crop.shape[1]] = crop / max(crop.max(), 1e-6)
    return np.asarray(Image.fromarray(square).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC))


def _features(inks: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Oriented gradients of N digits, (N, _TURNS * _CELLS**2), each as shares of the whole.

    Each votes for the nearest directions and cells (Dalal and Triggs 2005, section 6). A
    classifier of the pixels themselves errs half as often again and more (jobs/LOG.md).
    """
    if len(inks) > _AT_ONCE:
        several = range(0, len(inks), _AT_ONCE)
        return np.concatenate([_features(inks[i : i + _AT_ONCE]) for i in several])
    shown = np.pad(np.stack([_centre(ink) for ink in inks]), ((0, 0), (1, 1), (1, 1)))
    down = (shown[:, 2:, 1:-1] - shown[:, :-2, 1:-1]) / 2
    right = (shown[:, 1:-1, 2:] - shown[:, 1:-1, :-2]) / 2
    turn = np.arctan2(down, right) * (_TURNS / (2 * np.pi))
    bins = np.arange(_TURNS, dtype=np.float32)[:, None, None]
    apart = np.abs((turn[:, None] - bins) % _TURNS)  # (N, _TURNS, _SIDE, _SIDE)
    votes = np.hypot(down, right)[:, None] * np.maximum(1 - np.minimum(apart, _TURNS - apart), 0)
    middles = (np.arange(_CELLS, dtype="f4")[:, None] + 0.5) * (_SIDE / _CELLS) - 0.5
    near = np.maximum(1 - np.abs(np.arange(_SIDE, dtype="f4") - middles) * (_CELLS / _SIDE), 0)
    cells = (near @ votes @ near.T).reshape(len(inks), -1)
    features: NDArray[np.float32] = np.sqrt(cells / np.maximum(cells.sum(axis=1)[:, None], 1e-6))
    return features


def _name_color(image: NDArray[np.uint8], ink: NDArray[np.float32]) -> str:
    """The palette colour nearest in direction to the strokes' mean above the ground."""
    weight = (ink * (ink > 0.6))[..., None]
    mean = (image * weight).sum(axis=(0, 1)) / max(float(weight.sum()), 1e-6)
    palette = np.array(list(COLORS.values()), np.float32)
    direction = mean / max(float(np.linalg.norm(mean)), 1e-6)
    similarity = (palette / np.linalg.norm(palette, axis=1, keepdims=True)) @ direction
    return list(COLORS)[int(similarity.argmax())]


def _bend(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A digit as another hand might have written it: turned, sheared and stretched a little."""
    big = Image.fromarray(np.pad(np.asarray(image), 3))
    turn, shear = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.2, 0.2)
    stretch = np.diag(1 + rng.uniform(-0.1, 0.1, 2))
    matrix = np.array([[np.cos(turn), shear - np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = matrix @ stretch
    middle = np.full(2, big.width / 2)
    rows = np.column_stack([matrix, middle - matrix @ middle]).reshape(-1).tolist()
    return big.transform(big.size, Image.Transform.AFFINE, rows, Image.Resampling.BICUBIC)


def _split_pair(ink: NDArray[np.float32], axis: int) -> int:
    """Where a pair parts along ``axis``: the emptiest line of the middle third."""
    profile = ink.sum(axis=1 - axis)
    low, high = len(profile) // 3, len(profile) - len(profile) // 3
    valley = np.flatnonzero(profile[low:high] <= profile[low:high].min() + 1e-6)
    return low + int(valley[len(valley) // 2])


class DigitReader:
    """Reads scenes with a support-vector classifier fitted on the scans of one split.

    ``bends`` is how many bent copies of each it learns from beside the scan itself.
    """

    def __init__(self, split: Literal["train", "test"], seed: int = 0, *, bends: int = 0) -> None:
        from sklearn.svm import SVC

        self.split = split
        scans, labels = load_scans(split)
        rng = np.random.default_rng(seed)
        inks, targets = list[NDArray[np.float32]](), []
        for size in (14, 20, 26):  # the sizes at which scenes of 32 and 48 pixels show digits
            for scan, label in zip(scans, labels, strict=True):
                big = Image.fromarray((scan * 255).astype(np.uint8)).resize(
                    (size, size), Image.Resampling.BICUBIC
                )
                for shown in (big, *(_bend(big, rng) for _ in range(bends))):
                    noisy = np.asarray(shown, np.float32) / 255 + rng.normal(0, 0.03, shown.size)
                    inks.append(np.pad(np.clip(noisy, 0, 1), 2).astype(np.float32))
                    targets.append(label)
        self._classifier: Any = SVC(C=10, gamma="scale").fit(_features(inks), targets)

    def read(self, image: NDArray[np.uint8]) -> Reading:
        """Read one picture (H, W, 3). Raises UnreadableImage when it shows no digit."""
        return self.read_many([image])[0]

    def find(self, image: NDArray[np.uint8]) -> list[FoundDigit]:
        """The digits of a picture (H, W, 3): one or two, in their places; none if it shows none."""
        try:
            reading = self.read(image)
        except UnreadableImage:
            return []
        found, left, top = [], 0, 0
        pieces, relation = _find_digits(image)
        for digit, color, (_, ink) in zip(reading.digits, reading.colors, pieces, strict=True):
            rows, columns = _box(ink)
            box = (left + columns.start, top + rows.start, left + columns.stop, top + rows.stop)
            found.append(FoundDigit(digit, color, box))
            left += ink.shape[1] if relation == "left of" else 0
            top += ink.shape[0] if relation == "above" else 0
        return found

    def read_many(self, images: Sequence[NDArray[np.uint8]]) -> list[Reading]:
        """Read pictures of any sizes; raises UnreadableImage for one that shows no digit."""
        found = [_find_digits(image) for image in images]
        named = iter(self.name([piece for pieces, _ in found for piece in pieces]))
        readings = []
        for pieces, relation in found:
            digits, colors = zip(*(next(named) for _ in pieces), strict=True)
            readings.append(Reading(digits, colors, relation))
        return readings

    def name(self, pieces: Sequence[Piece]) -> list[tuple[int, str]]:
        """The digit of each piece and its colour. Raises UnreadableImage for one without."""
        digits = self._classifier.predict(_features([ink for _, ink in pieces])).tolist()
        return [(d, _name_color(*piece)) for d, piece in zip(digits, pieces, strict=True)]


@cache
def evaluation_reader() -> DigitReader:
    """The one that judges: fitted on test scans, which nothing else has seen; once a process."""
    return DigitReader("test", bends=3)


def _find_digits(image: NDArray[np.uint8]) -> tuple[list[Piece], Relation | None]:
    """Cut a picture into one or two (picture, ink) pieces and name their relation."""
    ink = find_ink(image)
    rows, columns = _box(ink)
    height, width = ink.shape
    if columns.stop - columns.start > _PAIR_EXTENT * width:
        cut = _split_pair(ink, axis=1)
        return [(image[:, s], ink[:, s]) for s in (slice(cut), slice(cut, None))], "left of"
    if rows.stop - rows.start > _PAIR_EXTENT * height:
        cut = _split_pair(ink, axis=0)
        return [(image[s], ink[s]) for s in (slice(cut), slice(cut, None))], "above"
    return [(image, ink)], None
