"""Two pieces of a block, written out for fp32 on a CPU, where eager autograd wastes the most.

Nothing here is needed on a GPU, where a compiler fuses the plain formulas. On 2 cores, block by
block (batch 4, 256 tokens, width 1152), against autograd over torch's own operations:

    split_linear    q, k, v as contiguous tensors from one weight: no gathering of their gradients
    modulate_norm   6/10 of the time and half of the memory: the normed tokens are never stored

``tests/benchmarks/bench_network.py`` measures the whole. Gradients are first order only.

Legend: B batch, N image tokens, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def fits(x: Tensor) -> bool:
    """Whether these kernels are for ``x``: fp32 on the CPU, and nobody is tracing."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


class _SplitLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, parts: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, weight)
        rows = zip(weight.chunk(parts), bias.chunk(parts), strict=True)
        return tuple(functional.linear(x, w, b) for w, b in rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tokens, parts = x.flatten(0, -2), len(gradients)
        flat = [gradient.flatten(0, -2) for gradient in gradients]
        of_x, of_weight = torch.zeros_like(tokens), torch.empty_like(weight)
        rows = zip(flat, weight.chunk(parts), of_weight.chunk(parts), strict=True)
        for gradient, w, of_w in rows:
            of_x.addmm_(gradient, w)
            torch.mm(gradient.T, tokens, out=of_w)
        of_bias = torch.cat([gradient.sum(0) for gradient in flat])
        return of_x.view_as(x), of_weight, of_bias, None


def split_linear(x: Tensor, weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, ...]:
    """``linear(x, weight, bias)`` cut into ``parts`` along the last dimension, each contiguous."""
    found: tuple[Tensor, ...] = _SplitLinear.apply(x, weight, bias, parts)  # type: ignore[no-untyped-call]
    return found


class _ModulateNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        weight, out, moments = 1 + scale, torch.empty_like(x), []
        for i, row in enumerate(x):
            out[i], *found = torch.native_layer_norm(
                row, row.shape[-1:], weight[i, 0], shift[i, 0], eps
            )
            moments += found
        ctx.save_for_backward(x, weight, shift, *moments)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, shift, *moments = ctx.saved_tensors
        of_x, of_shift, of_scale = (torch.empty_like(t) for t in (x, shift, weight))
        for i, row in enumerate(x):
            of_x[i], of_scale[i, 0], of_shift[i, 0] = torch.ops.aten.native_layer_norm_backward(
                gradient[i], row, row.shape[-1:], *moments[2 * i : 2 * i + 2],
                weight[i, 0], shift[i, 0], (True, True, True),
            )  # fmt: skip
        return of_x, of_shift, of_scale, None


def modulate_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """``layer_norm(x) * (1 + scale) + shift`` for x (B, N, D), shift and scale (B, 1, D)."""
    found: Tensor = _ModulateNorm.apply(x, shift, scale, eps)  # type: ignore[no-untyped-call]
    return found
