"""Conversion: published checkpoints and diffusers folders to our networks and back, bit for bit.

Our parameter names are those of the released code (PixArt-alpha, facebookresearch/DiT), so a
published checkpoint is checked and copied. diffusers names parts differently, cuts fused
projections into pieces and copies DiT's embedders into every block: ``RENAMES`` says where each
part goes, and is read in both directions. Nothing may be missing, left over or mis-shaped.

What is read may come from anywhere: a config is validated before anything is allocated, and a
pickle is read as plain tensors or not at all.

diffusers' DiT spaces timestep frequencies by 1/127; the published weights were trained with 1/128
(facebookresearch/DiT, TimestepEmbedder), which is ours. The same DiT weights therefore draw
slightly other pictures there, unless each block's ``norm1.emb.time_proj.downscale_freq_shift`` is
set to 0. PixArt is not concerned.
"""

import json
import pickle
import re
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pixart_models.config import ConfigError, NetworkConfig
from pixart_models.dit import DiT
from pixart_models.errors import ModelInputError
from pixart_models.layers import sincos_positions
from pixart_models.pixart import PixArt
from pixart_models.snapshot import MAX_PARAMETERS, build_network

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
NOT_WEIGHTS = {  # fixed positions, and the untrained null caption of released training code
    "pos_embed", "y_embedder.y_embedding", "pos_embed.pos_embed", "caption_projection.y_embedding",
}  # fmt: skip
_UNREADABLE = (  # what torch.load raises for files cut short or with bytes changed
    OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, struct.error, SafetensorError,
)  # fmt: skip

_TIME = "transformer_blocks.{i}.norm1.emb."
_SHARED = {
    "x_embedder.proj": ("pos_embed.proj",),
    "blocks.{i}.attn.qkv": tuple(f"transformer_blocks.{{i}}.attn1.to_{n}" for n in "qkv"),
    "blocks.{i}.attn.proj": ("transformer_blocks.{i}.attn1.to_out.0",),
    "blocks.{i}.mlp.fc1": ("transformer_blocks.{i}.ff.net.0.proj",),
    "blocks.{i}.mlp.fc2": ("transformer_blocks.{i}.ff.net.2",),
}
# Our part -> diffusers' parts. Several hold its pieces in order; a part of ours that is in no
# block but theirs is, is copied into every block.
RENAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "pixart": {
        **_SHARED,
        "blocks.{i}.cross_attn.q_linear": ("transformer_blocks.{i}.attn2.to_q",),
        "blocks.{i}.cross_attn.kv_linear": (
            "transformer_blocks.{i}.attn2.to_k",
            "transformer_blocks.{i}.attn2.to_v",
        ),
        "blocks.{i}.cross_attn.proj": ("transformer_blocks.{i}.attn2.to_out.0",),
        "blocks.{i}.scale_shift_table": ("transformer_blocks.{i}.scale_shift_table",),
        "t_embedder.mlp.0": ("adaln_single.emb.timestep_embedder.linear_1",),
        "t_embedder.mlp.2": ("adaln_single.emb.timestep_embedder.linear_2",),
        "csize_embedder.mlp.0": ("adaln_single.emb.resolution_embedder.linear_1",),
        "csize_embedder.mlp.2": ("adaln_single.emb.resolution_embedder.linear_2",),
        "ar_embedder.mlp.0": ("adaln_single.emb.aspect_ratio_embedder.linear_1",),
        "ar_embedder.mlp.2": ("adaln_single.emb.aspect_ratio_embedder.linear_2",),
        "t_block.1": ("adaln_single.linear",),
        "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
        "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
        "final_layer.linear": ("proj_out",),
        "final_layer.scale_shift_table": ("scale_shift_table",),
    },
    "dit": {
        **_SHARED,
        "blocks.{i}.adaLN_modulation.1": ("transformer_blocks.{i}.norm1.linear",),
        "t_embedder.mlp.0": (_TIME + "timestep_embedder.linear_1",),
        "t_embedder.mlp.2": (_TIME + "timestep_embedder.linear_2",),
        "y_embedder.embedding_table": (_TIME + "class_embedder.embedding_table",),
        "final_layer.adaLN_modulation.1": ("proj_out_1",),
        "final_layer.linear": ("proj_out_2",),
    },
}
CLASSES = {"pixart": "PixArtTransformer2DModel", "dit": "DiTTransformer2DModel"}
_NORMS = {"pixart": "ada_norm_single", "dit": "ada_norm_zero"}
_UNUSED = {"pixart": ("num_classes",), "dit": ("text_width", "max_tokens", "size_condition")}
_SIZES = {  # config.json's key: our field, and the most we accept
    "num_attention_heads": ("heads", 1024),
    "attention_head_dim": ("width", 1024),  # of all heads, with us
    "num_layers": ("depth", 1000),
    "in_channels": ("latent_channels", 1024),
    "patch_size": ("patch", 64),
    "sample_size": ("sample_size", 4096),
    "caption_channels": ("text_width", 32_768),  # PixArt
    "num_embeds_ada_norm": ("num_classes", 1_000_000),  # DiT; no weights of PixArt
}
_FIXED: dict[str, tuple[Any, ...]] = {  # what our layers do; a missing key means the first
    "activation_fn": ("gelu-approximate",), "attention_bias": (True,),
    "norm_elementwise_affine": (False,), "attention_type": ("default",),
    "only_cross_attention": (False, None), "double_self_attention": (False, None),
    "norm_eps": (1e-6, 1e-5),  # diffusers' default for DiT is 1e-5
}  # fmt: skip


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
        with path.open("rb") as file:
            mapped = file.read(4) == b"PK\x03\x04"  # torch's zip format, which can be mapped
        held: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"holds {found[1]}" if found else "is damaged or holds objects"
        raise ConversionError(f"{path} {what}, and was not unpickled; {accepted}") from error
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConversionError(f"{path} cannot be read: {reason}") from error
    if isinstance(held, dict):
        held = held.get("state_dict", held.get("state_dict_ema", held))
    if not isinstance(held, dict) or not all(isinstance(t, Tensor) for t in held.values()):
        raise ConversionError(f"{path} holds no dict of tensors by name; {accepted}")
    return {str(name): tensor for name, tensor in held.items()}


