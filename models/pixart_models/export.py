"""Snapshots from and for other programs: released weights, diffusers' folders and pipelines.

An exported folder loads with diffusers alone. What diffusers cannot express is refused, rather
than exported as something that draws another picture.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pixart_models import convert
from pixart_models.autoencoder import load_autoencoder
from pixart_models.config import NetworkConfig, get_preset
from pixart_models.convert import ConversionError
from pixart_models.diffusion import ObjectiveName
from pixart_models.dit import DiT
from pixart_models.drawing import Drawer
from pixart_models.layers import sincos_positions
from pixart_models.pixart import PixArt
from pixart_models.snapshot import CONFIG_FILE, SnapshotConfig, save_snapshot
from pixart_models.solvers import SolverName, check_solver
from pixart_models.text import load_text_encoder

_DPM: dict[str, Any] = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}
_FLOW: dict[str, Any] = {**_DPM, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
_BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
_DDIM: dict[str, Any] = {**_BETAS, "timestep_spacing": "trailing", "clip_sample": False}
SCHEDULERS: dict[tuple[ObjectiveName, SolverName], tuple[str, dict[str, Any]]] = {
    ("iddpm", "dpm++2m"): ("DPMSolverMultistepScheduler", {**_DPM, **_BETAS}),
    ("iddpm", "ddim"): ("DDIMScheduler", _DDIM),
    ("flow", "dpm++2m"): ("DPMSolverMultistepScheduler", _FLOW),
    ("flow", "euler"): ("DPMSolverMultistepScheduler", {**_FLOW, "solver_order": 1}),
}


def import_snapshot(
    source: Path, folder: Path, preset: str, autoencoder: str, text_encoder: str,
    objective: ObjectiveName | None, solver: SolverName,
) -> None:  # fmt: skip
    """Write a new snapshot of a released file of network ``preset``, or of a diffusers folder.

    The encoders are folders or hub ids; when empty, those in ``source``, a pipeline's folder. So is
    the objective; elsewhere a network that predicts the variance is ``iddpm``, and any other must
    be told. Raises ConversionError, ConfigError, SolverError or ModelNotFound.
    """
    if not source.exists():
        raise ConversionError(f"{source}: there is no such file or folder")
    if not (preset or source.is_dir()):
        raise ConversionError(f"{source} does not say what it is; give its preset")
    if source.is_dir():
        network = convert.from_diffusers(source, get_preset(preset).max_tokens if preset else 120)
    else:
        network = convert.from_published(source, get_preset(preset))
    config, describe = network.config, convert.describe_network
    if preset and describe(config) != describe(get_preset(preset)):
        raise ConversionError(f"{source} holds another network than {preset}; leave preset out")
    objective = objective or _read_objective(source, config)
    if (objective == "iddpm") != config.predict_variance:
        raise ConversionError(
            f"{source} {'predicts' if config.predict_variance else 'does not predict'} a variance, "
            f"which is not what {objective} trains; name its objective"
        )
    check_solver(objective, solver)
    vae = load_autoencoder(_absolute(autoencoder or source))
    text = load_text_encoder(_absolute(text_encoder or source), config.max_tokens)
    if isinstance(network, DiT):  # it reads none, but what is trained from it will
        config = replace(config, text_width=text.width)
    reads, given = (config.latent_channels, config.text_width), (vae.channels, text.width)
    if reads != given:
        raise ConversionError(
            f"{source} reads latents and text of {reads} channels, the autoencoder and text "
            f"encoder give {given}; name those it was trained with"
        )
    settings = SnapshotConfig(
        network=config, objective=objective, solver=solver,
        resolution=config.sample_size * vae.factor,
        autoencoder=vae.source, autoencoder_digest=vae.digest,
        text_encoder=text.source, text_encoder_digest=text.digest,
    )  # fmt: skip
    folder.mkdir()
    save_snapshot(folder, settings, network.state_dict())


def _absolute(source: str | Path) -> str:
    """A local folder from the root, so that it is found from anywhere; else as it is, a hub id."""
    return str(Path(source).absolute()) if Path(source).is_dir() else str(source)


def _read_objective(source: Path, config: NetworkConfig) -> ObjectiveName:
    """What a pipeline's scheduler says, or else what the network's outputs do."""
    path = source / "scheduler" / "scheduler_config.json"
    if path.is_file():
        flow = convert.read_json(path).get("prediction_type") == "flow_prediction"
        return "flow" if flow else "iddpm"
    if config.predict_variance:
        return "iddpm"
    raise ConversionError(f"{source} does not say how it was trained; give its objective")


def save_published(network: PixArt | DiT, path: Path) -> None:
    """Write a .safetensors file, or one that the released code loads: PixArt's under state_dict.

    Includes ``pos_embed`` (1, N, D), which its loaders expect. PixArt's ``y_embedding`` is left
    out: ours is guided by the features of an empty prompt, not by a noise vector. Raises
    ConversionError for a PixArt that the released code has no class for.
    """
    config, side = network.config, network.config.base_grid
    for name, published in (("adaln", "single"), ("text_in", "cross")):
        if isinstance(network, PixArt) and (mine := getattr(config, name)) != published:
            raise ConversionError(f"the released code cannot express {name} = {mine!r}")
    positions = sincos_positions(config.width, side, side, side, config.position_scale)
    weights = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    weights["pos_embed"] = positions[None]
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save({"state_dict": weights} if isinstance(network, PixArt) else weights, path)


def save_diffusers(network: PixArt | DiT, folder: Path) -> None:
    """Write a folder that PixArtTransformer2DModel or DiTTransformer2DModel loads, in one file.

    Raises ConversionError for what these classes cannot express.
    """
    config, kind = network.config, network.config.architecture
    document = convert.describe_network(config)
    told = convert.parse_network(document, convert.CLASSES[kind], config.max_tokens).to_dict()
    ours = {f: v for f, v in config.to_dict().items() if f not in convert.UNUSED[kind]}
    lost = [f"{field} = {value!r}" for field, value in ours.items() if told[field] != value]
    if lost:
        raise ConversionError(
            f"diffusers' {convert.CLASSES[kind]} cannot express {', '.join(lost)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    weights = convert.split_names(network.state_dict(), config)
    apart = {name: t.detach().cpu().clone() for name, t in weights.items()}
    save_file(apart, folder / convert.WEIGHTS_FILE, {"format": "pt"})
    (folder / convert.INDEX_FILE).unlink(missing_ok=True)  # of old shards; it would be read instead
    (folder / CONFIG_FILE).write_text(json.dumps(document, indent=2) + "\n")


def export_pipeline(drawer: Drawer, folder: Path) -> dict[str, Any]:
    """Write a folder that diffusers.PixArtAlphaPipeline.from_pretrained loads.

    Returns the arguments that make the pipeline draw what ``drawer.draw`` draws of the same
    prompt, latents (B, C, h, w) of noise, steps and guidance, to the last bits. It does not ask
    the folder, so the caller minds: it lower-cases and strips prompts, ignores guidance below 1,
    and fails at 1 step.

    Raises ConversionError for a network, solver or encoder that the pipeline cannot express.
    """
    config = drawer.config
    if (config.objective, config.solver) not in SCHEDULERS:
        raise ConversionError(
            f"solver {config.solver} with {config.objective} cannot be exported: the pipeline "
            f"would draw other pictures, from fresh noise of its own"
        )
    if config.network.size_condition and config.network.sample_size != 128:
        raise ConversionError(
            f"size_condition with sample_size = {config.network.sample_size} cannot be exported: "
            f"the pipeline tells sizes to networks of sample_size = 128 alone"
        )
    if getattr(drawer.text_encoder.model.config, "quantization_config", None):
        raise ConversionError("an 8-bit text encoder cannot be exported; load it without eight_bit")
    import diffusers

    class_name, settings = SCHEDULERS[config.objective, config.solver]
    save_diffusers(drawer.network, folder / "transformer")
    pipeline = diffusers.PixArtAlphaPipeline(
        tokenizer=drawer.text_encoder.tokenizer, text_encoder=drawer.text_encoder.model,
        vae=drawer.autoencoder.model, scheduler=getattr(diffusers, class_name)(**settings),
        transformer=diffusers.PixArtTransformer2DModel.from_pretrained(
            folder / "transformer", low_cpu_mem_usage=False
        ),
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    path = folder / "text_encoder/config.json"  # a half-precise one must load like the others
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2))
    return {
        "height": config.resolution,
        "width": config.resolution,
        "max_sequence_length": config.network.max_tokens,
        "use_resolution_binning": False,
        "clean_caption": False,
    }
