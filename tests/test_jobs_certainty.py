"""Intervals that hold as often as they say, and differences that are told from chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixart_jobs.certainty import Outcomes, difference, holm, measure, ratio


def coins(rng: np.random.Generator, count: int, chance: float) -> Outcomes:
    """Prompts of one or two digits, each right with a chance that the prompt decides."""
    total = rng.integers(1, 3, count)
    right = rng.binomial(total, chance)
    return np.stack([right, total], axis=1).astype(float)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    figures = [measure(coins(rng, 160, 0.9), seed=i) for i in range(80)]
    held = sum(f.low <= 0.9 <= f.high for f in figures)
    assert 70 <= held <= 79
    assert all(f.low <= f.value <= f.high for f in figures)


def test_prompts_that_all_agree_are_not_certainty() -> None:
    found = measure(np.ones((160, 2)))
    assert found.value == found.high == 1.0
    assert 0.97 < found.low < 0.98, "Wilson's for 160 of 160"
    none = measure(np.array([[0.0, 1.0]] * 20))
    assert none.low == 0.0
    assert 0.1 < none.high < 0.2


def test_a_metric_that_no_prompt_asks_for_has_no_value() -> None:
    assert np.isnan(measure(np.zeros((5, 2))).value)
    assert np.isnan(difference(np.zeros((5, 2)), np.zeros((5, 2)), paired=True).p)


def test_the_same_version_twice_does_not_differ() -> None:
    outcomes = coins(np.random.default_rng(1), 160, 0.9)
    found = difference(outcomes, outcomes, paired=True)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


@pytest.mark.parametrize("paired", [True, False])
def test_chance_is_called_significant_about_as_often_as_it_may(paired: bool) -> None:
    rng = np.random.default_rng(2)
    found = [
        difference(coins(rng, 100, 0.8), coins(rng, 100, 0.8), paired=paired, seed=i).p
        for i in range(40)
    ]
    assert sum(p < 0.05 for p in found) <= 6
    assert np.median(found) > 0.2


@pytest.mark.parametrize("paired", [True, False])
def test_a_large_difference_is_told_with_its_size(paired: bool) -> None:
    rng = np.random.default_rng(3)
    found = difference(coins(rng, 160, 0.6), coins(rng, 160, 0.9), paired=paired)
    assert found.p < 0.001
    assert 0.2 < found.low < found.value < found.high < 0.45


def test_pairs_see_what_unrelated_prompts_hide() -> None:
    """One prompt in ten got better, none worse, among prompts that differ a lot."""
    a = np.stack([np.arange(100) % 2, np.ones(100)], axis=1).astype(float)
    b = a.copy()
    b[:20:2, 0] = 1
    assert difference(a, b, paired=True).p < 0.01
    assert difference(a, b, paired=False).p > 0.05


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="3 and 4 prompts cannot be paired"):
        difference(np.ones((3, 2)), np.ones((4, 2)), paired=True)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        measure(np.ones(3))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_any_outcomes_have_an_ordered_interval_and_the_same_twice(
    pairs: list[tuple[int, int]],
) -> None:
    outcomes = np.array([(min(r, t), t) for r, t in pairs], float)
    found = measure(outcomes)
    assert found == measure(outcomes) or np.isnan(found.value)
    if not np.isnan(found.value):
        assert found.value == ratio(outcomes)
        assert 0 <= found.low <= found.high <= 1


def test_holm_asks_more_of_the_smallest() -> None:
    assert holm([0.01, 0.04, float("nan"), 0.03])[:2] == pytest.approx([0.03, 0.06])
    assert np.isnan(holm([float("nan")])[0])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
