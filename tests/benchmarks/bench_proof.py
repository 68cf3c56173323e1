"""The paper's claims in miniature: the built-in studies, each with its interval over seeds.

    .venv/bin/python tests/benchmarks/bench_proof.py [--studies captions,transformer]
        [--share 0.5] [--seeds 3] [--root FOLDER] [--record]

Runs ``pixart ablate`` on each study, every variant with every seed at ``--share`` of the study's
compute, and writes down what it found: quality at the end, compute to each target and its ratio to
the baseline's. There is no bar: what does not hold at this scale is a result as well. With --root
it goes on with what is there. On 2 cores a run of the whole compute takes about 8 minutes; a study
has two or three variants.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).resolve().parent.parent))
from recording import record

from pixart_cluster.recipe import read_recipe
from pixart_jobs.ablation import STUDIES, read_study
from pixart_jobs.planner import stage_flops


def shorten(name: str, share: float, seeds: int, folder: Path) -> Path:
    """The study with a share of its compute, as a file."""
    study, runs = read_study(name, read_recipe)
    recipe = runs[0].recipe
    whole = study.tflops or sum(stage_flops(recipe, s) for s in recipe.stages) / 1e12
    document = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    changes = {"tflops": whole * share, "seeds": list(range(seeds))}
    path.write_text(yaml.safe_dump(document | changes))
    return path


def tell(found: dict[str, Any]) -> dict[str, Any]:
    """A study's figures by variant."""
    return {
        row["variant"]: {
            "parameters": row["parameters"], "tflops": row["flops"] / 1e12,
            "seconds": row["seconds"], "captions": row["facts"], "at the end": row["final"],
            "against the baseline": row["differences"], "compute to target": row["reached"],
            "of the baseline's": row["ratios"],
        }
        for row in found["rows"]
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", default=",".join(sorted(p.stem for p in STUDIES.glob("*"))))
    parser.add_argument("--share", type=float, default=1.0, help="of the studies' compute")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--root", type=Path, help="goes on with what is there")
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pixart-proof-") as made:
        root = (told.root or Path(made)).absolute()
        for name in told.studies.split(","):
            root.mkdir(parents=True, exist_ok=True)
            path, began = shorten(name, told.share, told.seeds, root), time.monotonic()
            pixart = Path(sys.executable).parent / "pixart"
            subprocess.run([pixart, "ablate", path, "--root", root / name], check=True)
            figures = tell(json.loads((root / name / "study.json").read_text()))
            took = {"minutes": round((time.monotonic() - began) / 60, 1)}
            print(json.dumps({name: took | figures}, indent=1), flush=True)
            if told.record:
                record(f"proof_{name}", took | figures, ["torch", "scipy"],
                       share=told.share, seeds=told.seeds)  # fmt: skip


if __name__ == "__main__":
    main()
