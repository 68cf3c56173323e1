"""DiT -> PixArt: exact at t = 500, and every parameter accounted for."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pixart_models.config import ConfigError, NetworkConfig
from pixart_models.dit import DiT
from pixart_models.pixart import PixArt
from pixart_models.reparameterize import Report, reparameterize

SOURCE = NetworkConfig(architecture="dit", depth=3, width=24, heads=2, sample_size=8, num_classes=5)
TARGET = replace(SOURCE, architecture="pixart", text_width=10)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def dit() -> DiT:
    """Random, the zero-initialised parameters too: a trained DiT has no zeros."""
    network = DiT(SOURCE)
    for i, parameter in enumerate(network.parameters()):
        parameter.data = draw(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5
    return network.eval().requires_grad_(False)


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
    assert str(report) == f"{len(report.copied)} copied, 7 derived, {len(report.new)} new"


def test_the_parent_stays_as_it_was(dit: DiT) -> None:
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    pixart, _ = reparameterize(dit, TARGET)
    for parameter in pixart.parameters():
        nn.init.zeros_(parameter)
    for name, tensor in dit.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_another_resolution_is_welcome(dit: DiT) -> None:
    pixart, _ = reparameterize(dit, replace(TARGET, sample_size=16, position_scale=2.0))
    assert pixart(draw(1, 4, 16, 16), torch.tensor([500.0]), draw(1, 2, 10)).shape == (1, 8, 16, 16)


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