def from_published(path: Path, config: NetworkConfig) -> PixArt | DiT:
    """The network of ``config`` (see ``get_preset``) with a released checkpoint's weights, fp32.

    Released files do not say what they are: 256 and 512 px differ in positions alone, which are
    computed, so naming the right preset is the caller's part. Raises ConversionError.
    """
    with torch.device("meta"):
        network = build_network(config)
    weights = _check(read_weights(path), network.state_dict(), str(path))
    return _fill(network, weights)


def to_published(network: PixArt | DiT) -> dict[str, Tensor]:
    """The weights in the released layout, to be saved as safetensors or with torch.save.

    Includes ``pos_embed`` (1, N, D), which the released loaders expect. PixArt's ``y_embedding``
    is left out: ours is guided by the features of an empty prompt, not by a noise vector.
    """
    config, side = network.config, network.config.base_grid
    positions = sincos_positions(config.width, side, side, side, config.position_scale)
    weights = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    return {**weights, "pos_embed": positions[None]}


def from_diffusers(folder: Path, max_tokens: int = 120) -> PixArt | DiT:
    """The network of a diffusers transformer folder, whole or sharded, in fp32.

    ``max_tokens`` is what diffusers leaves to the caller of its pipeline. Raises ConversionError.
    """
    config = _parse_config(_read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE), max_tokens)
    with torch.device("meta"):
        network = build_network(config)
    expected = _split(network.state_dict(), config)
    weights = _check(_read_shards(folder), expected, str(folder))
    return _fill(network, _join(weights, network.state_dict(), config, str(folder)))


def save_diffusers(network: PixArt | DiT, folder: Path) -> None:
    """Write a folder that PixArtTransformer2DModel or DiTTransformer2DModel loads, in one file.

    Raises ConversionError for what these classes cannot express.
    """
    document = _describe(network.config)
    folder.mkdir(parents=True, exist_ok=True)
    weights = _split(network.state_dict(), network.config)
    apart = {name: t.detach().cpu().clone() for name, t in weights.items()}
    save_file(apart, folder / WEIGHTS_FILE, {"format": "pt"})
    (folder / INDEX_FILE).unlink(missing_ok=True)  # of shards before; it would be read instead
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")


