"""Fragments made by hand, and states of them, for tests that need no engine."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from pixart_platform.checkpoint import Progress, Saver, State, StateStore
from pixart_platform.engine import Fragment
from pixart_platform.storage import Folder

KINDS = ("weight", "average")
PATIENCE = 60.0
Values = dict[str, Tensor]  # a parameter's, flat
Cut = list[tuple[str, int, int]]  # (parameter, begin, end) of what a rank holds


def values_of(lengths: dict[str, int]) -> Values:
    """Different numbers everywhere."""
    ends = np.cumsum([0, *lengths.values()]).tolist()
    spans = zip(lengths, pairwise(ends), strict=True)
    return {name: torch.arange(*span).float() / 3 for name, span in spans}


def cut_out(values: Values, cut: Cut) -> list[Fragment]:
    """Fragments as an engine has them; the average is the weight's negative."""
    return [
        Fragment(name, begin, {"weight": values[name][begin:end],
                               "average": -values[name][begin:end]})
        for name, begin, end in cut
    ]  # fmt: skip


def blank(cut: Cut) -> list[Fragment]:
    """Fragments to restore into."""
    return [
        Fragment(name, begin, {kind: torch.full((end - begin,), math.nan) for kind in KINDS})
        for name, begin, end in cut
    ]


VALUES = values_of({"blocks.0.weight": 10, "blocks.0.bias": 3})
WHOLE: Cut = [("blocks.0.weight", 0, 10), ("blocks.0.bias", 0, 3)]
HALVES: list[Cut] = [[("blocks.0.weight", 0, 7)], [("blocks.0.weight", 7, 10), WHOLE[1]]]


def open_store(folder: Folder, digest: str = "run", keep: int = 99, **more: int) -> StateStore:
    return StateStore(folder, digest, keep, **more)


def save(
    store: StateStore,
    progress: Progress | int,
    cuts: Sequence[Cut] = (WHOLE,),
    values: Values = VALUES,
    token: str = "token",
) -> Folder:
    """A complete state by as many ranks as there are cuts."""
    progress = Progress(progress) if isinstance(progress, int) else progress
    savers = [Saver(store, rank, len(cuts), token) for rank in range(len(cuts))]
    for saver, cut in zip(savers, cuts, strict=True):
        saver.start(progress, cut_out(values, cut))
    for saver in savers:
        saver.finish(PATIENCE)
    return store.folder / str(progress.images_seen)


def newest(store: StateStore, least: int = 0) -> int | None:
    found = store.find_newest(least)
    return found.progress.images_seen if found else None


def is_whole(state: State, values: Values = VALUES) -> bool:
    read = state.read("weight"), state.read("average")
    return all(
        found.keys() == values.keys()
        and all(torch.equal(found[name], sign * values[name]) for name in values)
        for found, sign in zip(read, (1, -1), strict=True)
    )
