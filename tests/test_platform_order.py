"""The order of samples: complete, repeatable, and the same on any number of workers."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.errors import TrainingError
from pixart_platform.order import Bucket, Order, slice_of_rank

BUCKETS: tuple[Bucket, ...] = ((8, 8), (4, 16), (16, 4))

block_counts = st.lists(st.integers(0, 9), min_size=1, max_size=6)
bucket_counts = st.dictionaries(st.sampled_from(BUCKETS), block_counts, min_size=1).filter(
    lambda counts: any(map(sum, counts.values()))
)
orders = st.builds(
    lambda counts, batch, seed: Order.over(counts, batch_images=batch, seed=seed),
    bucket_counts, st.integers(1, 24), st.integers(0, 2**63 - 1),
)  # fmt: skip


def draw_streams(order: Order, num_batches: int) -> dict[Bucket, list[int]]:
    """Every bucket's samples, in the order of their batches."""
    streams: dict[Bucket, list[int]] = {}
    for n in range(num_batches):
        bucket, samples = order.batch(n)
        streams.setdefault(bucket, []).extend(samples.tolist())
    return streams


def sizes_of(order: Order) -> dict[Bucket, int]:
    return {bucket: int(counts.sum()) for bucket, counts in order.block_counts}


def make_order(counts: dict[Bucket, list[int]], batch: int, seed: int, window: int = 64) -> Order:
    return replace(Order.over(counts, batch_images=batch, seed=seed), window_blocks=window)


@repeatable
@given(orders)
def test_each_sample_appears_once_an_epoch(order: Order) -> None:
    for bucket, stream in draw_streams(order, 30).items():
        size = sizes_of(order)[bucket]
        for start in range(0, len(stream) - size + 1, size):
            assert sorted(stream[start : start + size]) == list(range(size))


@repeatable
@given(orders)
def test_a_batch_is_full_and_holds_samples_of_one_bucket(order: Order) -> None:
    for n in range(20):
        bucket, samples = order.batch(n)
        assert samples.shape == (order.batch_images,)
        assert samples.min() >= 0
        assert samples.max() < sizes_of(order)[bucket]


@repeatable
@given(orders, st.integers(0, 50))
def test_a_restart_at_any_batch_goes_on_as_if_there_was_none(order: Order, n: int) -> None:
    for earlier in range(n):
        order.batch(earlier)
    fresh = Order(order.block_counts, order.batch_images, order.seed)
    assert order.batch(n)[0] == fresh.batch(n)[0]
    np.testing.assert_array_equal(order.batch(n)[1], fresh.batch(n)[1])