class _Places(NamedTuple):
    """Where diffusers keeps one of our parameters: pieces in order, or a copy in each place."""

    names: list[str]
    are_copies: bool


def _find_places(name: str, config: NetworkConfig) -> _Places:
    table = RENAMES[config.architecture]
    block = re.match(r"blocks\.(\d+)\.", name)
    part = re.sub(r"^blocks\.\d+\.", "blocks.{i}.", name)
    suffix = ""
    if part not in table:
        part, dot, kind = part.rpartition(".")
        suffix = dot + kind
    theirs = [place + suffix for place in table[part]]
    if block or "{i}" not in theirs[0]:
        return _Places([t.format(i=block and block[1]) for t in theirs], are_copies=False)
    return _Places([t.format(i=i) for i in range(config.depth) for t in theirs], are_copies=True)


def _split(weights: Mapping[str, Tensor], config: NetworkConfig) -> dict[str, Tensor]:
    """Our names to diffusers'."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        places = _find_places(name, config)
        count = len(places.names)
        pieces = [tensor] * count if places.are_copies else tensor.chunk(count)
        found.update(zip(places.names, pieces, strict=True))
    return found


def _join(
    weights: Mapping[str, Tensor], names: Collection[str], config: NetworkConfig, where: str
) -> dict[str, Tensor]:
    """Diffusers' names to ours. Raises ConversionError where a DiT's copies differ."""
    found: dict[str, Tensor] = {}
    for name in names:
        places = _find_places(name, config)
        pieces = [weights[place] for place in places.names]
        if not places.are_copies:
            found[name] = torch.cat(pieces)
            continue
        for place, piece in zip(places.names, pieces, strict=True):
            if not torch.equal(piece, pieces[0]):
                raise ConversionError(
                    f"{where}: {place} differs from {places.names[0]}, but a DiT has one "
                    f"{name} for all blocks; only weights that share it can be converted"
                )
        found[name] = pieces[0]
    return found


def _check(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """``weights`` less NOT_WEIGHTS, when they are the expected ones and finite, or an error."""
    kept = {name: tensor for name, tensor in weights.items() if name not in NOT_WEIGHTS}
    wrong = {
        "missing": [n for n in expected if n not in kept],
        "extra": [n for n in kept if n not in expected],
        "mis-shaped": [
            f"{n} {list(kept[n].shape)} for {list(t.shape)}"
            for n, t in expected.items()
            if n in kept and kept[n].shape != t.shape
        ],
    }
    if any(wrong.values()):
        parts = [f"{k} {names[:3]} ({len(names)} in all)" for k, names in wrong.items() if names]
        raise ConversionError(
            f"{where} does not fit the network asked for: {', '.join(parts)}; "
            f"check the preset or config.json"
        )
    bad = [name for name, tensor in kept.items() if not _is_finite(tensor)]
    if bad:
        raise ConversionError(
            f"{where} has values that are no finite numbers in {bad[:3]} ({len(bad)} in all)"
        )
    return kept


def _is_finite(tensor: Tensor) -> bool:
    plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
    return plain and bool(tensor.float().isfinite().all())


def _fill(network: PixArt | DiT, weights: Mapping[str, Tensor]) -> PixArt | DiT:
    """Copies, so that nothing stays mapped to a file that may change."""
    copies = {name: t.to(torch.float32, copy=True) for name, t in weights.items()}
    network.load_state_dict(copies, assign=True)
    return network


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(
            f"{path} cannot be read: {error}; give the folder of the transformer itself"
        ) from error
    if not isinstance(document, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return document


def _read_shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's weights file, or of the files its index names."""
    if not (folder / INDEX_FILE).exists():
        return read_weights(folder / WEIGHTS_FILE)
    places = _read_json(folder / INDEX_FILE).get("weight_map")
    names = {str(n) for n in places.values()} if isinstance(places, dict) else {"nothing"}
    if not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise ConversionError(f"{folder / INDEX_FILE}: weight_map must name safetensors beside it")
    return {n: t for name in sorted(names) for n, t in read_weights(folder / name).items()}


