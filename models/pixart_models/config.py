"""What defines a network: one typed class for both architectures, and the presets by name."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


class ModelInputError(ValueError):
    """What a user gave the models that they cannot use; base of this room's named errors.

    The message names the value and the way out.
    """


class ConfigError(ModelInputError):
    """A network configuration that cannot be built."""


@dataclass(frozen=True)
class NetworkConfig:
    """Everything that fixes the shape of a DiT or PixArt.

    ``sample_size`` is the latent side the position grid is based on (pixels / 8 for SD's VAE);
    ``position_scale`` squeezes positions, so that a model moved to a finer grid keeps the span it
    was trained on (2.0 for PixArt at 1024 px). ``predict_variance`` doubles the output channels
    for IDDPM's learned range. ``text_width`` and ``max_tokens`` matter to PixArt only,
    ``num_classes`` to DiT only. ``size_condition`` adds original size and aspect ratio to the
    timestep (PixArt at 1024 px). ``qk_norm`` normalises queries and keys within each head, which
    no published PixArt-alpha does. ``adaln`` is how a PixArt's blocks learn of the timestep: by
    one shared map and a table each (``single``, the paper's), or by a map each as DiT's (``block``,
    the paper's baseline: 27 % of the parameters). ``text_in`` is where a PixArt's blocks meet the
    text: by ``cross`` attention, or as further tokens of self-attention (``context``), for which
    there are no published weights.
    """

    architecture: Literal["pixart", "dit"] = "pixart"
    depth: int = 28
    width: int = 1152
    heads: int = 16
    patch: int = 2
    mlp_ratio: float = 4.0
    latent_channels: int = 4
    predict_variance: bool = True
    sample_size: int = 32
    position_scale: float = 1.0
    text_width: int = 4096
    max_tokens: int = 120
    num_classes: int = 1000
    size_condition: bool = False
    qk_norm: bool = False
    adaln: Literal["single", "block"] = "single"
    text_in: Literal["cross", "context"] = "cross"

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "patch", "latent_channels", "sample_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"network.{name} = {getattr(self, name)}: must be at least 1")
        if self.width % self.heads:
            raise ConfigError(
                f"network.width = {self.width} is not divisible by heads = {self.heads}; "
                f"try width = {self.width - self.width % self.heads or self.heads}"
            )
        if self.width % 4:
            raise ConfigError(f"network.width = {self.width}: 2-D positions need a multiple of 4")
        if self.size_condition and self.width % 3:
            raise ConfigError(f"network.width = {self.width}: size_condition needs a multiple of 3")
        if self.sample_size % self.patch:
            raise ConfigError(
                f"network.sample_size = {self.sample_size} is no multiple of patch = {self.patch}"
            )

    @property
    def out_channels(self) -> int:
        return self.latent_channels * (2 if self.predict_variance else 1)

    @property
    def base_grid(self) -> int:
        """Tokens a side of the grid that positions are counted on."""
        return self.sample_size // self.patch

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_XL_2 = NetworkConfig()
_DEMO = NetworkConfig(
    depth=6, width=192, heads=6, latent_channels=8, predict_variance=False, sample_size=8,
    text_width=64, max_tokens=48, num_classes=10,
)  # fmt: skip

_SIGMA = replace(_XL_2, max_tokens=300)  # Chen et al. 2024, arXiv 2403.04692: 300 text tokens

PRESETS: dict[str, NetworkConfig] = {
    "pixart-xl-2-256": _XL_2,
    "pixart-xl-2-512": replace(_XL_2, sample_size=64),
    "pixart-xl-2-1024": replace(_XL_2, sample_size=128, position_scale=2.0, size_condition=True),
    "pixart-sigma-xl-2-256": replace(_SIGMA, position_scale=0.5),
    "pixart-sigma-xl-2-512": replace(_SIGMA, sample_size=64),
    "pixart-sigma-xl-2-1024": replace(_SIGMA, sample_size=128, position_scale=2.0),
    "pixart-s-2-256": replace(_XL_2, depth=12, width=384, heads=6),
    "pixart-b-2-256": replace(_XL_2, depth=12, width=768, heads=12),
    "pixart-l-2-256": replace(_XL_2, depth=24, width=1024, heads=16),
    "dit-xl-2-256": replace(_XL_2, architecture="dit"),
    "dit-xl-2-512": replace(_XL_2, architecture="dit", sample_size=64),
    "dit-s-2-256": replace(_XL_2, architecture="dit", depth=12, width=384, heads=6),
    "dit-b-2-256": replace(_XL_2, architecture="dit", depth=12, width=768, heads=12),
    "dit-l-2-256": replace(_XL_2, architecture="dit", depth=24, width=1024, heads=16),
    "digits": _DEMO,
    "digits-shallow": replace(_DEMO, depth=3),  # as good at half the compute (jobs/LOG.md)
    "crowds": replace(_DEMO, depth=3, patch=4, sample_size=16, max_tokens=64),
    "digits-mini": replace(_DEMO, depth=2, width=48, heads=4),
}


def get_preset(name: str, **overrides: Any) -> NetworkConfig:
    """The preset ``name`` with fields replaced. Raises ConfigError for an unknown name."""
    if name not in PRESETS:
        raise ConfigError(f"unknown network preset {name!r}; one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **overrides)
