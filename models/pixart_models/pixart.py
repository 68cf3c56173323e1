"""PixArt, the text-to-image transformer (Chen et al. 2023, arXiv 2310.00426, section 2.3).

Against DiT: cross-attention to text in each block, and adaLN-single: one map of the timestep
shared by all blocks, to which each block adds its own small table. The timestep is per sample,
so a batch may mix any of them.

Legend: B batch, N image tokens, L text tokens of a row, T of all rows, D width, C latent channels,
H, W latent size.
"""

import torch
from torch import Tensor, nn

from pixart_models.config import ModelInputError, NetworkConfig
from pixart_models.layers import (
    CrossAttention,
    Mlp,
    PackedText,
    PatchEmbed,
    Positions,
    SelfAttention,
    TimestepEmbedder,
    initialize_linears,
    linear_at,
    modulate_norm,
    pack_padded,
    padding_of,
    token_grid,
    unpatchify,
)
from pixart_models.token_drop import Route, run_blocks


class CaptionEmbedder(nn.Module):
    """Projects text features (T, text_width) to (T, D)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.y_proj = Mlp(config.text_width, config.width, config.width)

    def forward(self, text: Tensor) -> Tensor:
        projected: Tensor = self.y_proj(text)
        return projected


class SizeEmbedder(TimestepEmbedder):
    """Numbers (B, k) -> (B, k * D/3), each embedded as a timestep is, at width D/3."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values.flatten()).view(values.shape[0], -1)


class PixArtBlock(nn.Module):
    """Modulated self-attention, plain cross-attention, modulated MLP; with text in context, where
    x holds it too, no cross-attention."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.attn = SelfAttention(width, config.heads, config.qk_norm)
        self.has_cross = config.text_in == "cross"
        if self.has_cross:
            self.cross_attn = CrossAttention(width, config.heads, config.qk_norm)
        self.mlp = Mlp(width, int(width * config.mlp_ratio), width)
        self.has_own_map = config.adaln == "block"
        if self.has_own_map:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        else:
            self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(self, x: Tensor, text: PackedText | Tensor, modulation: Tensor) -> Tensor:
        """modulation (B, 6, D): the shared map of the timestep, to which this block's table is
        added; or (B, D), the embedded timestep, where the block has a map of its own. text is
        packed, or the mask (B, 1, 1, N) of tokens where x holds it."""
        if self.has_own_map:
            modulation = self.adaLN_modulation(modulation).view(len(x), 6, -1)
        else:
            modulation = self.scale_shift_table + modulation
        chunks = modulation.chunk(6, dim=1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks  # each (B, 1, D)
        mask = None if self.has_cross else text
        x = x + gate_a * self.attn(modulate_norm(x, shift_a, scale_a), mask)  # (B, N, D)
        if self.has_cross:
            x = x + self.cross_attn(x, text)  # (B, N, D)
        mixed: Tensor = self.mlp(modulate_norm(x, shift_m, scale_m))
        return x + gate_m * mixed  # (B, N, D)


class FinalLayer(nn.Module):
    """Norm modulated by the timestep embedding plus a table, then one linear map to patches."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.width
        self.linear = nn.Linear(width, config.patch**2 * config.out_channels)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        patches: Tensor = self.linear(modulate_norm(x, shift, scale))
        return patches


def join_text(x: Tensor, text: PackedText) -> tuple[Tensor, Tensor]:
    """Image tokens (B, N, D) and after them each row's text, padded: (B, N + L, D); and the mask
    (B, 1, 1, N + L) of what is real."""
    index, real = padding_of(text)
    joined = torch.cat([x, text.tokens[index]], dim=1)
    mask = torch.cat([real.new_ones(x.shape[:2]), real], dim=1)
    return joined, mask[:, None, None]


