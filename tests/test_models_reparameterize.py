"""DiT -> PixArt is exact at t = 500, PixArt -> PixArt everywhere; no parameter unaccounted for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pixart_models.config import ConfigError, NetworkConfig, get_preset
from pixart_models.dit import DiT
from pixart_models.pixart import PixArt
from pixart_models.reparameterize import Report, adapt, check_compatible, reparameterize

SOURCE = NetworkConfig(architecture="dit", depth=3, width=24, heads=2, sample_size=8, num_classes=5)
TARGET = replace(SOURCE, architecture="pixart", text_width=10)


SIDE = {  # of tiny latents whose token grids are to each other as 256, 512 and 1024 px
    "256": TARGET,
    "512": replace(TARGET, sample_size=16),
    "1024": replace(TARGET, sample_size=32, position_scale=2.0, size_condition=True),
}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomize(network: nn.Module) -> None:
    """Every parameter, the zero-initialised ones too: a trained network has no zeros."""
    for i, parameter in enumerate(network.eval().requires_grad_(False).parameters()):
        parameter.data = draw(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5


@pytest.fixture(scope="module")
def dit() -> DiT:
    network = DiT(SOURCE)
    randomize(network)
    return network


@pytest.fixture(scope="module")
def parent() -> PixArt:
    """A trained PixArt at 512 px."""
    network = PixArt(SIDE["512"])
    randomize(network)
    return network


@pytest.fixture(scope="module")
def converted(dit: DiT) -> tuple[PixArt, Report]:
    pixart, report = reparameterize(dit, TARGET)
    return pixart.eval().requires_grad_(False), report


def dit_modulations(dit: DiT, t: float) -> Tensor:
    """(blocks, 6, D) without a class."""
    condition = dit.condition(torch.tensor([t]), dit.null_label(1, torch.device("cpu")))
    maps: list[Any] = [block.adaLN_modulation for block in dit.blocks]
    return torch.stack([modulation(condition).view(6, -1) for modulation in maps])


def pixart_modulations(pixart: PixArt, t: float) -> Tensor:
    """(blocks, 6, D): the shared map plus each block's table."""
    shared = pixart.t_block(pixart.t_embedder(torch.tensor([t]))).view(6, -1)
    tables: list[Any] = [block.scale_shift_table for block in pixart.blocks]
    return torch.stack([table + shared for table in tables])


def test_each_block_modulates_as_dit_does_at_500(
    dit: DiT, converted: tuple[PixArt, Report]
) -> None:
    ours, theirs = pixart_modulations(converted[0], 500.0), dit_modulations(dit, 500.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - dit_modulations(dit, 400.0)).abs().max() > 1e-2


def test_the_shared_map_follows_the_blocks_mean_at_every_timestep(
    dit: DiT, converted: tuple[PixArt, Report]
) -> None:
    for t in (0.0, 250.0, 999.0):
        ours, theirs = pixart_modulations(converted[0], t), dit_modulations(dit, t)
        torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=1e-6)


def test_the_output_is_the_unconditional_dits_at_500_whatever_the_text(
    dit: DiT, converted: tuple[PixArt, Report]
) -> None:
    latents, timesteps = draw(2, 4, 8, 8), torch.full((2,), 500.0)
    ours = converted[0](latents, timesteps, draw(2, 6, 10, seed=2))
    theirs = dit(latents, timesteps, dit.null_label(2, latents.device))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, dit(latents, timesteps, torch.tensor([0, 1])), atol=1e-2)


def test_the_report_lists_every_parameter_once(dit: DiT, converted: tuple[PixArt, Report]) -> None:
    pixart, report = converted
    listed = [*report.copied, *report.derived, *report.new]
    assert sorted(listed) == sorted(pixart.state_dict())
    assert all("cross_attn" in name or "y_embedder" in name for name in report.new)
    ours, theirs = pixart.state_dict(), dit.state_dict()
    for name in report.copied:
        assert torch.equal(ours[name], theirs[name]), name
    assert "blocks.2.attn.qkv.weight" in report.copied
    counts = f"{len(report.copied)} copied, 7 derived, {len(report.new)} new"
    positions = "positions: 4x4 over span 4 -> 4x4 over span 4 (scale 1.0)"
    assert str(report) == f"{counts}; {positions}"


def test_blocks_with_maps_of_their_own_keep_dits_at_every_timestep(dit: DiT) -> None:
    pixart, report = reparameterize(dit, replace(TARGET, adaln="block"))
    for t in (0.0, 400.0, 999.0):
        embedded = pixart.t_embedder(torch.tensor([t]))
        maps: list[Any] = [block.adaLN_modulation for block in pixart.blocks]
        ours = torch.stack([own(embedded).view(6, -1) for own in maps])
        torch.testing.assert_close(ours, dit_modulations(dit, t), rtol=0, atol=1e-6)
    latents, timesteps = draw(2, 4, 8, 8), torch.full((2,), 500.0)
    drawn = pixart(latents, timesteps, draw(2, 6, 10, seed=2))
    theirs = dit(latents, timesteps, dit.null_label(2, latents.device))
    torch.testing.assert_close(drawn, theirs, rtol=1e-5, atol=1e-5)
    listed = [*report.copied, *report.derived, *report.new]
    assert sorted(listed) == sorted(pixart.state_dict())
    assert not any("t_block" in name for name in listed)


