"""Interrupt campaign of the data plane: kill -9 and a bad S3 change nothing.

    .venv/bin/python tests/faults/data.py [--quick] [--seed N] [--store s3|local]

A small recipe's tables (ingest, select, caption, encode) are made once undisturbed. Then they are
made again and again while the driver, a worker or the raylet is killed at random moments, half of
them soon after a partition was begun, and the command is repeated until it ends, as by a user.
With ``--store s3``, the default, that is on a server that fails a tenth of its calls
(``chaos_s3``), in a full run some of them by a silence that outlasts the client's timeout. Each
time, every table must have the digest of the undisturbed run and verify, and no partition may have
been computed again whose record was there before a kill: each call of a transform leaves a line in
a trace. Only processes below the drivers that this script started are killed.

At least 30 kills, about 20 minutes on 2 idle cores; ``--quick`` 4 kills, about 2 minutes. The last
line is one JSON object of figures; the exit code is 1 when one misses its bar.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.append(str(Path(__file__).resolve().parent.parent))
from processes import Silence, family, kill

from pixart_platform.errors import ManifestError
from pixart_platform.storage import Folder, open_folder
from pixart_platform.tables import verify_table

TABLES_OF = {
    "ingest": {"images"}, "caption": {"captions"}, "encode": {"text", "latents_32px"},
}  # fmt: skip
KINDS = ("driver", "worker", "raylet")
FAULTY_SHARE = 0.12  # so that of few calls, too, a tenth fails
MODEL_SECONDS = 0.3  # what a partition takes besides, or no kill would meet a job half done
STALLS = [2.0] * 11 + [65.0]  # seconds; the last outlasts the client's timeout
PATIENCE_SECONDS = 120  # for a driver to notice that its raylet is gone
GRACE_SECONDS = 3  # for Ray to follow a dead driver, before this script makes it
MAX_FAILURES = 5  # of the command in a row, for no reason that this script gave
Partition = tuple[str, int]  # job and number


def make_tables(store: str, root: Path, num_scenes: int) -> None:
    """What a driver does: a recipe's tables in ``store``, by way of the pipeline."""
    from pixart_cluster.local import local_ray, quiet_environment

    quiet_environment()
    from pixart_jobs import pipeline
    from pixart_jobs.recipe import Recipe
    from pixart_jobs.workspace import Workspace
    from pixart_platform import partitions

    stage = {
        "condition_on": "text", "start_from": "scratch", "resolution": 32, "images": 64,
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    data = {"num_scenes": num_scenes, "partition_rows": 20, "store": store, "num_workers": 1}
    pools = {"num_readers": 1, "num_workers": 1}
    recipe = Recipe.model_validate(
        {
            "name": "campaign", "data": data, "caption": pools,
            "encode": {"resolutions": [32], **pools}, "stages": {"align": stage},
        }
    )  # fmt: skip
    # MLflow's seconds of starting, at each of many starts, have no part in this.
    vars(pipeline)["Registry"] = lambda *_: None
    vars(partitions)["_Apply"] = _trace(partitions._Apply, root / "trace")
    with local_ray(root / "logs") as scratch:
        space = Workspace.under(root, scratch)
        pipeline.Pipeline(recipe, space, Silence()).make_tables()


def _trace(apply: Any, path: Path) -> Any:
    """``partitions._Apply``, leaving a line of each partition that it begins to compute."""

    class Traced(apply):  # type: ignore[misc]  # a class that mypy cannot know
        def __init__(self, transform: type, kwargs: dict[str, Any]) -> None:
            self._job = transform.__module__.rpartition(".")[2]
            super().__init__(transform, kwargs)

        def __call__(self, batch: Any) -> Any:
            with path.open("a") as trace:
                trace.write(f"{time.time()} {self._job} {batch['__partition__'][0]}\n")
            time.sleep(MODEL_SECONDS)
            return super().__call__(batch)

    return Traced


def find_finished(store: Folder) -> set[Partition]:
    """Partitions of which every table of their job has the record."""
    records: dict[str, set[int]] = {}
    for name in store.children():
        entries = (store / name).walk("_records/")
        numbers = {int(entry.name[len("_records/") : -len(".json")]) for entry in entries}
        records[name.rpartition("-")[0]] = numbers
    return {
        (job, k)
        for job, kinds in TABLES_OF.items()
        for k in set.intersection(*(records.get(kind, set()) for kind in kinds))
    }


@dataclass(frozen=True)
class Kill:
    """When, of what, and which partitions were finished before."""

    moment: float
    kind: str
    finished: set[Partition]


def read_trace(root: Path) -> list[tuple[float, Partition]]:
    """When the computation of which partition began, in a run's folder."""
    path = root / "trace"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(float(moment), (job, int(k))) for moment, job, k in lines]


