"""The order of samples: complete, repeatable, and the same on any number of workers."""

from collections import Counter
from itertools import islice

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
    bucket_counts, st.integers(1, 40), st.integers(0, 2**63 - 1),
)  # fmt: skip


def draw_streams(order: Order, num_batches: int) -> dict[Bucket, list[int]]:
    """Every bucket's samples, in the order of their batches."""
    streams: dict[Bucket, list[int]] = {}
    for n in range(num_batches):
        bucket, samples = order.batch(n)
        streams.setdefault(bucket, []).extend(samples.tolist())
    return streams


def sizes_of(order: Order) -> dict[Bucket, int]:
    return {bucket: sum(counts) for bucket, counts in order.block_counts}


@repeatable
@given(orders)
def test_each_sample_appears_once_an_epoch(order: Order) -> None:
    for bucket, stream in draw_streams(order, 60).items():
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
@given(bucket_counts, st.integers(1, 3), st.integers(0, 1000), st.integers(0, 30))
def test_any_number_of_workers_draws_the_same_global_batches(
    counts: dict[Bucket, list[int]], factor: int, seed: int, n: int
) -> None:
    _, samples = Order.over(counts, batch_images=24 * factor, seed=seed).batch(n)
    for world_size in (1, 2, 3, 4, 8):
        parts = [samples[slice_of_rank(samples, rank, world_size)] for rank in range(world_size)]
        assert {len(part) for part in parts} == {24 * factor // world_size}
        np.testing.assert_array_equal(np.concatenate(parts), samples)


def test_a_batch_that_does_not_divide_says_what_to_use() -> None:
    with pytest.raises(TrainingError, match=r"batch_images = 10 .* 4 workers; use a multiple of 4"):
        slice_of_rank(np.arange(10), 0, 4)


def test_every_bucket_gets_turns_in_proportion_to_its_size() -> None:
    order = Order.over({(8, 8): [300], (4, 16): [100], (2, 2): [1]}, batch_images=10, seed=1)
    turns = Counter(order.batch(n)[0] for n in range(41))
    assert turns == {(8, 8): 30, (4, 16): 10, (2, 2): 1}


def test_buckets_take_turns_rather_than_one_after_the_other() -> None:
    order = Order.over({(8, 8): [500], (4, 16): [500]}, batch_images=10, seed=1)
    first_half = Counter(order.batch(n)[0] for n in range(50))
    assert min(first_half.values()) > 10


def test_a_window_keeps_few_blocks_open_at_a_time() -> None:
    counts = tuple(np.random.default_rng(0).integers(1, 12, 60).tolist())
    blocks = np.repeat(np.arange(60), counts)
    order = Order((((8, 8), counts),), batch_images=sum(counts), seed=5, window_blocks=4)
    _, samples = order.batch(0)
    left = Counter(blocks.tolist())
    begun: set[int] = set()
    for block in blocks[samples].tolist():
        begun.add(block)
        left[block] -= 1
        assert sum(left[b] > 0 for b in begun) <= 4
    assert not +left


def test_samples_are_mixed_across_the_blocks_of_a_window() -> None:
    order = Order((((8, 8), (100,) * 8),), batch_images=50, seed=5, window_blocks=8)
    _, samples = order.batch(0)
    assert len(set((samples // 100).tolist())) == 8


def test_epochs_and_seeds_differ() -> None:
    def epochs(seed: int) -> list[list[int]]:
        order = Order.over({(8, 8): [50, 50]}, batch_images=100, seed=seed)
        return [order.batch(n)[1].tolist() for n in range(3)]

    drawn = [*epochs(1), *epochs(2)]
    assert len({tuple(epoch) for epoch in drawn}) == 6


def test_a_batch_larger_than_the_data_set_repeats_it() -> None:
    order = Order.over({(8, 8): [2, 1]}, batch_images=10, seed=0)
    stream = [int(s) for n in range(3) for s in order.batch(n)[1]]
    assert Counter(stream) == {0: 10, 1: 10, 2: 10}


def test_empty_buckets_and_blocks_are_never_drawn() -> None:
    order = Order.over({(8, 8): [0, 3, 0], (4, 16): [0, 0]}, batch_images=2, seed=0)
    assert order.num_samples == 3
    assert set(draw_streams(order, 12)) == {(8, 8)}


@pytest.mark.parametrize("counts", [{}, {(8, 8): []}, {(8, 8): [0, 0], (4, 16): [0]}])
def test_an_order_over_nothing_says_why(counts: dict[Bucket, list[int]]) -> None:
    with pytest.raises(TrainingError, match=r"no sample is eligible.*'where'.*loosen it"):
        Order.over(counts, batch_images=4, seed=0)


def test_the_order_of_a_seed_stays_the_same_over_releases() -> None:
    order = Order.over({(8, 8): [4, 4], (4, 4): [4]}, batch_images=4, seed=3)
    drawn = [(bucket[0], samples.tolist()) for bucket, samples in map(order.batch, range(3))]
    assert drawn == [(4, [2, 0, 3, 1]), (8, [4, 3, 0, 5]), (8, [2, 1, 6, 7])]


def test_a_stream_of_a_bucket_does_not_depend_on_the_batch_size() -> None:
    counts = {(8, 8): [5, 7, 3]}
    streams = [
        islice(draw_streams(Order.over(counts, batch_images=b, seed=2), 30)[(8, 8)], 30)
        for b in (1, 4, 15, 31)
    ]
    assert len({tuple(stream) for stream in streams}) == 1
