"""Parts that DiT and PixArt share: embeddings, attention, MLP, patches, positions.

Submodule names follow the published checkpoints (``attn.qkv``, ``mlp.fc1`` ...), so conversion is
a copy. Text travels packed: nothing is computed on padding.

Legend: B batch, N image tokens, L text tokens of a row, T of all rows, D width, C latent channels,
H, W latent size, h, w token grid, p patch.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pixart_models.config import ModelInputError

_EPS = 1e-6  # of every norm
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


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights of x (B, N, D), times (1 + scale) + shift, each (B, 1, D)."""
    return functional.layer_norm(x, x.shape[-1:], eps=_EPS) * (1 + scale) + shift


class MaskError(ModelInputError):
    """A text mask that does not say which tokens are real."""


class PackedText(NamedTuple):
    """Text features of B captions, one after another, without padding.

    ``tokens`` (T, Dt); ``offsets`` (B + 1,) int32, where each caption begins, then T; ``longest``
    is the most tokens of a caption.
    """

    tokens: Tensor
    offsets: Tensor
    longest: int

    def to(self, device: torch.device, dtype: torch.dtype) -> "PackedText":
        """Copied without waiting for the device."""
        tokens = self.tokens.to(device, dtype, non_blocking=True)
        return PackedText(tokens, self.offsets.to(device, non_blocking=True), self.longest)


def pack_text(rows: Sequence[Tensor]) -> PackedText:
    """Pack the features (L_i, Dt) of each caption; L_i at least 1, or MaskError."""
    lengths = [len(row) for row in rows]
    if 0 in lengths:
        raise MaskError(f"caption {lengths.index(0)} has no tokens; an empty prompt has one")
    offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    tokens = torch.cat(list(rows))
    return PackedText(tokens, offsets.to(tokens.device, non_blocking=True), max(lengths))


def pack_padded(text: Tensor, mask: Tensor | None) -> PackedText:
    """Pack padded features (B, L, Dt); mask (B, L) bool is True where a token is real.

    Without a mask all are. Waits for a device the mask lives on. Raises MaskError for a mask of
    another shape or type, or with an empty row.
    """
    batch, length, width = text.shape
    if mask is None:
        mask = torch.ones(batch, length, dtype=torch.bool, device=text.device)
    if mask.shape != (batch, length) or mask.dtype != torch.bool:
        raise MaskError(
            f"the text mask is {mask.dtype} of shape {tuple(mask.shape)}; with text of shape "
            f"{tuple(text.shape)} it must be torch.bool of shape {(batch, length)}"
        )
    lengths = mask.sum(dim=1)
    if not (counts := lengths.tolist()) or 0 in counts:
        raise MaskError(f"the text masks of rows {[i for i, n in enumerate(counts) if not n]} are "
                        f"all False; an empty prompt still has one real token")  # fmt: skip
    offsets = functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    tokens = text.reshape(-1, width) if min(counts) == length else text[mask]
    return PackedText(tokens, offsets, max(counts))


class SelfAttention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (_head_norm(width // heads, qk_norm) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D); mask (B, 1, 1, N) is True at tokens that are looked at."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.unbind(2)
        mixed = _attend(self.q_norm(query), self.k_norm(key), value, mask)  # (B, N, heads, d)
        projected: Tensor = self.proj(mixed.flatten(2))
        return projected


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's attention for (B, tokens, heads, d) tensors; mask (B, 1, 1, L)."""
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2)


def _head_norm(width: int, on: bool) -> nn.Module:
    """RMS norm of queries or keys within a head (Esser et al. 2024, section 5.3.2), or nothing."""
    return nn.RMSNorm(width, eps=_EPS) if on else nn.Identity()


class CrossAttention(nn.Module):
    """Image tokens (queries) look at the text tokens of their own row (keys, values)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.q_norm, self.k_norm = (_head_norm(width // heads, qk_norm) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: PackedText) -> Tensor:
        """x (B, N, D); text with tokens (T, D)."""
        query = self.q_norm(self.q_linear(x).view(*x.shape[:2], self.heads, -1))  # (B, N, heads, d)
        kv = self.kv_linear(text.tokens).view(-1, 2, self.heads, query.shape[-1])
        key, value = kv.unbind(1)  # each (T, heads, d)
        mixed = attend_packed(query, self.k_norm(key), value, text)  # (B, N, heads, d)
        projected: Tensor = self.proj(mixed.flatten(2))
        return projected


def attend_packed(query: Tensor, key: Tensor, value: Tensor, text: PackedText) -> Tensor:
    """Attention of query (B, N, heads, d) to its row's part of key and value (T, heads, d).

    One kernel for variable lengths in half precision on a GPU, elsewhere padded again behind a
    mask: row by row was no faster on the CPU, and a tenth slower at the demo's size, to draw
    (``jobs/LOG.md``) and to train.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and query.shape[-1] % 8 == 0:  # the kernel's own condition
        from torch.nn.attention.varlen import varlen_attn

        batch, tokens = query.shape[:2]
        starts = torch.arange(batch + 1, device=query.device, dtype=torch.int32) * tokens
        flat: Any = varlen_attn(
            query.flatten(0, 1), key, value, starts, text.offsets, tokens, text.longest
        )
        mixed: Tensor = flat.view_as(query)
        return mixed
    index, real = padding_of(text)
    return _attend(query, key[index], value[index], real[:, None, None])


def padding_of(text: PackedText) -> tuple[Tensor, Tensor]:
    """Where the tokens of each row are, (B, L) to ``longest``, and which of them are real."""
    place = torch.arange(text.longest, device=text.tokens.device)
    index = (text.offsets[:-1, None] + place).clamp(max=len(text.tokens) - 1)
    return index, place < text.offsets.diff()[:, None]


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
        # Contiguous, or every residual sum would keep the transposed layout and every use copy it.
        return tokens.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)


def token_grid(latents: Tensor, patch: int) -> tuple[int, int]:
    """(h, w) of latents (B, C, H, W). Raises ModelInputError unless patches tile them."""
    height, width = latents.shape[-2:]
    if height % patch or width % patch:
        raise ModelInputError(
            f"latents of {height}x{width} cannot be cut into patches of {patch}x{patch}; "
            f"pad or crop the picture to whole patches"
        )
    return height // patch, width // patch


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
            with torch.inference_mode(False):  # a picture drawn first must not spoil training
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
