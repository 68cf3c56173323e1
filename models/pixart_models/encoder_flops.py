"""What encoding costs before an encoder is loaded: FLOPs by its name, a multiply-add being 2.

Products and convolutions are counted, as torch counts them; nothing is downloaded or built.
"""

import re
from typing import NamedTuple


class TextEncoderSize(NamedTuple):
    """A T5 encoder with gated MLPs: width, MLPs' inner width, layers, width of all heads."""

    width: int
    hidden: int
    layers: int
    inner: int

    def flops(self, tokens: float) -> float:
        """Of a caption: projections, an MLP's three products, scores and mixes, by layer."""
        products = tokens * self.width * (4 * self.inner + 3 * self.hidden)
        return 2 * self.layers * (products + 2 * tokens**2 * self.inner)


class AutoencoderSize(NamedTuple):
    """An AutoencoderKL's encoder: channels and residual blocks of each level, latent channels."""

    channels: tuple[int, ...]
    blocks: int
    latent: int
    attention: bool

    @property
    def factor(self) -> int:
        return 1 << len(self.channels) - 1

    def flops(self, height: int, width: int) -> float:
        """Of a picture; convolutions are 3 x 3, two in each residual block."""
        area, before, moments = height * width, self.channels[0], 2 * self.latent
        total = 27.0 * area * before
        for level, c in enumerate(self.channels):
            if level:  # the convolution that halves the level above
                area //= 4
                total += 9 * area * before**2
            shortcut = before if before != c else 0
            total += area * c * (9 * before + shortcut + 9 * c * (2 * self.blocks - 1))
            before = c
        total += area * (36 * before**2 + 9 * before * moments + moments**2)  # middle, ends
        total += self.attention * 2 * area * before * (2 * before + area)
        return 2 * total


T5_SIZES = {
    "small": TextEncoderSize(512, 1024, 8, 384),
    "base": TextEncoderSize(768, 2048, 12, 768),
    "large": TextEncoderSize(1024, 2816, 24, 1024),
    "xl": TextEncoderSize(2048, 5120, 24, 2048),
    "xxl": TextEncoderSize(4096, 10240, 24, 4096),
}  # of T5 v1.1 and Flan-T5
_TINY_T5 = TextEncoderSize(64, 128, 2, 128)
_STABLE_DIFFUSION = AutoencoderSize((128, 256, 512, 512), 2, 4, True)
_DIGITS = AutoencoderSize((16, 32, 48), 1, 8, False)


def size_text_encoder(source: str) -> TextEncoderSize:
    """By its name's end, as ``flan-t5-large``; others, pipelines among them, count as T5-XXL."""
    if source.startswith("builtin:"):
        return _TINY_T5
    named = re.search(r"t5.*[-_](small|base|large|xl|xxl)/?$", source.lower())
    return T5_SIZES[named[1] if named else "xxl"]


def size_autoencoder(source: str) -> AutoencoderSize:
    """Whatever is not built in counts as Stable Diffusion's, which is SDXL's too."""
    return _DIGITS if source.startswith("builtin:") else _STABLE_DIFFUSION