class PixArt(nn.Module):
    """Denoiser of latents (B, C, H, W) at timesteps (B,) in 0-1000, given text features."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        assert config.architecture == "pixart"
        self.config = config
        self.checkpoint_blocks = False  # recompute each block in backward instead of keeping it
        width = config.width
        self.x_embedder = PatchEmbed(config.latent_channels, config.patch, width)
        self.t_embedder = TimestepEmbedder(width)
        if config.adaln == "single":
            self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = CaptionEmbedder(config)
        self.positions = Positions(width, config.base_grid, config.position_scale)
        blocks = [PixArtBlock(config) for _ in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(config)
        if config.size_condition:
            self.csize_embedder = SizeEmbedder(width // 3)
            self.ar_embedder = SizeEmbedder(width // 3)
        self._initialize(blocks)

    def _initialize(self, blocks: list[PixArtBlock]) -> None:
        """Cross-attention and the output start at zero: an untrained text path does no harm."""
        initialize_linears(self)
        mlps = [self.t_embedder.mlp]
        if self.config.size_condition:
            mlps += [self.csize_embedder.mlp, self.ar_embedder.mlp]
        normals = [linear_at(mlp, i) for mlp in mlps for i in (0, 2)]
        normals += [linear_at(self.t_block, 1)] if self.config.adaln == "single" else []
        for layer in (*normals, self.y_embedder.y_proj.fc1, self.y_embedder.y_proj.fc2):
            # The published 0.02 is about 1/sqrt(fan-in) at XL's widths; narrow networks need that.
            fan_in = layer.in_features
            nn.init.normal_(layer.weight, std=0.02 if fan_in >= 1024 else fan_in**-0.5)
        zeros = [self.final_layer.linear, *(b.cross_attn.proj for b in blocks if b.has_cross)]
        zeros += [linear_at(b.adaLN_modulation, 1) for b in blocks if b.has_own_map]  # as DiT's
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor | PackedText,
        mask: Tensor | None = None,
        sizes: Tensor | None = None,
        route: Route | None = None,
    ) -> Tensor:
        """Predict (B, C or 2C, H, W); with a masking ``route`` the kept patches (see take_patches).

        text packed, or padded (B, L, text_width) with mask (B, L) bool, True where a token is real;
        sizes (B, 3) original height, width in pixels and height / width, with size_condition.
        """
        if route and self.config.text_in == "context":
            raise ModelInputError(
                "token_drop with text_in = context: it would drop text; use cross"
            )
        h, w = token_grid(latents, self.config.patch)
        x = self.x_embedder(latents)  # (B, N, D)
        x = x + self.positions(h, w, x)
        embedded = self.t_embedder(timesteps)  # (B, D)
        if self.config.size_condition:
            if sizes is None or sizes.shape != (len(x), 3):
                given = "none" if sizes is None else f"{tuple(sizes.shape)}"
                raise ModelInputError(
                    f"this network is conditioned on sizes ({len(x)}, 3): height and width in "
                    f"pixels and height / width of each picture; given: {given}"
                )
            parts = [self.csize_embedder(sizes[:, :2]), self.ar_embedder(sizes[:, 2:])]
            embedded = embedded + torch.cat(parts, dim=1)
        modulation = embedded  # (B, D)
        if self.config.adaln == "single":
            modulation = self.t_block(embedded).view(len(x), 6, -1)  # (B, 6, D)
        packed = text if isinstance(text, PackedText) else pack_padded(text, mask)
        packed = packed._replace(tokens=self.y_embedder(packed.tokens))  # (T, D)
        seen: PackedText | Tensor = packed
        if self.config.text_in == "context":
            x, seen = join_text(x, packed)  # (B, N + L, D)
        x = run_blocks(
            self.blocks, x, (seen, modulation), route, self.checkpoint_blocks
        )  # (B, N or K, D)
        if self.config.text_in == "context":
            x = x[:, : h * w]
        h, w = (h, w) if x.shape[1] == h * w else (x.shape[1], 1)
        return unpatchify(self.final_layer(x, embedded), h, w, self.config.patch)
