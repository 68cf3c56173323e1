"""Drawing: a picture is its own row's business, whatever it is drawn beside."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pixart_models.autoencoder import Autoencoder, load_autoencoder
from pixart_models.config import ModelInputError, get_preset
from pixart_models.diffusion import ObjectiveName
from pixart_models.dit import DiT
from pixart_models.drawing import (
    EVERYWHERE,
    Drawer,
    DrawingError,
    Guidance,
    draw_classes,
    fresh_noise,
    initial_noise,
    load_drawer,
    predict,
    solve,
)
from pixart_models.layers import pack_text
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, save_snapshot
from pixart_models.solvers import (
    SOLVERS,
    SolverError,
    SolverName,
    build_schedule,
    guide,
    rescale,
)
from pixart_models.text import TextEncoder, load_text_encoder

PROMPTS = ["a red three", "a blue seven to the left of a green eight on a dark picture", ""]
SEEDS = [1, 2, 3]


def randomize(network: nn.Module, seed: int = 0) -> None:
    """Give every parameter, the zero-initialised ones too, values that matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        fan_in = parameter.shape[-1]
        parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    network.eval().requires_grad_(False)


@cache
def load_encoders() -> tuple[TextEncoder, Autoencoder]:
    return load_text_encoder("builtin:t5-tiny", 48), load_autoencoder("builtin:digits")


def build_drawer(objective: ObjectiveName, **overrides: Any) -> Drawer:
    """A drawer whose network has seeded weights, none of them zero."""
    text_encoder, autoencoder = load_encoders()
    network = PixArt(get_preset("digits-mini", predict_variance=objective == "iddpm", **overrides))
    randomize(network)
    config = SnapshotConfig(
        network=network.config, objective=objective, resolution=32,
        autoencoder=autoencoder.source, autoencoder_digest=autoencoder.digest,
        text_encoder=text_encoder.source, text_encoder_digest=text_encoder.digest,
    )  # fmt: skip
    return Drawer(config, network, autoencoder, text_encoder)


@pytest.fixture(scope="module", params=["flow", "iddpm"])
def drawer(request: pytest.FixtureRequest) -> Drawer:
    return build_drawer(request.param)


@pytest.fixture(scope="module")
def flow_drawer() -> Drawer:
    return build_drawer("flow")


def count_rows(network: nn.Module, draw: Callable[[], Any]) -> list[int]:
    """Rows of each network evaluation while ``draw`` runs."""
    rows: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        rows.append(len(args[0]))

    handle = network.register_forward_pre_hook(note)
    draw()
    handle.remove()
    return rows


def test_the_same_seed_draws_the_same_picture_and_another_does_not(drawer: Drawer) -> None:
    one = drawer.draw(PROMPTS, SEEDS, steps=3)
    assert one.shape == (3, 32, 32, 3)
    assert one.dtype == np.uint8
    np.testing.assert_array_equal(drawer.draw(PROMPTS, SEEDS, steps=3), one)
    other = drawer.draw(PROMPTS, [4, 5, 6], steps=3)
    assert (np.abs(one.astype(int) - other).mean(axis=(1, 2, 3)) > 2).all()


def test_a_picture_in_a_batch_is_the_picture_alone(drawer: Drawer) -> None:
    together = drawer.draw(PROMPTS, SEEDS, steps=3)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = drawer.draw([prompt], [seed], steps=3)[0]
        assert np.abs(together[i].astype(int) - alone).max() <= 1


def test_prompt_negative_prompt_guidance_and_steps_each_change_the_picture(drawer: Drawer) -> None:
    base: dict[str, Any] = {"prompts": ["a red three"], "seeds": [1], "steps": 3, "guidance": 3.0}
    pictures = [
        drawer.draw(**{**base, **changed})
        for changed in (
            {},
            {"prompts": ["a blue two"]},
            {"negative_prompt": "a red three above a blue four"},
            {"guidance": 5.0},
            {"steps": 5},
        )
    ]
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)


