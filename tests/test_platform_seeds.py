"""Random draws: a function of the sample's place in the run, whoever draws them."""

import pytest
import torch
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.seeds import SampleDraws, derive_seed

parts = st.tuples(st.integers(-(2**70), 2**70) | st.text(max_size=6)) | st.lists(
    st.integers() | st.text(max_size=4), min_size=1, max_size=4
).map(tuple)


def test_a_seed_stays_the_same_over_releases() -> None:
    assert derive_seed(0, "order") == 1705570157440245618
    assert derive_seed(7, 123) == 6369574320560275676


@repeatable
@given(parts, parts)
def test_equal_parts_give_equal_seeds_and_others_different_ones(
    first: tuple[int | str, ...], second: tuple[int | str, ...]
) -> None:
    assert (derive_seed(*first) == derive_seed(*second)) == (first == second)
    assert 0 <= derive_seed(*first) < 2**63


@pytest.mark.parametrize(
    ("first", "second"),
    [((1, 23), (12, 3)), (("a", "b"), ("ab",)), ((1,), ("1",)), ((1, 2), (2, 1)), ((0,), (0, 0))],
)
def test_parts_do_not_run_together(
    first: tuple[int | str, ...], second: tuple[int | str, ...]
) -> None:
    assert derive_seed(*first) != derive_seed(*second)


@repeatable
@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=6), st.integers(0, 2**31))
def test_a_sample_draws_the_same_alone_as_in_any_batch(positions: list[int], seed: int) -> None:
    def draw(chosen: list[int]) -> list[torch.Tensor]:
        draws = SampleDraws(seed, chosen)
        return [draws.normal((2, 3)), draws.uniform(), draws.normal((4,)), draws.uniform()]

    together = draw(positions)
    assert [t.shape[0] for t in together] == [len(positions)] * 4
    for i, position in enumerate(positions):
        for one, all_ in zip(draw([position]), together, strict=True):
            assert torch.equal(one[0], all_[i])


def test_samples_and_runs_draw_different_numbers() -> None:
    drawn = [SampleDraws(seed, [0, 1]).normal((5,)) for seed in (1, 2)]
    rows = [tuple(row.tolist()) for pair in drawn for row in pair]
    assert len(set(rows)) == 4


def test_draws_have_the_moments_of_their_distributions() -> None:
    draws = SampleDraws(3, list(range(4000)))
    normal, uniform = draws.normal((4,)), draws.uniform()
    assert abs(float(normal.mean())) < 0.03
    assert abs(float(normal.std()) - 1) < 0.03
    assert abs(float(uniform.mean()) - 0.5) < 0.03
    assert 0 <= float(uniform.min()) <= float(uniform.max()) < 1
    assert abs(float(torch.corrcoef(torch.stack([normal[:, 0], uniform]))[0, 1])) < 0.05
