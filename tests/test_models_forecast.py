"""The forecast of a step: FLOPs against torch's counter, memory against autograd and a process."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks.bench_memory import SHAPES, measure
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart_models.config import NetworkConfig, get_preset
from pixart_models.dit import DiT
from pixart_models.forecast import (
    StepMemory,
    count_parameters,
    forward_flops,
    step_flops,
    step_memory,
)
from pixart_models.layers import pack_text
from pixart_models.pixart import PixArt
from pixart_models.token_drop import TokenDrop

TINY = NetworkConfig(depth=4, width=48, heads=2, sample_size=8, text_width=20, num_classes=5)
MEDIUM = NetworkConfig(depth=4, width=192, heads=4, mlp_ratio=3.5, text_width=64, num_classes=5)
MASK = TokenDrop("mask", share=0.75, start=1, end=0, depth=4)
ROUTE = TokenDrop("route", share=0.5, start=2, end=1, depth=4)
LENGTHS = (3, 9, 12)  # text tokens of the rows of a batch, and their mean
TEXT = 8
ALIKE = (TEXT,) * len(LENGTHS)  # nothing is padded

CASES: dict[str, tuple[NetworkConfig, int, int, TokenDrop | None]] = {
    "tiny": (TINY, 8, 8, None),
    "oblong": (TINY, 8, 12, None),
    "medium": (MEDIUM, 16, 16, None),
    "1024 tokens": (TINY, 64, 64, None),
    "sized": (replace(MEDIUM, size_condition=True, predict_variance=False), 16, 16, None),
    "normed": (replace(MEDIUM, qk_norm=True), 16, 16, None),
    "adaln by block": (replace(MEDIUM, adaln="block"), 16, 16, None),
    "text in context": (replace(MEDIUM, text_in="context"), 16, 16, None),
    "masked": (MEDIUM, 32, 32, MASK),
    "routed": (MEDIUM, 32, 32, ROUTE),
    "dit": (replace(MEDIUM, architecture="dit"), 16, 16, None),
    "dit normed": (replace(MEDIUM, architecture="dit", qk_norm=True), 16, 16, None),
    "dit masked": (replace(MEDIUM, architecture="dit"), 32, 32, MASK),
}
each_case = pytest.mark.parametrize("case", CASES)


def build(
    case: str, lengths: Sequence[int] = LENGTHS, *, differentiable: bool = False
) -> tuple[PixArt | DiT, Callable[[], Tensor]]:
    """The network, and a forward pass of it for a batch with texts of ``lengths``.

    ``differentiable`` inputs make backward compute the gradient of every factor of every product.
    """
    torch.manual_seed(0)
    config, height, width, drop = CASES[case]
    network = PixArt(config) if config.architecture == "pixart" else DiT(config)
    for parameter in network.parameters():  # no zeros, so that every gradient is computed
        nn.init.normal_(parameter, std=0.02)
    batch = len(LENGTHS)
    latents = torch.randn(batch, 4, height, width, requires_grad=differentiable)
    times = torch.rand(batch, requires_grad=differentiable)
    tokens = (height // config.patch) * (width // config.patch)
    options: dict[str, Any] = {"route": drop.choose(torch.rand(batch, tokens)) if drop else None}
    if config.size_condition:
        options["sizes"] = torch.rand(batch, 3, requires_grad=differentiable)
    condition: Any = torch.arange(batch)
    if config.architecture == "pixart":
        texts = [torch.randn(n, config.text_width) for n in lengths]
        condition = pack_text([text.requires_grad_(differentiable) for text in texts])
    return network, partial(network, latents, times, condition, **options)


def count_flops(work: Callable[[], object]) -> float:
    """FLOPs a sample by torch's own count, which does not know the CPU's fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    total: int = counter.get_total_flops()
    return total / len(LENGTHS)


