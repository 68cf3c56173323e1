"""Which samples form global batch n: a pure function of (counts, seed, n).

No I/O, no rank, no world size: ranks take their slice of the same batch. So a run resumes exactly
from one integer, and draws the same batches on any number of workers.

Samples live in *blocks* (row groups of a table), and each block's eligible samples of one *bucket*
(latent shape) are counted. A bucket is an endless stream of epochs; in each epoch its blocks are
shuffled, then samples are shuffled within windows of blocks, so a reader holds few blocks at a
time. Each sample appears once an epoch; batch k of a bucket is the stream's k-th slice. Buckets
take turns in a shuffled cycle, in proportion to their size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pixart_platform.errors import TrainingError

Bucket = tuple[int, int]  # latent height, width


@dataclass(frozen=True)
class Order:
    """The order of a run over ``block_counts``: eligible samples by bucket and block."""

    block_counts: tuple[tuple[Bucket, tuple[int, ...]], ...]
    batch_images: int
    seed: int
    window_blocks: int = 64

    @classmethod
    def over(
        cls, counts: Mapping[Bucket, Sequence[int]], *, batch_images: int, seed: int
    ) -> "Order":
        """Build it, dropping empty buckets. Raises TrainingError when nothing is eligible."""
        filled = tuple((b, tuple(c)) for b, c in sorted(counts.items()) if sum(c))
        if not filled:
            raise TrainingError(
                "no sample is eligible for this stage: its 'where' condition rejects every row "
                "of the tables; loosen it or look at 'status' counts of the tables"
            )
        return cls(filled, batch_images, seed)

    @property
    def num_samples(self) -> int:
        return sum(sum(counts) for _, counts in self.block_counts)

    def batch(self, n: int) -> tuple[Bucket, NDArray[np.int64]]:
        """Bucket and sample numbers (batch_images,) of global batch ``n`` >= 0.

        A sample's number counts the bucket's eligible samples in table order.
        """
        sizes = tuple(sum(counts) for _, counts in self.block_counts)
        turns = _cycle(sizes, self.batch_images, self.seed)
        cycle, place = divmod(n, len(turns))
        which = int(turns[place])
        per_cycle = int((turns == which).sum())
        k = cycle * per_cycle + int((turns[:place] == which).sum())
        bucket, counts = self.block_counts[which]
        return bucket, self._stream(which, counts, k * self.batch_images)

    def _stream(self, which: int, counts: tuple[int, ...], start: int) -> NDArray[np.int64]:
        """``batch_images`` samples of a bucket's endless stream from position ``start``."""
        size, parts, need = sum(counts), [], self.batch_images
        while need:
            epoch, offset = divmod(start, size)
            shuffled = _epoch(counts, self.window_blocks, (self.seed, which, epoch))
            part = shuffled[offset : offset + need]
            parts.append(part)
            start, need = start + len(part), need - len(part)
        return np.concatenate(parts)


@lru_cache(maxsize=8)
def _cycle(sizes: tuple[int, ...], batch_images: int, seed: int) -> NDArray[np.int64]:
    """Whose turn it is, for one cycle: each bucket in proportion to its samples, at least once."""
    turns = [max(1, round(size / batch_images)) for size in sizes]
    cycle = np.repeat(np.arange(len(sizes)), turns)
    return np.random.default_rng([seed, 1]).permutation(cycle)


@lru_cache(maxsize=8)
def _epoch(
    counts: tuple[int, ...], window_blocks: int, key: tuple[int, int, int]
) -> NDArray[np.int64]:
    """A permutation of range(sum(counts)): blocks shuffled, samples shuffled within windows."""
    rng = np.random.default_rng([*key, 2])
    starts = np.concatenate([[0], np.cumsum(counts)])
    blocks = rng.permutation(len(counts))
    windows = []
    for first in range(0, len(blocks), window_blocks):
        chosen = blocks[first : first + window_blocks]
        samples = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in chosen])
        windows.append(rng.permutation(samples))
    return np.concatenate(windows).astype(np.int64)


def slice_of_rank(batch: NDArray[np.int64], rank: int, world_size: int) -> slice:
    """The part of a global batch that ``rank`` draws. Raises TrainingError if it cannot divide."""
    share, rest = divmod(len(batch), world_size)
    if rest:
        raise TrainingError(
            f"batch_images = {len(batch)} does not divide among {world_size} workers; "
            f"use a multiple of {world_size}"
        )
    return slice(rank * share, (rank + 1) * share)