def find_repeated(trace: list[tuple[float, Partition]], kills: list[Kill]) -> set[Partition]:
    """Partitions begun after a kill before which they were finished."""
    return {
        partition
        for moment, partition in trace
        if any(moment > kill.moment and partition in kill.finished for kill in kills)
    }


class Driver:
    """One start of the command; its output is appended to ``root/log``."""

    def __init__(self, store: str, root: Path, num_scenes: int, environment: dict[str, str]):
        arguments = ["--drive", store, "--root", str(root), "--scenes", str(num_scenes)]
        with (root / "log").open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *arguments],
                stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment,
            )  # fmt: skip
        self._family: list[psutil.Process] = []

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if it still runs."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def kill(self, wanted: str, rng: random.Random) -> str:
        """Kill one process of this kind, itself while there is none; returns its kind."""
        self._family = family(self._process.pid)
        found = [process for process in self._family[1:] if _kind_of(process) == wanted]
        kill(rng.choice(found) if found else self._family[0])
        return wanted if found else "driver"

    def bury(self) -> None:
        """Leave nothing of a dead driver's behind, as when its machine is lost."""
        _, left = psutil.wait_procs(self._family, timeout=GRACE_SECONDS)
        for process in left:
            with suppress(psutil.Error, ProcessLookupError):
                kill(process)
        psutil.wait_procs(left, timeout=30)


def _kind_of(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        title = " ".join(process.cmdline())
        if title.startswith("ray::"):
            return "other" if "Agent" in title else "worker"
        return process.name()
    return "gone"


@dataclass
class Campaign:
    """Runs of the command under fire, and what was seen."""

    num_scenes: int
    rng: random.Random
    max_gap: float
    environment: dict[str, str] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)
    repeated: set[Partition] = field(default_factory=set)
    num_begun_twice: int = 0
    num_hung: int = 0
    _kinds: list[str] = field(default_factory=list)  # to come, so that all have their turn

    def run(self, store: Folder, root: Path, num_kills: int) -> None:
        """One run to its end, with at most that many kills on the way."""
        root.mkdir(parents=True)
        kills: list[Kill] = []
        failures = 0
        while True:
            driver = Driver(store.uri, root, self.num_scenes, self.environment)
            status = None
            before = len(kills)
            while status is None:
                status = self._wait(driver, root, half_done=len(kills) % 2 == 0)
                if status is None and len(kills) < num_kills:
                    kills.append(self._kill_one(driver, store))
                    status = self._see_if_it_died(driver, kills[-1].kind)
            driver.bury()
            if status == 0:
                break
            failures = failures + 1 if len(kills) == before else 0
            if failures == MAX_FAILURES:
                raise SystemExit((root / "log").read_text()[-8000:])
        trace = read_trace(root)
        self.kills.update(one.kind for one in kills)
        self.repeated |= find_repeated(trace, kills)
        self.num_begun_twice += len(trace) - len({partition for _, partition in trace})

    def _wait(self, driver: Driver, root: Path, *, half_done: bool) -> int | None:
        """Any time, or a moment after another partition was begun, where most is at stake."""
        if not half_done:
            return driver.wait(self.rng.uniform(0, self.max_gap))
        before, status = len(read_trace(root)), None
        while status is None and len(read_trace(root)) == before:
            status = driver.wait(0.5)
        return driver.wait(self.rng.uniform(0, 4)) if status is None else status

    def _kill_one(self, driver: Driver, store: Folder) -> Kill:
        finished, moment = find_finished(store), time.time()
        self._kinds = self._kinds or self.rng.sample(KINDS, len(KINDS))
        kind = driver.kill(self._kinds.pop(), self.rng)
        print(f"killed a {kind}; finished before: {len(finished)} partitions", flush=True)
        return Kill(moment, kind, finished)

    def _see_if_it_died(self, driver: Driver, kind: str) -> int | None:
        if kind == "worker":
            return None
        status = driver.wait(PATIENCE_SECONDS)
        if status is None:
            self.num_hung += 1
            driver.kill("driver", self.rng)
            status = driver.wait(PATIENCE_SECONDS)
        return status


