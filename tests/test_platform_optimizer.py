"""The learning rate over a stage, and AdamW with an average of the weights beside its moments."""

import copy

import pytest
import torch
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pixart_platform.optimizer import AVERAGE, KINDS, AveragingAdamW, OptimizerSettings

PEAK = 0.01


def make(warmup_images: int = 0, decay_share: float = 0.0) -> OptimizerSettings:
    return OptimizerSettings(
        learning_rate=PEAK, warmup_images=warmup_images, decay_share=decay_share
    )


def test_without_warm_up_and_decay_the_rate_is_constant() -> None:
    assert {make().rate_at(n, 100) for n in range(101)} == {PEAK}


def test_warm_up_is_a_line_that_ends_at_the_peak() -> None:
    rates = [make(warmup_images=100).rate_at(n, 1000) for n in range(1000)]
    assert rates[0] == pytest.approx(PEAK / 100)
    assert rates[49] == pytest.approx(PEAK / 2)
    assert rates[98] < PEAK
    assert set(rates[99:]) == {PEAK}


def test_decay_is_a_line_from_the_peak_to_zero_at_the_end() -> None:
    rates = [make(decay_share=0.25).rate_at(n, 1000) for n in range(1001)]
    assert set(rates[:751]) == {PEAK}
    assert rates[751] < PEAK
    assert rates[875] == pytest.approx(PEAK / 2)
    assert rates[999] > 0
    assert rates[1000] == 0


@repeatable
@given(st.integers(0, 5000), st.floats(0, 1), st.integers(1, 5000), st.data())
def test_the_rate_rises_then_falls_and_stays_between_zero_and_the_peak(
    warmup: int, decay: float, total: int, data: st.DataObject
) -> None:
    settings = make(warmup, decay)
    places = sorted(data.draw(st.lists(st.integers(0, total - 1), min_size=2, max_size=20)))
    rates = [settings.rate_at(n, total) for n in places]
    assert all(0 < rate <= PEAK for rate in rates)
    before = [r for n, r in zip(places, rates, strict=True) if n <= (1 - decay) * total]
    after = [r for n, r in zip(places, rates, strict=True) if n >= warmup]
    assert before == sorted(before)
    assert after == sorted(after, reverse=True)


def make_network(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(5, 3)


def optimize(network: nn.Module, clips: bool = True, **settings: float) -> AveragingAdamW:
    chosen = OptimizerSettings(learning_rate=PEAK, **settings)
    return AveragingAdamW(network.parameters(), chosen, clips=clips)


def put_gradients(network: nn.Module, seed: int, size: float = 1.0) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.grad = size * torch.randn(parameter.shape, generator=numbers)


def values_of(network: nn.Module, optimizer: AveragingAdamW) -> list[Tensor]:
    """Copies of the weights and of all that is kept beside them."""
    kept = [[p, *(optimizer.state[p][kind] for kind in KINDS)] for p in network.parameters()]
    return [value.detach().clone() for values in kept for value in values]


def test_the_average_follows_the_weights_by_its_share_and_starts_at_the_first() -> None:
    network = make_network()
    optimizer = optimize(network)
    expected = [optimizer.prepare(p)[AVERAGE].clone() for p in network.parameters()]
    for mean, parameter in zip(expected, network.parameters(), strict=True):
        assert torch.equal(mean, parameter)
    for n in range(6):
        put_gradients(network, n)
        optimizer.average_share = 0.5 / (n + 1)
        optimizer.step()
        for mean, parameter in zip(expected, network.parameters(), strict=True):
            mean.add_((parameter.detach() - mean) * optimizer.average_share)
    for mean, parameter in zip(expected, network.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[parameter][AVERAGE], mean)
        assert not torch.allclose(mean, parameter)


@pytest.mark.parametrize("clips", [True, False])
def test_the_weights_are_those_of_torchs_adamw(clips: bool) -> None:
    ours = make_network()
    theirs = copy.deepcopy(ours)
    optimizer = optimize(ours, clips, weight_decay=0.1, gradient_clip=0.5)
    for parameter in ours.parameters():
        optimizer.prepare(parameter)
    plain = torch.optim.AdamW(theirs.parameters(), lr=PEAK, weight_decay=0.1, fused=True)
    for n in range(5):
        put_gradients(ours, n)
        put_gradients(theirs, n)
        if clips:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        plain.step()
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_who_clips_takes_no_step_on_a_gradient_that_is_not_finite(bad: float) -> None:
    network = make_network()
    optimizer = optimize(network)
    optimizer.average_share = 0.1
    for parameter in network.parameters():
        optimizer.prepare(parameter)
    put_gradients(network, 0)
    optimizer.step()
    before = values_of(network, optimizer)
    put_gradients(network, 1)
    assert network.bias.grad is not None
    network.bias.grad[1] = bad
    optimizer.step()
    for was, now in zip(before, values_of(network, optimizer), strict=True):
        assert torch.equal(was, now)
    assert {float(state["step"]) for state in optimizer.state.values()} == {1}


def test_a_state_put_back_goes_on_where_it_was() -> None:
    """Weights, moments, average and the number of steps are all there is."""
    whole, stopped = make_network(), make_network()
    optimizer = optimize(whole)
    optimizer.average_share = 0.2
    for parameter in whole.parameters():
        optimizer.prepare(parameter)
    for n in range(7):
        if n == 3:
            middle = values_of(whole, optimizer)
        put_gradients(whole, n)
        optimizer.step()
    resumed = optimize(stopped)
    resumed.average_share = 0.2
    with torch.no_grad():
        for parameter in stopped.parameters():
            states = resumed.prepare(parameter, num_steps=3)
            for place in (parameter, *(states[kind] for kind in KINDS)):
                place.copy_(middle.pop(0))
    for n in range(3, 7):
        put_gradients(stopped, n)
        resumed.step()
    for one, other in zip(values_of(whole, optimizer), values_of(stopped, resumed), strict=True):
        assert torch.equal(one, other)
