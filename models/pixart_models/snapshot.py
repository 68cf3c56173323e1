"""Snapshots: the weights and settings a picture is drawn with, as safetensors and JSON.

A snapshot is what the registry holds and services load; nothing in it is ever unpickled. It names
the autoencoder and text encoder it was trained with by source *and* digest, because a latent or a
text feature from other weights is silent nonsense.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_models.config import ModelInputError, NetworkConfig
from pixart_models.diffusion import ObjectiveName
from pixart_models.dit import DiT
from pixart_models.pixart import PixArt
from pixart_models.solvers import SolverName, check_solver

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MAX_PARAMETERS = 20_000_000_000  # refuse a config that would allocate more
_MOST = {  # numbers that reach an allocation, a loop or a division; all are above 0
    "depth": 1000, "width": 32_768, "heads": 1024, "patch": 64, "mlp_ratio": 64,
    "latent_channels": 1024, "sample_size": 4096, "position_scale": 1000, "text_width": 32_768,
    "max_tokens": 8192, "num_classes": 1_000_000, "resolution": 32_768,
}  # fmt: skip


class SnapshotError(ModelInputError):
    """A snapshot folder that cannot be used, with the reason."""


@dataclass(frozen=True)
class SnapshotConfig:
    """Everything but the weights.

    ``resolution`` is the native picture side in pixels; ``solver`` is the one these weights are
    drawn with: distilled ones need lcm.
    """

    network: NetworkConfig
    objective: ObjectiveName
    resolution: int
    autoencoder: str
    autoencoder_digest: str
    text_encoder: str
    text_encoder_digest: str
    solver: SolverName = "dpm++2m"

    @classmethod
    def from_json(cls, text: str, where: str) -> "SnapshotConfig":
        """Parse and validate. Raises SnapshotError naming ``where``."""
        try:
            raw = json.loads(text)
            network = raw.pop("network")
            _check_fields(NetworkConfig, network, "network.")
            _check_fields(cls, raw, "")
            config = cls(network=NetworkConfig(**network), **raw)
            check_solver(config.objective, config.solver)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise SnapshotError(f"{where} is not a snapshot config: {error}") from error
        if config.network.depth * config.network.width**2 * 18 > MAX_PARAMETERS:
            raise SnapshotError(f"{where} asks for a network beyond {MAX_PARAMETERS:,} parameters")
        return config


def _check_fields(kind: type, values: dict[str, Any], prefix: str) -> None:
    """Raise TypeError or ValueError unless ``values`` fit ``kind``'s annotations and ``_MOST``."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise TypeError(f"unknown keys {unknown}")
    for name, value in values.items():
        place = f"{prefix}{name} = {value!r:.60}"
        if not _fits(value, hints[name]):
            raise TypeError(f"{place}: must be {_describe(hints[name])}")
        if name in _MOST and not 0 < value <= _MOST[name]:
            raise ValueError(f"{place}: must be above 0 and at most {_MOST[name]}")


def _fits(value: object, hint: Any) -> bool:
    """Whether a value from JSON has the annotated type; a bool is no number."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float and isinstance(value, float):
        return math.isfinite(value)
    return type(value) is (int if hint is float else hint)


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return f"one of {', '.join(get_args(hint))}"
    return "a finite number" if hint is float else f"of type {hint.__name__}"


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
        stored = load_file(folder / WEIGHTS_FILE, device=device)
    except (OSError, SafetensorError) as error:
        raise SnapshotError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    with torch.device("meta"):
        network = build_network(config.network)
    # Copied, since what stays mapped to a file would change or vanish with it.
    weights = {n: t.to(torch.float32, copy=True) for n, t in stored.items() if not t.is_complex()}
    missing, extra = _differences(network.state_dict(), weights)
    if missing or extra:
        raise SnapshotError(
            f"{folder / WEIGHTS_FILE} does not fit its config: missing or mis-shaped "
            f"{missing[:3]}, extra {extra[:3]} ({len(missing)} and {len(extra)} in all)"
        )
    network.load_state_dict(weights, assign=True)
    bad = [name for name, tensor in weights.items() if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise SnapshotError(f"{folder / WEIGHTS_FILE} has non-finite values in {bad[:3]}")
    return config, network


def _differences(
    expected: dict[str, Any], actual: dict[str, Tensor]
) -> tuple[list[str], list[str]]:
    missing = [n for n, t in expected.items() if n not in actual or actual[n].shape != t.shape]
    return missing, [n for n in actual if n not in expected]
