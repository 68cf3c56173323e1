"""Our PixArt against diffusers' PixArtTransformer2DModel: same weights, same inputs, one process.

Width 1152, depth 4, 256 image tokens, captions of 60 tokens on average padded to 120 for diffusers
(which cannot do without) and packed for us. Ours and the peer take turns, and a figure compares
lower quartiles, so that what else the machine does hits both. Memory is the peak of a fresh process
each. With a GPU: bf16 and compiled, and XL/2 at 256 px with its model FLOPs utilisation.

    python tests/benchmarks/bench_network.py [--quick] [--batch 8] [--record RESULTS_FOLDER]

``--quick`` takes about 2 minutes on 2 cores. The last line is one JSON object of figures and bars.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from pixart_models.config import NetworkConfig, get_preset
from pixart_models.export import save_diffusers
from pixart_models.forecast import forward_flops
from pixart_models.layers import PackedText, pack_padded
from pixart_models.pixart import PixArt
from pixart_models.token_drop import TokenDrop, take_patches

sys.path.insert(0, str(Path(__file__).parents[1]))
from recording import RESULTS, figure, record

TEXT_TOKENS = 120
Step = Callable[[], object]


class Case:
    """One batch for a network and its peer, on a device."""

    def __init__(self, config: NetworkConfig, batch: int, device: torch.device) -> None:
        draw = torch.Generator().manual_seed(0)
        side = config.sample_size
        lengths = (60 + 20 * torch.randn(batch, generator=draw)).round().clamp(8, TEXT_TOKENS)
        self.lengths = (lengths - lengths.mean() + 60).round().clamp(8, TEXT_TOKENS).long()
        text = torch.randn(batch, TEXT_TOKENS, config.text_width, generator=draw)
        mask = torch.arange(TEXT_TOKENS) < self.lengths[:, None]
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        packed = pack_padded(text, mask)
        self.packed: PackedText = packed.to(device, dtype)
        self.text, self.mask = text.to(device, dtype), mask.to(device)
        latents = torch.randn(batch, config.latent_channels, side, side, generator=draw)
        self.latents = latents.to(device, dtype)
        self.times = (999 * torch.rand(batch, generator=draw)).to(device)
        self.target = torch.randn(batch, config.out_channels, side, side, generator=draw).to(device)

    def ours(self, network: nn.Module) -> Tensor:
        output: Tensor = network(self.latents, self.times, self.packed)
        return output

    def theirs(self, network: nn.Module) -> Tensor:
        output: Tensor = network(
            self.latents, self.text, self.times, encoder_attention_mask=self.mask, return_dict=False
        )[0]
        return output


def build(config: NetworkConfig, device: torch.device) -> tuple[PixArt, nn.Module]:
    """Our network with random weights (no zeros), and diffusers' with the same."""
    torch.manual_seed(0)
    network = PixArt(config)
    for parameter in network.parameters():
        parameter.data.normal_(std=max(parameter.shape[-1], 4) ** -0.5)
    with tempfile.TemporaryDirectory() as folder:
        save_diffusers(network, Path(folder))
        peer: Any = PixArtTransformer2DModel.from_pretrained(folder, low_cpu_mem_usage=False)
    return network.to(device), peer.to(device).train()


def training_step(network: nn.Module, forward: Callable[[nn.Module], Tensor], case: Case) -> Step:
    """Forward, loss, backward and AdamW (bf16 by autocast on a GPU, over fp32 weights)."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    cuda = case.latents.is_cuda

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
            loss = functional.mse_loss(forward(network).float(), case.target)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(network: nn.Module, forward: Callable[[nn.Module], Tensor], case: Case) -> Step:
    def step() -> None:
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=case.latents.is_cuda):
            forward(network)

    return step


def clock(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Lower quartile of seconds of each step, all taking turns, after one warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name in sorted(steps, reverse=bool(i % 2)):
            _wait()
            started = time.perf_counter()
            steps[name]()
            _wait()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: sorted(values)[len(values) // 4] for name, values in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_step(width: int, rows: int, device: torch.device) -> tuple[Step, float]:
    """The network's largest product alone, and its FLOPs: what the machine could do at best."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(4 * width, width, device=device, dtype=dtype)

    def step() -> None:
        for _ in range(8):
            functional.linear(x, weight)

    return step, 8 * 2 * rows * 4 * width * width


