"""Tiny real snapshots for the serve room's tests: random weights, nothing downloaded."""

import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pixart_models.autoencoder import load_autoencoder
from pixart_models.config import get_preset
from pixart_models.drawing import Drawer, load_drawer
from pixart_models.pixart import PixArt
from pixart_models.snapshot import SnapshotConfig, save_snapshot
from pixart_models.text import load_text_encoder
from pixart_platform.manifest import FileRecord, Manifest


@cache
def _base() -> Drawer:
    """The encoders, loaded once, and a configuration that fits them."""
    text_encoder = load_text_encoder("builtin:t5-tiny", 48)
    autoencoder = load_autoencoder("builtin:digits")
    config = SnapshotConfig(
        network=get_preset("digits-mini"),
        objective="flow",
        resolution=32,
        autoencoder=autoencoder.source,
        autoencoder_digest=autoencoder.digest,
        text_encoder=text_encoder.source,
        text_encoder_digest=text_encoder.digest,
    )
    return Drawer(config, PixArt(config.network), autoencoder, text_encoder)


def build_drawer(seed: int = 0, preset: str = "digits-mini") -> Drawer:
    """A drawer with seeded random weights, the zero-initialised ones included. Of a published
    preset it has the depth, width and heads."""
    base, shape = _base(), get_preset(preset)
    kept = {name: getattr(shape, name) for name in ("depth", "width", "heads")}
    if "digits" not in preset:
        shape = replace(get_preset("digits"), **kept)
    config = replace(base.config, network=shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PixArt(config.network)
        zeros: list[nn.Parameter] = [p for p in network.parameters() if not p.any()]
        for parameter in zeros:
            nn.init.normal_(parameter, std=0.1)
    return replace(base, config=config, network=network.eval().requires_grad_(False))


def write_snapshot(folder: Path, drawer: Drawer) -> Path:
    """A published snapshot: weights, configuration, manifest last."""
    folder.mkdir(parents=True)
    save_snapshot(folder, drawer.config, drawer.network.state_dict())
    records = tuple(FileRecord.of(path) for path in sorted(folder.iterdir()))
    Manifest("snapshot/1", {}, {}, records).commit_to(folder)
    return folder


class Gate:
    """Lets a network take one step a permit, and writes down how many rows each step had.

    ``num_arrived`` counts steps that reached the gate: one more than passed while one waits there.
    """

    def __init__(self, network: nn.Module, permits: int = 0) -> None:
        self.batches: list[int] = []
        self.num_arrived = 0
        self._permits = threading.Semaphore(permits)
        network.register_forward_pre_hook(self._pass)

    def allow(self, steps: int = 10_000) -> None:
        self._permits.release(steps)

    def _pass(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self.num_arrived += 1
        assert self._permits.acquire(timeout=20), "nobody opened the gate"
        latents: Tensor = args[0]
        self.batches.append(len(latents))


def test_a_written_snapshot_draws_what_its_drawer_drew(tmp_path: Path) -> None:
    drawer = build_drawer(seed=3)
    loaded = load_drawer(write_snapshot(tmp_path / "snapshot", drawer), like=drawer)
    ours = drawer.draw(["a red three", "a blue two"], [1, 2], steps=3)
    assert ours.std() > 5, "the pictures must differ from one flat colour"
    assert np.abs(ours[0].astype(int) - ours[1]).max() > 20
    np.testing.assert_array_equal(loaded.draw(["a red three", "a blue two"], [1, 2], steps=3), ours)
