"""Forecast against measured memory of training steps: is ``pixart_models.forecast`` to be trusted?

Each shape runs two fp32 steps (forward, loss, backward, fused AdamW, gradients freed) in a fresh
process, twice: as programs normally run, where the peak resident memory less what the imports took
stands against ``total``; and with MALLOC_MMAP_THRESHOLD_=65536, which makes glibc give every freed
tensor back to the system, against ``live``. Linux only.

    python tests/benchmarks/bench_memory.py [--quick]

``--quick`` measures a few small shapes, in a minute on 2 idle cores; all take 10 and, for XL/2 at
batch 4, 13 GiB. Only a full run writes results/. The last line is one JSON object.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pixart_models.config import NetworkConfig, get_preset
from pixart_models.dit import DiT
from pixart_models.forecast import StepMemory, step_memory
from pixart_models.layers import pack_text
from pixart_models.pixart import PixArt
from pixart_models.token_drop import TokenDrop, take_patches

sys.path.insert(0, str(Path(__file__).parents[1]))
from recording import figure, record

BAR = 0.10  # largest relative error
MIB = 2**20
RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # every tensor is a mapping of its own


@dataclass(frozen=True)
class Shape:
    """A training step: a preset with overrides, its batch, latent side and ways to spend less."""

    preset: str
    batch: int
    side: int = 32
    recompute: bool = False
    drop: Callable[..., TokenDrop] | None = None  # given depth
    quick: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> NetworkConfig:
        return get_preset(self.preset, **self.overrides)

    @property
    def token_drop(self) -> TokenDrop | None:
        return self.drop(depth=self.config.depth) if self.drop else None

    @property
    def lengths(self) -> list[int]:
        """Text tokens of each caption: 40 to 120, evenly."""
        return [round(n) for n in torch.linspace(40, 120, self.batch).tolist()]

    def forecast(self) -> StepMemory:
        text = sum(self.lengths) / self.batch
        return step_memory(
            self.config, self.batch, self.side, self.side, text, self.token_drop,
            recompute=self.recompute,
        )  # fmt: skip


_XL, _L, _B, _S = (f"pixart-{size}-2-256" for size in ("xl", "l", "b", "s"))
_MASK = partial(TokenDrop, "mask", 0.75, 2, 0)
_ROUTE = partial(TokenDrop, "route", 0.5, 2, 1)
SHAPES = {
    "S/2, 6 blocks": Shape(_S, 4, overrides={"depth": 6}, quick=True),
    "S/2, 6 blocks, recomputed": Shape(_S, 8, recompute=True, overrides={"depth": 6}, quick=True),
    "S/2, 6 blocks, 1024 tokens": Shape(_S, 2, side=64, overrides={"depth": 6}),
    "S/2, routed": Shape(_S, 8, drop=_ROUTE),
    "DiT-S/2": Shape("dit-s-2-256", 6, quick=True),
    "XL/2, 3 blocks": Shape(_XL, 2, overrides={"depth": 3}, quick=True),
    "S/2": Shape(_S, 32),
    "S/2, recomputed": Shape(_S, 16, recompute=True),
    "XL/2, 4 blocks": Shape(_XL, 4, overrides={"depth": 4}),
    "XL/2, 4 blocks, batch 8": Shape(_XL, 8, overrides={"depth": 4}),
    "XL/2, 4 blocks, 1024 tokens": Shape(_XL, 2, side=64, overrides={"depth": 4}),
    "XL/2, 8 blocks, recomputed": Shape(_XL, 8, recompute=True, overrides={"depth": 8}),
    "XL/2, 6 blocks, masked": Shape(_XL, 8, drop=_MASK, overrides={"depth": 6}),
    "B/2": Shape(_B, 8),
    "B/2, recomputed": Shape(_B, 16, recompute=True),
    "B/2, routed": Shape(_B, 16, drop=_ROUTE),
    "B/2, 1024 tokens": Shape(_B, 4, side=64),
    "DiT-B/2": Shape("dit-b-2-256", 8),
    "DiT-L/2": Shape("dit-l-2-256", 4),
    "L/2": Shape(_L, 4),
    "XL/2, batch 1": Shape(_XL, 1),
    "XL/2": Shape(_XL, 4),
}


def run_steps(shape: Shape, num_steps: int = 2) -> None:
    """Train a new network on random tensors."""
    torch.manual_seed(0)
    config, batch, side = shape.config, shape.batch, shape.side
    network = PixArt(config) if config.architecture == "pixart" else DiT(config)
    network.checkpoint_blocks = shape.recompute
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    latents = torch.randn(batch, config.latent_channels, side, side)
    target, times = torch.randn(batch, config.out_channels, side, side), 999 * torch.rand(batch)
    condition: Any = torch.randint(config.num_classes, (batch,))
    if config.architecture == "pixart":
        condition = pack_text([torch.randn(n, config.text_width) for n in shape.lengths])
    route = None
    if drop := shape.token_drop:
        route = drop.choose(torch.rand(batch, (side // config.patch) ** 2))
        target = take_patches(target, route.kept, config.patch) if route.stop is None else target
    for _ in range(num_steps):
        output: Tensor = network(latents, times, condition, route=route)
        torch.autograd.backward(functional.mse_loss(output, target))
        del output
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def read_status(field_name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name))


def print_measured(shape: Shape) -> None:
    """In the fresh process: peak bytes above the imports."""
    importlib.import_module("torch._dynamo")  # as torch's optimizers do: 70 MiB of code
    before = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run_steps(shape)
    print(read_status("VmHWM") - before)


def measure(name: str, environment: dict[str, str] | None = None) -> int:
    """Peak bytes of a shape, in a process of its own."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name], check=True, capture_output=True, text=True,
        env={**inherited, **(environment or {})},
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def compare(name: str) -> dict[str, Any]:
    """One row of the table: forecast and measured bytes, as it is and with memory given back."""
    forecast = SHAPES[name].forecast()
    total, live = measure(name), measure(name, RETURNING)
    row = {
        "shape": name, "batch": SHAPES[name].batch, "forecast": vars(forecast), "measured": total,
        "error": round(forecast.total / total - 1, 4),
        "measured_live": live, "error_live": round(forecast.live / live - 1, 4),
    }  # fmt: skip
    print(
        f"{name:28}{row['batch']:6}{forecast.total / MIB:10.0f}{total / MIB:10.0f}"
        f"{row['error']:+8.1%}"
        f"{forecast.live / MIB:10.0f}{live / MIB:10.0f}{row['error_live']:+8.1%}",
        flush=True,
    )
    return row


def judge(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures: largest relative errors, and XL/2's own."""
    errors = {
        "largest_error": max(abs(row["error"]) for row in rows),
        "largest_error_live": max(abs(row["error_live"]) for row in rows),
    }
    for row in rows:
        if row["shape"] == "XL/2":
            errors["xl2_error"] = abs(row["error"])
    return {name: figure(x, BAR, at_most=True, digits=4) for name, x in errors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    parser.add_argument("--measure", choices=SHAPES, help="run this shape here, for another run")
    options = parser.parse_args()
    if options.measure:
        print_measured(SHAPES[options.measure])
        return
    print(f"{'MiB':28} batch  forecast  measured   error      live  measured   error")
    rows = [compare(name) for name, shape in SHAPES.items() if shape.quick or not options.quick]
    figures = judge(rows)
    if not options.quick:
        libc = " ".join(platform.libc_ver())
        record("memory", figures, ("torch",), libc=libc, rows=rows)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
