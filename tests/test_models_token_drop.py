"""Token drop: what a network makes of a part of the tokens, against one token after another."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from builders import repeatable
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pixart_models.config import ConfigError, NetworkConfig
from pixart_models.diffusion import ObjectiveName, get_objective
from pixart_models.dit import DiT
from pixart_models.layers import PackedText, pack_text
from pixart_models.pixart import PixArt
from pixart_models.snapshot import build_network
from pixart_models.token_drop import Route, TokenDrop, run_blocks, take_patches

DEPTH, PATCH, TEXT_WIDTH = 4, 2, 6
PIXART = NetworkConfig(
    depth=DEPTH, width=24, heads=2, sample_size=8, text_width=TEXT_WIDTH, qk_norm=True
)
DIT = replace(PIXART, architecture="dit", num_classes=5)
Mode = Literal["mask", "route"]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(config: NetworkConfig) -> PixArt | DiT:
    """A network in which every parameter, the zero-initialised ones too, matters."""
    network = build_network(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        fan_in = max(parameter.shape[-1], 4)
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    return network


@pytest.fixture(scope="module")
def networks() -> dict[str, PixArt | DiT]:
    return {config.architecture: build(config).requires_grad_(False) for config in (PIXART, DIT)}


def condition_of(network: PixArt | DiT, lengths: list[int]) -> Tensor | PackedText:
    if isinstance(network, DiT):
        return torch.tensor(lengths)
    return pack_text([draw(n, TEXT_WIDTH, seed=n) for n in lengths])


def run_by_hand(
    network: PixArt | DiT, latents: Tensor, time: float, length: int, route: tuple[list[int], Any]
) -> dict[int, Tensor]:
    """Output tokens (p * p * C,) of one picture (1, C, H, W), by place."""
    kept, (start, stop) = route
    timestep, given = torch.tensor([time]), condition_of(network, [length])
    x = network.x_embedder(latents)
    x = x + network.positions(latents.shape[-2] // PATCH, latents.shape[-1] // PATCH, x)
    conditions: tuple[Any, ...]
    if isinstance(network, DiT):
        assert isinstance(given, Tensor)
        told = network.condition(timestep, given)
        conditions = (told,)
    else:
        assert isinstance(given, PackedText)
        told = network.t_embedder(timestep)
        text = given._replace(tokens=network.y_embedder(given.tokens))
        conditions = (text, network.t_block(told).view(1, 6, -1))
    tokens = {place: x[0, place] for place in range(x.shape[1])}
    for i, block in enumerate(network.blocks):
        inside = start <= i and (stop is None or i < stop)
        places = kept if inside else sorted(tokens)
        if inside and stop is None:
            tokens = {place: tokens[place] for place in kept}
        mixed = block(torch.stack([tokens[place] for place in places])[None], *conditions)[0]
        tokens |= dict(zip(places, mixed, strict=True))
    return {p: network.final_layer(t[None, None], told)[0, 0] for p, t in tokens.items()}


@settings(repeatable, max_examples=25)
@given(
    architecture=st.sampled_from(["pixart", "dit"]),
    mode=st.sampled_from(["mask", "route"]),
    share=st.floats(0.05, 0.95),
    ends=st.sampled_from([(1, 1), (1, 2), (2, 1)]),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)).filter(lambda g: g[0] * g[1] > 1),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_a_network_on_a_part_of_the_tokens_equals_its_blocks_run_by_hand(
    networks: dict[str, PixArt | DiT], architecture: str, mode: Mode, share: float,
    ends: tuple[int, int], grid: tuple[int, int], lengths: list[int],
) -> None:  # fmt: skip
    network, (h, w) = networks[architecture], grid
    drop = TokenDrop(mode, share, *ends, DEPTH)
    route = drop.choose(draw(len(lengths), h * w, seed=h))
    latents = draw(len(lengths), 4, h * PATCH, w * PATCH, seed=w)
    times = [100.0 * (i + 1) for i in range(len(lengths))]
    output = network(latents, torch.tensor(times), condition_of(network, lengths), route=route)
    blocks = (ends[0], DEPTH - ends[1] if mode == "route" else None)
    for i, length in enumerate(lengths):
        kept = route.kept[i].tolist()
        tokens = run_by_hand(network, latents[i, None], times[i], length, (kept, blocks))
        assert sorted(tokens) == (kept if mode == "mask" else list(range(h * w)))
        columns = 1 if mode == "mask" else w
        assert output.shape == (len(lengths), 8, len(tokens) // columns * PATCH, columns * PATCH)
        for place, token in enumerate(tokens[p] for p in sorted(tokens)):
            top, left = place // columns * PATCH, place % columns * PATCH
            patch = output[i, :, top : top + PATCH, left : left + PATCH]  # (2C, p, p)
            wanted = token.view(PATCH, PATCH, -1).permute(2, 0, 1)
            torch.testing.assert_close(patch, wanted, rtol=1e-4, atol=1e-5)


class Mark(nn.Module):
    """A block that leaves its number on every token it sees."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        marked: Tensor = x + 10**self.number
        return marked


@pytest.mark.parametrize("recompute", [False, True])
def test_routed_tokens_skip_exactly_the_blocks_between(recompute: bool) -> None:
    blocks = nn.ModuleList(Mark(i) for i in range(5))
    route = Route(torch.tensor([[0, 2], [1, 3]]), 1, 4)
    seen = run_blocks(blocks, torch.zeros(2, 4, 1), (), route, recompute)[..., 0]
    assert seen.tolist() == [[11111, 10001, 11111, 10001], [10001, 11111, 10001, 11111]]
    masked = run_blocks(blocks, torch.zeros(2, 4, 1), (), route._replace(stop=None), recompute)
    assert masked[..., 0].tolist() == [[11111] * 2] * 2
    whole = run_blocks(blocks, torch.zeros(2, 4, 1), (), None, recompute)
    assert whole[..., 0].tolist() == [[11111] * 4] * 2