def test_guidance_of_one_is_the_conditional_prediction_and_costs_one_row(drawer: Drawer) -> None:
    features = drawer.text_encoder.encode(PROMPTS)
    text = pack_text(features)

    def conditional(x: Tensor, timesteps: Tensor, _lines: Tensor) -> Tensor:
        output: Tensor = drawer.network(x, timesteps, text)
        return output[:, : x.shape[1]]

    with torch.inference_mode():
        x = torch.stack([initial_noise(seed, (8, 8, 8)) for seed in SEEDS])
        latents = solve(conditional, x, drawer.config.objective, 3)
    expected = drawer.autoencoder.decode(latents)
    drawn = drawer.draw(PROMPTS, SEEDS, steps=3, guidance=1.0, negative_prompt="a blue two")
    np.testing.assert_array_equal(drawn, expected)
    for guidance, rows in ((1.0, 3), (2.5, 6), (0.0, 6)):
        counted = count_rows(
            drawer.network,
            lambda g=guidance: drawer.draw(PROMPTS, SEEDS, steps=2, guidance=g),  # type: ignore[misc]
        )
        assert counted == [rows, rows]


def test_each_row_is_guided_by_its_own_scale_and_negative(drawer: Drawer) -> None:
    features = drawer.text_encoder.encode(PROMPTS)
    negatives = drawer.text_encoder.encode(["", "a longer thing that is not wanted", "x"])
    x, timesteps = (
        torch.stack([initial_noise(s, (8, 8, 8)) for s in SEEDS]),
        torch.tensor([900.0, 500.0, 1.0]),
    )
    scale = [2.5, 1.0, 0.0]
    with torch.inference_mode():
        mixed = predict(drawer.network, x, timesteps, features, negatives, scale)
        for i in range(3):
            row = slice(i, i + 1)
            one, other = (
                drawer.network(x[row], timesteps[row], f[i][None])[:, :8]
                for f in (features, negatives)
            )
            expected = other + scale[i] * (one - other)
            torch.testing.assert_close(mixed[row], expected, rtol=1e-4, atol=1e-4)
    rows = count_rows(
        drawer.network, lambda: predict(drawer.network, x, timesteps, features, negatives, scale)
    )
    assert rows == [5], "only the rows with guidance are evaluated twice"


def test_each_prompt_may_have_its_own_guidance_and_negative(drawer: Drawer) -> None:
    scales, unwanted = [1.0, 2.5, 6.0], ["", "a blue two", "a red three above a blue four"]
    together = drawer.draw(PROMPTS, SEEDS, steps=2, guidance=scales, negative_prompt=unwanted)
    for i in range(3):
        alone = drawer.draw(
            PROMPTS[i : i + 1], SEEDS[i : i + 1], steps=2, guidance=scales[i],
            negative_prompt=unwanted[i],
        )[0]  # fmt: skip
        assert np.abs(together[i].astype(int) - alone).max() <= 1


def test_outside_its_interval_guidance_is_off_and_free(flow_drawer: Drawer) -> None:
    """Flow's four steps begin at timesteps 999, 749, 500 and 250."""

    def draw(**options: Any) -> Any:
        return flow_drawer.draw(PROMPTS, SEEDS, steps=4, guidance=4.0, **options)

    def rows(**options: Any) -> list[int]:
        return count_rows(flow_drawer.network, lambda: draw(**options))

    assert rows(guidance_interval=(400, 800)) == [3, 6, 6, 3]
    assert rows(guidance_interval=(300, 400)) == [3, 3, 3, 3]
    assert rows() == [6, 6, 6, 6]
    np.testing.assert_array_equal(draw(), draw(guidance_interval=EVERYWHERE))
    unguided = flow_drawer.draw(PROMPTS, SEEDS, steps=4, guidance=1.0)
    np.testing.assert_array_equal(draw(guidance_interval=(300, 400)), unguided)
    some = draw(guidance_interval=(400, 800))
    assert not np.array_equal(some, unguided)
    assert not np.array_equal(some, draw())


