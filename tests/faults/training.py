"""Fault campaign of the training plane: whatever happens, a stage ends with the right weights.

    .venv/bin/python tests/faults/training.py [--quick] [--seed N] [--only NAME,...]

One short stage is trained undisturbed for every ZeRO stage, then under fire, on a Ray cluster of a
head and two nodes on this machine (``training_runs``): the driver, a worker or a whole node is
killed at random moments; a node is lost and another comes, so that the run has 2, 1 and 2 workers;
S3 fails a tenth of its calls, then all of them; the disk is full for a while; MLflow is down for a
while; a row of the table is not a number; a worker stands still; a node gives notice and goes.

Weights, both moments, averages, snapshot, logged losses and the samples of every batch must be the
undisturbed run's to the bit, with other numbers of workers the losses to 1e-6. After a NaN they
must be those of a run that was told to leave out the same batches.

At least 20 kills, about 30 minutes on 2 idle cores; ``--quick`` 3 kills, about 4 minutes. The last
line is one JSON object of figures; the exit code is 1 when one misses its bar. Needs root for the
full disk (it mounts a small one). Only processes that this script started are killed.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).resolve().parent.parent))
from chaos_s3 import FAULTS, ChaosS3, endpoint, make_bucket
from faults.training_runs import (
    BATCH,
    SAVE_EVERY,
    Machines,
    Run,
    find_differences,
    machines,
    write_tables,
)
from processes import family, kill, wait_for

from pixart_cluster.server import free_port

KINDS = ("driver", "worker", "node")
ZERO_STAGES = (2, 0, 1, 3)
PACE_SECONDS = 0.15  # of a step under fire
POISONED = 100  # the row that is not a number; each epoch meets it once
SHARE = 0.12  # of S3's calls that fail


@dataclass
class Row:
    """A line of the table."""

    scenario: str
    faults: str
    seconds: float
    differences: list[str]
    remark: str = ""

    def __str__(self) -> str:
        told = f"differs: {', '.join(self.differences)}" if self.differences else "equal"
        return f"{self.scenario:24} {self.faults:34} {self.seconds:6.0f}  {told}  {self.remark}"


@dataclass
class Campaign:
    """Runs under fire, and what was seen."""

    root: Path
    machines: Machines
    s3: ChaosS3
    rng: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    rows: list[Row] = field(default_factory=list)
    largest_error: float = 0.0  # of a loss with another number of workers, relative
    _straight: dict[int, Run] = field(default_factory=dict)
    _runs: list[Run] = field(default_factory=list)

    def make(self, name: str, *, tables: str = "tables", **settings: Any) -> Run:
        uri = settings.pop("tracking_uri", f"sqlite:///{self.root / 'mlflow.db'}")
        run = Run(self.root / name, self.root / tables, uri, self.machines.address, **settings)
        self._runs.append(run)
        return run

    def clear(self) -> None:
        """Leave no driver behind, whatever happened."""
        for run in self._runs:
            if run.process and run.process.poll() is None:
                kill(run.process)

    def straight(self, zero_stage: int = 2) -> Run:
        """The undisturbed run."""
        if zero_stage not in self._straight:
            run = self.make(f"straight-{zero_stage}", train={"zero_stage": zero_stage})
            with self.told(f"straight, ZeRO {zero_stage}", "none") as row:
                run.start()
                run.finish()
                row.differences = find_differences(run, run)
            self._straight[zero_stage] = run
        return self._straight[zero_stage]

    @contextmanager
    def told(self, scenario: str, faults: str) -> Iterator[Row]:
        began = time.monotonic()
        row = Row(scenario, faults, 0, ["unfinished"])
        yield row
        row.seconds = time.monotonic() - began
        self.rows.append(row)
        print(row, flush=True)

    def strike(self, run: Run, kind: str) -> None:
        """Kill one of this kind: the driver while there is no worker."""
        workers = self.machines.workers()
        if kind == "worker" and workers:
            kill(self.rng.choice(workers))
        elif kind == "node":
            self.machines.lose(self.rng.randrange(self.machines.num_nodes))
            time.sleep(self.rng.uniform(0, 3))
            self.machines.add()
        else:
            kind = "driver"
            kill(run.driver)
            run.driver.wait()
            run.start()
        self.kills[kind] += 1


def kill_at_random(campaign: Campaign, zero_stage: int, num_kills: int) -> None:
    """Kills of every kind, most at random steps, some while it starts."""
    rng, straight = campaign.rng, campaign.straight(zero_stage)
    run = campaign.make(
        f"killed-{zero_stage}", train={"zero_stage": zero_stage}, pace_seconds=PACE_SECONDS
    )
    kinds = [kind for _ in range(num_kills) for kind in rng.sample(KINDS, len(KINDS))][:num_kills]
    steps = sorted(rng.sample(range(straight.images // BATCH - 6), num_kills))
    with campaign.told(f"killed, ZeRO {zero_stage}", " ".join(kinds)) as row:
        run.start()
        for number, (kind, step) in enumerate(zip(kinds, steps, strict=True)):
            if number % 4 == 3:
                time.sleep(rng.uniform(0, 20))
            else:
                run.wait(lambda step=step: run.reached() >= step * BATCH, f"step {step}")  # type: ignore[misc]  # mypy sees no default
                time.sleep(rng.uniform(0, 2 * PACE_SECONDS))
            campaign.strike(run, kind)
        run.finish()
        row.differences = find_differences(run, straight)
        row.remark = f"steps begun {len(run.trace()) // 2} instead of {len(straight.trace()) // 2}"


def shrink_and_grow(campaign: Campaign, zero_stage: int) -> None:
    """2 workers, 1, then 2, in one start of the command."""
    straight = campaign.straight(zero_stage)
    train = {"zero_stage": zero_stage, "min_workers": 1, "resize_every_seconds": 2}
    run = campaign.make(f"elastic-{zero_stage}", train=train)
    with campaign.told(f"2-1-2 workers, ZeRO {zero_stage}", "node lost, node added") as row:
        run.hold_at(208)
        run.start()
        run.wait(lambda: run.reached(2) == 208 - BATCH, "two workers")
        campaign.machines.lose(0)
        campaign.kills["node"] += 1
        run.hold_at(400)
        run.wait(lambda: run.reached(1) == 400 - BATCH, "one worker")
        campaign.machines.add()
        run.wait(lambda: run.reached(2) == 400 - BATCH, "two workers again")
        run.hold_at(None)
        run.finish()
        worlds = [line["world"] for line in run.trace()]
        turns = [w for w, before in zip(worlds, [0, *worlds], strict=False) if w != before]
        error = find_error(run, straight)
        campaign.largest_error = max(campaign.largest_error, error)
        row.differences = [] if run.batches() == straight.batches() else ["batches"]
        row.differences += [] if turns == [2, 1, 2] else [f"workers {turns}"]
        row.remark = f"losses to {error:.1e}"


def find_error(run: Run, straight: Run) -> float:
    """Largest relative difference of a logged loss; infinite if one is missing."""
    ours, theirs = run.curve(), straight.curve()
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(
        abs(value - theirs[key][0]) / abs(theirs[key][0])
        for key, values in ours.items()
        if key[0] == "loss"
        for value in values
    )


def suffer_s3(campaign: Campaign) -> None:
    """States on S3 that fails often, then always until after the last step, and a killed driver."""
    straight, s3 = campaign.straight(), campaign.s3
    make_bucket("campaign")
    run = campaign.make("s3", train={"states": "s3://campaign/states"}, pace_seconds=0.5)
    with campaign.told("S3 bad, then down", "every 8th call, driver, 60 s") as row:
        s3.share, s3.kinds = SHARE, FAULTS
        run.start()
        run.wait(lambda: run.reached() >= 200, "step 13")
        campaign.strike(run, "driver")
        run.wait(lambda: run.reached() >= straight.images // 2, "the middle")
        s3.share, s3.kinds = 1.0, ("InternalError",)
        run.wait(lambda: run.reached() == straight.images - BATCH, "the last step")
        time.sleep(60)
        s3.share = 0
        run.finish()
        row.differences = find_differences(run, straight)
        row.remark = f"{s3.faults.total()} of {s3.calls.total()} calls failed"


def fill_disk(campaign: Campaign) -> None:
    """States on a disk that is full for a while, in which a worker dies besides."""
    straight, place = campaign.straight(), campaign.root / "small"
    place.mkdir()
    with mounted(place, "16m"), campaign.told("disk full", "full for 16 steps, worker") as row:
        run = campaign.make("full", train={"states": str(place)}, pace_seconds=PACE_SECONDS)
        run.start()
        run.wait(lambda: run.reached() >= 200, "step 13")
        with (place / "ballast").open("wb") as ballast, suppress(OSError):
            while ballast.write(bytes(1 << 16)):
                ballast.flush()
        run.wait(lambda: run.reached() >= 200 + 3 * SAVE_EVERY, "three saves that cannot be")
        before = run.plan.states.complete()
        campaign.strike(run, "worker")
        run.wait(lambda: run.reached() >= 200 + 4 * SAVE_EVERY, "a fourth")
        held = run.plan.states.find_newest()
        (place / "ballast").unlink()
        run.finish()
        row.differences = find_differences(run, straight)
        row.remark = f"states kept meanwhile: {before}"
        if held is None or held.progress.images_seen > 256:
            row.differences.append("the disk was not full")


@contextmanager
def mounted(place: Path, size: str) -> Iterator[None]:
    """A file system of that size."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class MlflowServer:
    """A real tracking server, which can be stopped and started again at the same port."""

    def __init__(self, root: Path, port: int) -> None:
        self.uri, self._root, self._port = f"http://127.0.0.1:{port}", root, port

    def start(self) -> None:
        options = ["--host", "127.0.0.1", "--port", str(self._port), "--workers", "1",
                   "--backend-store-uri", f"sqlite:///{self._root / 'server.db'}",
                   "--artifacts-destination", str(self._root / "artifacts")]  # fmt: skip
        with (self._root / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *options],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        wait_for(self._answers, "MLflow to answer")

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health", timeout=5):
            return True
        return False

    def stop(self) -> None:
        everyone = family(self._process.pid)
        for process in everyone:
            with suppress(ProcessLookupError):
                kill(process)
        psutil.wait_procs(everyone)


