"""Which samples form global batch n: a pure function of (counts, seed, n).

No I/O, no rank, no world size: ranks take their slice of the same batch. So a run resumes exactly
from one integer, and draws the same batches on any number of workers.

Samples live in *blocks* (row groups of a table), and each block's eligible samples of one *bucket*
(latent shape) are counted. A bucket is an endless stream of epochs; in each epoch its blocks are
shuffled, then samples are shuffled within windows of blocks. Each sample appears once an epoch;
batch k of a bucket is the stream's k-th slice. Of a billion samples only the blocks are permuted,
and only the windows that a batch touches are made.

Within a batch the samples of a window are in table order. A step does not care, but a rank's slice
then lies in few blocks, and in nearly the same ones from batch to batch.

Buckets take turns in shuffled cycles of an epoch of the whole (or a part of a long one). After c
epochs a bucket of s samples has had floor(c * s / batch) turns, so none is drawn too often.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pixart_platform.errors import TrainingError

Bucket = tuple[int, int]  # latent height, width
Counts = NDArray[np.integer[Any]]
_CYCLE_BATCHES = 4096
_TURNS, _BLOCKS, _SAMPLES = 1, 2, 3  # what a seed is for


@dataclass(frozen=True, eq=False)
class Order:
    """The order of a run over ``block_counts``: eligible samples by bucket and block."""

    block_counts: tuple[tuple[Bucket, Counts], ...]
    batch_images: int
    seed: int
    window_blocks: int = 64

    @classmethod
    def over(
        cls, counts: Mapping[Bucket, Sequence[int] | Counts], *, batch_images: int, seed: int
    ) -> "Order":
        """Build it, dropping what is empty. Raises TrainingError when nothing is eligible."""
        arrays = [(bucket, np.asarray(counts[bucket])) for bucket in sorted(counts)]
        filled = tuple((bucket, c[c > 0]) for bucket, c in arrays if c.any())
        if not filled:
            raise TrainingError(
                "no sample is eligible for this stage: its 'where' condition rejects every row "
                "of the tables; loosen it or look at 'status' counts of the tables"
            )
        return cls(filled, batch_images, seed)

    @cached_property
    def _streams(self) -> "list[_Stream]":
        counts = [counts for _, counts in self.block_counts]
        return [_Stream(c, self.seed, which, self.window_blocks) for which, c in enumerate(counts)]

    @cached_property
    def _turns(self) -> "_Turns":
        return _Turns([stream.size for stream in self._streams], self.batch_images, self.seed)

    def batch(self, n: int) -> tuple[Bucket, NDArray[np.int64]]:
        """Bucket and sample numbers (batch_images,) of global batch ``n`` >= 0.

        A sample's number counts the bucket's eligible samples in table order.
        """
        which, k = self._turns.find(n)
        samples = self._streams[which].take(k * self.batch_images, self.batch_images)
        return self.block_counts[which][0], samples


class _Turns:
    """Whose turn it is. A cycle is an epoch of all samples, or as many as make 4096 batches."""

    def __init__(self, sizes: list[int], batch_images: int, seed: int) -> None:
        cycle_samples = min(sum(sizes), _CYCLE_BATCHES * batch_images)
        self._shares = [size * cycle_samples for size in sizes]
        self._whole = sum(sizes) * batch_images
        self._seed, self._cycle = seed, lru_cache(maxsize=2)(self._shuffle)

    def _before(self, cycle: int) -> list[int]:
        """Every bucket's turns before a cycle, in integers of any size."""
        return [cycle * share // self._whole for share in self._shares]

    def find(self, n: int) -> tuple[int, int]:
        """The bucket of batch ``n``, and how many batches it has had before."""
        last = (n + len(self._shares)) * self._whole // sum(self._shares) + 1
        cycle = bisect_right(range(last + 1), n, key=lambda c: sum(self._before(c))) - 1
        before, turns = self._before(cycle), self._cycle(cycle)
        place = n - sum(before)
        which = int(turns[place])
        return which, before[which] + int(np.count_nonzero(turns[:place] == which))

    def _shuffle(self, cycle: int) -> NDArray[np.int64]:
        turns = np.subtract(self._before(cycle + 1), self._before(cycle))
        rng = np.random.default_rng([self._seed, _TURNS, cycle])
        return rng.permutation(np.repeat(np.arange(len(turns)), turns))


class _Stream:
    """One bucket's endless stream of samples; it holds a few numbers a block, none a sample."""

    def __init__(self, counts: Counts, seed: int, which: int, window_blocks: int) -> None:
        self._counts, self._seed, self._which, self._span = counts, seed, which, window_blocks
        self._starts = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=self._starts[1:])
        self.size = int(self._starts[-1])
        self._epoch = lru_cache(maxsize=2)(self._shuffle_blocks)
        self._window = lru_cache(maxsize=4)(self._shuffle_window)

    def take(self, start: int, count: int) -> NDArray[np.int64]:
        """``count`` samples from position ``start``, in table order as far as a window goes."""
        parts = []
        while count:
            epoch, offset = divmod(start, self.size)
            _, ends = self._epoch(epoch)
            window = int(np.searchsorted(ends, offset, side="right"))
            first = offset - (int(ends[window - 1]) if window else 0)
            parts.append(np.sort(self._window(epoch, window)[first : first + count]))
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return np.concatenate(parts)

    def _shuffle_blocks(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """An epoch's order of blocks, and where each window of it ends, in samples."""
        rng = np.random.default_rng([self._seed, _BLOCKS, self._which, epoch])
        blocks = rng.permutation(len(self._counts)).astype(np.int32)
        firsts = np.arange(0, len(blocks), self._span)
        return blocks, np.add.reduceat(self._counts[blocks], firsts, dtype=np.int64).cumsum()

    def _shuffle_window(self, epoch: int, window: int) -> NDArray[np.int64]:
        blocks = self._epoch(epoch)[0][window * self._span : (window + 1) * self._span]
        samples = [np.arange(self._starts[b], self._starts[b + 1]) for b in blocks]
        rng = np.random.default_rng([self._seed, _SAMPLES, self._which, epoch, window])
        return rng.permutation(np.concatenate(samples))


def slice_of_rank(batch: NDArray[np.int64], rank: int, world_size: int) -> slice:
    """The part of a global batch that ``rank`` draws; parts differ by a sample at most."""
    return slice(len(batch) * rank // world_size, len(batch) * (rank + 1) // world_size)
