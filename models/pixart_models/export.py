"""Export: everything that draws a snapshot's pictures, as a diffusers pipeline folder.

For people without this project: the folder loads with diffusers alone. What its pipeline cannot
express is refused, rather than exported as something that draws another picture.
"""

import json
from pathlib import Path
from typing import Any

from pixart_models.convert import CLASSES, ConversionError, save_diffusers
from pixart_models.diffusion import ObjectiveName
from pixart_models.drawing import Drawer
from pixart_models.solvers import SolverName

_DPM: dict[str, Any] = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}
_FLOW: dict[str, Any] = {**_DPM, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
_BETAS: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 2e-2}
SCHEDULERS: dict[tuple[ObjectiveName, SolverName], tuple[str, dict[str, Any]]] = {
    ("iddpm", "dpm++2m"): ("DPMSolverMultistepScheduler", {**_DPM, **_BETAS}),
    ("iddpm", "ddim"): (
        "DDIMScheduler",
        {**_BETAS, "timestep_spacing": "trailing", "clip_sample": False},
    ),
    ("flow", "dpm++2m"): ("DPMSolverMultistepScheduler", _FLOW),
    ("flow", "euler"): ("DPMSolverMultistepScheduler", {**_FLOW, "solver_order": 1}),
}


def export_pipeline(drawer: Drawer, folder: Path) -> dict[str, Any]:
    """Write a folder that diffusers.PixArtAlphaPipeline.from_pretrained loads.

    Returns the arguments that make the pipeline draw what ``drawer.draw`` draws of the same
    prompt, latents (B, C, h, w) of noise, steps and guidance. What is left to the caller, because
    the pipeline does not ask the folder:

    - it lower-cases and strips prompts, ignores guidance below 1, and fails at 1 step;
    - with flow, it tells the network whole timesteps where ours have fractions. The noise levels
      are the same; with the demo's weights pixels move by 2e-4 of full scale on average, and a
      few by up to 0.05.

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
    scheduler = getattr(diffusers, class_name)(**settings)
    text_encoder, tokenizer = drawer.text_encoder.model, drawer.text_encoder.tokenizer
    save_diffusers(drawer.network, folder / "transformer")
    scheduler.save_pretrained(folder / "scheduler")
    drawer.autoencoder.model.save_pretrained(folder / "vae")
    text_encoder.save_pretrained(folder / "text_encoder")
    _edit_json(folder / "text_encoder/config.json", dtype="float32")  # as the others are loaded
    tokenizer.save_pretrained(folder / "tokenizer")
    index: dict[str, Any] = {
        "_class_name": "PixArtAlphaPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", class_name],
        "text_encoder": ["transformers", type(text_encoder).__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        "transformer": ["diffusers", CLASSES["pixart"]],
        "vae": ["diffusers", type(drawer.autoencoder.model).__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return {
        "height": config.resolution,
        "width": config.resolution,
        "max_sequence_length": config.network.max_tokens,
        "use_resolution_binning": False,
        "clean_caption": False,
    }


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=2) + "\n")
