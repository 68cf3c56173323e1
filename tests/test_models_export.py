"""Export: diffusers' pipeline draws our pictures from the folder, or the folder is not written."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pixart_models.autoencoder import Autoencoder, load_autoencoder
from pixart_models.config import get_preset
from pixart_models.convert import ConversionError
from pixart_models.diffusion import ObjectiveName
from pixart_models.drawing import Drawer, initial_noise
from pixart_models.export import SCHEDULERS, export_pipeline
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig
from pixart_models.solvers import SOLVERS, SolverName, build_schedule
from pixart_models.text import TextEncoder, load_text_encoder

# diffusers converts a tensor with numpy 1's protocol.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = ["a red three", "", "a blue seven on a dark picture " * 9]  # the last is cut
SEEDS = [1, 2, 3]
NEGATIVE = "a blue two"
STEPS = 5
Pictures = NDArray[np.float32]


@pytest.fixture(scope="module")
def text_encoder() -> TextEncoder:
    return load_text_encoder("builtin:t5-tiny", 48)


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return load_autoencoder("builtin:digits")


@pytest.fixture(scope="module")
def build(text_encoder: TextEncoder, autoencoder: Autoencoder) -> Callable[..., Drawer]:
    def build_drawer(
        objective: ObjectiveName = "iddpm", solver: SolverName = "dpm++2m", **fields: Any
    ) -> Drawer:
        """A drawer of random weights, the zero-initialised ones too; ``fields`` of its network."""
        fields = {"predict_variance": objective == "iddpm", **fields}
        network = PixArt(get_preset("digits-mini", **fields)).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for p in network.parameters():
            p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5
        config = SnapshotConfig(
            network=network.config, objective=objective, resolution=32,
            autoencoder=autoencoder.source, autoencoder_digest=autoencoder.digest,
            text_encoder=text_encoder.source, text_encoder_digest=text_encoder.digest,
            solver=solver,
        )  # fmt: skip
        return Drawer(config, network, autoencoder, text_encoder)

    return build_drawer


def load_pipeline(folder: Path) -> Any:
    """As a user does, with diffusers alone."""
    from diffusers import PixArtAlphaPipeline

    pipeline = PixArtAlphaPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_with_pipeline(pipeline: Any, told: dict[str, Any], guidance: float) -> Pictures:
    """(B, H, W, 3) in 0-1, from the noise of SEEDS."""
    side = (told["height"] // 4, told["width"] // 4)
    pictures: Pictures = pipeline(
        PROMPTS, negative_prompt=NEGATIVE, guidance_scale=guidance, num_inference_steps=STEPS,
        latents=torch.stack([initial_noise(seed, (8, *side)) for seed in SEEDS]),
        output_type="np", **told,
    ).images  # fmt: skip
    return pictures


def assert_same(
    drawer: Drawer, theirs: Pictures, guidance: float, size: tuple[int, int] | None = None
) -> None:
    """``theirs`` are what ``drawer`` draws, to 4e-5 of full scale, before it rounds to bytes."""
    ours = drawer.draw(
        PROMPTS, SEEDS, steps=STEPS, guidance=guidance, negative_prompt=NEGATIVE, size=size
    )
    assert ours.std() > 12
    assert np.abs(theirs * 255 - ours).max() < 0.51
    assert np.abs(theirs * 255 - ours).mean() < 0.26  # rounding alone: 0.25


@pytest.mark.parametrize(("objective", "solver"), SCHEDULERS)
def test_the_exported_pipeline_draws_our_pictures(
    build: Callable[..., Drawer], objective: ObjectiveName, solver: SolverName, tmp_path: Path
) -> None:
    drawer = build(objective, solver)
    told = export_pipeline(drawer, tmp_path)
    pipeline = load_pipeline(tmp_path)
    drawn = {g: draw_with_pipeline(pipeline, told, g) for g in (1.0, 3.0)}
    for guidance, theirs in drawn.items():
        assert_same(drawer, theirs, guidance)
    timesteps = build_schedule(objective, STEPS, solver).timesteps
    assert pipeline.scheduler.timesteps.tolist() == timesteps.tolist()
    assert np.abs(drawn[1.0] - drawn[3.0]).max() > 0.1


@pytest.mark.parametrize("objective", ["iddpm", "flow"])
def test_the_variance_is_told_from_the_channels(
    build: Callable[..., Drawer], objective: ObjectiveName, tmp_path: Path
) -> None:
    """Each objective with the number of channels that the other usually has."""
    drawer = build(objective, predict_variance=objective == "flow")
    told = export_pipeline(drawer, tmp_path)
    assert_same(drawer, draw_with_pipeline(load_pipeline(tmp_path), told, 3.0), 3.0)


def test_a_size_conditioned_network_is_told_the_sizes_it_is_here(
    build: Callable[..., Drawer], tmp_path: Path
) -> None:
    drawer = build(sample_size=128, position_scale=2.0, size_condition=True)
    told = {**export_pipeline(drawer, tmp_path), "height": 24, "width": 48}
    theirs = draw_with_pipeline(load_pipeline(tmp_path), told, 3.0)
    assert_same(drawer, theirs, 3.0, size=(48, 24))


def test_an_encoder_in_half_precision_loads_like_the_rest(
    build: Callable[..., Drawer], text_encoder: TextEncoder, tmp_path: Path
) -> None:
    """On a GPU it is bf16, while the network is fp32."""
    half = copy.deepcopy(text_encoder)
    half.model.to(torch.bfloat16)
    told = export_pipeline(replace(build(), text_encoder=half), tmp_path)
    assert half.model.dtype == torch.bfloat16
    pipeline = load_pipeline(tmp_path)
    assert pipeline.text_encoder.dtype == torch.float32
    assert np.isfinite(draw_with_pipeline(pipeline, told, 3.0)).all()


def test_the_caller_is_told_what_the_folder_cannot_say(
    build: Callable[..., Drawer], tmp_path: Path
) -> None:
    assert export_pipeline(build(), tmp_path) == {
        "height": 32, "width": 32, "max_sequence_length": 48, "use_resolution_binning": False,
        "clean_caption": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "solver", "fields", "message"),
    [
        *((o, "lcm", {}, f"solver lcm with {o} cannot") for o in ("flow", "iddpm")),
        ("flow", "dpm++2m", {"size_condition": True}, "size_condition with sample_size = 8 cannot"),
        ("flow", "dpm++2m", {"qk_norm": True}, "cannot express qk_norm = True"),
        ("iddpm", "ddim", {"mlp_ratio": 2.0}, "cannot express mlp_ratio = 2.0"),
    ],
)
def test_what_the_pipeline_would_draw_otherwise_is_refused(
    build: Callable[..., Drawer],
    objective: ObjectiveName,
    solver: SolverName,
    fields: dict[str, Any],
    message: str,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConversionError, match=message):
        export_pipeline(build(objective, solver, **fields), tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_every_solver_of_ours_is_exported_or_refused() -> None:
    ours = {pair for o, solvers in SOLVERS.items() for pair in product([o], solvers)}
    assert {pair for pair in ours if pair[1] != "lcm"} == set(SCHEDULERS)


def test_an_eight_bit_encoder_is_refused(
    build: Callable[..., Drawer], text_encoder: TextEncoder, tmp_path: Path
) -> None:
    small = copy.deepcopy(text_encoder)
    small.model.config.quantization_config = {"load_in_8bit": True}
    with pytest.raises(ConversionError, match="an 8-bit text encoder cannot be exported"):
        export_pipeline(replace(build(), text_encoder=small), tmp_path)
