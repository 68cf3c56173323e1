"""Aspect buckets: the published tables from one rule, the nearest one, and a crop that covers."""

from itertools import pairwise
from math import log

import pytest
from builders import repeatable
from hypothesis import assume, given
from hypothesis import strategies as st

from pixart_models.buckets import MAX_RATIO, Size, buckets, cover, is_extreme, nearest_bucket
from pixart_models.config import ModelInputError

# PixArt-alpha, diffusion/data/datasets/utils.py, ASPECT_RATIO_1024, in steps of 64 px; the tables
# of 512 and 256 px (and Sigma's of 2048) are the same in steps of 32 and 16 (and 128) px.
PUBLISHED = [
    (8, 32), (8, 31), (8, 30), (8, 29), (9, 28), (9, 27), (9, 26), (10, 25), (10, 24), (11, 23),
    (11, 22), (11, 21), (12, 21), (12, 20), (13, 19), (13, 18), (14, 18), (14, 17), (15, 17),
    (15, 16), (16, 16), (16, 15), (17, 15), (17, 14), (18, 14), (18, 13), (19, 13), (20, 12),
    (21, 12), (22, 11), (23, 11), (24, 10), (25, 10), (26, 9), (27, 9), (28, 9), (29, 8), (30, 8),
    (31, 8), (32, 8),
]  # fmt: skip

multiples = st.sampled_from([1, 4, 8, 16, 32])
grids = st.tuples(st.integers(1, 40), multiples)  # steps a side, and what a step must divide by
sides = st.integers(1, 10_000)
shapes = st.tuples(sides, sides)


@pytest.mark.parametrize("resolution", [256, 512, 1024, 2048])
def test_the_rule_gives_the_published_table(resolution: int) -> None:
    step = resolution // 16
    assert list(buckets(resolution)) == [(h * step, w * step) for h, w in PUBLISHED]


@pytest.mark.parametrize(
    ("resolution", "expected"),
    [
        (32, [(16, 64), (24, 40), (32, 32), (40, 24), (64, 16)]),
        (40, [(24, 64), (32, 48), (40, 40), (48, 32), (64, 24)]),
    ],
)
def test_the_demos_sides_have_buckets_on_its_grid(
    resolution: int, expected: list[tuple[int, int]]
) -> None:
    assert list(buckets(resolution, 8)) == expected


@repeatable
@given(grids)
def test_every_bucket_is_legal_and_about_as_large_as_the_square(grid: tuple[int, int]) -> None:
    resolution, multiple = grid[0] * grid[1], grid[1]
    table = buckets(resolution, multiple)
    assert (resolution, resolution) in table
    for height, width in table:
        assert height % multiple == width % multiple == 0
        assert 0.9 * resolution**2 <= height * width <= resolution**2
        assert not is_extreme(height, width)
    assert all(a.height / a.width < b.height / b.width for a, b in pairwise(table))


def test_a_side_that_sixteenths_do_not_suit_has_no_swarm_of_buckets() -> None:
    assert all(5 <= len(buckets(side)) <= 66 for side in (384, 640, 896, 1152))


@repeatable
@given(grids, shapes)
def test_the_nearest_bucket_is_nearest(grid: tuple[int, int], shape: tuple[int, int]) -> None:
    table = buckets(grid[0] * grid[1], grid[1])

    def distance(bucket: Size) -> float:
        return abs(log(shape[0] / shape[1] * bucket.width / bucket.height))

    chosen = nearest_bucket(*shape, table)
    assert distance(chosen) <= min(map(distance, table)) + 1e-12
    assert nearest_bucket(*shape, table[::-1]) == chosen, "a tie does not depend on the order"


@repeatable
@given(grids, shapes)
def test_a_transposed_picture_gets_the_transposed_bucket(
    grid: tuple[int, int], shape: tuple[int, int]
) -> None:
    table = buckets(grid[0] * grid[1], grid[1])
    chosen = nearest_bucket(*shape, table)
    other = nearest_bucket(*shape[::-1], table)
    assume(chosen[::-1] in table and other[::-1] in table)  # not so for one published bucket
    assert other == chosen[::-1]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1000, 1000), (1024, 1024)),
        ((1080, 1920), (768, 1344)),
        ((1920, 1080), (1344, 768)),
        ((3000, 4000), (896, 1152)),
        ((1, 100), (512, 2048)),
        ((100, 1), (2048, 512)),
    ],
)
def test_pictures_of_usual_shapes_go_where_one_expects(
    shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert nearest_bucket(*shape, buckets(1024)) == expected


def test_of_two_buckets_as_near_the_squarer_is_taken() -> None:
    table = (Size(16, 64), Size(32, 32), Size(64, 16))
    assert nearest_bucket(100, 200, table) == nearest_bucket(200, 100, table) == (32, 32)


@repeatable
@given(shapes)
def test_little_of_a_picture_up_to_4_to_1_is_cut_off(shape: tuple[int, int]) -> None:
    assume(not is_extreme(*shape) and min(shape) >= 200)
    bucket = nearest_bucket(*shape, buckets(512))
    crop = cover(*shape, bucket)
    assert bucket.height * bucket.width >= 0.86 * crop.height * crop.width


@repeatable
@given(shapes, st.sampled_from(buckets(256)))
def test_a_crop_covers_its_bucket_and_is_centred(shape: tuple[int, int], bucket: Size) -> None:
    height, width, top, left = cover(*shape, bucket)
    assert height >= bucket.height
    assert width >= bucket.width
    assert height == bucket.height or width == bucket.width, "scaled no further than needed"
    assert (top, left) == ((height - bucket.height) // 2, (width - bucket.width) // 2)
    scale = max(bucket.height / shape[0], bucket.width / shape[1])
    assert abs(height - shape[0] * scale) <= 0.5
    assert abs(width - shape[1] * scale) <= 0.5


def test_the_longest_picture_allowed_is_published_as_four_to_one() -> None:
    assert MAX_RATIO == 4
    assert not is_extreme(100, 400)
    assert is_extreme(100, 401)
    assert is_extreme(401, 100)


@pytest.mark.parametrize(("resolution", "multiple"), [(100, 16), (24, 16), (0, 8), (-16, 16)])
def test_a_base_side_off_the_grid_is_refused(resolution: int, multiple: int) -> None:
    with pytest.raises(ModelInputError, match=rf"{resolution} px.*multiple of {multiple} "):
        buckets(resolution, multiple)
