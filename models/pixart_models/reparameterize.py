"""DiT -> PixArt without forgetting: the re-parameterisation of paper section 2.3.

DiT's block i modulates by its own map f_i(c); PixArt by one shared f plus a table E_i. The paper
picks E_i so that both agree at t = 500. Any f works there; we take the mean of all f_i, which is
the shared map with the least squared error to the blocks' own at every other t. "Without class"
is the null class DiT learned for guidance, folded into the timestep embedding's bias, so PixArt
starts as DiT's unconditional model: same modulation at t = 500, same output (cross-attention
starts at zero).
"""

from dataclasses import dataclass, replace

import torch

from pixart_models.config import ConfigError, NetworkConfig
from pixart_models.dit import DiT, DiTBlock
from pixart_models.layers import linear_at
from pixart_models.pixart import PixArt

MATCH_TIMESTEP = 500.0


@dataclass(frozen=True)
class Report:
    """Which parameters of the PixArt were copied from the DiT, derived from it, or are new."""

    copied: tuple[str, ...]
    derived: tuple[str, ...]
    new: tuple[str, ...]

    def __str__(self) -> str:
        return f"{len(self.copied)} copied, {len(self.derived)} derived, {len(self.new)} new"


def check_compatible(source: NetworkConfig, target: NetworkConfig) -> None:
    """Raise ConfigError unless a DiT ``source`` can become a PixArt ``target``."""
    shared = (
        "depth",
        "width",
        "heads",
        "patch",
        "mlp_ratio",
        "latent_channels",
        "predict_variance",
    )
    for name in shared:
        if getattr(source, name) != getattr(target, name):
            raise ConfigError(
                f"network.{name}: the parent has {getattr(source, name)}, the stage asks for "
                f"{getattr(target, name)}; re-parameterisation needs them equal"
            )


@torch.no_grad()
def reparameterize(dit: DiT, target: NetworkConfig) -> tuple[PixArt, Report]:
    """A PixArt of ``target`` that starts as ``dit``'s unconditional model at t = 500.

    Positions are computed, not learned, so ``target`` may use another sample_size or
    position_scale. Raises ConfigError when the shapes differ.
    """
    target = replace(target, architecture="pixart")
    check_compatible(dit.config, target)
    pixart = PixArt(target)
    source, state = dit.state_dict(), pixart.state_dict()

    copied = sorted(name for name in state if name in source and "final_layer.scale" not in name)
    for name in copied:
        state[name].copy_(source[name])
    device = next(dit.parameters()).device
    null = dit.y_embedder(dit.null_label(1, device))[0]
    state["t_embedder.mlp.2.bias"].add_(null)
    modulations = [b.adaLN_modulation for b in dit.blocks if isinstance(b, DiTBlock)]
    maps = [linear_at(modulation, 1) for modulation in modulations]
    state["t_block.1.weight"].copy_(torch.stack([m.weight for m in maps]).mean(0))
    state["t_block.1.bias"].copy_(torch.stack([m.bias for m in maps]).mean(0))

    embedded = pixart.t_embedder(torch.tensor([MATCH_TIMESTEP], device=device))  # (1, D)
    shared = pixart.t_block(embedded).view(6, -1)
    for i, modulation in enumerate(modulations):
        own = modulation(embedded).view(6, -1)
        state[f"blocks.{i}.scale_shift_table"].copy_(own - shared)
    final = dit.final_layer.adaLN_modulation(embedded).view(2, -1)
    state["final_layer.scale_shift_table"].copy_(final - embedded)

    derived = [n for n in state if "scale_shift_table" in n or n.startswith("t_block.")]
    derived.append("t_embedder.mlp.2.bias")
    copied = [n for n in copied if n not in derived]
    new = sorted(set(state) - set(copied) - set(derived))
    return pixart, Report(tuple(copied), tuple(sorted(derived)), tuple(new))
