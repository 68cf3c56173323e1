"""Runs of one short training stage on a cluster of this machine, for ``training.py`` to disturb.

Tables are made up (random moments and features), so a campaign pays for training only. A run is
``pixart`` itself with one more command, in a process of its own that may be killed and started
again. Its workers leave a line of every step they take (which samples, in how many workers), take
their time if asked to, and wait at a given image, so that faults meet a run where they should. The
product's code is the shipped one: the lines are written by wrapping what it calls, in the worker.
"""

import base64
import json
import logging
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil

sys.path.append(str(Path(__file__).resolve().parent.parent))
from builders import write_table
from processes import kill_family, train_workers

from pixart_platform.tables import Table

if TYPE_CHECKING:
    from pixart_jobs.stage import StagePlan

PARTITION_ROWS, NUM_PARTITIONS, SIZE, CHANNELS, WIDTH, TOKENS = 80, 4, 8, 8, 64, 6
BATCH, SAVE_EVERY = 16, 64
PATIENCE_SECONDS = 600
EXACT = ("loss", "evaluation_loss", "learning_rate", "gradient_norm")  # metrics, with their parts
Samples = dict[int, int]  # by position in the run


def write_tables(root: Path, poisoned: Collection[int] = ()) -> None:
    """Image, text and latent tables; the moments of ``poisoned`` rows are not numbers."""
    rng = np.random.default_rng(5)
    rows: dict[str, list[list[dict[str, Any]]]] = {"images": [], "text": [], "latents": []}
    for k in range(NUM_PARTITIONS):
        numbers = range(k * PARTITION_ROWS, (k + 1) * PARTITION_ROWS)
        ids = [{"id": f"{i:05d}"} for i in numbers]
        features = rng.standard_normal((PARTITION_ROWS, TOKENS, WIDTH), np.float32)
        moments = rng.standard_normal((PARTITION_ROWS, 2 * CHANNELS, SIZE, SIZE), np.float32)
        moments[[i in poisoned for i in numbers]] = np.nan
        rows["images"].append([one | {"width": 32, "height": 32} for one in ids])
        rows["text"].append([
            one | {"features": _to_bf16(f), "num_tokens": [TOKENS]}
            for one, f in zip(ids, features, strict=True)
        ])  # fmt: skip
        rows["latents"].append([
            one | {"moments": m.astype(np.float16).tobytes(), "bucket_h": SIZE, "bucket_w": SIZE}
            for one, m in zip(ids, moments, strict=True)
        ])  # fmt: skip
    null = base64.b64encode(_to_bf16(rng.standard_normal((2, WIDTH), np.float32))).decode()
    text = {"digest": "none", "width": WIDTH, "null_features": null}
    latents = {"digest": "none", "factor": 4, "channels": CHANNELS, "scale": 1.0}
    write_table(root / "images", "images/2", rows["images"])
    write_table(root / "text", "text/2", rows["text"], text)
    write_table(root / "latents", "latents/1", rows["latents"], latents)


def _to_bf16(values: Any) -> bytes:
    """Raw little-endian bf16, cut off."""
    cut: bytes = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return cut