def lose_mlflow(campaign: Campaign) -> None:
    """MLflow is killed in the middle of a run, and started again."""
    straight = campaign.straight()
    server = MlflowServer(campaign.root, free_port())
    server.start()
    run = campaign.make("mlflow", tracking_uri=server.uri, pace_seconds=0.5)
    with campaign.told("MLflow down", "for 20 steps") as row, ExitStack() as stack:
        run.start()
        run.wait(lambda: run.reached() >= 160, "step 11")
        server.stop()
        run.wait(lambda: run.reached() >= 480, "steps without MLflow")
        server.start()
        stack.callback(server.stop)
        run.finish()
        row.differences = find_differences(run, straight)
        repeated = sum(len(values) > 1 for values in run.curve().values())
        row.remark = f"{repeated} points logged twice"


def meet_nan(campaign: Campaign) -> None:
    """A row that is not a number is left out by rewinding, as often as an epoch meets it."""
    poisoned, rewinds = campaign.make("nan", tables="poisoned", train={"max_rewinds": 3}), 0
    with campaign.told("NaN, rewinding", "a poisoned row, 2 epochs") as row:
        poisoned.start()
        poisoned.finish()
        skips = poisoned.plan.states.folder.read("skips.json")
        rewinds = len(json.loads(skips))
        clean = campaign.make("skips-given")
        clean.plan.states.folder.write("skips.json", skips)
        clean.start()
        clean.finish()
        row.differences = find_differences(poisoned, clean)
        row.remark = f"{rewinds} rewinds: {skips.decode()}"
        if not rewinds:
            row.differences.append("no rewind")


