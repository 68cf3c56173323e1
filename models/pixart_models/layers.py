"""Parts that DiT and PixArt share: embeddings, attention, MLP, patches, positions.

Submodule names follow the published checkpoints (``attn.qkv``, ``mlp.fc1`` ...), so conversion is
a copy. Attention is torch's scaled_dot_product_attention throughout.

Legend: B batch, N image tokens, L text tokens, D width, C latent channels, H, W latent size,
h, w token grid, p patch.
"""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional

FREQUENCIES = 256  # width of the sinusoidal timestep features


def embed_timesteps(timesteps: Tensor, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal features (B, FREQUENCIES), cosines first, of timesteps (B,) in 0-1000."""
    half = FREQUENCIES // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """Timestep (B,) -> (B, D): sinusoids, then a two-layer SiLU MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        features = embed_timesteps(timesteps).to(linear_at(self.mlp, 0).weight.dtype)
        embedded: Tensor = self.mlp(features)
        return embedded


def linear_at(layers: nn.Sequential, index: int) -> nn.Linear:
    """The linear layer at ``index`` of a sequence."""
    layer = layers[index]
    assert isinstance(layer, nn.Linear)
    return layer


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """tokens (B, N, D) * (1 + scale) + shift, with shift and scale (B, 1, D)."""
    return tokens * (1 + scale) + shift


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class CrossAttention(nn.Module):
    """Image tokens (queries) look at text tokens (keys, values)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, N, D), text (B, L, D), mask (B, 1, 1, L) True where a token is real."""
        batch, tokens, width = x.shape
        query = self.q_linear(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        kv = self.kv_linear(text).view(batch, text.shape[1], 2, self.heads, -1)
        key, value = kv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D/heads)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between."""

    def __init__(self, width_in: int, hidden: int, width_out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width_in, hidden)
        self.fc2 = nn.Linear(hidden, width_out)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.fc2(functional.gelu(self.fc1(x), approximate="tanh"))
        return mixed


class PatchEmbed(nn.Module):
    """Latents (B, C, H, W) -> tokens (B, N, D), row-major over the token grid."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, latents: Tensor) -> Tensor:
        tokens: Tensor = self.proj(latents)  # (B, D, h, w)
        return tokens.flatten(2).transpose(1, 2)  # (B, N, D)


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """Tokens (B, N, p*p*C) of an ``height`` x ``width`` grid -> (B, C, height*p, width*p)."""
    batch = tokens.shape[0]
    grid = tokens.view(batch, height, width, patch, patch, -1)
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height * patch, width * patch)


def _sincos_1d(width: int, positions: Tensor) -> Tensor:
    """(M,) positions -> (M, width) float64, sines first."""
    omega = 1.0 / 10_000 ** (torch.arange(width // 2, dtype=torch.float64) / (width / 2))
    angles = positions[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_positions(width: int, h: int, w: int, base: int, scale: float) -> Tensor:
    """Fixed 2-D position embedding (h*w, width), float32.

    Positions run over ``base / scale`` units whatever the grid: ``arange(n) / (n / base) / scale``,
    so a finer grid is an interpolation of a coarser one trained with the same ``base / scale``.
    The first half of the width encodes the column, the second the row, as published.
    """
    rows = torch.arange(h, dtype=torch.float64) / (h / base) / scale
    columns = torch.arange(w, dtype=torch.float64) / (w / base) / scale
    grid_rows, grid_columns = torch.meshgrid(rows, columns, indexing="ij")
    halves = [_sincos_1d(width // 2, g.reshape(-1)) for g in (grid_columns, grid_rows)]
    return torch.cat(halves, dim=1).float()


class Positions(nn.Module):
    """Position embeddings by grid shape, computed once per shape and device."""

    MAX_SHAPES = 64

    def __init__(self, width: int, base: int, scale: float) -> None:
        super().__init__()
        self.width, self.base, self.scale = width, base, scale
        self._cache: OrderedDict[tuple[int, int, torch.device, torch.dtype], Tensor] = OrderedDict()

    def forward(self, h: int, w: int, like: Tensor) -> Tensor:
        """(1, h*w, D) on the device and in the dtype of ``like``."""
        key = (h, w, like.device, like.dtype)
        if key not in self._cache:
            table = sincos_positions(self.width, h, w, self.base, self.scale)
            self._cache[key] = table.to(like.device, like.dtype)[None]
            if len(self._cache) > self.MAX_SHAPES:
                self._cache.popitem(last=False)
        return self._cache[key]


def initialize_linears(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer and the patch projection."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            weight = part.weight.data
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
            if part.bias is not None:
                nn.init.zeros_(part.bias)
