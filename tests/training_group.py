"""Three real processes with DeepSpeed over gloo: a pair of workers, and one that is alone.

    run_group(folder)

does everything ``test_platform_engine`` asks about in one go, as each process takes ten seconds to
start. The stores of states below ``folder`` are named after what was done and the ZeRO stage.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from small_training import (
    BATCH,
    OPTIMIZER,
    Guess,
    average_share,
    make_network,
    run,
    settings_of,
    write_index,
)
from torch import Tensor, distributed, multiprocessing

from pixart_platform.batches import RowIndex
from pixart_platform.checkpoint import StateStore
from pixart_platform.engine import WEIGHT, Engine, ZeroStage
from pixart_platform.optimizer import AVERAGE
from pixart_platform.seeds import SampleDraws
from pixart_platform.storage import LocalFolder
from pixart_platform.train_loop import Derailed

ZERO_STAGES: tuple[ZeroStage, ...] = (0, 1, 2, 3)
STOP, TAKEN_OVER, GIVEN_BACK, TOTAL = (n * BATCH for n in (5, 4, 8, 12))
PARTS = 3
_CPU = torch.device("cpu")


def run_group(folder: Path) -> None:
    """Returns when all is done; raises what a process raised, with its traceback."""
    write_index(folder / "tables")
    turns = multiprocessing.get_context("spawn").Barrier(3)
    multiprocessing.spawn(_work, (folder, turns), nprocs=3)  # type: ignore[attr-defined, no-untyped-call]  # torch forgot its types


def store_of(folder: Path, name: str, zero_stage: int) -> StateStore:
    return StateStore(LocalFolder(folder / f"{name}-{zero_stage}"), "group", keep=99)


def next_stage(zero_stage: ZeroStage) -> ZeroStage:
    return ZERO_STAGES[(zero_stage + 1) % len(ZERO_STAGES)]


def read_result(folder: Path, name: str, rank: int) -> dict[str, Any]:
    """What a process noted."""
    found: dict[str, Any] = json.loads((folder / f"{name}.{rank}.json").read_text())
    return found


def _work(process: int, folder: Path, turns: Any) -> None:
    """One process. The pair hands over to the one that is alone, and it hands back."""
    alone = process == 2
    rank, world_size, group = (0, 1, "alone") if alone else (process, 2, "pair")
    sys.stdout = sys.stderr = (folder / f"log.{process}").open("w")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/{group}.group", rank=rank, world_size=world_size,
        timeout=timedelta(minutes=5),
    )  # fmt: skip
    worker = _Worker(folder, rank)
    if alone:
        turns.wait()
        worker.for_each_stage(partial(worker.train, "elastic", GIVEN_BACK))
        turns.wait()
        worker.for_each_stage(worker.follow_average)
    else:
        worker.for_each_stage(partial(worker.train, "elastic", TAKEN_OVER))
        turns.wait()
        worker.for_each_stage(worker.work_in_pair)
        worker.meet_bad_loss()
        turns.wait()
        worker.for_each_stage(partial(worker.train, "elastic", TOTAL))
    distributed.destroy_process_group()


class _Worker:
    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank
        self._index: RowIndex = write_index(folder / "tables")

    def for_each_stage(self, do: Callable[[ZeroStage], None]) -> None:
        for zero_stage in ZERO_STAGES:
            do(zero_stage)

    def note(self, name: str, result: dict[str, Any]) -> None:
        (self._folder / f"{name}.{self._rank}.json").write_text(json.dumps(result))

    def train(
        self, name: str, total_images: int, zero_stage: ZeroStage, under: ZeroStage | None = None,
        **changes: Any,
    ) -> None:  # fmt: skip
        """Train the run ``name``, from the newest of its states if there is one."""
        make = partial(
            Engine, settings=OPTIMIZER, accumulate=changes.get("accumulate", 1), device=_CPU,
            zero_stage=zero_stage if under is None else under,
        )  # fmt: skip
        store = store_of(self._folder, name, zero_stage)
        run(settings_of(total_images, **changes), store, self._index, make, token=f"{total_images}")
        distributed.barrier()  # a rank goes on when its part is saved, the first when all is

    def work_in_pair(self, zero_stage: ZeroStage) -> None:
        self.train("straight", TOTAL, zero_stage)
        self.train("resumed", STOP, zero_stage)
        if self._rank == 0:
            first, copy = (store_of(self._folder, n, zero_stage) for n in ("resumed", "switched"))
            shutil.copytree(first.folder.uri, copy.folder.uri)
        distributed.barrier()
        self.train("resumed", TOTAL, zero_stage)
        self.train("switched", TOTAL, zero_stage, under=next_stage(zero_stage))
        self.train("parts", TOTAL, zero_stage, accumulate=PARTS)
        self.meet_bad_gradient(zero_stage)

    def meet_bad_gradient(self, zero_stage: ZeroStage) -> None:
        """Of the second rank alone, in a step after a good one."""
        engine = Engine(make_network(), OPTIMIZER, zero_stage=zero_stage, accumulate=1, device=_CPU)
        result: dict[str, Any] = {}
        for factor in (1.0, math.inf if self._rank == 1 else 1.0):
            before = _copy(engine)
            engine.set_rates(0.01, 0.5)
            engine.backward(self._loss(engine, 0, 4) * factor)
            engine.step()
            after = _copy(engine)
            moved = [not torch.equal(was, now) for was, now in zip(before, after, strict=True)]
            result = {"norm_was": result.get("norm"), "moved_was": result.get("moved")} | {
                "norm": str(engine.gradient_norm()), "moved": any(moved),
            }  # fmt: skip
        self.note(f"bad-gradient-{zero_stage}", result)

    def meet_bad_loss(self) -> None:
        """Of one sample in the second rank's share of the fourth batch."""
        store = store_of(self._folder, "bad-loss", 2)
        make = partial(Engine, settings=OPTIMIZER, accumulate=1, device=_CPU, zero_stage=2)
        task = Guess({4 * BATCH - 1: math.nan})
        try:
            run(settings_of(TOTAL), store, self._index, make, task=task)
        except Derailed as error:
            self.note("bad-loss", {"message": str(error), "images_seen": error.images_seen})

    def follow_average(self, zero_stage: ZeroStage) -> None:
        """The average of an engine beside a plain loop's over the weights it showed."""
        engine = Engine(make_network(), OPTIMIZER, zero_stage=zero_stage, accumulate=1, device=_CPU)
        plain = [f.views[WEIGHT].clone() for f in engine.fragments(share=False)]
        for n in range(10):
            share = average_share(n * BATCH)
            engine.set_rates(0.01, share)
            engine.backward(self._loss(engine, n * BATCH, BATCH))
            engine.step()
            for mean, fragment in zip(plain, engine.fragments(share=False), strict=True):
                mean.add_((fragment.views[WEIGHT] - mean) * share)
        found = [f.views[AVERAGE] for f in engine.fragments(share=False)]
        weights = [f.views[WEIGHT] for f in engine.fragments(share=False)]
        self.note(f"average-{zero_stage}", {
            "from_plain": _difference(plain, found), "from_weights": _difference(weights, found),
        })  # fmt: skip

    def _loss(self, engine: Engine, first: int, count: int) -> Tensor:
        draws = SampleDraws(1, list(range(first, first + count)))
        labels = torch.arange(first, first + count) / 100
        return Guess().loss(engine.module, labels, draws).values.mean()


def _copy(engine: Engine) -> list[Tensor]:
    """All that the rank holds, and the weights it computes with, if those are all there."""
    held = [view for f in engine.fragments(share=False) for view in f.views.values()]
    used = engine.module.parameters() if engine.zero_stage < 3 else ()
    return [value.detach().clone() for value in (*held, *used)]


def _difference(one: list[Tensor], other: list[Tensor]) -> float:
    one, other = ([torch.cat([v.flatten() for v in values])] for values in (one, other))
    return float((one[0] - other[0]).norm() / one[0].norm())