def stop_at_nan(campaign: Campaign) -> None:
    """Without rewinds a loss that is not a number ends the command in one line."""
    run = campaign.make("nan-stops", tables="poisoned")
    with campaign.told("NaN, no rewinds", "a poisoned row") as row:
        run.start()
        run.finish(status=2)
        last = run.log.strip().splitlines()[-1]
        row.remark = last
        wanted = last.startswith("error: stage only: loss is nan after ") and " images" in last
        row.differences = [] if wanted and "Traceback" not in run.log else ["message"]


def damage_table(campaign: Campaign) -> None:
    """What one worker alone cannot read ends the command in one line, and no other waits for it."""
    tables = campaign.root / "damaged-tables"
    write_tables(tables)
    *_, last_part = sorted((tables / "latents").glob("*.parquet"))
    whole = last_part.read_bytes()
    last_part.write_bytes(whole[:4] + b"\xff" * 4096 + whole[4100:])  # the end says what is where
    run = campaign.make("damaged", tables=tables.name)
    with campaign.told("table damaged", "a partition overwritten") as row:
        run.start()
        run.finish(status=2)
        row.remark = run.log.strip().splitlines()[-1]
        wanted = row.remark.startswith("error: ") and last_part.name in row.remark
        row.differences = [] if wanted and "Traceback" not in run.log else ["message"]


