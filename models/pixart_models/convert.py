"""Conversion: published checkpoints and diffusers folders to our networks, bit for bit.

Our parameter names are those of the released code (PixArt-alpha, facebookresearch/DiT), so a
published checkpoint is checked and copied. diffusers names parts differently, cuts fused
projections into pieces and copies DiT's embedders into every block: two tables say where each
part goes, and are read in both directions. Nothing may be missing, left over or mis-shaped.

What is read may come from anywhere: a config is validated before anything is allocated, and a
pickle is read as plain tensors or not at all.

diffusers' DiT spaces timestep frequencies by 1/127, the published weights and ours by 1/128
(facebookresearch/DiT, TimestepEmbedder): the same DiT draws slightly other pictures there, unless
each block's ``norm1.emb.time_proj.downscale_freq_shift`` is set to 0. PixArt is not concerned.
"""

import json
import pickle
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart_models.config import ConfigError, ModelInputError, NetworkConfig
from pixart_models.dit import DiT
from pixart_models.pixart import PixArt
from pixart_models.snapshot import CONFIG_FILE, MAX_PARAMETERS, build_network

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
_UNREADABLE = (  # what torch.load raises for files cut short or with bytes changed
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error, SafetensorError,
)  # fmt: skip

# Fixed positions, and the untrained null caption of released training code: not weights.
_PUBLISHED_EXTRAS = {"pos_embed", "y_embedder.y_embedding"}
_DIFFUSERS_EXTRAS = {"pos_embed.pos_embed", "caption_projection.y_embedding"}

# Our part -> diffusers' parts: inside block i several hold its pieces in order; outside, one that
# names a block {i} is a copy of ours in every block.
_IN_BLOCK = {
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q", "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    "scale_shift_table": "scale_shift_table", "adaLN_modulation.1": "norm1.linear",
}  # fmt: skip
_EMBED = "transformer_blocks.{i}.norm1.emb."
_OUTSIDE = {
    "pixart": {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc1": "caption_projection.linear_1",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.scale_shift_table": "scale_shift_table",
    },
    "dit": {
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": _EMBED + "timestep_embedder.linear_1",
        "t_embedder.mlp.2": _EMBED + "timestep_embedder.linear_2",
        "y_embedder.embedding_table": _EMBED + "class_embedder.embedding_table",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    },
}
CLASSES = {"pixart": "PixArtTransformer2DModel", "dit": "DiTTransformer2DModel"}
_NORMS = {"pixart": "ada_norm_single", "dit": "ada_norm_zero"}
UNUSED = {
    "pixart": ("num_classes",),
    "dit": ("text_width", "max_tokens", "size_condition", "adaln", "text_in"),
}
_SIZES = {  # config.json's key: our field, and the most we accept; heads are as wide as all with us
    "num_attention_heads": ("heads", 1024), "attention_head_dim": ("width", 1024),
    "num_layers": ("depth", 1000), "in_channels": ("latent_channels", 1024),
    "patch_size": ("patch", 64), "sample_size": ("sample_size", 4096),
    "caption_channels": ("text_width", 32_768), "num_embeds_ada_norm": ("num_classes", 1_000_000),
}  # fmt: skip
_NO_EFFECT = {"dropout", "norm_num_groups", "num_embeds_ada_norm", "upcast_attention"}
_ALSO = {"_class_name": "Transformer2DModel", "norm_eps": 1e-5}  # first published as, and with


class ConversionError(ModelInputError):
    """Weights or a configuration that cannot be converted, with the reason."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file, or a ``torch.save`` of plain tensors.

    A training checkpoint gives its ``state_dict``, which the released scripts draw with, or else
    its ``state_dict_ema``. Nothing in a pickle is executed. Raises ConversionError.
    """
    accepted = "accepted are safetensors, or torch.save of a plain state dict"
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found[1]}" if found else "is damaged or holds objects"
        raise ConversionError(f"{path} {what}, and was not unpickled; {accepted}") from error
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConversionError(f"{path} cannot be read: {reason}") from error
    if isinstance(held, dict):
        held = held.get("state_dict", held.get("state_dict_ema", held))
    if not isinstance(held, dict) or not all(
        isinstance(t, Tensor) and not t.is_nested for t in held.values()
    ):
        raise ConversionError(f"{path} holds no dict of plain tensors by name; {accepted}")
    return {str(name): tensor for name, tensor in held.items()}


