"""What a training step costs before it is run: FLOPs of a sample, bytes of memory of a process.

FLOPs are those of matrix products and attention, a multiply-add being 2, as peaks are counted, of
real tokens (a CPU attends to padding, too). Memory is that of eager PyTorch with AdamW, fused or
one tensor at a time (foreach adds a copy of the weights), gradients freed after the step;
``tests/benchmarks/bench_memory.py`` measures it.

Legend: N image tokens, n those a block sees, T text tokens of a row, Dt their width, D width, F
width of timestep features, r MLP ratio, p patch, C channels. A product is rows * inner * columns.
"""

import math
from dataclasses import dataclass

import torch

from pixart_models.config import NetworkConfig
from pixart_models.dit import DiT
from pixart_models.layers import FREQUENCIES
from pixart_models.pixart import PixArt
from pixart_models.token_drop import TokenDrop

LIBRARIES = 48 * 2**20  # measured: bytes of BLAS's buffers, and of code that a step first touches
Drop = TokenDrop | None


def count_parameters(config: NetworkConfig) -> int:
    """Parameters of the network, built without memory."""
    with torch.device("meta"):
        network = PixArt(config) if config.architecture == "pixart" else DiT(config)
    return sum(p.numel() for p in network.parameters())


def _count_tokens(config: NetworkConfig, h: int, w: int, drop: Drop) -> list[int]:
    """Image tokens of a latent (h, w) that each block and, last, the final layer sees."""
    tokens = (h // config.patch) * (w // config.patch)
    if drop is None:
        return [tokens] * (config.depth + 1)
    kept, start, stop = drop.choose(torch.zeros(1, tokens))
    part = range(start, config.depth + 1 if stop is None else stop)
    return [kept.shape[1] if i in part else tokens for i in range(config.depth + 1)]


def _split_flops(config: NetworkConfig, tokens: list[int], text: float) -> tuple[float, float]:
    """Forward FLOPs of a sample: of all blocks, and outside of them."""
    d, area, depth, (*blocks, last) = config.width, config.patch**2, config.depth, tokens
    joined = text * (config.text_in == "context")  # tokens that blocks see beside the image's
    seen = [n + joined for n in blocks]
    n, squares = sum(seen), sum(n**2 for n in seen)
    inner = 4.0 * n * d**2 + 2 * squares * d  # attn: qkv n*D*3D, proj n*D*D; n*D*n scores, n*n*D
    inner += 2 * n * d * int(d * config.mlp_ratio)  # mlp: fc1 n*D*rD, fc2 n*rD*D
    outer = FREQUENCIES * d + d**2  # t_embedder 1*F*D, 1*D*D
    outer += blocks[0] * area * config.latent_channels * d  # x_embedder N*ppC*D
    outer += last * d * area * config.out_channels  # final_layer.linear n*D*ppC
    if config.architecture == "dit":
        inner += depth * 6 * d**2  # adaLN_modulation 1*D*6D
        return 2 * inner, 2.0 * (outer + 2 * d**2)  # final_layer.adaLN_modulation 1*D*2D
    if config.adaln == "block":
        inner += depth * 6 * d**2  # adaLN_modulation 1*D*6D
    if config.text_in == "cross":
        inner += 2 * n * d**2  # cross_attn: q_linear and proj n*D*D
        inner += text * (2 * depth * d**2 + 2 * n * d)  # kv_linear T*D*2D; n*D*T scores, n*T*D
    outer += 6 * d**2 * (config.adaln == "single")  # t_block 1*D*6D
    outer += (FREQUENCIES * d + d**2 // 3) * config.size_condition  # 3 times 1*F*D/3, 1*D/3*D/3
    return 2 * inner, 2 * (outer + text * (config.text_width + d) * d)  # y_embedder T*Dt*D, T*D*D


def forward_flops(
    config: NetworkConfig, height: int, width: int, text_tokens: float, drop: Drop = None
) -> float:
    """FLOPs of a sample with a latent (height, width); a mean of text tokens gives the mean."""
    return sum(_split_flops(config, _count_tokens(config, height, width, drop), text_tokens))


def step_flops(
    config: NetworkConfig, height: int, width: int, text_tokens: float, drop: Drop = None,
    *, recompute: bool = False,
) -> float:  # fmt: skip
    """FLOPs of a sample's forward and backward, which is two; ``recompute`` runs blocks again."""
    inner, outer = _split_flops(config, _count_tokens(config, height, width, drop), text_tokens)
    return (3 + recompute) * inner + 3 * outer


@dataclass(frozen=True)
class StepMemory:
    """Bytes of a training process beyond its imports, from the second step on."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    live: int  # most in use at once: the peak of an allocator without holes
    total: int  # the peak with glibc, which leaves holes between tensors unfilled


def step_memory(
    config: NetworkConfig, batch: int, height: int, width: int, text_tokens: float,
    drop: Drop = None, *, recompute: bool = False, element_bytes: int = 4, weight_bytes: int = 4,
    gradient_bytes: int = 4, optimizer_bytes: int = 8, ema_copies: int = 0,
) -> StepMemory:  # fmt: skip
    """Memory of a step. Bytes are per element of activations, else per parameter; EMA is fp32.

    bf16 with fp32 master weights is element_bytes 2, weight_bytes 2 + 4, gradient_bytes 2.
    """
    d, hidden, norms = config.width, int(config.width * config.mlp_ratio), 2 * config.qk_norm
    pixart, parameters = config.architecture == "pixart", count_parameters(config)
    *blocks, last = _count_tokens(config, height, width, drop)
    cross = pixart and config.text_in == "cross"
    if pixart and not cross:  # padded to the longest of a batch
        blocks = [n + math.ceil(text_tokens) for n in blocks]
    token = (8 + 2 * norms) * d  # self-attention: input, norm, modulated, q, k, v, mix, output
    token += (4 + norms) * d * cross  # cross-attention: input, q, mix by row, mix of all rows
    token += 4 * d + 2 * hidden  # MLP: input, norm, modulated, output; before and after GELU
    text = text_tokens * (2 + norms) * d * cross  # keys and values of cross-attention
    kept = 3.0 * last * d  # final layer: input, norm, modulated
    kept += sum(n * d if recompute else n * token + text for n in blocks)
    kept += text_tokens * (config.text_width + 3 * d) * pixart  # features, y_embedder's layers
    scratch = 1.0 * blocks[0] * (d + hidden)  # gradients: of tokens, and within an MLP
    scratch += (blocks[0] * token + text) * recompute  # the block that is being run again
    unit = batch * element_bytes
    activations, workspace = round(unit * kept), round(unit * scratch) + LIBRARIES
    weights, gradients = weight_bytes * parameters, gradient_bytes * parameters
    optimizer = (optimizer_bytes + 4 * ema_copies) * parameters
    live = weights + optimizer + workspace + max(activations, gradients)
    # Measured with glibc 2.36: an aligned tensor often does not fit the hole an equal one left.
    reused = 0.12 * activations + 0.45 * min(activations, gradients)
    total = live + round(9 * unit * d * sum(blocks) if recompute else reused)
    return StepMemory(weights, gradients, optimizer, activations, workspace, live, total)
