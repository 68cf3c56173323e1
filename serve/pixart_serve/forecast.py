"""How long work will take: row-steps that are here, at the pace that was measured.

The time of a batch is a curve over its size in row-pixels (rows x width x height), learnt from
every batch: on a GPU a small batch costs nearly what a medium one does, so that seconds per row
alone would call a lightly loaded engine slow. One curve serves all picture sizes; what attention
adds in large ones is averaged in. Nothing measured yet means no time at all: nobody is refused on
a guess.
"""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_NEWEST = 0.2  # weight of the newest batch in its average
_MARGIN, _MOST = 2.0, 5.0  # times a prediction: promised at least, and at most
_DEVIATIONS = 4.0  # of the ratio of actual to predicted seconds, above its mean
_SHORT_SECONDS = 0.5  # a prediction that teaches nothing: what comes between is as long
_CELLS_PER_DOUBLING = 4
_Group = TypeVar("_Group", bound=Hashable)


class Pace:
    """Seconds of a batch by its row-pixels."""

    def __init__(self) -> None:
        self._cells: dict[int, tuple[float, float]] = {}  # row-pixels and seconds, averaged
        self._fastest: dict[int, tuple[float, float]] = {}
        self._warm = False

    def observe(self, row_pixels: int, seconds: float) -> None:
        """Learn from a batch; not from the very first, which loads kernels and fills caches."""
        if not self._warm:
            self._warm = True
            return
        cell = round(_CELLS_PER_DOUBLING * math.log2(row_pixels))
        pixels, average = self._cells.get(cell, (float(row_pixels), seconds))
        self._cells[cell] = (
            pixels + _NEWEST * (row_pixels - pixels), average + _NEWEST * (seconds - average)
        )  # fmt: skip
        known = self._fastest.get(cell)
        if known is None or seconds / row_pixels < known[1] / known[0]:
            self._fastest[cell] = float(row_pixels), seconds

    def seconds(self, row_pixels: float, *, at_best: bool = False) -> float:
        """Interpolated; in proportion beyond the largest batch seen. ``at_best``: the fastest."""
        if not self._cells:
            return 0.0
        cells = sorted((self._fastest if at_best else self._cells).values())
        inside = float(np.interp(row_pixels, *np.transpose(cells)))
        return inside * max(row_pixels / cells[-1][0], 1.0)


class Promise:
    """What is promised of a prediction: a multiple of it that was enough for nearly all so far.

    The pace is that of a moment ago; callers that come in crowds slow it down themselves. So what
    came of earlier promises counts: the multiple is the mean of actual over predicted seconds and
    some mean deviations, with the gains of TCP's timer (Jacobson 1988, appendix A), and never less
    than a margin, for the first of a crowd.
    """

    def __init__(self) -> None:
        self._mean, self._deviation = 1.0, 0.0

    @property
    def multiple(self) -> float:
        return min(max(self._mean + _DEVIATIONS * self._deviation, _MARGIN), _MOST)

    def observe(self, predicted: float, seconds: float, *, is_over: bool = True) -> None:
        """Work predicted at ``predicted`` seconds took ``seconds``, or was given up after them."""
        if predicted < _SHORT_SECONDS:
            return
        ratio = seconds / predicted
        if is_over or ratio > self.multiple:  # who leaves early says nothing
            self._deviation += (abs(ratio - self._mean) - self._deviation) / 4
            self._mean += (ratio - self._mean) / 8


@dataclass
class Load:
    """Work of pictures of one size: rows, and the row-steps these still need."""

    pixels: int
    num_rows: int = 0
    num_row_steps: int = 0

    def add(self, num_rows: int, steps: int) -> None:
        self.num_rows += num_rows
        self.num_row_steps += num_rows * steps

    def turns(self, max_rows: int) -> int:
        """Batches until all of it is done."""
        return math.ceil(self.num_row_steps / max(min(self.num_rows, max_rows), 1))

    def turn_seconds(self, pace: Pace, max_rows: int) -> float:
        return pace.seconds(min(self.num_rows, max_rows) * self.pixels)


def predict_seconds(
    pace: Pace, max_rows: int, ahead: Mapping[_Group, Load], group: _Group, own: Load
) -> float:
    """Seconds until ``own`` work, queued behind ``ahead`` in its group, is done.

    Groups take turns, a batch each; within a group it is first come, first served. While work
    waits, all rows are busy, so that it begins when they could have done all that is ahead, at the
    latest (Graham 1966): the forecast may be late by less than its own work takes, never early.
    """
    before = ahead.get(group, Load(own.pixels))
    together = Load(
        own.pixels, before.num_rows + own.num_rows, before.num_row_steps + own.num_row_steps
    )
    fits = together.num_rows <= max_rows
    waits = 0 if fits else math.ceil(before.num_row_steps / max_rows)
    turns = waits + own.turns(max_rows)
    others = (
        min(turns, load.turns(max_rows)) * load.turn_seconds(pace, max_rows)
        for other, load in ahead.items()
        if other != group
    )
    return turns * together.turn_seconds(pace, max_rows) + sum(others)
