"""The training plane: our whole step against a bare loop and a peer, and what its services cost.

    python tests/benchmarks/bench_training.py [--quick]

Runs train the network ``digits`` in batches of 64 on the same tables, in processes of their own
with one thread each, and take turns of some steps, so that what else the machine does hits all:

``ours``    a Ray Train worker: DeepSpeed, order, reading, average, logging; nothing left out
``saving``  the same with a state saved in every turn; the cost is scaled to digits.yaml's interval
``bare``    plain PyTorch outside Ray: batches decoded in memory, noise in one draw, fused AdamW,
            clipping and a foreach average
``peer``    accelerate + DeepSpeed with the same settings (the recipe's ZeRO stage, fp32, gloo), and
            bare's batches

and then, without those, ``one`` of ours and ``two`` workers, with the same global batch. On 2 cores
Ray's own processes and gloo's threads take theirs from the workers (a tenth, by what the kernel
counts of waiting for a core), so there the processor's ratio says what the step itself does.

Seconds are those between steps as the loops see them, without the first ones of a turn; beside them
stand those of the training thread's processor, which other programs hardly change. Another run has
its states drawn beside it: how long that takes, which would be the worker's wait if it drew itself,
and what becomes of its steps meanwhile. Needs ``pip install accelerate``.

``--quick`` takes about 3 minutes on 2 cores; a full run writes results/. The last line is one JSON
object of figures and bars.
"""

import argparse
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, ClassVar, NamedTuple

import torch

from pixart_cluster.local import local_ray, quiet_environment
from pixart_cluster.recipe import read_recipe
from pixart_jobs import train, watch
from pixart_jobs.recipe import Recipe
from pixart_jobs.stage import build_index
from pixart_platform.tables import Table
from pixart_platform.tracking import Tracker, sqlite_uri

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.training_loops import Turn, run_bare, run_peer
from recording import figure, record
from stages import plan_stage, write_tables

NEVER = 10**9  # images
BATCH = 64  # images
SETTINGS = ("train.network=digits", f"stages.align.batch_images={BATCH}")
WARM = 4  # steps of a turn that do not count: what was read ahead, and caches
PATIENCE_SECONDS = 300
Seconds = list[float]
Figures = dict[str, Any]


class Reply(NamedTuple):
    """A turn: when each of its steps began and the last ended, by the clock and in seconds of the
    training thread's processor; and how long each save blocked."""

    clock: Seconds
    processor: Seconds
    saves: Seconds

    @property
    def step(self) -> float:
        """Mean seconds of the steps that count."""
        return _mean_step(self.clock)

    @property
    def processor_step(self) -> float:
        return _mean_step(self.processor)


def _mean_step(times: Seconds) -> float:
    return (times[-1] - times[WARM]) / (len(times) - 1 - WARM)


class Referee:
    """Lets runs take steps, one run at a time."""

    def __init__(self) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(1)
        self.port: int = self._server.getsockname()[1]
        self._lines: dict[str, Any] = {}

    def await_runs(self, names: list[str], runs: list[Any]) -> None:
        """Wait until all want to take their first step."""
        while set(self._lines) != set(names):
            assert all(run.is_alive() for run in runs), "a run failed before its first step"
            with suppress(TimeoutError):
                connection, _ = self._server.accept()
                connection.settimeout(PATIENCE_SECONDS)
                line = connection.makefile("rw")
                self._lines[line.readline().strip()] = line

    def give_turn(self, name: str, num_steps: int) -> Reply:
        self._lines[name].write(f"{num_steps}\n")
        self._lines[name].flush()
        return Reply(*json.loads(self._lines[name].readline()))

    def end(self, name: str) -> None:
        """No more turns: what the run does now, it does for itself."""
        self._lines[name].write("0\n")
        self._lines[name].flush()


# --- our runs --------------------------------------------------------------------------------


