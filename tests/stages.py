"""Stages to train on tables of noise, without pictures, encoders or the jobs that make tables.

The numbers are a function of the recipe's seed: latents of standard normal means, captions of 4 to
20 tokens, labels, and qualities between 0 and 1. Shapes are those of the demo's own encoders.
"""

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from builders import Row, write_table

from pixart_jobs.encode import pack_features
from pixart_jobs.recipe import Recipe
from pixart_jobs.stage import StageInputs, StagePlan, plan
from pixart_platform.tables import Table

FACTOR, CHANNELS, TEXT_WIDTH = 4, 8, 64  # of builtin:digits and builtin:t5-tiny
_PARTITION_ROWS = 512


def plan_stage(
    recipe: Recipe, name: str, tables: dict[str, Table], root: Path, parent: Path | None = None
) -> StagePlan:
    """Stage ``name`` under ``root``, from fresh weights or the snapshot ``parent``."""
    latents = tables[f"latents-{recipe.stages[name].resolution}"]
    inputs = StageInputs(tables["images"], tables["text"], latents, parent)
    return plan(recipe, name, inputs, root / "stages")


def write_tables(recipe: Recipe, root: Path, num_images: int) -> dict[str, Table]:
    """What a pipeline makes for its stages, by kind; latents by resolution, as ``latents-32``."""
    draw = np.random.default_rng(recipe.seed)
    images = [
        {"source": "noise", "uri": "", "bytes": b"", "width": 48, "height": 48,
         "label": int(draw.integers(10)), "quality": float(draw.random())}
        for _ in range(num_images)
    ]  # fmt: skip
    lengths = draw.integers(4, 21, num_images).tolist()
    text = [{"features": _draw_features(draw, n), "num_tokens": [n]} for n in lengths]
    null = base64.b64encode(_draw_features(draw, 1)).decode()
    told = {"digest": "noise", "width": TEXT_WIDTH, "null_features": null}
    tables = {
        "images": _write(root / "images", "images/2", images),
        "text": _write(root / "text", "text/2", text, told),
    }
    for resolution in recipe.encode.resolutions:
        latents = [_draw_latent(draw, resolution) for _ in range(num_images)]
        told = {"digest": "noise", "factor": FACTOR, "channels": CHANNELS, "scale": 1.0}
        name = f"latents-{resolution}"
        tables[name] = _write(root / name, "latents/1", latents, told)
    return tables


def _draw_features(draw: np.random.Generator, num_tokens: int) -> bytes:
    values = draw.standard_normal((num_tokens, TEXT_WIDTH), np.float32)
    return pack_features(torch.from_numpy(values))


def _draw_latent(draw: np.random.Generator, resolution: int) -> Row:
    side = resolution // FACTOR
    moments = draw.standard_normal((2 * CHANNELS, side, side))
    moments[CHANNELS:] -= 4  # log-variances
    return {
        "moments": moments.astype(np.float16).tobytes(),
        "bucket_h": side, "bucket_w": side, "width": resolution, "height": resolution,
    }  # fmt: skip


def _write(place: Path, schema: str, rows: Sequence[Row], extra: Row | None = None) -> Table:
    named = [{"id": f"{i:016x}", **row} for i, row in enumerate(rows)]
    parts = [named[i : i + _PARTITION_ROWS] for i in range(0, len(named), _PARTITION_ROWS)]
    return write_table(place, schema, parts, extra)