@repeatable
@given(share=st.floats(0.001, 0.999), batch=st.integers(1, 3), tokens=st.integers(2, 40))
def test_what_is_kept_is_some_but_not_all_in_order_and_least_noisy(
    share: float, batch: int, tokens: int
) -> None:
    noise = draw(batch, tokens, seed=tokens)
    kept = TokenDrop("mask", share, 1, 1, 2).choose(noise).kept
    assert 1 <= kept.shape[1] < tokens
    assert abs(kept.shape[1] - tokens * (1 - share)) <= 1
    for row, places in zip(noise.tolist(), kept.tolist(), strict=True):
        assert places == sorted(set(places))
        rest = [row[i] for i in range(tokens) if i not in places]
        assert max(row[i] for i in places) <= min(rest)


def patches_of(latents: Tensor, kept: Tensor) -> list[list[Tensor]]:
    """The kept patches (1, C, p, p) of each picture, cut out one by one."""
    columns = latents.shape[-1] // PATCH
    return [
        [
            picture[None, :, i // columns * PATCH :, i % columns * PATCH :][..., :PATCH, :PATCH]
            for i in places
        ]
        for picture, places in zip(latents, kept.tolist(), strict=True)
    ]


@repeatable
@given(h=st.integers(1, 4), w=st.integers(2, 4), channels=st.integers(1, 3))
def test_taken_patches_are_the_kept_ones_one_above_the_other(h: int, w: int, channels: int) -> None:
    latents = draw(2, channels, h * PATCH, w * PATCH)
    kept = TokenDrop("mask", 0.5, 1, 1, 2).choose(draw(2, h * w, seed=2)).kept
    taken = take_patches(latents, kept, PATCH)
    wanted = torch.cat([torch.cat(row, dim=2) for row in patches_of(latents, kept)])
    assert torch.equal(taken, wanted)


@pytest.mark.parametrize(("name", "gamma"), [("flow", None), ("iddpm", None), ("iddpm", 5.0)])
def test_a_masked_loss_is_the_mean_loss_of_the_kept_patches(
    name: ObjectiveName, gamma: float | None
) -> None:
    objective = get_objective(name, 0.0, gamma)
    x0, noise = draw(3, 4, 8, 8), draw(3, 4, 8, 8, seed=2)
    timesteps = objective.sample_timesteps(torch.tensor([0.0001, 0.5, 0.9]))
    x_t = objective.add_noise(x0, noise, timesteps)
    output = draw(3, 8 if objective.predicts_variance else 4, 8, 8, seed=3)
    kept = TokenDrop("mask", 0.7, 1, 1, 2).choose(draw(3, 16, seed=4)).kept
    tensors = (output, x0, noise, x_t)
    loss = objective.loss(*(take_patches(t, kept, PATCH) for t in tensors), timesteps)  # type: ignore[call-arg]
    for i in range(3):
        patches = zip(*(patches_of(t, kept)[i] for t in tensors), strict=True)
        each = [objective.loss(*patch, timesteps[i, None]) for patch in patches]  # type: ignore[call-arg]
        torch.testing.assert_close(loss[i], torch.cat(each).mean())


@pytest.mark.parametrize("config", [PIXART, DIT])
@pytest.mark.parametrize("mode", ["mask", "route"])
def test_every_parameter_learns_and_recomputing_changes_no_gradient(
    config: NetworkConfig, mode: Mode
) -> None:
    network = build(config)
    route = TokenDrop(mode, 0.75, 1, 1, DEPTH).choose(draw(2, 16))
    gradients = []
    for recompute in (False, True):
        network.checkpoint_blocks = recompute
        network.zero_grad()
        inputs = draw(2, 4, 8, 8), torch.tensor([5.0, 900.0]), condition_of(network, [3, 2])
        network(*inputs, route=route).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    idle = [name for name, gradient in gradients[0].items() if gradient is None]
    assert idle == []
    assert all(torch.isfinite(g).all() and g.any() for g in gradients[0].values() if g is not None)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(
    ("mode", "share", "start", "end", "says"),
    [
        ("mask", 0.0, 1, 1, "token_drop.share = 0.0: must be above 0 and below 1"),
        ("mask", 1.0, 1, 1, "token_drop.share = 1.0: must be above 0 and below 1"),
        ("route", float("nan"), 1, 1, "token_drop.share = nan: must be above 0 and below 1"),
        ("mask", 0.5, 4, 1, "token_drop.start = 4: each must be at least 1 and leave one"),
        ("mask", 0.5, 0, 1, "token_drop.start = 0: each must be at least 1 and leave one"),
        ("route", 0.5, 2, 2, "token_drop.start = 2, end = 2: each must"),
        ("route", 0.5, 2, 0, "token_drop.start = 2, end = 0: each must"),
    ],
)
def test_a_drop_that_leaves_no_block_or_no_token_is_refused(
    mode: Mode, share: float, start: int, end: int, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        TokenDrop(mode, share, start, end, DEPTH)
    assert str(caught.value).startswith(says)


def test_pictures_too_small_for_a_share_are_refused() -> None:
    drop = TokenDrop("mask", 0.95, 1, 1, DEPTH)
    drop.check_tokens(16)
    with pytest.raises(ConfigError, match=r"token_drop.share = 0.95: keeps 0 of the 4 tokens"):
        drop.check_tokens(4)
    with pytest.raises(ConfigError, match=r"token_drop.share = 0.01: keeps 16 of the 16 tokens"):
        TokenDrop("mask", 0.01, 1, 1, DEPTH).check_tokens(16)
