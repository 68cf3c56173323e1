"""The autoencoder: moments out, pictures back, and weights small enough to live in the package."""

import json
import shutil
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_jobs.scenes import compose_scene
from pixart_models.autoencoder import BUILTIN, Autoencoder, load_autoencoder, sample_moments
from pixart_models.text import ModelNotFound


@pytest.fixture(scope="module")
def autoencoder() -> Autoencoder:
    return load_autoencoder(BUILTIN)


@pytest.fixture(scope="module")
def scenes() -> NDArray[np.uint8]:
    """Scenes of scans and prompts no training saw, (B, 48, 48, 3)."""
    return np.stack([compose_scene(i, seed=0, split="test").image for i in range(12)])


@pytest.fixture(scope="module")
def moments(autoencoder: Autoencoder, scenes: NDArray[np.uint8]) -> Tensor:
    pixels = torch.from_numpy(scenes).permute(0, 3, 1, 2).float() / 127.5 - 1
    return autoencoder.encode(pixels)


def test_moments_are_means_and_log_variances_on_the_latent_grid(
    autoencoder: Autoencoder, moments: Tensor
) -> None:
    assert (autoencoder.factor, autoencoder.channels) == (4, 8)
    assert moments.shape == (12, 2 * 8, 48 // 4, 48 // 4)
    assert autoencoder.encode(torch.zeros(1, 3, 32, 64)).shape == (1, 16, 8, 16)


def test_an_unseen_scene_survives_the_round_trip(
    autoencoder: Autoencoder, moments: Tensor, scenes: NDArray[np.uint8]
) -> None:
    decoded = autoencoder.decode(moments.chunk(2, dim=1)[0] * autoencoder.scale)
    assert decoded.dtype == np.uint8
    assert decoded.shape == scenes.shape
    error = np.abs(decoded.astype(int) - scenes).mean(axis=(1, 2, 3))  # of 255; a flat one: 22
    assert error.mean() < 6
    assert error.max() < 16


def test_decoding_undoes_the_scale_and_rounds_to_the_nearest_value(
    autoencoder: Autoencoder, moments: Tensor
) -> None:
    mean = moments[:1, :8]
    with torch.inference_mode():
        exact = (autoencoder.model.decode(mean).sample[0] + 1).clamp(0, 2) * 127.5
    decoded = torch.from_numpy(autoencoder.decode(mean * autoencoder.scale)[0]).permute(2, 0, 1)
    assert (decoded - exact).abs().max() < 0.51


def test_scaled_latents_have_about_unit_variance(autoencoder: Autoencoder, moments: Tensor) -> None:
    latents = sample_moments(moments, torch.zeros_like(moments[:, :8]), autoencoder.scale)
    assert 0.85 < latents.std() < 1.15


def test_sampled_moments_have_the_mean_and_deviation_they_say() -> None:
    mean = torch.tensor([-2.0, 0.5]).view(1, 2, 1, 1)
    deviation = torch.tensor([0.1, 3.0]).view(1, 2, 1, 1)
    moments = torch.cat([mean, 2 * deviation.log()], dim=1).expand(20_000, 4, 1, 1)
    noise = torch.randn(20_000, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    latents = sample_moments(moments, noise, scale=0.5)
    torch.testing.assert_close(latents.mean(0)[None], mean * 0.5, rtol=0, atol=0.05)
    torch.testing.assert_close(latents.std(0)[None], deviation * 0.5, rtol=0.02, atol=0)


def test_sampling_equals_diffusers_for_extreme_log_variances() -> None:
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    moments = torch.cat([torch.ones(1, 1, 1, 3), torch.tensor([[[[-1e4, 0.5, 1e4]]]])], dim=1)
    theirs = DiagonalGaussianDistribution(moments)
    ours = sample_moments(moments, torch.ones(1, 1, 1, 3), scale=1.0)
    torch.testing.assert_close(ours, theirs.mean + theirs.std)


def test_weights_are_stable_and_at_most_a_megabyte(autoencoder: Autoencoder) -> None:
    assert load_autoencoder(BUILTIN).digest == autoencoder.digest
    folder = Path(str(files("pixart_models") / "assets/autoencoder"))
    assert load_autoencoder(str(folder)).digest == autoencoder.digest, "weights, not the source"
    (weights,) = folder.glob("*.safetensors")
    assert weights.stat().st_size <= 1_000_000


def test_the_builtin_digest_is_the_one_in_snapshots(autoencoder: Autoencoder) -> None:
    """Snapshots trained earlier name it; another would make them undrawable."""
    assert autoencoder.digest == "2ff335d63ff25903"


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A diffusers pipeline's folder with its autoencoder in ``vae``."""
    shutil.copytree(str(files("pixart_models") / "assets/autoencoder"), tmp_path / "vae")
    (tmp_path / "model_index.json").write_text("{}")
    return tmp_path


def fault(source: Path | str) -> str:
    """The one line said of a source that cannot be loaded."""
    with pytest.raises(ModelNotFound) as caught:
        load_autoencoder(str(source))
    message = str(caught.value)
    assert message.startswith(f"cannot load the autoencoder '{source}': ")
    assert "\n" not in message
    return message


def test_a_pipelines_folder_is_the_autoencoder_inside_it(
    autoencoder: Autoencoder, pipeline: Path
) -> None:
    assert load_autoencoder(str(pipeline)).digest == autoencoder.digest
    assert load_autoencoder(str(pipeline / "vae")).digest == autoencoder.digest


def test_a_tensor_that_is_not_there_is_named(pipeline: Path) -> None:
    """diffusers warns and fills it with random numbers."""
    path = pipeline / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    lost = weights.pop("decoder.conv_in.weight")
    save_file(weights, path)
    assert "missing or mis-shaped, first decoder.conv_in.weight" in fault(pipeline)
    save_file(weights | {"decoder.conv_in.weight": lost[:3].clone()}, path)
    assert "missing or mis-shaped, first decoder.conv_in.weight" in fault(pipeline)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(pipeline: Path) -> None:
    path = pipeline / "vae/diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    message = fault(pipeline)
    assert "only diffusion_pytorch_model.bin, no diffusion_pytorch_model.safetensors" in message
    assert "AutoencoderKL.from_pretrained(FOLDER, use_safetensors=False)" in message


def test_another_model_is_refused(pipeline: Path) -> None:
    path = pipeline / "vae/config.json"
    config = json.loads(path.read_text()) | {"_class_name": "AutoencoderTiny"}
    path.write_text(json.dumps(config))
    assert "holds a 'AutoencoderTiny', but a 'AutoencoderKL' is needed" in fault(pipeline)


def test_an_unknown_source_says_how_to_get_the_model(tmp_path: Path) -> None:
    assert "give a local folder or ORG/NAME" in fault(tmp_path / "nothing")
    assert "'hf download someone/some-vae' fetches it" in fault("someone/some-vae")