@dataclass
class Run:
    """One stage in a folder of its own: what it is, its driver process, what it left."""

    folder: Path
    tables: Path
    tracking_uri: str
    address: str
    images: int = 640
    train: dict[str, Any] = field(default_factory=dict)
    pace_seconds: float = 0.0
    """How long each step takes besides, so that faults meet one."""
    process: subprocess.Popen[bytes] | None = None

    @cached_property
    def plan(self) -> "StagePlan":
        from pixart_jobs.recipe import Recipe
        from pixart_jobs.stage import StageInputs, plan

        train = {
            "network": "digits-mini", "num_workers": 2, "max_failures": 1000,
            "save_every_images": SAVE_EVERY, "log_every_images": BATCH, "evaluate_images": 16,
            "preview_every_images": 1 << 30,
        }  # fmt: skip
        stage = {
            "condition_on": "text", "start_from": "scratch", "resolution": SIZE * 4,
            "images": self.images, "batch_images": BATCH, "ema_half_life_images": 100,
            "optimizer": {"learning_rate": 2e-3, "warmup_images": 64},
        }  # fmt: skip
        recipe = Recipe.model_validate({
            "name": "campaign", "seed": 3, "train": train | self.train, "stages": {"only": stage},
            "encode": {"resolutions": [SIZE * 4]},
        })  # fmt: skip
        tables = {kind: Table.open(self.tables / kind) for kind in ("images", "text", "latents")}
        inputs = StageInputs(**tables, parent=None)
        return plan(recipe, "only", inputs, self.folder / "stages")

    def start(self) -> None:
        """Run the command; its output is appended to ``folder/log``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {k: v for k, v in vars(self).items() if k not in ("plan", "process")}
        (self.folder / "run.json").write_text(json.dumps(told, default=str))
        with (self.folder / "log").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "stage", str(self.folder)],
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    @property
    def driver(self) -> subprocess.Popen[bytes]:
        assert self.process
        return self.process

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    def hold_at(self, images_seen: int | None) -> None:
        """Workers wait before the step that follows so many images; None lets them go."""
        path = self.folder / "hold"
        if images_seen is None:
            path.unlink(missing_ok=True)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".new").write_text(str(images_seen))
            path.with_suffix(".new").replace(path)

    def trace(self) -> list[dict[str, Any]]:
        """What the workers did, step by step, in all attempts."""
        path = self.folder / "trace"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def reached(self, world_size: int | None = None) -> int:
        """Images seen before the furthest step that was begun, by as many workers if told."""
        traced = self.trace()
        return max((s["seen"] for s in traced if world_size in (None, s["world"])), default=-1)

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until the condition holds; raises when the driver ends first."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if self.driver.poll() is not None and not condition():
                raise SystemExit(f"{self.folder}: ended before {what}:\n{self.log[-4000:]}")
            if time.monotonic() > deadline:
                raise SystemExit(f"{self.folder}: waited in vain for {what}")
            time.sleep(0.02)

    def finish(self, status: int = 0) -> None:
        """Wait for the driver's end; raises unless it is as expected."""
        found = self.driver.wait(PATIENCE_SECONDS)
        if found != status:
            raise SystemExit(f"{self.folder}: exit {found}, not {status}:\n{self.log[-4000:]}")

    def batches(self) -> Samples:
        """Samples by position. Raises ValueError if two attempts took different ones."""
        found: Samples = {}
        for line in self.trace():
            for position, sample in zip(line["positions"], line["samples"], strict=True):
                if found.setdefault(position, sample) != sample:
                    raise ValueError(f"position {position}: {sample} and {found[position]}")
        return found

    def curve(self) -> dict[tuple[str, int], list[float]]:
        """Every value that was logged, by metric and images seen; more than one if repeated."""
        from pixart_platform.tracking import connect

        client = connect(self.tracking_uri)
        where = client.get_experiment_by_name("campaign")
        assert where
        tag = f"tags.`pixart.identity` = '{self.folder.name}'"
        (run,) = client.search_runs([where.experiment_id], tag)
        found = defaultdict(list)
        for name in run.data.metrics:
            if not name.startswith(EXACT):
                continue
            points = client.get_metric_history(run.info.run_id, name)
            for metric in sorted(points, key=lambda m: m.timestamp):
                found[name, metric.step].append(metric.value)
        return dict(found)

    def result(self) -> dict[str, bytes]:
        """The last state, by kind and parameter, the curve that it holds, and the snapshot."""
        last = self.plan.states.find_newest(self.plan.num_images)
        assert last, f"{self.folder}: there is no last state"
        found = {
            f"{kind} {name}": values.numpy().tobytes()
            for kind in ("weight", "exp_avg", "exp_avg_sq", "average")
            for name, values in last.read(kind).items()
        }
        history = [
            (n, {k: v for k, v in metrics.items() if k.startswith(EXACT)})
            for n, metrics in last.progress.history
        ]
        snapshot = (self.plan.snapshot_folder / "model.safetensors").read_bytes()
        return found | {"history": json.dumps(history).encode(), "snapshot": snapshot}


def find_differences(run: Run, straight: Run) -> list[str]:
    """What differs between two finished runs by a bit; empty when all is well.

    After a rewind, batches and points in MLflow that were given up are not counted.
    """
    ours, theirs = run.result(), straight.result()
    found = {k.split()[0] for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}
    rewound = run.plan.states.folder.find("skips.json") and run.train.get("max_rewinds")
    logged, wanted = run.curve(), straight.curve()
    for key in wanted.keys() if rewound else logged.keys() | wanted.keys():
        values = logged.get(key, [])
        if set(values[-1:] if rewound else values) != set(wanted.get(key, [])):
            found.add(f"logged {key[0]} at {key[1]}")
    begun, wanted_begun = run.batches(), straight.batches()
    if (wanted_begun.items() - begun.items()) if rewound else begun != wanted_begun:
        found.add("batches")
    return sorted(found)