def taking_turns(port: int) -> Callable[[dict[str, Any]], None]:
    """What Ray Train runs on each worker: ours, with the first one stopping between steps."""

    def work(config: dict[str, Any]) -> None:
        import ray.train

        from pixart_jobs import train as job
        from pixart_platform import train_loop
        from pixart_platform.checkpoint import Saver

        if ray.train.get_context().get_world_rank() == 0:
            turn, loop, start = Turn(port, config["stage"].name), train_loop.train, Saver.start

            def timed_start(*arguments: Any) -> None:
                began = time.perf_counter()
                start(*arguments)
                turn.saves.append(time.perf_counter() - began)

            def timed_loop(*, average_share: Callable[[int], float], **rest: Any) -> None:
                def share(images_seen: int) -> float:  # asked once, at the beginning of each step
                    turn.may_step()
                    return average_share(images_seen)

                loop(average_share=share, **rest)

            Saver.start = timed_start  # type: ignore[method-assign, assignment]
            train_loop.train = timed_loop
        job._train_worker(config)

    return work


def recipe_of(name: str, num_steps: int, **train_settings: Any) -> Recipe:
    """The demo's second stage from fresh weights, called ``name``, on one worker; saves nothing."""
    recipe = read_recipe("digits", SETTINGS)
    settings = recipe.stages["align"]
    changes = {"start_from": "scratch", "images": num_steps * settings.batch_images}
    quiet = {"num_workers": 1, "save_every_images": NEVER, "preview_every_images": NEVER}
    return recipe.model_copy(update={
        "name": name, "stages": {name: settings.model_copy(update=changes)},
        "train": recipe.train.model_copy(update=quiet | train_settings),
    })  # fmt: skip


def hold_contest(
    names: Sequence[str],
    tables: dict[str, Table],
    root: Path,
    scratch: Path,
    rounds: int,
    count: int,
) -> dict[str, list[Reply]]:
    """Turns of the runs ``names``, each with ``count`` steps that count."""
    steps = WARM + count
    first = count - 2  # so that a state is saved two counted steps into a turn
    total = first + rounds * steps + 1
    special = {"saving": {"save_every_images": steps * BATCH}, "two": {"num_workers": 2}}
    stages = {
        name: plan_stage(recipe_of(name, total, **special.get(name, {})), name, tables, root)
        for name in names
    }
    referee = Referee()
    train._train_worker = taking_turns(referee.port)  # type: ignore[assignment]
    outside = {"bare": run_bare, "peer": run_peer}
    spawn = get_context("spawn")
    runs: list[Any] = [
        spawn.Process(target=outside[name], args=(stage, referee.port))
        if name in outside
        else Thread(
            target=train._fit,
            args=(stage, start_tracker(root, name), scratch / name, train.prepare(stage)),
        )
        for name, stage in stages.items()
    ]
    for started in runs:
        started.daemon = True
        started.start()
    began = time.monotonic()
    referee.await_runs(list(stages), runs)
    print(f"{'start':10} {time.monotonic() - began:.0f} s until all wait for their turn")
    for name in stages:
        referee.give_turn(name, first)
    replies = {name: list[Reply]() for name in stages}
    for n in range(rounds):
        for name in sorted(stages, reverse=bool(n % 2)):
            replies[name].append(referee.give_turn(name, steps))
        means = (f"{name} {1000 * found[-1].step:.0f}" for name, found in replies.items())
        print(f"turn {n + 1:<6}{', '.join(means)} ms a step", flush=True)
    for name in stages:
        referee.end(name)
    for ended in runs:
        ended.join(PATIENCE_SECONDS)
    return replies


def judge(replies: dict[str, list[Reply]], count: int) -> Figures:
    """Figures compare lower quartiles of turns: what else the machine does only adds to them."""
    step = {name: _quartile(reply.step for reply in found) for name, found in replies.items()}
    work = {name: _quartile(r.processor_step for r in found) for name, found in replies.items()}
    interval = read_recipe("digits").train.save_every_images / BATCH * step["ours"]
    added = count * (step["saving"] - step["ours"])
    blocked = median(seconds for reply in replies["saving"] for seconds in reply.saves)
    print(
        f"a state    blocks {blocked:.3f} s, slows the steps after it by {added:.3f} s in all; "
        f"one is saved every {interval:.0f} s"
    )
    return {
        "step_of_bare_loop": figure(step["bare"] / step["ours"], 0.95),
        "processor_step_of_bare_loop": {"value": round(work["bare"] / work["ours"], 3)},
        "step_of_accelerate": figure(step["peer"] / step["ours"], 1.0),
        "processor_step_of_accelerate": {"value": round(work["peer"] / work["ours"], 3)},
        "two_workers_of_one": figure(step["one"] / step["two"], 1.7),
        "processor_two_workers_of_one": {"value": round(work["one"] / work["two"], 3)},
        "checkpoint_share": figure(added / interval, 0.02, at_most=True, digits=4),
        "checkpoint_blocking_share": figure(blocked / interval, 0.02, at_most=True, digits=4),
    }


