"""Pipelines on a cluster whose nodes die: submitted over the Jobs API with a token, and watched.

    .venv/bin/python tests/faults/cluster.py [--only nodes,two,refused]

A real Ray cluster of this machine: a head, and nodes for encoding, training and drivers, each a
raylet with labels of its own; MLflow's server and S3 over HTTP beside it. The miniature pipeline
is submitted with ``pixart submit``:

``nodes``    alone first, then again while the node that encodes, the node that trains and the node
             of the driver are killed, one after another, each replaced as an autoscaler would. It
             must end right, its weights equal to the bit, and ``status`` must have told the truth
             all the time.
``two``      two of them at once: both right, and neither waits for the other to end.
``refused``  without the token, or with another: submission and dashboard refuse.

About 12 minutes on 2 cores. The last line is one JSON object of figures; the exit code is 1 when
one misses its bar.
"""

import argparse
import hashlib
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # read at import
import psutil
from chaos_s3 import ChaosS3, endpoint, make_bucket
from mlflow_server import ServerProcess
from processes import MINI, PIXART, REPOSITORY, family, kill_family
from recording import figure

from pixart_cluster.local import quiet_environment
from pixart_cluster.server import free_port
from pixart_cluster.submit import Attempt, Cluster, ClusterError
from pixart_platform.tracking import sqlite_uri

ROLES = {"driver": 1, "encoding": 3, "training": 2}  # CPUs of a node of each
LOST_SECONDS = 60.0  # after which the truth about a lost driver must be known
PATIENCE_SECONDS = 900.0
Figures = dict[str, Any]


class Machines:
    """A head without CPUs, and a node for each role."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as RayCluster

        port = free_port()
        self._cluster = RayCluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 0, "include_dashboard": True, "dashboard_host": "127.0.0.1",
                "dashboard_port": port, "dashboard_agent_listen_port": free_port(),
            },
        )  # fmt: skip
        self.address = f"http://127.0.0.1:{port}"
        self._nodes: dict[str, Any] = {}
        for role in ROLES:
            self.add(role)

    def add(self, role: str) -> None:
        self._nodes[role] = self._cluster.add_node(
            num_cpus=ROLES[role], labels={"pixart-role": role}, include_dashboard=False,
            dashboard_agent_listen_port=free_port(),
        )  # fmt: skip

    def replace(self, role: str) -> None:
        """Kill everything on the node of a role at once, then bring up another."""
        node = self._nodes[role]
        (raylet,) = node.all_processes["raylet"]
        kill_family(raylet.process.pid)
        self._cluster.remove_node(node, allow_graceful=False)
        self.add(role)

    def has(self, role: str, what: str) -> bool:
        """Whether a process called so runs on a role's node."""
        (raylet,) = self._nodes[role].all_processes["raylet"]
        for process in family(raylet.process.pid):
            with suppress(psutil.Error):  # gone meanwhile
                if what in " ".join(process.cmdline()):
                    return True
        return False

    def shutdown(self) -> None:
        self._cluster.shutdown()  # type: ignore[no-untyped-call]  # Ray has types in parts


@dataclass
class Submitted:
    """``pixart submit`` as a process, and all that ``status`` said while it ran."""

    name: str
    process: "subprocess.Popen[bytes]"
    log: Path
    seen: list[tuple[float, Attempt, str]] = field(default_factory=list)

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def wait_to_say(self, text: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.says(text):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, f"{text!r} is not in\n{self.log.read_text()}"
            time.sleep(0.2)


@dataclass
class Site:
    """Everything a team has: cluster, MLflow, S3, a shared folder."""

    machines: Machines
    registry: str
    runs: Path

    def weights(self, name: str) -> str:
        (path,) = (self.runs / name / "stages").glob("aesthetics-*/snapshot/*.safetensors")
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @contextmanager
    def submitted(self, name: str) -> Iterator[Submitted]:
        """The miniature pipeline under a name; ``status`` is asked twice a second meanwhile."""
        log = self.runs / f"{name}.log"
        settings = {
            "name": name, "train.snapshots": f"s3://models/{name}",
            "data.nodes.pixart-role": "encoding", "encode.nodes.pixart-role": "encoding",
            "caption.nodes.pixart-role": "encoding", "train.nodes.pixart-role": "training",
            "evaluate.nodes.pixart-role": "encoding", "caption.num_workers": 2,
            "encode.num_workers": 2, "encode.num_readers": 2,
        }  # fmt: skip
        asked = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*PIXART, "submit", MINI, "--runs", self.runs, "--registry", self.registry,
                 "--address", self.machines.address, "--driver-on", "pixart-role=driver", *asked],
                stdout=output, stderr=subprocess.STDOUT, cwd=self.runs,
            )  # fmt: skip
        run, done = Submitted(name, process, log), threading.Event()
        watcher = threading.Thread(target=self._watch, args=(run, done))
        watcher.start()
        try:
            yield run
        finally:
            done.set()
            watcher.join()
            if process.poll() is None:
                process.kill()

    def _watch(self, run: Submitted, done: threading.Event) -> None:
        cluster = Cluster(self.machines.address)
        while not done.wait(0.5):
            try:
                attempt = cluster.latest(run.name)
                run.seen.append((time.monotonic(), attempt, attempt.describe()))
            except ClusterError:
                continue  # not submitted yet

    def run_alone(self, name: str) -> Submitted:
        with self.submitted(name) as run:
            code = run.process.wait(PATIENCE_SECONDS)
            assert code == 0, run.log.read_text()
        return run


