"""The miniature recipe's losses, batch by batch, as they were when last they were meant to change.

Its three stages are trained one after the other, on tables of noise, by one worker without Ray:
order, draws, decoding, conditions, objective, network, clipping, schedule, AdamW, the average (the
next stage starts from it), re-parameterisation and adaption all show in the 68 numbers. A refactor
leaves them as they are. Who means to change what is learned makes them again, and says so:

    python tests/test_golden_losses.py

They agree to 1e-5 of their size, not to the bit: torch and MKL choose kernels by the processor, and
these sum in different orders. Kernels for SSE, AVX2 and AVX-512 differed by 1e-7 at most; one image
more of warm-up changes the losses by 6e-4, one batch more of the average by 2e-4.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from processes import MINI
from stages import plan_stage, write_tables

from pixart_cluster.recipe import read_recipe
from pixart_jobs.stage import (
    StagePlan,
    average_of,
    build_index,
    make_task,
    publish_snapshot,
    start_network,
)
from pixart_models.ema import ema_decay
from pixart_platform import train_loop
from pixart_platform.checkpoint import Progress, Saver
from pixart_platform.engine import Engine, choose_accelerator
from pixart_platform.order import Order
from pixart_platform.seeds import derive_seed

GOLDEN = Path(__file__).parent / "golden" / "mini_losses.json"
TOLERANCE = 1e-5


@pytest.mark.slow
def test_losses_are_those_that_are_stored(tmp_path: Path) -> None:
    """In a process of its own: DeepSpeed never forgets a process group."""
    measured = tmp_path / "losses.json"
    subprocess.run([sys.executable, __file__, str(measured)], check=True, timeout=300)
    losses, golden = (json.loads(path.read_text()) for path in (measured, GOLDEN))
    assert list(losses) == list(golden)
    for name, curve in golden.items():
        assert losses[name] == pytest.approx(curve, rel=TOLERANCE), name


def train_stages(root: Path) -> dict[str, list[float]]:
    """Losses of each stage's batches."""
    os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it
    torch.set_num_threads(1)
    meet = f"file://{root}/group"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    recipe = read_recipe(str(MINI))
    tables = write_tables(recipe, root / "tables", recipe.data.num_scenes)
    found: dict[str, list[float]] = {}
    parent: Path | None = None
    for name in recipe.stages:
        stage = plan_stage(recipe, name, tables, root, parent)
        found[name] = train_stage(stage)
        parent = stage.snapshot_folder
    torch.distributed.destroy_process_group()
    return found


def train_stage(stage: StagePlan) -> list[float]:
    """What pixart_jobs.train does on a worker, then on the driver, with the same parts."""
    from pixart_jobs.train import loop_settings  # imports Ray Train, which takes seconds

    recipe, settings, device = stage.recipe, stage.settings, choose_accelerator()
    torch.manual_seed(derive_seed(recipe.seed, stage.name, "init"))
    network = start_network(stage.snapshot.network, stage.inputs.parent)
    index, progress = build_index(stage), Progress()
    seed, batch = derive_seed(recipe.seed, "order"), settings.batch_images
    train_loop.train(
        task=make_task(stage, device),
        engine=Engine(
            network, settings.optimizer, zero_stage=recipe.train.zero_stage, accumulate=1,
            device=device,
        ),
        optimizer=settings.optimizer,
        settings=loop_settings(stage, (), 1),
        index=index,
        order=Order.over(index.counts, batch_images=batch, seed=seed),
        progress=progress,
        saver=Saver(stage.states, rank=0, world_size=1, token="golden"),
        average_share=lambda seen: 1 - ema_decay(settings.ema_half_life_images, batch, seen),
        log_metrics=lambda *_: None,
        has_notice=lambda: False,
    )  # fmt: skip
    publish_snapshot(stage, average_of(stage, stage.states.open(stage.num_images)))
    assert len(progress.recent) == settings.images // batch
    return progress.recent


def main() -> None:
    """Train, and write the losses to the golden file or to the one that is named."""
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    with tempfile.TemporaryDirectory() as folder:
        losses = train_stages(Path(folder))
    rounded = {name: [float(f"{loss:.9g}") for loss in curve] for name, curve in losses.items()}
    place.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