def find_digests(store: Folder) -> dict[str, str]:
    """The digest of every table by folder name, or what is wrong with it."""
    found = {}
    for name in store.children():
        try:
            found[name] = verify_table(store / name).digest
        except ManifestError as error:
            found[name] = str(error)
    return found


def run_campaign(base: Folder, scratch: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The undisturbed run, the disturbed ones, and the figures."""
    from chaos_s3 import ChaosS3

    num_kills, num_scenes = (4, 200) if options.quick else (30, 600)
    start = time.monotonic()
    calm = Campaign(num_scenes, random.Random(options.seed), max_gap=600)
    calm.run(base / "calm", scratch / "calm", 0)
    expected = find_digests(base / "calm")
    seconds = time.monotonic() - start
    print(f"undisturbed: {seconds:.0f} s, tables {', '.join(expected)}", flush=True)

    stalls = STALLS[:1] if options.quick else STALLS
    differing: set[str] = set()
    with ChaosS3(FAULTY_SHARE, options.seed, stall_seconds=stalls) as chaos:
        environment = {"AWS_ENDPOINT_URL": chaos.uri} if options.store == "s3" else {}
        storm = Campaign(num_scenes, random.Random(options.seed), 0.4 * seconds, environment)
        for number in range(1000):
            store = base / f"storm-{number}"
            storm.run(store, scratch / store.name, num_kills - storm.kills.total())
            found = find_digests(store)
            differing |= {name for name, _ in expected.items() ^ found.items()}
            print(f"run {number}: {dict(storm.kills)}, {len(differing)} tables differ", flush=True)
            if storm.kills.total() >= num_kills:
                break
    print(f"S3 calls {dict(chaos.calls)}, faults {dict(chaos.faults)}")
    print(f"computations begun again because a kill met them: {storm.num_begun_twice}")
    figures = {
        "kills": _figure(storm.kills.total(), num_kills, storm.kills.total() >= num_kills),
        "tables_that_differ_or_do_not_verify": _figure(len(differing), 0, not differing),
        "finished_partitions_computed_again": _figure(len(storm.repeated), 0, not storm.repeated),
        "drivers_hung": _figure(storm.num_hung, 0, storm.num_hung == 0),
    }
    if options.store == "s3":
        share = chaos.faults.total() / chaos.calls.total()
        bar = 0.08 if options.quick else 0.1
        figures["share_of_calls_that_failed"] = _figure(round(share, 3), bar, share >= bar)
    return figures


def _figure(value: float, bar: float, ok: bool) -> dict[str, Any]:
    return {"value": value, "bar": bar, "ok": ok}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=("s3", "local"), default="s3")
    for internal in ("--drive", "--root", "--scenes"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        make_tables(options.drive, Path(options.root), int(options.scenes))
        return 0
    from chaos_s3 import ChaosS3, endpoint, make_bucket  # seconds that no driver needs

    scratch = Path(tempfile.mkdtemp(prefix="campaign-"))
    with ChaosS3() as server, endpoint(server.uri):
        base = make_bucket("campaign") if options.store == "s3" else open_folder(scratch / "store")
        figures = run_campaign(base, scratch, options)
    ok = all(figure["ok"] for figure in figures.values())
    if ok:
        shutil.rmtree(scratch)
    else:
        print(f"logs and traces are kept in {scratch}")
    print(json.dumps(figures))
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