def _parse_config(raw: dict[str, Any], where: str, max_tokens: int) -> NetworkConfig:
    """The network that a transformer's config.json describes, bounded. Raises ConversionError."""

    def check(key: str, value: object, fits: bool, wanted: object) -> None:
        if not fits:
            raise ConversionError(f"{where}: {key} = {value!r:.60}: must be {wanted}")

    architecture = _parse_architecture(raw, where)
    for key, accepted in _FIXED.items():
        value = raw.get(key, accepted[0])
        check(key, value, value in accepted, accepted[0])
    found: dict[str, Any] = {}
    for key, (field, most) in _SIZES.items():
        if field not in _UNUSED[architecture]:
            value = raw.get(key)
            fits = type(value) is int and 1 <= value <= most
            check(key, value, fits, f"a whole number from 1 to {most}")
            found[field] = value
    found["width"] *= found["heads"]
    parameters = found["depth"] * found["width"] ** 2 * 18
    check("num_layers", found["depth"], parameters <= MAX_PARAMETERS, "of fewer parameters")
    channels, side = found["latent_channels"], found["sample_size"]
    value = raw.get("out_channels") or channels
    check("out_channels", value, value in (channels, 2 * channels), f"{channels} or its double")
    found["predict_variance"] = value == 2 * channels
    if architecture == "pixart":
        value = raw.get("cross_attention_dim") or found["width"]
        check("cross_attention_dim", value, value == found["width"], found["width"])
        value = raw.get("interpolation_scale") or max(side // 64, 1)
        fits = type(value) in (int, float) and 0 < value <= 1000
        check("interpolation_scale", value, fits, "above 0 and at most 1000")
        found["position_scale"] = float(value)
        value = raw.get("use_additional_conditions")
        found["size_condition"] = side == 128 if value is None else value is True
    try:
        return NetworkConfig(architecture=architecture, max_tokens=max_tokens, **found)
    except ConfigError as error:
        raise ConversionError(f"{where}: {error}") from error


def _parse_architecture(raw: dict[str, Any], where: str) -> Literal["pixart", "dit"]:
    """By class name, or by norm for the class that both were first published as."""
    name, norm = raw.get("_class_name"), raw.get("norm_type")
    if name in (CLASSES["pixart"], "Transformer2DModel") and norm == _NORMS["pixart"]:
        return "pixart"
    if name in (CLASSES["dit"], "Transformer2DModel") and norm == _NORMS["dit"]:
        return "dit"
    raise ConversionError(
        f"{where}: _class_name = {name!r:.60} with norm_type = {norm!r:.60}; accepted are "
        f"{' and '.join(f'{CLASSES[a]} with {_NORMS[a]}' for a in CLASSES)}"
    )


def _describe(config: NetworkConfig) -> dict[str, Any]:
    """The config.json of ``config``. Raises ConversionError for what it would lose."""
    name, unused = CLASSES[config.architecture], _UNUSED[config.architecture]
    document: dict[str, Any] = {"_class_name": name, "norm_type": _NORMS[config.architecture]}
    for key, (field, _) in _SIZES.items():
        if field not in unused:
            document[key] = getattr(config, field)
    document["attention_head_dim"] = config.width // config.heads
    document["out_channels"] = config.out_channels
    document["norm_eps"] = 1e-6
    if config.architecture == "pixart":
        document["cross_attention_dim"] = config.width
        document["interpolation_scale"] = config.position_scale
        document["use_additional_conditions"] = config.size_condition
    told = _parse_config(document, name, config.max_tokens)
    ours = {f: v for f, v in config.to_dict().items() if f not in unused}
    lost = [f"{field} = {v!r}" for field, v in ours.items() if getattr(told, field) != v]
    if lost:
        raise ConversionError(f"diffusers' {name} cannot express {', '.join(lost)}")
    return document