def from_published(path: Path, config: NetworkConfig) -> PixArt | DiT:
    """The network of ``config`` (see ``get_preset``) with a released checkpoint's weights, fp32.

    Released files do not say what they are: 256 and 512 px differ in positions alone, which are
    computed, so naming the right preset is the caller's part. Raises ConversionError.
    """
    with torch.device("meta"):
        network = build_network(config)
    weights = _check(read_weights(path), network.state_dict(), _PUBLISHED_EXTRAS, str(path))
    network.load_state_dict(weights, assign=True)
    return network


def from_diffusers(folder: Path, max_tokens: int = 120) -> PixArt | DiT:
    """The network of a diffusers transformer or pipeline folder, whole or sharded, in fp32.

    ``max_tokens`` is what diffusers leaves to the caller of its pipeline. Raises ConversionError.
    """
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = parse_network(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE), max_tokens)
    with torch.device("meta"):
        network = build_network(config)
    expected = split_names(network.state_dict(), config)
    weights = _check(_read_shards(folder), expected, _DIFFUSERS_EXTRAS, str(folder))
    joined = _join(weights, network)
    for name, tensor in split_names(joined, config).items():
        if not torch.equal(tensor, weights[name]):
            raise ConversionError(
                f"{folder}: {name} differs from block 0's, but a DiT here has one for all blocks"
            )
    network.load_state_dict(joined, assign=True)
    return network


def _find_places(name: str, config: NetworkConfig) -> list[str]:
    """Where diffusers keeps one of our parameters: its pieces in order, or its copies."""
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+?)(\.weight|\.bias)?", name)
    assert match
    block, part, kind = match.groups("")
    if block:
        return [f"transformer_blocks.{block}.{place}{kind}" for place in _IN_BLOCK[part].split()]
    place = _OUTSIDE[config.architecture][part]
    return list(dict.fromkeys(place.format(i=i) + kind for i in range(config.depth)))


def split_names(weights: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """Our names to diffusers'."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        places = _find_places(name, config)
        pieces = tensor.chunk(len(places)) if name.startswith("blocks.") else [tensor] * len(places)
        found.update(zip(places, pieces, strict=True))
    return found


def _join(weights: Mapping[str, Tensor], network: PixArt | DiT) -> dict[str, Tensor]:
    """Diffusers' names to ours; of copies, the first."""
    found: dict[str, Tensor] = {}
    for name in network.state_dict():
        pieces = [weights[place] for place in _find_places(name, network.config)]
        found[name] = torch.cat(pieces) if name.startswith("blocks.") else pieces[0]
    return found


def _check(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], extras: set[str], where: str
) -> dict[str, Tensor]:
    """``weights`` less ``extras`` in fp32, if they are the expected ones and finite, or an error.

    Copies, so that nothing stays mapped to a file that may change.
    """
    kept = {name: tensor for name, tensor in weights.items() if name not in extras}
    wanted, found = (
        {f"{name} {[*tensor.shape]}" for name, tensor in side.items()} for side in (expected, kept)
    )
    if wanted != found:
        raise ConversionError(
            f"{where} does not fit the network asked for: missing {_some(wanted - found)}, "
            f"extra {_some(found - wanted)}; check the preset or config.json"
        )
    bad = {name for name, tensor in kept.items() if not _is_finite(tensor)}
    if bad:
        raise ConversionError(f"{where} has values that are no finite numbers in {_some(bad)}")
    return {name: tensor.to(torch.float32, copy=True) for name, tensor in kept.items()}


def _some(names: set[str]) -> str:
    return f"{sorted(names)[:3]} ({len(names)} in all)"


def _is_finite(tensor: Tensor) -> bool:
    plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return plain and bool(tensor.float().isfinite().all())


