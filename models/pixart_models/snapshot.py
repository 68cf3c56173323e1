"""Snapshots: the weights and settings a picture is drawn with, as safetensors and JSON.

A snapshot is what the registry holds and services load; nothing in it is ever unpickled. It names
the autoencoder and text encoder it was trained with by source *and* digest, because a latent or a
text feature from other weights is silent nonsense.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_models.config import NetworkConfig
from pixart_models.diffusion import ObjectiveName
from pixart_models.dit import DiT
from pixart_models.errors import ModelInputError
from pixart_models.pixart import PixArt

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MAX_PARAMETERS = 20_000_000_000  # refuse a config that would allocate more


class SnapshotError(ModelInputError):
    """A snapshot folder that cannot be used, with the reason."""


@dataclass(frozen=True)
class SnapshotConfig:
    """Everything but the weights. ``resolution`` is the native picture side in pixels."""

    network: NetworkConfig
    objective: ObjectiveName
    resolution: int
    autoencoder: str
    autoencoder_digest: str
    text_encoder: str
    text_encoder_digest: str

    @classmethod
    def from_json(cls, text: str, where: str) -> "SnapshotConfig":
        """Parse and validate. Raises SnapshotError naming ``where``."""
        try:
            raw = json.loads(text)
            network = NetworkConfig(**raw.pop("network"))
            unknown = set(raw) - {f.name for f in fields(cls)}
            if unknown:
                raise TypeError(f"unknown keys {sorted(unknown)}")
            if raw.get("objective") not in get_args(ObjectiveName):
                raise ValueError(f"unknown objective {raw.get('objective')!r}")
            config = cls(network=network, **raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SnapshotError(f"{where} is not a snapshot config: {error}") from error
        if config.network.depth * config.network.width**2 * 18 > MAX_PARAMETERS:
            raise SnapshotError(f"{where} asks for a network beyond {MAX_PARAMETERS:,} parameters")
        return config


def build_network(config: NetworkConfig) -> PixArt | DiT:
    return PixArt(config) if config.architecture == "pixart" else DiT(config)


def save_snapshot(folder: Path, config: SnapshotConfig, weights: dict[str, Tensor]) -> None:
    """Write both files into an existing folder."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / WEIGHTS_FILE)
    document: dict[str, Any] = asdict(config)
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")


def load_config(folder: Path) -> SnapshotConfig:
    """Read the settings alone. Raises SnapshotError."""
    try:
        text = (folder / CONFIG_FILE).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SnapshotError(f"{folder} holds no readable {CONFIG_FILE}: {error}") from error
    return SnapshotConfig.from_json(text, str(folder / CONFIG_FILE))


def load_network(folder: Path, device: str = "cpu") -> tuple[SnapshotConfig, PixArt | DiT]:
    """Rebuild the network with its weights, on ``device``, in fp32. Raises SnapshotError."""
    config = load_config(folder)
    try:
        weights = load_file(folder / WEIGHTS_FILE, device=device)
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    with torch.device("meta"):
        network = build_network(config.network)
    missing, extra = _differences(network.state_dict(), weights)
    if missing or extra:
        raise SnapshotError(
            f"{folder / WEIGHTS_FILE} does not fit its config: missing or mis-shaped "
            f"{missing[:3]}, extra {extra[:3]} ({len(missing)} and {len(extra)} in all)"
        )
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise SnapshotError(f"{folder / WEIGHTS_FILE} has non-finite values in {bad[:3]}")
    return config, network


def _differences(
    expected: dict[str, Any], actual: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    missing = [n for n, t in expected.items() if n not in actual or actual[n].shape != t.shape]
    return missing, [n for n in actual if n not in expected]
