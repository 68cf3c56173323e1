"""Is a difference real? Trainings that differ in their seed alone, and one that reads raw captions.

    .venv/bin/python tests/benchmarks/bench_compare.py [--share 0.5] [--record]

The demo's recipe is trained three times (``--share`` of its images): twice on dense captions with
different seeds, once on raw captions, as the web has them. ``pixart compare`` must then call the
seeds no significant difference in any figure, and the captions a significant one, with its size.
About 20 minutes on 2 cores, 12 with half of the images.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
from recording import figure, record

from pixart_cluster.recipe import read_recipe
from pixart_jobs.certainty import CONFIDENCE
from pixart_jobs.compare import compare
from pixart_platform.registry import Registry
from pixart_platform.tracking import sqlite_uri

TRAININGS = {
    "seed 0": ["seed=0"], "seed 1": ["seed=1"], "raw captions": ["caption.captioner=builtin:raw"],
}  # fmt: skip
GATED = ("digit_accuracy", "color_accuracy", "relation_accuracy")


def train(root: Path, share: float, settings: list[str]) -> int:
    """The version that a pipeline with these settings makes."""
    recipe = read_recipe("digits")
    changes = [f"evaluate.minimum.{name}=0" for name in GATED]
    for name, stage in recipe.stages.items():
        whole = stage.batch_images
        changes.append(f"stages.{name}.images={int(stage.images * share) // whole * whole}")
    given = [text for change in (*settings, *changes) for text in ("--set", change)]
    pixart = Path(sys.executable).parent / "pixart"
    began = time.monotonic()
    subprocess.run([pixart, "run", "digits", "--root", root, *given], check=True)
    print(f"{', '.join(settings)}: {time.monotonic() - began:.0f} s", flush=True)
    return Registry(sqlite_uri(root), "digits").versions()[-1].number


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--share", type=float, default=1.0, help="of the demo's images")
    parser.add_argument("--root", type=Path, help="goes on with what is there")
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pixart-compare-") as folder:
        root = (told.root or Path(folder)).absolute()
        versions = [str(train(root, told.share, s)) for s in TRAININGS.values()]
        found = compare(sqlite_uri(root), "digits", versions)
    figures = {}
    for name, side in zip(TRAININGS, found.sides, strict=True):
        for metric in GATED:
            figures[f"{name}: {metric}"] = str(side.suites["digits"].figures[metric])
    seeds = [f for f in found.findings if f.side == 1 and f.metric in GATED]
    captions = [f for f in found.findings if f.side == 2 and f.metric == "digit_accuracy"]
    for finding in (*seeds, *captions):
        figures[f"{list(TRAININGS)[finding.side]} against seed 0: {finding.metric}"] = str(finding)
    alpha = 1 - CONFIDENCE
    judged = figures | {
        "smallest p of the seeds": figure(min(f.p for f in seeds), alpha),
        "p of the captions": figure(captions[0].p, alpha, at_most=True, digits=5),
    }
    print(json.dumps(judged, indent=1))
    if told.record:
        record("compare", judged, ["torch", "scipy"], share=told.share)
    sys.exit(any(isinstance(f, dict) and not f["ok"] for f in judged.values()))


if __name__ == "__main__":
    main()