@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_rescaled_guidance_has_the_contrast_of_none(objective: ObjectiveName) -> None:
    generator = torch.Generator().manual_seed(0)
    x, told, untold = (torch.randn(3, 8, 4, 4, generator=generator) for _ in range(3))
    lines = build_schedule(objective, 4).table[1].expand(3, -1)
    p, q = lines[0, :2]
    guided = guide(told, untold, torch.full((3,), 6.0))
    shares = torch.tensor([0.0, 0.5, 1.0])
    found = rescale(x, told, guided, lines, shares)
    assert torch.equal(found[0], guided[0])
    plain, strong, half, whole = (
        (p * x + q * output)[i] for output, i in ((told, 2), (guided, 2), (found, 1), (found, 2))
    )
    torch.testing.assert_close(whole.std(), plain.std())
    torch.testing.assert_close(whole / whole.std(), strong / strong.std(), rtol=1e-3, atol=1e-4)
    plain, strong = ((p * x + q * output)[1].std() for output in (told, guided))
    torch.testing.assert_close(half.std(), (plain + strong) / 2)


@given(
    scale=st.floats(-5, 20),
    ends=st.tuples(st.floats(0, 1000), st.floats(0, 1000)).map(sorted),
    timestep=st.floats(0, 1000),
)
def test_guidance_acts_inside_its_interval_ends_included(
    scale: float, ends: list[float], timestep: float
) -> None:
    low, high = ends
    guidance = Guidance(scale, (low, high))
    assert guidance.at(timestep) == (1 if timestep < low or timestep > high else scale)
    assert guidance.at(low) == guidance.at(high) == scale
    assert Guidance(scale).at(timestep) == scale


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": [2.0, 3.0]}, "guidance holds 2 values for 3 prompts"),
        ({"negative_prompt": ["x"]}, "negative_prompt holds 1 values for 3 prompts"),
        ({"seeds": [1]}, "1 seeds for 3 prompts"),
        ({"guidance": float("nan")}, "guidance = nan: must be a finite number"),
        ({"guidance": [1.0, 2.0, float("inf")]}, "guidance = inf: must be a finite number"),
        ({"guidance_interval": (800, 400)}, r"guidance_interval = \(800, 400\): must be timesteps"),
        ({"guidance_interval": (0, 1001)}, "0 <= low <= high <= 1000"),
        ({"guidance_rescale": 1.5}, "guidance_rescale = 1.5: must be 0 to 1"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale = nan: must be 0 to 1"),
        ({"guidance_interval": (float("nan"), 5)}, "0 <= low <= high <= 1000"),
        ({"steps": 0}, "num_inference_steps = 0: must be 1 to 1000 with dpm"),
    ],
)
def test_what_cannot_be_drawn_is_named(
    flow_drawer: Drawer, options: dict[str, Any], message: str
) -> None:
    good: dict[str, Any] = {"prompts": PROMPTS, "seeds": SEEDS, "steps": 2}
    with pytest.raises(ModelInputError, match=message):
        flow_drawer.draw(**(good | options))


def with_solver(drawer: Drawer, solver: SolverName) -> Drawer:
    return replace(drawer, config=replace(drawer.config, solver=solver))


def test_a_snapshot_is_drawn_with_the_solver_it_names(drawer: Drawer) -> None:
    names = SOLVERS[drawer.config.objective]
    drawn = [with_solver(drawer, name).draw(PROMPTS, SEEDS, steps=4) for name in names]
    np.testing.assert_array_equal(drawn[0], drawer.draw(PROMPTS, SEEDS, steps=4))
    assert len({pictures.tobytes() for pictures in drawn}) == len(names)
    with pytest.raises(SolverError, match="must be 1 to 50 with lcm"):
        with_solver(drawer, "lcm").draw(PROMPTS, SEEDS, steps=51)


def test_a_picture_that_is_noised_again_does_not_depend_on_its_batch(drawer: Drawer) -> None:
    distilled = with_solver(drawer, "lcm")
    together = distilled.draw(PROMPTS, SEEDS, steps=4)
    np.testing.assert_array_equal(distilled.draw(PROMPTS, SEEDS, steps=4), together)
    for i in range(3):
        alone = distilled.draw(PROMPTS[i : i + 1], SEEDS[i : i + 1], steps=4)[0]
        assert np.abs(together[i].astype(int) - alone).max() <= 1


