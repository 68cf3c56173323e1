"""The paper's claims in miniature: the built-in studies and the outside peers, over seeds.

    .venv/bin/python tests/benchmarks/bench_proof.py [--studies recipe,captions]
        [--peers recipe/diffusers,recipe/unet] [--share 0.5] [--seeds 3] [--parallel 2]
        [--root FOLDER] [--record]

Runs ``pixart ablate`` on each study, every variant with every seed at ``--share`` of the study's
compute, and writes down what it found: quality at the end, compute to each target and its ratio to
the baseline's. There is no bar: what does not hold at this scale is a result as well. Peers
(proof_peers.py) are held against the default recipe's runs in their study, which must be there.
With --root it goes on with what is there. All of it takes about eight hours on 2 cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import yaml

sys.path.append(str(Path(__file__).resolve().parent.parent))
from benchmarks.proof_curves import draw
from recording import record

from pixart_cluster.recipe import read_recipe
from pixart_jobs.ablation import STUDIES, Outcome, Point, Study, read_study
from pixart_jobs.planner import stage_flops
from pixart_jobs.study_report import as_document, summarize

OURS = "default"
STUDIED = ("recipe", "crowds", "decomposition", "transformer", "captions", "levers")
TASKS = {"recipe": "digits", "crowds": "crowds"}  # of studies with peers
PEERS = {  # TFLOPs; the paper's settings get ten times ours
    "recipe/diffusers": 40, "crowds/diffusers": 80, "recipe/unet": 20,
}  # fmt: skip
PEER_POINTS = 15
Figures = dict[str, Any]


def shorten(name: str, share: float, seeds: int, folder: Path) -> Path:
    """The study with a share of its compute, as a file."""
    _, runs = read_study(name, read_recipe)
    whole = {
        run.variant: sum(stage_flops(run.recipe, s) for s in run.recipe.stages) / 1e12
        for run in runs
    }
    document = yaml.safe_load((STUDIES / f"{name}.yaml").read_text())
    path = folder / f"{name}.yaml"
    changes: Figures = {"seeds": list(range(seeds))}
    if share != 1:
        changes["tflops"] = {v: tflops * share for v, tflops in whole.items()}
    changed = yaml.safe_dump(document | changes, sort_keys=False)  # the first is the baseline
    path.write_text(changed)
    return path


def tell(found: Figures) -> Figures:
    """A study's figures by variant, and its curves by run: TFLOPs and the first target's metric."""
    target = next(iter(found["study"]["target"]))
    figures: Figures = {
        row["variant"]: {
            "parameters": row["parameters"], "tflops": row["flops"] / 1e12,
            "seconds": row["seconds"], "captions": row["facts"], "at the end": row["final"],
            "against the baseline": row["differences"], "compute to target": row["reached"],
            "of the baseline's": row["ratios"],
        }
        for row in found["rows"]
    }  # fmt: skip
    for run in found["runs"]:
        curve = [[round(p["flops"] / 1e12, 3), round(p[target], 3)] for p in run["points"]]
        figures[run["variant"]].setdefault(f"curves of {target}", []).append(curve)
    return figures


def run_peer(peer: str, seed: int, root: Path) -> Outcome:
    """A peer's training in a process of its own, or what it said earlier."""
    study, _, name = peer.partition("/")
    path = root / f"{study}-{name}-{seed}.jsonl"
    if not path.exists():
        script = str(Path(__file__).with_name("proof_peers.py"))
        command = [
            sys.executable, "-W", "ignore", script, name, "--seed", str(seed),
            "--task", TASKS[study], "--tflops", str(PEERS[peer]), "--points", str(PEER_POINTS),
        ]  # fmt: skip
        done = subprocess.run(
            command, check=True, text=True, stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        path.write_text(done.stdout)
    return peer_outcome(name, seed, [json.loads(line) for line in path.read_text().splitlines()])


def peer_outcome(name: str, seed: int, lines: list[Figures]) -> Outcome:
    points = [
        Point("all", line["images"], line["tflops"] * 1e12, line["seconds"],
              {m: value for m, value in line.items() if m.endswith("_accuracy")})
        for line in lines
    ]  # fmt: skip
    last = points[-1]
    return Outcome(name, seed, lines[-1]["parameters"], last.flops, last.seconds, {}, points)


def our_outcomes(told: Figures) -> Iterator[Outcome]:
    """The default recipe's runs, as a study has told them."""
    for run in told["runs"]:
        if run["variant"] == OURS:
            points = [
                Point(p["stage"], p["images"], p["flops"], p["seconds"],
                      {m: value for m, value in p.items() if m.endswith("_accuracy")})
                for p in run["points"]
            ]  # fmt: skip
            yield replace(Outcome.load(run | {"points": []}), points=points, facts={})


def compare_peer(peer: str, theirs: Sequence[Outcome], root: Path) -> Figures:
    """A peer as the baseline of ours in its study."""
    study, _, name = peer.partition("/")
    told = json.loads((root / study / "study.json").read_text())
    both_of = Study(
        name="peers", recipe=TASKS[study], variants={name: {}, OURS: {}},
        seeds=tuple(range(len(theirs))), target=told["study"]["target"],
    )  # fmt: skip
    both = [*theirs, *sorted(our_outcomes(told), key=lambda o: o.seed)[: len(theirs)]]
    return tell(as_document(both_of, summarize(both_of, both), both))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--studies", default=",".join(STUDIED))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--share", type=float, default=1.0, help="of the studies' compute")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at a time")
    parser.add_argument("--root", type=Path, help="goes on with what is there")
    parser.add_argument("--record", action="store_true")
    told = parser.parse_args()

    def keep(name: str, began: float, figures: Figures) -> None:
        spent = root / f"{name}.minutes"  # of all calls
        minutes = (time.monotonic() - began) / 60
        minutes += float(spent.read_text()) if spent.exists() else 0.0
        spent.write_text(str(minutes))
        figures = {"minutes": round(minutes, 1)} | figures
        print(json.dumps({name: figures}, indent=1), flush=True)
        if told.record:
            record(f"proof_{name}", figures, ["torch", "diffusers", "scipy"],
                   share=told.share, seeds=told.seeds, at_a_time=told.parallel)  # fmt: skip
            if (study := name.partition("_")[0]) in TASKS:
                draw(study)

    with tempfile.TemporaryDirectory(prefix="pixart-proof-") as made:
        root = (told.root or Path(made)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        for name in filter(None, told.studies.split(",")):
            path, began = shorten(name, told.share, told.seeds, root), time.monotonic()
            pixart = Path(sys.executable).parent / "pixart"
            command = [pixart, "ablate", path, "--root", root / name]
            subprocess.run([*command, "--parallel", str(told.parallel)], check=True)
            keep(name, began, tell(json.loads((root / name / "study.json").read_text())))
        peers, folder = list(filter(None, told.peers.split(","))), root / "peers"
        folder.mkdir(exist_ok=True)
        with ThreadPoolExecutor(told.parallel) as pool:
            began = time.monotonic()
            asked = {(p, s): pool.submit(run_peer, p, s, folder)
                     for p, s in product(peers, range(told.seeds))}  # fmt: skip
            for peer in peers:
                theirs = [asked[peer, s].result() for s in range(told.seeds)]
                keep(peer.replace("/", "_"), began, compare_peer(peer, theirs, root))
                began = time.monotonic()


if __name__ == "__main__":
    main()