def read_json(path: Path) -> dict[str, Any]:
    try:
        return {**json.loads(path.read_text())}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConversionError(
            f"{path} cannot be read: {error}; give a transformer folder"
        ) from error


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weights file, or of the files its index names."""
    if not (folder / INDEX_FILE).exists():
        return read_weights(folder / WEIGHTS_FILE)
    places = read_json(folder / INDEX_FILE).get("weight_map")
    listed = [(n, str(f)) for n, f in places.items()] if isinstance(places, dict) else [("", "")]
    files = {file for _, file in listed if re.fullmatch(r"[\w.-]+\.safetensors", file)}
    shards = {file: read_weights(folder / file) for file in sorted(files)}
    if sorted(listed) != sorted((n, file) for file, shard in shards.items() for n in shard):
        raise ConversionError(f"{folder / INDEX_FILE}: weight_map must list what its files hold")
    return {n: t for shard in shards.values() for n, t in shard.items()}


def parse_network(raw: dict[str, Any], where: str, max_tokens: int) -> NetworkConfig:
    """The network of a config.json, which may ask for nothing our layers do not do, or an error."""
    raw = {key: value for key, value in raw.items() if value is not None}

    def check(key: str, fits: bool, wanted: object) -> None:
        if not fits:
            raise ConversionError(f"{where}: {key} = {raw.get(key)!r:.60}: must be {wanted}")

    name, names = raw.get("_class_name"), [*CLASSES.values(), _ALSO["_class_name"]]
    check("_class_name", name in names, f"one of {names}")
    is_dit = name == CLASSES["dit"] or raw.get("norm_type") == _NORMS["dit"]
    architecture: Literal["pixart", "dit"] = "dit" if is_dit else "pixart"
    found: dict[str, Any] = {}
    for key, (field, most) in _SIZES.items():
        if field not in UNUSED[architecture]:
            found[field] = value = raw.get(key)
            fits = type(value) is int and 1 <= value <= most
            check(key, fits, f"a whole number from 1 to {most}")
    found["width"] *= found["heads"]
    parameters = found["depth"] * found["width"] ** 2 * 18
    check("num_layers", parameters <= MAX_PARAMETERS, "of fewer parameters")
    found["predict_variance"] = raw.get("out_channels") == 2 * found["latent_channels"]
    if architecture == "pixart":  # what is left out follows from the size, as in diffusers
        side = found["sample_size"]
        scale = raw.get("interpolation_scale", max(side // 64, 1))
        fits = type(scale) in (int, float) and 0 < scale <= 1000
        check("interpolation_scale", fits, "above 0 and at most 1000")
        found["position_scale"] = float(scale)
        found["size_condition"] = raw.get("use_additional_conditions", side == 128) is True
    try:
        config = NetworkConfig(architecture=architecture, max_tokens=max_tokens, **found)
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error
    ours = describe_network(config)
    for key in sorted(raw.keys() - (_NO_EFFECT - ours.keys())):
        accepted = (ours.get(key, False), _ALSO.get(key))
        fits = raw[key] in accepted or key in ("_diffusers_version", "_name_or_path")
        check(key, fits, ours.get(key, "left out"))
    return config


def describe_network(config: NetworkConfig) -> dict[str, Any]:
    """The config.json of ``config``, as far as diffusers has words for it."""
    kind = config.architecture
    document: dict[str, Any] = {
        key: getattr(config, field) for key, (field, _) in _SIZES.items()
        if field not in UNUSED[kind]
    }  # fmt: skip
    document |= {
        "_class_name": CLASSES[kind], "norm_type": _NORMS[kind], "norm_eps": 1e-6,
        "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
        "attention_bias": True, "attention_head_dim": config.width // config.heads,
        "out_channels": config.out_channels,
    }  # fmt: skip
    if kind == "pixart":
        document |= {
            "attention_type": "default", "cross_attention_dim": config.width,
            "interpolation_scale": config.position_scale,
            "use_additional_conditions": config.size_condition,
        }  # fmt: skip
    return document