@repeatable
@given(bucket_counts, st.integers(1, 40), st.integers(0, 1000), st.integers(0, 30))
def test_any_number_of_workers_draws_the_same_global_batches(
    counts: dict[Bucket, list[int]], batch: int, seed: int, n: int
) -> None:
    _, samples = Order.over(counts, batch_images=batch, seed=seed).batch(n)
    for world_size in (1, 2, 3, 4, 7, 8, 50):
        parts = [samples[slice_of_rank(samples, rank, world_size)] for rank in range(world_size)]
        assert {len(part) for part in parts} <= {batch // world_size, -(-batch // world_size)}
        np.testing.assert_array_equal(np.concatenate(parts), samples)


@repeatable
@given(orders, st.integers(1, 9))
def test_after_whole_epochs_every_bucket_was_drawn_in_proportion_to_its_size(
    order: Order, epochs: int
) -> None:
    turns = {b: epochs * size // order.batch_images for b, size in sizes_of(order).items()}
    drawn = Counter(order.batch(n)[0] for n in range(sum(turns.values())))
    assert drawn == Counter(turns)


def test_within_a_long_epoch_too_buckets_are_drawn_in_proportion_to_their_size() -> None:
    order = Order.over({(8, 8): [6000], (4, 16): [3000], (2, 2): [1000]}, batch_images=1, seed=1)
    drawn = Counter(order.batch(n)[0] for n in range(4096))
    for bucket, size in sizes_of(order).items():
        assert drawn[bucket] == pytest.approx(4096 * size / 10_000, abs=3)


@repeatable
@given(orders, st.integers(0, 10**12))
def test_any_batch_of_the_far_future_can_be_drawn(order: Order, n: int) -> None:
    bucket, samples = order.batch(n)
    assert samples.shape == (order.batch_images,)
    assert 0 <= samples.min() <= samples.max() < sizes_of(order)[bucket]


def test_a_batch_of_a_billion_samples_comes_from_the_blocks_of_a_window() -> None:
    counts = np.full(10**9 // 256, 256, np.int16)
    counts[1::2] = 0  # so half of them, and only these are permuted
    bucket, samples = Order.over({(8, 8): counts}, batch_images=512, seed=1).batch(10**6)
    assert bucket == (8, 8)
    assert len(np.unique(samples)) == 512
    assert samples.max() > 2**28
    assert 50 < len(np.unique(samples // 256)) <= 64


def test_buckets_take_turns_rather_than_one_after_the_other() -> None:
    order = Order.over({(8, 8): [500], (4, 16): [500]}, batch_images=10, seed=1)
    first_half = Counter(order.batch(n)[0] for n in range(50))
    assert min(first_half.values()) > 10


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_a_window_keeps_few_blocks_open_at_a_time(batch: int) -> None:
    counts = np.random.default_rng(0).integers(1, 12, 60)
    order = make_order({(8, 8): counts.tolist()}, batch, seed=5, window=4)
    blocks = np.repeat(np.arange(60), counts)
    left = Counter(blocks.tolist())
    begun: set[int] = set()
    stream = draw_streams(order, -(-len(blocks) // batch))[8, 8]
    for block in blocks[stream[: len(blocks)]].tolist():
        begun.add(block)
        left[block] -= 1
        assert sum(left[b] > 0 for b in begun) <= 4
    assert not +left


def test_samples_are_mixed_across_the_blocks_of_a_window() -> None:
    order = make_order({(8, 8): [100] * 8}, 50, seed=5, window=8)
    _, samples = order.batch(0)
    assert len(set((samples // 100).tolist())) == 8


def test_a_ranks_slices_lie_in_few_blocks() -> None:
    order = make_order({(8, 8): [100] * 16}, 160, seed=5, window=8)
    for rank in range(8):
        mine = [
            samples[slice_of_rank(samples, rank, 8)] for _, samples in map(order.batch, range(5))
        ]
        assert len(np.unique(np.concatenate(mine) // 100)) <= 3


def test_epochs_and_seeds_differ() -> None:
    def epochs(seed: int) -> list[list[int]]:
        order = Order.over({(8, 8): [50, 50]}, batch_images=50, seed=seed)
        return [order.batch(n)[1].tolist() for n in range(0, 6, 2)]

    drawn = [*epochs(1), *epochs(2)]
    assert len({tuple(epoch) for epoch in drawn}) == 6


def test_a_batch_larger_than_the_data_set_repeats_it() -> None:
    order = Order.over({(8, 8): [2, 1]}, batch_images=10, seed=0)
    stream = [int(s) for n in range(3) for s in order.batch(n)[1]]
    assert Counter(stream) == {0: 10, 1: 10, 2: 10}


def test_empty_buckets_and_blocks_are_never_drawn() -> None:
    order = Order.over({(8, 8): [0, 3, 0], (4, 16): [0, 0]}, batch_images=2, seed=0)
    streams = draw_streams(order, 12)
    assert {bucket: set(stream) for bucket, stream in streams.items()} == {(8, 8): {0, 1, 2}}


@pytest.mark.parametrize("counts", [{}, {(8, 8): []}, {(8, 8): [0, 0], (4, 16): [0]}])
def test_an_order_over_nothing_says_why(counts: dict[Bucket, list[int]]) -> None:
    with pytest.raises(TrainingError, match=r"no sample is eligible.*'where'.*loosen it"):
        Order.over(counts, batch_images=4, seed=0)


def test_the_order_of_a_seed_stays_the_same_over_releases() -> None:
    order = Order.over({(8, 8): [4, 4], (4, 4): [4]}, batch_images=4, seed=3)
    drawn = [(bucket[0], samples.tolist()) for bucket, samples in map(order.batch, range(3))]
    assert drawn == [(4, [0, 1, 2, 3]), (8, [1, 4, 6, 7]), (8, [0, 2, 3, 5])]


def test_a_stream_of_a_bucket_does_not_depend_on_the_batch_size() -> None:
    """Six of its samples are the same six, however many batches they come in."""
    counts = {(8, 8): [5, 7, 3]}
    streams = [draw_streams(make_order(counts, b, seed=2), 60 // b)[8, 8] for b in (1, 2, 3, 6)]
    sixes = {tuple(tuple(sorted(s[i : i + 6])) for i in range(0, 60, 6)) for s in streams}
    assert len(sixes) == 1