def nodes(site: Site) -> Figures:
    began = time.monotonic()
    site.run_alone("straight")
    alone = time.monotonic() - began
    lies, killed_at = list[str](), 0.0
    with site.submitted("disturbed") as run:
        for job, role, sign in (
            ("encode", "encoding", ""), ("align", "training", "RayTrainWorker"),
            ("aesthetics", "driver", ""),
        ):  # fmt: skip
            run.wait_to_say(f"{job:<10} 0 of")
            wait_until(lambda role=role, sign=sign: site.machines.has(role, sign))  # type: ignore[misc]  # mypy sees no default
            print(f"nodes      {job}: the {role} node is killed", flush=True)
            killed_at = time.monotonic()
            site.machines.replace(role)
        code = run.process.wait(PATIENCE_SECONDS)
        wait_until(lambda: run.seen[-1][1].has_ended)
    for at, attempt, told in run.seen:
        ended_well, is_last = attempt.state == "SUCCEEDED", at == run.seen[-1][0]
        if attempt.has_ended and not attempt.is_lost and not (ended_well and attempt.number == 2):
            lies.append(told)
        if attempt.is_lost and at < killed_at:
            lies.append(f"before the driver's node was killed: {told}")
        if attempt.number == 1 and at > killed_at + LOST_SECONDS:
            lies.append(f"{at - killed_at:.0f} s after its driver was lost: {told}")
        if is_last and not ended_well:
            lies.append(told)
    lost = [at for at, attempt, _ in run.seen if attempt.is_lost or attempt.number > 1]
    status = pixart("status", "disturbed", "--address", site.machines.address)
    print(f"nodes      {status.stdout.strip()}; alone it takes {alone:.0f} s; {lies[:3]}")
    if code:
        print(run.log.read_text())
    return {
        "nodes_exit_code": figure(code, 0, at_most=True),
        "nodes_weights_differ": figure(
            int(site.weights("disturbed") != site.weights("straight")), 0, at_most=True
        ),
        "nodes_status_lies": figure(len(lies), 0, at_most=True),
        "nodes_seconds_until_loss_is_told": figure(
            round(lost[0] - killed_at, 1) if lost else float("inf"), LOST_SECONDS, at_most=True
        ),
        "nodes_status_asked": {"value": len(run.seen)},
    }


def two(site: Site) -> Figures:
    """Progress of both in every third of the time, and the same weights."""
    began = time.monotonic()
    names = ("one", "other")
    with site.submitted(names[0]) as one, site.submitted(names[1]) as other:
        codes = [run.process.wait(2 * PATIENCE_SECONDS) for run in (one, other)]
    took = [run.seen[-1][0] - began for run in (one, other)]
    for run, code in zip((one, other), codes, strict=True):
        if code:
            print(run.log.read_text())
    print(f"two        took {took[0]:.0f} s and {took[1]:.0f} s")
    return {
        "two_exit_codes": figure(max(codes), 0, at_most=True),
        "two_weights_differ": figure(
            len({site.weights(name) for name in names}) - 1, 0, at_most=True
        ),
        "two_later_end_of_earlier": figure(round(max(took) / min(took), 2), 1.5, at_most=True),
    }


def refused(site: Site) -> Figures:
    """Whoever has no token, or another, gets in nowhere."""
    address, wrong = site.machines.address, dict[str, str]()
    for case, environment in {
        "none": {"RAY_AUTH_MODE": "disabled"}, "other": {"RAY_AUTH_TOKEN": secrets.token_hex(32)},
    }.items():  # fmt: skip
        for words in (
            ["submit", MINI, "--runs", site.runs, "--address", address, "--no-follow"],
            ["list", "--address", address],
        ):
            done = pixart(*words, environment=environment)
            if done.returncode != 2 or "token" not in done.stderr or "Traceback" in done.stderr:
                wrong[f"{words[0]}, token: {case}"] = done.stdout + done.stderr
    for path in ("/api/jobs/", "/nodes?view=summary", "/api/v0/actors", "/logical/actors"):
        try:
            with urllib.request.urlopen(f"{address}{path}", timeout=20) as answer:
                wrong[path] = f"{answer.status}"
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):
                wrong[path] = f"{error.code}"
    for what, told in wrong.items():
        print(f"refused    {what}: {told}")
    return {"refused_not": figure(len(wrong), 0, at_most=True)}


def pixart(
    *words: object, environment: dict[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*PIXART, *map(str, words)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | (environment or {}),
    )  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextmanager
def site(root: Path) -> Iterator[Site]:
    """Its files are under ``root``; no other program finds the cluster by chance."""
    rooms = [REPOSITORY / name for name in ("platform", "models", "jobs", "serve", "cluster")]
    os.environ |= {
        "RAY_TMPDIR": str(root / "r"), "PIXART_CACHE": str(root / "cache"),
        "RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "3",
        "PYTHONPATH": ":".join(map(str, rooms)),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    with ExitStack() as stack:
        s3 = stack.enter_context(ChaosS3())
        stack.enter_context(endpoint(s3.uri))
        make_bucket("models")
        server = ServerProcess(root, sqlite_uri(root))
        stack.callback(server.kill)
        server.start()
        machines = Machines()
        stack.callback(machines.shutdown)
        (root / "runs").mkdir()
        yield Site(machines, server.uri, root / "runs")


SCENARIOS = {"refused": refused, "nodes": nodes, "two": two}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(SCENARIOS))
    told = parser.parse_args()
    quiet_environment()
    logging.getLogger("ray").setLevel(logging.ERROR)
    figures: Figures = {}
    with (
        tempfile.TemporaryDirectory(prefix="pc-", ignore_cleanup_errors=True) as folder,
        site(Path(folder)) as here,
    ):
        for name in told.only.split(","):
            figures |= SCENARIOS[name](here)
    for name, value in figures.items():
        print(f"{name:<40} {value}")
    print(json.dumps(figures))
    sys.exit(any(not f.get("ok", True) for f in figures.values()))


if __name__ == "__main__":
    main()