def compare(config: NetworkConfig, case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    network, peer = build(config, device)
    with torch.no_grad():
        error = float((case.ours(network) - case.theirs(peer)).abs().max())
    assert device.type != "cpu" or error < 1e-4, f"outputs differ by {error}"
    ours: nn.Module = network
    if device.type == "cuda":
        ours, peer = torch.compile(network), torch.compile(peer)  # type: ignore[assignment]
    batch = len(case.latents)
    matmul, matmul_flops = matmul_step(config.width, batch * config.base_grid**2, device)
    side, mean_text = config.sample_size, float(case.lengths.float().mean())
    flops = batch * forward_flops(config, side, side, mean_text)
    figures: dict[str, Any] = {}
    for name, make, passes, bar in (
        ("inference", inference, 1, 1.10 if device.type == "cpu" else 1.3),
        ("training", training_step, 3, 1.14 if device.type == "cpu" else 1.3),
    ):
        steps = {
            "ours": make(ours, case.ours, case), "peer": make(peer, case.theirs, case),
            "matmul": matmul,
        }  # fmt: skip
        seconds = clock(steps, rounds)
        ratio = seconds["peer"] / seconds["ours"]
        rate, peak = passes * flops / seconds["ours"], matmul_flops / seconds["matmul"]
        print(
            f"{name:10s} ours {seconds['ours']:.4f} s, diffusers {seconds['peer']:.4f} s: "
            f"{ratio:.3f}x; {rate / 1e9:.0f} GFLOP/s, {rate / peak:.0%} of the matmul peak"
        )
        figures[f"{name}_ratio"] = figure(ratio, bar)
        figures[f"{name}_share_of_matmul_peak"] = {"value": round(rate / peak, 3)}
    return figures


def measure_gpu(device: torch.device, rounds: int) -> dict[str, Any]:
    """XL/2 at 256 px: a compiled bf16 training step, dense and with 75 % of the tokens masked."""
    config = get_preset("pixart-xl-2-256")
    case = Case(config, 128, device)
    network: Any = torch.compile(build(config, device)[0])
    side = config.sample_size
    drop = TokenDrop("mask", 0.75, start=2, end=0, depth=config.depth)
    route = drop.choose(torch.rand(len(case.latents), config.base_grid**2, device=device))
    masked_case = Case(config, 128, device)
    masked_case.target = take_patches(case.target, route.kept, config.patch)

    def masked(network: nn.Module) -> Tensor:
        output: Tensor = network(case.latents, case.times, case.packed, route=route)
        return output

    steps = {
        "dense": training_step(network, case.ours, case),
        "masked": training_step(network, masked, masked_case),
    }
    seconds = clock(steps, rounds)
    matmul, matmul_flops = matmul_step(8192, 8192, device)
    peak = matmul_flops / clock({"matmul": matmul}, rounds)["matmul"]
    flops = 3 * len(case.latents) * forward_flops(config, side, side, 60.0)
    share, gain = flops / seconds["dense"] / peak, seconds["dense"] / seconds["masked"]
    print(f"XL/2: {len(case.latents) / seconds['dense']:.0f} images/s, {share:.0%} of matmul peak")
    return {
        "xl2_share_of_matmul_peak": figure(share, 0.5),
        "masked_speedup": figure(gain, 3.0, digits=2),
    }


def peak_megabytes(which: str, batch: int) -> float:
    """Peak memory of two training steps in a process of its own, less what it began with."""
    command = [sys.executable, __file__, "--memory-of", which, "--batch", str(batch)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def print_memory(which: str, batch: int) -> None:
    config = replace(get_preset("pixart-xl-2-256"), depth=4)
    case = Case(config, batch, torch.device("cpu"))
    before = _status("VmRSS")
    network, peer = build(config, torch.device("cpu"))
    if which == "ours":
        del peer
        step = training_step(network, case.ours, case)
    else:
        del network
        step = training_step(peer, case.theirs, case)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    for _ in range(2):
        step()
    print(_status("VmHWM") - before)


def _status(field: str) -> float:
    """A line of /proc/self/status in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--memory-of", choices=("ours", "peer"))
    options = parser.parse_args()
    if options.memory_of:
        return print_memory(options.memory_of, options.batch)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 2 if options.quick else options.batch
    config = replace(get_preset("pixart-xl-2-256"), depth=4)
    figures = compare(config, Case(config, batch, device), 8 if options.quick else 12, device)
    if device.type == "cuda":
        figures |= measure_gpu(device, 10)
    else:
        ours, peer = (peak_megabytes(which, batch) for which in ("ours", "peer"))
        print(f"memory     ours {ours:.0f} MB, diffusers {peer:.0f} MB at the peak of training")
        figures["memory_ratio"] = figure(ours / peer, 1.005, at_most=True)
    if folder := options.record or (None if options.quick else RESULTS):
        hardware = torch.cuda.get_device_name() if device.type == "cuda" else ""
        record("network", figures, ("torch",), folder, hardware)
    print(json.dumps(figures))
    return None


if __name__ == "__main__":
    main()
