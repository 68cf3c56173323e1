"""Aspect buckets: the shapes a multi-aspect stage trains on, and the crop that fits a picture in.

A batch holds one shape, so pictures are gathered in a few *buckets* of about equal area, between
1:4 and 4:1. One rule makes the table of any resolution: sides are whole steps between half and
twice the base side, and an area is 90 to 100 % of the base square. At a sixteenth of the base as
step it gives the table PixArt-alpha publishes for 256, 512 and 1024 px (Sigma's 2048 too):
diffusion/data/datasets/utils.py, ASPECT_RATIO_*.

Legend: sizes are (height, width) in pixels; a ratio is height / width.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from pixart_models.config import ModelInputError

MAX_RATIO = 4
"""PixArt leaves out pictures longer than this many times their short side."""

_LEFT_OUT = (21, 11)  # in sixteenths of the base: the published tables hold only its transpose


class Size(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


class Crop(NamedTuple):
    """A picture is resized to height x width, then cut at top, left; all in pixels."""

    height: int
    width: int
    top: int
    left: int


@lru_cache(maxsize=16)
def buckets(resolution: int, multiple: int = 16) -> tuple[Size, ...]:
    """The buckets of a base side, from wide to tall; the square is always one of them.

    ``multiple`` is what every side must divide by: autoencoder factor x patch, 16 for PixArt.
    Raises ModelInputError when the base side does not.
    """
    if resolution < 1 or resolution % multiple:
        raise ModelInputError(
            f"aspect buckets of {resolution} px: the base side must be a positive multiple of "
            f"{multiple} (autoencoder factor x patch)"
        )
    step = _step(resolution, multiple)
    base = resolution // step
    sides = range((base + 1) // 2, 2 * base + 1)
    by_ratio = {  # of two of one ratio the later, larger one stays
        h / w: Size(h * step, w * step)
        for h in sides
        for w in sides
        if 9 * base * base <= 10 * h * w <= 10 * base * base
        if (16 * h, 16 * w) != (_LEFT_OUT[0] * base, _LEFT_OUT[1] * base)
    }
    return tuple(by_ratio[ratio] for ratio in sorted(by_ratio))


def _step(resolution: int, multiple: int) -> int:
    """The legal step nearest a sixteenth of the base side.

    Not the finest: at 640 px steps of 16 would make 229 buckets, each too small to fill batches.
    """
    legal = [s for s in range(multiple, resolution + 1, multiple) if resolution % s == 0]
    return min(legal, key=lambda s: max(16 * s / resolution, resolution / (16 * s)))


def nearest_bucket(height: int, width: int, table: Sequence[Size]) -> Size:
    """The bucket that cuts least off a picture of this size, in pixels > 0; of two, the squarer.

    Nearest is by the quotient of ratios, so a picture and its transpose are treated alike; PixArt
    compares the difference of ratios rounded to two decimals, which favours flat buckets.
    """

    def loss(bucket: Size) -> tuple[float, float]:
        ours, theirs = height * bucket.width, width * bucket.height
        return max(ours, theirs) / min(ours, theirs), max(bucket) / min(bucket)

    return min(table, key=loss)


def is_extreme(height: int, width: int) -> bool:
    """Whether a picture is longer than MAX_RATIO times its short side, which PixArt leaves out."""
    return max(height, width) > MAX_RATIO * min(height, width)


def cover(height: int, width: int, bucket: Size) -> Crop:
    """The smallest resize that covers ``bucket``, and where its centre is cut out.

    A function of sizes alone: tables keep a picture's size and bucket, and the crop follows.
    """
    scale = max(bucket.height / height, bucket.width / width)
    tall, wide = max(bucket.height, round(height * scale)), max(bucket.width, round(width * scale))
    return Crop(tall, wide, (tall - bucket.height) // 2, (wide - bucket.width) // 2)
