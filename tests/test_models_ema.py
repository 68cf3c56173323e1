"""The average of weights: its half-life counts images, and its state is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pixart_models.ema import RAMP_UP, Ema, ema_decay

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


@pytest.mark.parametrize("batch_images", [20, 63, 360])
def test_the_average_itself_halves_its_distance(batch_images: int) -> None:
    ema, seen = Ema([("w", torch.zeros(2))], HALF_LIFE), 100_000
    for _ in range(HALF_LIFE // batch_images):
        seen += batch_images
        target = [("w", torch.tensor([1.0, -4.0]))]
        ema.update(target, batch_images=batch_images, images_seen=seen)
    torch.testing.assert_close(ema.tensors["w"], torch.tensor([0.5, -2.0]), rtol=1e-4, atol=0)


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
    ema = Ema([("w", torch.zeros(1))], 1e6)
    ema.update([("w", torch.ones(1))], batch_images=64, images_seen=64)
    assert ema.tensors["w"].item() == pytest.approx(1.0, abs=1e-5)


def test_the_average_is_fp32_and_its_own_memory() -> None:
    weight: Tensor = torch.ones(4, dtype=torch.bfloat16)
    ema = Ema([("w", weight)], 1000)
    weight.fill_(7)
    assert ema.tensors["w"].dtype == torch.float32
    assert torch.equal(ema.tensors["w"], torch.ones(4))
    exact = torch.ones(2)
    same_type = Ema([("w", exact)], 1000)
    exact.fill_(7)
    assert torch.equal(same_type.tensors["w"], torch.ones(2))


def test_names_decide_not_the_order_of_parameters() -> None:
    ema = Ema([("a", torch.zeros(1)), ("b", torch.zeros(2))], 1)
    ema.update([("b", torch.ones(2)), ("a", -torch.ones(1))], batch_images=100, images_seen=10_000)
    assert torch.equal(ema.tensors["a"], -torch.ones(1))
    assert torch.equal(ema.tensors["b"], torch.ones(2))


def test_a_restored_average_continues_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [[("w", torch.randn(5, generator=generator))] for _ in range(6)]
    straight = Ema(weights[0], 100)
    for i in range(1, 6):
        straight.update(weights[i], batch_images=10, images_seen=10 * i)
    first = Ema(weights[0], 100)
    for i in range(1, 3):
        first.update(weights[i], batch_images=10, images_seen=10 * i)
    saved = {name: tensor.clone() for name, tensor in first.tensors.items()}
    resumed = Ema([("w", torch.zeros(5))], 100)
    resumed.load(saved)
    for i in range(3, 6):
        resumed.update(weights[i], batch_images=10, images_seen=10 * i)
    assert torch.equal(resumed.tensors["w"], straight.tensors["w"])
    assert torch.equal(saved["w"], first.tensors["w"]), "loading must copy, not share"


def test_a_missing_name_is_not_restored_silently() -> None:
    with pytest.raises(KeyError, match="w"):
        Ema([("w", torch.zeros(1))], 1).load({"v": torch.zeros(1)})
