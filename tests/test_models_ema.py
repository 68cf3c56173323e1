"""Averages of weights: a half-life counts images, a width is a share, and state is exact."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from pixart_models.config import ModelInputError
from pixart_models.ema import (
    RAMP_UP,
    WIDTHS,
    PowerEma,
    Profile,
    blend,
    ema_decay,
    gamma_of,
    reconstruct,
)

HALF_LIFE = 2520  # divisible by every batch size here


@settings(deadline=None, derandomize=True)
@given(batch_images=st.sampled_from([1, 2, 5, 8, 63, 360, 2520]))
def test_half_the_distance_is_gone_after_half_life_images_at_any_batch_size(
    batch_images: int,
) -> None:
    distance, start = 1.0, int(HALF_LIFE / RAMP_UP)
    for seen in range(start + batch_images, start + HALF_LIFE + 1, batch_images):
        distance *= ema_decay(HALF_LIFE, batch_images, seen)
    assert distance == pytest.approx(0.5, rel=1e-9)


@settings(deadline=None, derandomize=True)
@given(
    batch_images=st.integers(1, 4096),
    steps=st.integers(1, 10_000),
    half_life=st.floats(1.0, 1e9),
)
def test_early_on_the_half_life_is_a_share_of_the_images_seen(
    batch_images: int, steps: int, half_life: float
) -> None:
    seen = batch_images * steps
    decay = ema_decay(half_life, batch_images, seen)
    assert 0 <= decay < 1
    assert decay == pytest.approx(0.5 ** (batch_images / min(half_life, RAMP_UP * seen)))


def test_the_first_batch_all_but_replaces_the_initial_weights() -> None:
    assert ema_decay(1e6, batch_images=64, images_seen=64) < 1e-5


def test_the_averages_are_fp32_and_their_own_memory() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight: Tensor = torch.ones(4, dtype=dtype)
        power = PowerEma([("w", weight)])
        weight.fill_(7)
        for tensors in power.tensors.values():
            assert tensors["w"].dtype == torch.float32
            assert torch.equal(tensors["w"], torch.ones(4))


def test_names_decide_not_the_order_of_parameters() -> None:
    power = PowerEma([("a", torch.zeros(1)), ("b", torch.zeros(2))])
    power.update([("b", torch.ones(2)), ("a", -torch.ones(1))], images_seen=64)
    for tensors in power.tensors.values():
        assert torch.equal(tensors["a"], -torch.ones(1))
        assert torch.equal(tensors["b"], torch.ones(2))


def test_a_missing_name_is_not_restored_silently() -> None:
    stored = {Profile(width, 64): {"v": torch.zeros(1)} for width in WIDTHS}
    with pytest.raises(KeyError, match="w"):
        PowerEma([("w", torch.zeros(1))]).load(stored)


def power_average(times: list[int], values: Tensor, sigma_rel: float) -> Tensor:
    """The definition: the integral of (g + 1) s^g / t^(g + 1) over each stretch of weights."""
    share = torch.tensor([0, *times], dtype=torch.float64) / times[-1]
    powers = share ** (gamma_of(sigma_rel) + 1)
    return powers.diff() @ values.double()


def walk(num_steps: int, batch_images: int = 64) -> tuple[list[int], Tensor]:
    """Times (S,) and weights (S, 40) of a made-up run: they settle, drift and sway."""
    generator = torch.Generator().manual_seed(0)
    share = torch.linspace(0, 1, num_steps, dtype=torch.float64)[:, None]
    goals, drift = torch.randn(2, 1, 40, generator=generator, dtype=torch.float64)
    pushes = 0.03 * torch.randn(num_steps, 40, generator=generator, dtype=torch.float64)
    sway = torch.empty_like(pushes)
    for i in range(num_steps):
        sway[i] = (0.95 * sway[i - 1] if i else 0) + pushes[i]  # forgotten in 20 steps
    values = goals * (1 - torch.exp(-8 * share)) + 0.3 * drift * share + sway
    return [batch_images * (i + 1) for i in range(num_steps)], values.float()


@given(sigma_rel=st.floats(0.01, 0.288))
def test_the_exponent_gives_the_profile_its_relative_width(sigma_rel: float) -> None:
    """sigma_rel is the standard deviation of a Beta(gamma + 1, 1) variable."""
    beta = torch.distributions.Beta(gamma_of(sigma_rel) + 1, torch.tensor(1.0).double())
    assert beta.stddev.item() == pytest.approx(sigma_rel, rel=1e-6)


def test_the_published_exponents_of_the_published_widths() -> None:
    assert [round(gamma_of(width), 2) for width in WIDTHS] == [16.97, 6.94]


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2887, 1.0, float("nan")])
def test_a_width_without_an_exponent_is_refused(sigma_rel: float) -> None:
    with pytest.raises(ModelInputError, match=f"sigma_rel = {sigma_rel}: must be above 0 and at"):
        gamma_of(sigma_rel)


def run(power: PowerEma, times: list[int], values: Tensor) -> None:
    for time, value in zip(times, values, strict=True):
        power.update([("w", value)], images_seen=time)


def test_the_running_average_is_the_power_functions_integral() -> None:
    times, values = walk(300)
    power = PowerEma([("w", torch.full((40,), 1e6))], (0.05, 0.10, 0.25))
    run(power, times, values)
    for sigma_rel, tensors in power.tensors.items():
        expected = power_average(times, values, sigma_rel).float()
        torch.testing.assert_close(tensors["w"], expected, rtol=0, atol=1e-5)


def test_updating_every_eighth_batch_is_nearly_as_good() -> None:
    times, values = walk(1600)
    often, rarely = PowerEma([("w", values[0])]), PowerEma([("w", values[0])])
    run(often, times, values)
    run(rarely, times[7::8], values[7::8])
    for width in WIDTHS:
        exact = often.tensors[width]["w"]
        moved = (values[-1] - exact).norm()
        assert (rarely.tensors[width]["w"] - exact).norm() < 0.1 * moved


@pytest.mark.parametrize(
    ("sigma_rel", "num_stored", "bar"),
    [
        (0.05, 8, 1e-5), (0.10, 8, 1e-5), (0.06, 8, 0.006), (0.075, 8, 0.006), (0.12, 8, 0.006),
        (0.06, 16, 0.0015), (0.075, 16, 0.0015), (0.12, 16, 0.0015), (0.15, 16, 0.002),
        (0.20, 16, 0.008),
    ],
)  # fmt: skip
def test_any_width_is_reconstructed_from_the_stored_two(
    sigma_rel: float, num_stored: int, bar: float
) -> None:
    """Error relative to how far the wanted average is from the last weights, a useless answer."""
    times, values = walk(640)
    power = PowerEma([("w", values[0])])
    stored: dict[Profile, dict[str, Tensor]] = {}
    every = len(times) // num_stored
    for before, now in pairwise(range(0, len(times) + 1, every)):
        run(power, times[before:now], values[before:now])
        stored |= {p: {"w": tensors["w"].clone()} for p, tensors in power.stored.items()}
    loads = {profile: partial(dict[str, Tensor], tensors) for profile, tensors in stored.items()}
    made = reconstruct(loads, Profile(sigma_rel, times[-1]))["w"]
    expected = power_average(times, values, sigma_rel)
    error = (made - expected).norm() / (values[-1] - expected).norm()
    assert error < bar


@given(
    sigma_rel=st.floats(0.05, 0.12),
    num_stored=st.integers(8, 24),
    images=st.integers(1_000, 10**9),
)
def test_the_blend_is_near_and_constant_weights_stay(
    sigma_rel: float, num_stored: int, images: int
) -> None:
    stored = [Profile(w, images * (i + 1)) for i in range(num_stored) for w in WIDTHS]
    weights, error = blend(stored, Profile(sigma_rel, images * num_stored))
    assert sum(weights) == pytest.approx(1, abs=1e-9)
    assert error < 0.014
    s = np.linspace(0, 1, 5_001)[1:] * images * num_stored

    def profile(p: Profile) -> NDArray[np.float64]:
        gamma, t = gamma_of(p.sigma_rel), p.images_seen
        return np.where(s <= t, (gamma + 1) * (s / t) ** gamma / t, 0.0)

    wanted = profile(Profile(sigma_rel, images * num_stored))
    made = sum(weight * profile(p) for weight, p in zip(weights, stored, strict=True))
    counted = np.linalg.norm(made - wanted) / np.linalg.norm(wanted)
    assert counted == pytest.approx(error, rel=0.05, abs=1e-4)


def test_what_cannot_be_reconstructed_says_how_far_it_is() -> None:
    loads = {Profile(w, 1000 * (i + 1)): dict[str, Tensor] for i in range(4) for w in WIDTHS}
    for wanted in (Profile(0.01, 4000), Profile(0.25, 4000), Profile(0.1, 8000)):
        with pytest.raises(ModelInputError, match=r"8 stored averages come within \d+% only"):
            reconstruct(loads, wanted)


def test_an_average_stored_twice_does_no_harm() -> None:
    stored = [Profile(w, 1000 * (i + 1)) for i in range(8) for w in WIDTHS]
    once, twice = (blend(s, Profile(0.07, 8000)) for s in (stored, stored + stored[-2:]))
    assert twice[1] == pytest.approx(once[1])


def test_restored_power_averages_continue_bit_for_bit() -> None:
    times, values = walk(20)
    straight, first = PowerEma([("w", values[0])]), PowerEma([("w", values[0])])
    run(straight, times, values)
    run(first, times[:9], values[:9])
    resumed = PowerEma([("w", torch.zeros(40))])
    resumed.load(first.stored)
    run(resumed, times[9:], values[9:])
    for width in WIDTHS:
        assert torch.equal(resumed.tensors[width]["w"], straight.tensors[width]["w"])
    with pytest.raises(KeyError):
        resumed.load({Profile(0.05, 64): {"w": values[0]}})