def slow_worker(campaign: Campaign) -> None:
    """A worker stands still for a while; nothing is restarted."""
    straight = campaign.straight()
    run = campaign.make("slow", pace_seconds=PACE_SECONDS)
    with campaign.told("slow worker", "stands still for 10 s, twice") as row:
        run.start()
        for seen in (160, 352):
            run.wait(lambda seen=seen: run.reached() >= seen, "a step")  # type: ignore[misc]  # mypy sees no default
            worker = campaign.rng.choice(campaign.machines.workers())
            worker.send_signal(signal.SIGSTOP)
            time.sleep(10)
            worker.send_signal(signal.SIGCONT)
        run.finish()
        row.differences = find_differences(run, straight)
        row.differences += ["restarts"] if len({s["pid"] for s in run.trace()}) != 2 else []


def give_notice(campaign: Campaign) -> None:
    """A node tells that it goes: a state is saved at once, and little is done twice."""
    straight = campaign.straight()
    train = {"save_every_images": straight.images}
    run = campaign.make("notice", train=train, pace_seconds=1.0)
    with campaign.told("notice, then node lost", "node") as row:
        run.start()
        run.wait(lambda: run.reached() >= 64, "step 5")
        campaign.machines.give_notice(0)
        run.wait(lambda: bool(run.plan.states.complete()), "the state that a notice is for")
        (saved,) = run.plan.states.complete()
        campaign.machines.lose(0)
        campaign.kills["node"] += 1
        campaign.machines.add()
        run.finish()
        row.differences = find_differences(run, straight)
        row.remark = f"state at {saved}"


SCENARIOS: dict[str, Callable[[Campaign], None]] = {
    **{f"zero{z}": lambda c, z=z: kill_at_random(c, z, 5) for z in ZERO_STAGES},  # type: ignore[misc]  # mypy sees no default
    "elastic": lambda c: shrink_and_grow(c, 2),
    "elastic3": lambda c: shrink_and_grow(c, 3),
    "notice": give_notice, "s3": suffer_s3, "disk": fill_disk, "mlflow": lose_mlflow,
    "nan": meet_nan, "nan-stops": stop_at_nan, "slow": slow_worker,
    "damaged": damage_table,
}  # fmt: skip
QUICK: dict[str, Callable[[Campaign], None]] = {
    "zero2": lambda c: kill_at_random(c, 2, 3), "disk": fill_disk, "nan-stops": stop_at_nan,
}  # fmt: skip


def find_figures(campaign: Campaign, least_kills: int) -> dict[str, Any]:
    differing = sum(bool(row.differences) for row in campaign.rows)
    kills, error = campaign.kills.total(), campaign.largest_error
    return {
        "kills": {"value": kills, "bar": least_kills, "ok": kills >= least_kills},
        "runs_that_differ": {"value": differing, "bar": 0, "ok": differing == 0},
        "loss_error_with_other_workers": {"value": error, "bar": 1e-6, "ok": error <= 1e-6},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="scenarios: " + ", ".join(SCENARIOS))
    options = parser.parse_args()
    from pixart_cluster.local import quiet_environment

    quiet_environment()
    chosen = QUICK if options.quick else SCENARIOS
    chosen = {name: SCENARIOS[name] for name in options.only.split(",") if name} or chosen
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    write_tables(root / "tables")
    write_tables(root / "poisoned", [POISONED])
    with ChaosS3(seed=options.seed) as s3, endpoint(s3.uri), machines(root / "ray") as cluster:
        campaign = Campaign(root, cluster, s3, random.Random(options.seed))
        try:
            for scenario in chosen.values():
                scenario(campaign)
        finally:
            campaign.clear()
    print("\n".join(map(str, campaign.rows)))
    print(f"killed: {dict(campaign.kills)}")
    figures = find_figures(campaign, 0 if options.only else 3 if options.quick else 20)
    ok = all(figure["ok"] for figure in figures.values())
    if ok:
        shutil.rmtree(root)
    else:
        print(f"runs are kept in {root}")
    print(json.dumps(figures))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