def _quartile(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[len(ordered) // 4]


class TimedWatcher(watch._Watcher):
    """Notes when each state was being drawn; the end is seen up to three seconds late."""

    spans: ClassVar[list[tuple[float, float]]] = []
    _began = 0.0

    def _ask(self) -> None:
        waiting = self._asked is not None
        super()._ask()
        if not waiting and self._asked is not None:
            self._began = time.monotonic()

    def _keep(self, look: watch.Look, images_seen: int) -> None:
        self.spans.append((self._began, time.monotonic()))
        super()._keep(look, images_seen)


def watch_previews(
    tables: dict[str, Table], root: Path, scratch: Path, num_previews: int
) -> Figures:
    """A strip of pictures, and steps while one is drawn by those while none is."""
    every = 30  # steps
    total = every * num_previews + every // 2
    stage = plan_stage(
        recipe_of("watched", total, preview_every_images=every * BATCH), "watched", tables, root
    )
    referee = Referee()
    train._train_worker = taking_turns(referee.port)  # type: ignore[assignment]
    watch._Watcher = TimedWatcher  # type: ignore[misc]
    tracker = start_tracker(root, "watched")
    ignore = (lambda _: None,) * 2
    run = Thread(target=train.run, args=(stage, tracker, scratch, *ignore), daemon=True)
    run.start()
    referee.await_runs(["watched"], [run])
    times = referee.give_turn("watched", total - 1).clock
    referee.end("watched")
    run.join(PATIENCE_SECONDS)
    beside, alone = Seconds(), Seconds()
    for before, after in pairwise(times[WARM:]):
        is_beside = any(begin < after and before < end for begin, end in TimedWatcher.spans)
        (beside if is_beside else alone).append(after - before)
    draw: Any = watch._look._function  # type: ignore[attr-defined]
    index = build_index(stage)
    draw(stage, stage.num_images, index)  # loads the frozen models
    began = time.monotonic()
    draw(stage, stage.num_images, index)
    seconds = time.monotonic() - began
    ratio = median(alone) / median(beside) if beside else 1.0
    print(
        f"previews   {len(TimedWatcher.spans)}, {seconds:.2f} s of drawing each; steps "
        f"{1000 * median(alone):.0f} ms, while one is drawn {1000 * median(alone) / ratio:.0f} ms"
    )
    return {
        "preview_seconds": {"value": round(seconds, 3)},
        "step_beside_preview_of_alone": {"value": round(ratio, 3)},
    }


def start_tracker(root: Path, name: str) -> Tracker:
    return Tracker.start(sqlite_uri(root), "bench", name, name, artifacts=root)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rounds, count, num_previews, num_images = (
        (2, 8, 1, 1024) if options.quick else (12, 20, 4, 4096)
    )
    os.environ["OMP_NUM_THREADS"] = "1"  # of all runs, as Ray gives a worker of one CPU
    os.environ["PYTHONPATH"] = sys.path[0]  # of Ray's workers
    torch.set_num_threads(1)
    quiet_environment()
    with tempfile.TemporaryDirectory() as folder, local_ray(Path(folder) / "logs") as scratch:
        root = Path(folder)
        tables = write_tables(read_recipe("digits"), root / "tables", num_images)
        length = (tables, root, scratch, rounds, count)
        replies = hold_contest(("ours", "saving", "bare", "peer"), *length)
        # Apart from the others: each waiting run's processes take a part of a core.
        replies |= hold_contest(("one", "two"), *length)
        figures = judge(replies, count) | watch_previews(tables, root, scratch, num_previews)
    if not options.quick:
        turns = {name: [round(r.step, 4) for r in found] for name, found in replies.items()}
        packages = ("torch", "ray", "deepspeed", "accelerate")
        record("training", figures, packages, step_seconds_by_turn=turns)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
