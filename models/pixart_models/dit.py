"""DiT, the class-conditional transformer of stage 1 (Peebles & Xie 2023, arXiv 2212.09748).

Each block owns an adaLN MLP, 27 % of all parameters, that PixArt later shares (see
``reparameterize``).

Legend: B batch, N image tokens, D width, C latent channels, H, W latent size.
"""

import torch
from torch import Tensor, nn

from pixart_models.config import NetworkConfig
from pixart_models.layers import (
    Mlp,
    PatchEmbed,
    Positions,
    SelfAttention,
    TimestepEmbedder,
    initialize_linears,
    linear_at,
    modulate_norm,
    token_grid,
    unpatchify,
)
from pixart_models.token_drop import Route, run_blocks


class LabelEmbedder(nn.Module):
    """Class label (B,) -> (B, D); index ``num_classes`` is the null class of guidance."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        embedded: Tensor = self.embedding_table(labels)
        return embedded


class DiTBlock(nn.Module):
    """Self-attention and MLP, modulated and gated by this block's own map of the condition."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.heads, config.qk_norm)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation: Tensor = self.adaLN_modulation(condition)[:, None]
        chunks = modulation.chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks  # each (B, 1, D)
        x = x + gate_a * self.attn(modulate_norm(x, shift_a, scale_a))  # (B, N, D)
        mixed: Tensor = self.mlp(modulate_norm(x, shift_m, scale_m))
        return x + gate_m * mixed  # (B, N, D)


class FinalLayer(nn.Module):
    """Modulated norm, then one linear map to patches."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.linear = nn.Linear(width, config.patch**2 * config.out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        patches: Tensor = self.linear(modulate_norm(x, shift, scale))
        return patches


class DiT(nn.Module):
    """Denoiser of latents (B, C, H, W) at timesteps (B,) in 0-1000, given labels (B,)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.architecture == "dit"
        self.config = config
        self.checkpoint_blocks = False  # recompute each block in backward instead of keeping it
        self.x_embedder = PatchEmbed(config.latent_channels, config.patch, config.width)
        self.t_embedder = TimestepEmbedder(config.width)
        self.y_embedder = LabelEmbedder(config.num_classes, config.width)
        self.positions = Positions(config.width, config.base_grid, config.position_scale)
        blocks = [DiTBlock(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(config)
        self._initialize(blocks)

    def _initialize(self, blocks: list[DiTBlock]) -> None:
        """adaLN-zero: every gate and the output start at zero."""
        initialize_linears(self)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for i in (0, 2):
            nn.init.normal_(linear_at(self.t_embedder.mlp, i).weight, std=0.02)
        modulated = [
            *(block.adaLN_modulation for block in blocks),
            self.final_layer.adaLN_modulation,
        ]
        for layer in (*(linear_at(m, 1) for m in modulated), self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def condition(self, timesteps: Tensor, labels: Tensor) -> Tensor:
        embedded: Tensor = self.t_embedder(timesteps) + self.y_embedder(labels)
        return embedded

    def forward(
        self, latents: Tensor, timesteps: Tensor, labels: Tensor, route: Route | None = None
    ) -> Tensor:
        """Predict (B, C or 2C, H, W); with a masking ``route`` the kept patches (see take_patches).

        labels are int64 in 0..num_classes (the last is null).
        """
        h, w = token_grid(latents, self.config.patch)
        x = self.x_embedder(latents)  # (B, N, D)
        x = x + self.positions(h, w, x)
        condition = self.condition(timesteps, labels)  # (B, D)
        x = run_blocks(self.blocks, x, (condition,), route, self.checkpoint_blocks)
        h, w = (h, w) if x.shape[1] == h * w else (x.shape[1], 1)  # (B, N or K, D)
        return unpatchify(self.final_layer(x, condition), h, w, self.config.patch)

    def null_label(self, batch: int, device: torch.device) -> Tensor:
        return torch.full((batch,), self.config.num_classes, device=device)