def count_saved(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for backward, the network's own aside; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


@each_case
def test_forward_flops_are_exactly_those_that_torch_counts(case: str) -> None:
    config, height, width, drop = CASES[case]
    _, forward = build(case, ALIKE)
    with torch.no_grad():
        counted = count_flops(forward)
    assert forward_flops(config, height, width, TEXT, drop) == pytest.approx(counted, rel=1e-9)


def test_what_a_cpu_computes_on_padding_is_not_counted() -> None:
    config, height, width, _ = CASES["medium"]
    _, forward = build("medium")
    with torch.no_grad():
        counted = count_flops(forward)
    tokens = height * width // config.patch**2
    padding = config.depth * 4 * tokens * config.width * (max(LENGTHS) - TEXT)
    forecast = forward_flops(config, height, width, TEXT)
    assert forecast + padding == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("recompute", [False, True])
@each_case
def test_step_flops_are_exactly_those_of_all_gradients(case: str, recompute: bool) -> None:
    config, height, width, drop = CASES[case]
    network, forward = build(case, ALIKE, differentiable=True)
    network.checkpoint_blocks = recompute
    counted = count_flops(lambda: torch.autograd.backward(forward().square().mean()))
    forecast = step_flops(config, height, width, TEXT, drop, recompute=recompute)
    assert forecast == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize(
    ("preset", "side", "published"),  # Peebles & Xie 2023, table 4, in 1e9 multiply-adds
    [
        ("dit-s-2-256", 32, 6.06), ("dit-b-2-256", 32, 23.01), ("dit-l-2-256", 32, 80.71),
        ("dit-xl-2-256", 32, 118.64), ("dit-xl-2-512", 64, 524.60),
    ],
)  # fmt: skip
def test_flops_are_the_published_ones(preset: str, side: int, published: float) -> None:
    forecast = forward_flops(get_preset(preset), side, side, text_tokens=0)
    assert forecast / 2e9 == pytest.approx(published, rel=1e-3)


@each_case
def test_activations_are_what_autograd_keeps(case: str) -> None:
    config, height, width, drop = CASES[case]
    lengths = ALIKE if config.text_in == "context" else LENGTHS  # it pads all that it keeps
    saved = count_saved(*build(case, lengths))
    forecast = step_memory(config, len(LENGTHS), height, width, TEXT, drop)
    assert forecast.activations == pytest.approx(saved, rel=0.04)


def test_recomputing_keeps_the_inputs_of_blocks_and_runs_one_block_at_a_time() -> None:
    config, height, width, _ = CASES["medium"]
    network, forward = build("medium")
    network.checkpoint_blocks = True
    forecast = step_memory(config, len(LENGTHS), height, width, TEXT, recompute=True)
    assert forecast.activations == pytest.approx(count_saved(network, forward), rel=0.04)
    plain = step_memory(config, len(LENGTHS), height, width, TEXT)
    block = (plain.activations - forecast.activations) / config.depth
    assert forecast.workspace - plain.workspace == pytest.approx(block, rel=0.05)


def test_parameters_cost_what_their_precision_says() -> None:
    network, _ = build("sized")
    parameters = sum(p.numel() for p in network.parameters())
    config = CASES["sized"][0]
    assert count_parameters(config) == parameters
    fp32 = step_memory(config, 2, 8, 8, TEXT)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (
        4 * parameters, 4 * parameters, 8 * parameters,
    )  # fmt: skip
    bf16 = step_memory(
        config, 2, 8, 8, TEXT, element_bytes=2, weight_bytes=6, gradient_bytes=2, ema_copies=2
    )
    assert (bf16.weights, bf16.gradients, bf16.optimizer) == (
        6 * parameters, 2 * parameters, 16 * parameters,
    )  # fmt: skip
    assert 2 * bf16.activations == fp32.activations


def test_xl_has_the_published_parameters() -> None:
    assert count_parameters(get_preset("pixart-xl-2-256")) == 610_856_096


@settings(max_examples=25)
@given(
    batch=st.integers(1, 64), side=st.integers(2, 32), text=st.floats(1, 300),
    recompute=st.booleans(), drop=st.sampled_from([None, MASK, ROUTE]), dit=st.booleans(),
)  # fmt: skip
def test_more_work_never_costs_less(
    batch: int, side: int, text: float, recompute: bool, drop: TokenDrop | None, dit: bool
) -> None:
    config = replace(TINY, architecture="dit" if dit else "pixart")

    def forecast(
        batch: int = batch, side: int = 2 * side, text: float = text, drop: TokenDrop | None = drop
    ) -> tuple[float, StepMemory]:
        flops = batch * step_flops(config, side, side, text, drop, recompute=recompute)
        return flops, step_memory(config, batch, side, side, text, drop, recompute=recompute)

    flops, memory = forecast()
    assert memory.live <= memory.total
    assert memory.live >= memory.weights + memory.gradients + memory.optimizer + memory.workspace
    for more in (
        forecast(batch=batch + 1), forecast(side=2 * side + 2), forecast(text=text + 1),
        forecast(drop=None),
    ):  # fmt: skip
        assert flops <= more[0]
        assert memory.live <= more[1].live
        assert memory.total <= more[1].total


@pytest.mark.skipif(sys.platform != "linux", reason="measured as glibc's peak, read from /proc")
def test_forecast_is_within_a_tenth_of_a_real_process() -> None:
    name = "S/2, 6 blocks"
    measured = measure(name, {"OMP_NUM_THREADS": "1"})  # cores are shared
    assert SHAPES[name].forecast().total == pytest.approx(measured, rel=0.1)