class Machines:
    """A head, where drivers run, and two nodes of one CPU each, which may be lost."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        self.address: str = self._cluster.address
        for _ in range(2):
            self.add()

    def add(self) -> None:
        self._cluster.add_node(num_cpus=1, include_dashboard=False)

    def lose(self, which: int) -> None:
        """Kill everything on a node at once, as when its machine is lost."""
        node = self._nodes()[which]
        (raylet,) = node.all_processes["raylet"]
        kill_family(raylet.process.pid)
        self._cluster.remove_node(node, allow_graceful=False)

    def give_notice(self, which: int) -> None:
        """Tell Ray that a node will be taken away, as clouds do."""
        node = self._nodes()[which]
        subprocess.run(
            [Path(sys.executable).parent / "ray", "drain-node", "--address", self.address,
             "--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
             "--reason-message", "campaign", "--deadline-remaining-seconds", "600"],
            check=True, capture_output=True,
        )  # fmt: skip

    def _nodes(self) -> list[Any]:
        return sorted(self._cluster.worker_nodes, key=lambda node: str(node.node_id))

    @property
    def num_nodes(self) -> int:
        return len(self._cluster.worker_nodes)

    def workers(self) -> list[psutil.Process]:
        """Training workers on all nodes."""
        return train_workers(os.getpid())

    def shutdown(self) -> None:
        self._cluster.shutdown()  # type: ignore[no-untyped-call]  # Ray has types in parts


@contextmanager
def machines(scratch: Path) -> Iterator[Machines]:
    """The cluster; its files are under ``scratch``, and no other program finds it by chance."""
    os.environ |= {
        "RAY_TMPDIR": str(scratch),
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
    }
    made = Machines()
    try:
        yield made
    finally:
        made.shutdown()


def train_stage(folder: Path) -> None:
    """What a driver does. It is a command of ``pixart``, whose errors it so has."""
    import ray

    from pixart_jobs import train
    from pixart_platform.tracking import Tracker

    told = json.loads((folder / "run.json").read_text())
    run = Run(**told | {name: Path(told[name]) for name in ("folder", "tables")})
    vars(train)["_train_worker"] = _trace(folder, run.pace_seconds)
    ray.init(run.address, log_to_driver=False, logging_level=logging.ERROR)
    tracker = Tracker.start(
        run.tracking_uri, "campaign", folder.name, folder.name, artifacts=folder.parent
    )
    train.run(run.plan, tracker, folder / "ray", lambda _: None, print)
    tracker.finish()


def _trace(folder: Path, pace_seconds: float) -> Callable[[dict[str, Any]], None]:
    """The worker's function, leaving a line of each step it takes; it runs on the workers."""

    def work(config: dict[str, Any]) -> None:
        import threading

        import torch.distributed

        from pixart_jobs import train
        from pixart_jobs.stage_task import LatentTask
        from pixart_platform.batches import RowIndex

        reading = threading.local()
        fetch, decode, loss = RowIndex.fetch, LatentTask.decode, LatentTask.loss

        def fetch_noted(index: Any, bucket: Any, samples: Any) -> Any:
            reading.samples = samples.tolist()
            return fetch(index, bucket, samples)

        def decode_noted(task: Any, columns: Any, draws: Any) -> Any:
            draws.samples = reading.samples
            return decode(task, columns, draws)

        def loss_traced(task: Any, model: Any, batch: Any, draws: Any) -> Any:
            world, seen = torch.distributed.get_world_size(), draws.positions[0] // BATCH * BATCH
            line = {"world": world, "pid": os.getpid(), "seen": seen, "positions": draws.positions,
                    "samples": draws.samples}  # fmt: skip
            _wait_while_held(folder / "hold", seen)
            with (folder / "trace").open("a") as trace:
                trace.write(json.dumps(line) + "\n")
            time.sleep(pace_seconds)
            return loss(task, model, batch, draws)

        vars_of: Sequence[tuple[Any, str, Any]] = (
            (RowIndex, "fetch", fetch_noted), (LatentTask, "decode", decode_noted),
            (LatentTask, "loss", loss_traced),
        )  # fmt: skip
        for owner, name, wrapped in vars_of:
            setattr(owner, name, wrapped)
        train._train_worker(config)

    return work


def _wait_while_held(path: Path, seen: int) -> None:
    while True:
        try:
            if seen < int(path.read_text()):
                return
        except FileNotFoundError:
            return
        time.sleep(0.02)


if __name__ == "__main__":
    from pixart_cluster import cli

    cli.cli.command(name="stage")(train_stage)
    cli.main()
