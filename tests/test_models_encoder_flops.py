"""FLOPs of encoders that are not loaded, against torch's counter on encoders without memory."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5Config, T5EncoderModel

from pixart_models.encoder_flops import (
    T5_SIZES,
    AutoencoderSize,
    TextEncoderSize,
    size_autoencoder,
    size_text_encoder,
)


def count_flops(model: Any, *inputs: torch.Tensor) -> float:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs)
    return float(counter.get_total_flops())


@pytest.mark.parametrize("size", [TextEncoderSize(48, 80, 3, 32), T5_SIZES["small"]])
@pytest.mark.parametrize("tokens", [7, 120])
def test_text_encoder(size: TextEncoderSize, tokens: int) -> None:
    config = T5Config(
        vocab_size=16, d_model=size.width, d_ff=size.hidden, num_layers=size.layers,
        d_kv=size.inner // 2, num_heads=2, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    with torch.device("meta"):
        counted = count_flops(T5EncoderModel(config), torch.zeros(1, tokens, dtype=torch.long))
    assert size.flops(tokens) == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize(
    "size", [AutoencoderSize((8, 16, 16), 2, 4, True), AutoencoderSize((16, 32, 48), 1, 8, False)]
)
def test_autoencoder(size: AutoencoderSize) -> None:
    with torch.device("meta"):
        model = AutoencoderKL(
            block_out_channels=size.channels, layers_per_block=size.blocks, norm_num_groups=8,
            latent_channels=size.latent, mid_block_add_attention=size.attention,
            down_block_types=("DownEncoderBlock2D",) * len(size.channels),
            up_block_types=("UpDecoderBlock2D",) * len(size.channels),
        )  # fmt: skip
        counted = count_flops(model.encode, torch.zeros(1, 3, 32, 48))
    assert size.flops(32, 48) == pytest.approx(counted, rel=1e-9)
    assert size.factor == 4


@pytest.mark.parametrize(
    ("source", "width"),
    [
        ("builtin:t5-tiny", 64),
        ("google/flan-t5-large", 1024),
        ("google/t5-v1_1-xl", 2048),
        ("DeepFloyd/t5-v1_1-xxl", 4096),
        ("/models/t5-v1_1-base/", 768),
        ("PixArt-alpha/PixArt-XL-2-1024-MS", 4096),
    ],
)
def test_a_text_encoder_is_known_by_its_name(source: str, width: int) -> None:
    assert size_text_encoder(source).width == width


def test_an_autoencoder_is_stable_diffusions_or_the_demos() -> None:
    found = size_autoencoder("stabilityai/sd-vae-ft-ema")
    assert (found.factor, found.latent) == (8, 4)
    found = size_autoencoder("builtin:digits")
    assert (found.factor, found.latent) == (4, 8)