def test_the_parent_stays_as_it_was(dit: DiT) -> None:
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    pixart, _ = reparameterize(dit, TARGET)
    for parameter in pixart.parameters():
        nn.init.zeros_(parameter)
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_straight_to_a_size_conditioned_pixart_of_the_same_span_is_exact_too(dit: DiT) -> None:
    target = replace(TARGET, sample_size=16, position_scale=2.0, size_condition=True)
    pixart, report = reparameterize(dit, target)
    latents, timesteps, sizes = draw(2, 4, 16, 16), torch.full((2,), 500.0), draw(2, 3, seed=4)
    ours = pixart(latents, timesteps, draw(2, 2, 10), sizes=100 * sizes)
    theirs = dit(latents, timesteps, dit.null_label(2, latents.device))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert "csize_embedder.mlp.2.weight" in report.new


def test_from_a_dit_at_256_to_512_to_1024(dit: DiT) -> None:
    """The paper's way: each stage begins where the one before ended."""
    network, report = reparameterize(dit, SIDE["256"])
    reports = [report]
    for side in ("512", "1024"):
        network, report = adapt(network, SIDE[side])
        reports.append(report)
        assert report.derived == ()
        assert sorted([*report.copied, *report.new]) == sorted(network.state_dict())
    assert [report.positions for report in reports] == [
        "4x4 over span 4 -> 4x4 over span 4 (scale 1.0)",
        "4x4 over span 4 -> 8x8 over span 8 (scale 1.0)",
        "8x8 over span 8 -> 16x16 over span 8 (scale 2.0)",
    ]
    assert reports[1].new == ()
    assert len(reports[2].new) == 8
    assert all(name.startswith(("csize_", "ar_")) for name in reports[2].new)
    assert network(draw(1, 4, 32, 32), torch.ones(1), draw(1, 2, 10), sizes=draw(1, 3)).any()


def test_the_presets_move_as_the_paper_says() -> None:
    """256 -> 512 px adds positions beyond the old ones; 512 -> 1024 puts new ones between."""
    spans = [
        c.base_grid / c.position_scale
        for c in (get_preset(f"pixart-xl-2-{side}") for side in (256, 512, 1024))
    ]
    assert spans == [16, 32, 32]


def test_positions_of_256_stay_at_512_and_those_of_512_are_every_second_at_1024() -> None:
    grids = [
        PixArt(config).positions(side, side, torch.zeros(1)).view(side, side, -1)
        for side, config in zip((4, 8, 16), SIDE.values(), strict=True)
    ]
    assert torch.equal(grids[1][:4, :4], grids[0])
    assert torch.equal(grids[2][::2, ::2], grids[1])


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.floats(0, 4096, width=32), min_size=6, max_size=6),
    timestep=st.floats(0, 1000, width=32),
    wide=st.integers(1, 8),
)
def test_a_size_conditioned_network_starts_as_its_parent_whatever_sizes_it_is_told(
    parent: PixArt, sizes: list[float], timestep: float, wide: int
) -> None:
    network, _ = adapt(parent, SIDE["1024"])
    latents, text = draw(2, 4, 8, 2 * wide), draw(2, 3, 10, seed=2)
    timesteps, told = torch.full((2,), timestep), torch.tensor(sizes).view(2, 3)
    assert torch.equal(
        network(latents, timesteps, text, sizes=told), parent(latents, timesteps, text)
    )


def test_new_size_embedders_learn(parent: PixArt) -> None:
    network, _ = adapt(parent, SIDE["1024"])
    network(draw(1, 4, 8, 8), torch.ones(1), draw(1, 3, 10), sizes=draw(1, 3)).sum().backward()
    for embedder in (network.csize_embedder, network.ar_embedder):
        gradient = embedder.get_parameter("mlp.2.weight").grad
        assert gradient is not None
        assert gradient.any()


def test_a_network_conditioned_already_keeps_its_embedders(parent: PixArt) -> None:
    grandparent, _ = adapt(parent, SIDE["1024"])
    randomize(grandparent)
    network, report = adapt(grandparent, replace(SIDE["1024"], sample_size=64, position_scale=4.0))
    inputs: Any = (draw(1, 4, 8, 8), torch.ones(1), draw(1, 3, 10), None, draw(1, 3))
    assert torch.equal(network(*inputs), grandparent(*inputs))
    assert report.new == report.derived == ()


@pytest.mark.parametrize(
    ("parent", "stage", "field"),
    [
        (TARGET, replace(TARGET, text_width=11), "text_width: the parent has 10, the stage asks"),
        (SIDE["1024"], SIDE["512"], "size_condition: the parent has True, the stage asks for Fa"),
        (SOURCE, replace(SOURCE, num_classes=6), "num_classes: the parent has 5, the stage asks"),
    ],
)
def test_what_cannot_follow_is_named(
    parent: NetworkConfig, stage: NetworkConfig, field: str
) -> None:
    with pytest.raises(ConfigError, match=rf"network\.{field}"):
        check_compatible(parent, stage)


@pytest.mark.parametrize(
    "changed",
    [
        {"depth": 4},
        {"width": 48},
        {"heads": 3},
        {"patch": 1},
        {"mlp_ratio": 2.0},
        {"latent_channels": 8},
        {"predict_variance": False},
    ],
)
def test_a_mismatch_names_the_field_and_both_values(dit: DiT, changed: dict[str, Any]) -> None:
    ((field, value),) = changed.items()
    parent = getattr(SOURCE, field)
    message = rf"network\.{field}: the parent has {parent}, the stage asks for {value};"
    with pytest.raises(ConfigError, match=message):
        reparameterize(dit, replace(TARGET, **changed))
