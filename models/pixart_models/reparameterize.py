"""The network a stage begins with, from its parent's: DiT -> PixArt, and PixArt -> a finer one.

DiT's block i modulates by its own map f_i(c); PixArt by one shared f plus a table E_i. The paper
(section 2.3) picks E_i so that both agree at t = 500. Any f works there; we take the mean of all
f_i, which is the shared map with the least squared error to the blocks' own at every other t.
"Without class" is the null class DiT learned for guidance, folded into the timestep embedding's
bias, so PixArt starts as DiT's unconditional model: same modulation at t = 500, same output.

Where a PixArt's blocks keep maps of their own (``adaln: block``), they are DiT's, at every t.

What is new starts harmless: cross-attention and size embedders end in zeros. Positions are
computed, not learned (``sincos_positions``), so another grid or scale loses nothing.
"""

from dataclasses import dataclass

import torch

from pixart_models.config import ConfigError, NetworkConfig
from pixart_models.dit import DiT, DiTBlock
from pixart_models.layers import linear_at
from pixart_models.pixart import PixArt

MATCH_TIMESTEP = 500.0
_SHARED = ["depth", "width", "heads", "patch", "mlp_ratio", "latent_channels", "predict_variance",
           "qk_norm"]  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Which parameters were copied from the parent, derived from it, or are new, and how the
    native token grid moved: a span in units of position, which both networks read alike."""

    copied: tuple[str, ...]
    derived: tuple[str, ...]
    new: tuple[str, ...]
    positions: str

    def __str__(self) -> str:
        counts = f"{len(self.copied)} copied, {len(self.derived)} derived, {len(self.new)} new"
        return f"{counts}; positions: {self.positions}"


def check_compatible(source: NetworkConfig, target: NetworkConfig) -> None:
    """Raise ConfigError unless a network of ``source`` can become one of ``target``."""
    own = ["text_width", "adaln", "text_in"] if source.architecture == "pixart" else ["num_classes"]
    own += ["size_condition"] if source.size_condition else []  # it may be added, not taken away
    for name in (*_SHARED, *(own if source.architecture == target.architecture else ())):
        if getattr(source, name) != getattr(target, name):
            raise ConfigError(
                f"network.{name}: the parent has {getattr(source, name)}, the stage asks for "
                f"{getattr(target, name)}; starting from a parent needs them equal"
            )


@torch.no_grad()
def adapt(network: PixArt, target: NetworkConfig) -> tuple[PixArt, Report]:
    """A PixArt of ``target`` that predicts what ``network`` does, whatever sizes it is told.

    Exactly so where both have the same span of positions (512 -> 1024 px with position_scale 2).
    Raises ConfigError for other shapes.
    """
    pixart = _begin(network, target)
    return pixart, _report(network, pixart, set())


@torch.no_grad()
def reparameterize(dit: DiT, target: NetworkConfig) -> tuple[PixArt, Report]:
    """A PixArt of ``target`` that starts as ``dit``'s unconditional model at t = 500.

    Exactly so where both have the same span of positions. Raises ConfigError for other shapes.
    """
    pixart = _begin(dit, target)
    state = pixart.state_dict()
    null = dit.y_embedder(dit.null_label(1, torch.device("cpu")))[0]
    state["t_embedder.mlp.2.bias"].add_(null)
    embedded = pixart.t_embedder(torch.tensor([MATCH_TIMESTEP]))  # (1, D)
    final = dit.final_layer.adaLN_modulation(embedded).view(2, -1)
    state["final_layer.scale_shift_table"].copy_(final - embedded)
    derived = {"t_embedder.mlp.2.bias", "final_layer.scale_shift_table"}
    if target.adaln == "block":
        return pixart, _report(dit, pixart, derived)
    modulations = [b.adaLN_modulation for b in dit.blocks if isinstance(b, DiTBlock)]
    maps = [linear_at(modulation, 1) for modulation in modulations]
    state["t_block.1.weight"].copy_(torch.stack([m.weight for m in maps]).mean(0))
    state["t_block.1.bias"].copy_(torch.stack([m.bias for m in maps]).mean(0))
    shared = pixart.t_block(embedded).view(6, -1)
    for i, modulation in enumerate(modulations):
        own = modulation(embedded).view(6, -1)
        state[f"blocks.{i}.scale_shift_table"].copy_(own - shared)
    derived |= {n for n in state if "scale_shift_table" in n or n.startswith("t_block.")}
    return pixart, _report(dit, pixart, derived)


def _begin(network: PixArt | DiT, target: NetworkConfig) -> PixArt:
    """A PixArt with what ``network`` has under the same name; new size embedders say nothing."""
    check_compatible(network.config, target)
    pixart, theirs = PixArt(target), network.state_dict()
    for name, tensor in pixart.state_dict().items():
        if name in theirs:
            tensor.copy_(theirs[name])
        elif name.startswith(("csize_embedder.mlp.2.", "ar_embedder.mlp.2.")):
            tensor.zero_()
    return pixart


def _report(network: PixArt | DiT, pixart: PixArt, derived: set[str]) -> Report:
    ours = pixart.state_dict().keys()
    known = derived | (ours & network.state_dict().keys())
    copied, old, new = (tuple(sorted(g)) for g in (known - derived, derived, ours - known))
    before, after = (
        f"{c.base_grid}x{c.base_grid} over span {c.base_grid / c.position_scale:g}"
        for c in (network.config, pixart.config)
    )
    positions = f"{before} -> {after} (scale {pixart.config.position_scale})"
    return Report(copied, old, new, positions)