def test_fresh_noise_is_a_function_of_seed_and_step() -> None:
    table = build_schedule("flow", 4, "lcm").table
    x = torch.zeros(4, 8, 16, 16)
    lines = torch.stack([table[0], table[2], table[3], table[0]])
    drawn = fresh_noise(lines, [7, 7, 7, 8], [0, 2, 3, 0], x)
    assert drawn is not None
    assert not drawn[2].any(), "the last step is not noised"
    for i, (seed, step) in enumerate([(7, 0), (7, 2)]):
        alone = fresh_noise(lines[i : i + 1], [seed], [step], x[:1])
        assert alone is not None
        assert torch.equal(alone[0], drawn[i])
    parts = [drawn[0], drawn[1], drawn[3], initial_noise(7, (8, 16, 16))]
    correlation = torch.corrcoef(torch.stack(parts).flatten(1))
    assert (correlation - torch.eye(4)).abs().max() < 0.1, "2048 independent values each"
    for part in parts:
        assert abs(part.mean()) < 0.1
        assert abs(part.std() - 1) < 0.1
    assert fresh_noise(build_schedule("flow", 4).table, SEEDS, [0] * 4, x) is None


def test_a_size_conditioned_network_is_told_the_picture_as_diffusers_would(tmp_path: Path) -> None:
    """diffusers: resolution = (height, width) in pixels, aspect_ratio = height / width."""
    from diffusers.models.embeddings import PixArtAlphaCombinedTimestepSizeEmbeddings

    drawer = build_drawer("flow", size_condition=True)
    save_snapshot(tmp_path, drawer.config, drawer.network.state_dict())
    network = load_drawer(tmp_path, like=drawer).network
    peer = PixArtAlphaCombinedTimestepSizeEmbeddings(48, 16, use_additional_conditions=True)
    for theirs, ours in (
        ("timestep_embedder", network.t_embedder),
        ("resolution_embedder", network.csize_embedder),
        ("aspect_ratio_embedder", network.ar_embedder),
    ):
        weights = list(ours.mlp.state_dict().values())
        names = list(getattr(peer, theirs).state_dict())
        getattr(peer, theirs).load_state_dict(dict(zip(names, weights, strict=True)))
    embedded: list[Tensor] = []
    network.t_block.register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
    drawn = replace(drawer, network=network).draw(["a red three"], [1], steps=1, size=(48, 24))
    assert drawn.shape == (1, 24, 48, 3)
    expected = peer(
        torch.tensor([999.0, 999.0]), torch.tensor([[24.0, 48.0]] * 2), torch.tensor([[0.5]] * 2),
        batch_size=2, hidden_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(embedded[0], expected, rtol=1e-4, atol=1e-4)
    other = replace(drawer, network=network).draw(["a red three"], [1], steps=1, size=(24, 48))
    assert not np.array_equal(other.transpose(0, 2, 1, 3), drawn)


def test_any_size_on_the_grid_can_be_drawn(flow_drawer: Drawer) -> None:
    pictures = flow_drawer.draw(["a red three"], [1], steps=1, size=(48, 24))
    assert pictures.shape == (1, 24, 48, 3)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((36, 32), "width = 36 px: must be a positive multiple of 8"),
        ((32, 33), "height = 33 px: must be a positive multiple of 8"),
        ((0, 32), "width = 0 px: must be a positive multiple of 8"),
        ((32, -8), "height = -8 px: must be a positive multiple of 8"),
    ],
)
def test_a_size_off_the_grid_names_the_side(
    flow_drawer: Drawer, size: tuple[int, int], message: str
) -> None:
    with pytest.raises(DrawingError, match=message):
        flow_drawer.draw(["a red three"], [1], size=size)


@pytest.mark.parametrize("objective", ["flow", "iddpm"])
def test_a_dit_draws_classes_each_as_if_alone(objective: ObjectiveName) -> None:
    _, autoencoder = load_encoders()
    network = DiT(
        get_preset("digits-mini", architecture="dit", predict_variance=objective == "iddpm")
    )
    randomize(network)

    def draw(labels: list[int], seeds: list[int], guidance: float = 2.0) -> Any:
        return draw_classes(
            network, autoencoder, objective, labels, seeds, steps=3, guidance=guidance
        ).astype(int)

    together = draw([3, 7], [1, 1])
    assert together.shape == (2, 32, 32, 3)
    assert np.abs(together[0] - together[1]).mean() > 2
    for i, label in enumerate([3, 7]):
        assert np.abs(together[i] - draw([label], [1])[0]).max() <= 1
    np.testing.assert_array_equal(draw([3], [1], guidance=0.0), draw([7], [1], guidance=0.0))
