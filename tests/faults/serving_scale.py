"""Scaling and health of the drawing service: replicas come and go, and callers notice nothing.

    .venv/bin/python tests/faults/serving_scale.py

A real service on a real Ray Serve, one replica and at most two, with a tiny model:

1. More callers come than one replica may keep waiting, and a second one starts; they go, and one
   leaves while others still draw there. No request fails, each is in the access log, and what
   Prometheus gets is what the table of metrics says.
2. The registry fails whoever asks, for longer than Serve takes to give a replica up. It stays.
3. A picture so large that its step never ends blocks the engine. Serve replaces that replica.

About 3 minutes on 2 cores. The last line is one JSON object of figures; the exit code is 1 when one
misses its bar.
"""

import asyncio
import json
import os
import sqlite3
import sys
import tempfile
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

sys.path.append(str(Path(__file__).resolve().parent.parent))
from faults.serving import Service, call_while, until
from recording import figure
from serving_load import Answer, Ask, caller, come_again, register_models

from pixart_cluster.local import local_ray, quiet_environment
from pixart_serve.app import APPLICATION, stop
from pixart_serve.metrics import METERS

NUM_CALLERS = 60  # nearly fill a queue of 64, on any machine; nobody is refused
STALL_SECONDS = 10
GIVEN_UP_SECONDS = 20  # Serve asks for health each 5 s and replaces after three failures
PATIENCE_SECONDS = 120
STORM = [Ask(f"a storm of number {i}", i, 40, 2.5) for i in range(50)]
Figures = dict[str, Any]


def count_running() -> int:
    """Replicas that requests go to."""
    application = serve.status().applications[APPLICATION]
    states = application.deployments["drawing"].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")


def scrape() -> dict[str, dict[str, float]]:
    """What Prometheus gets of ours: the sum of a family's counts by replica, by its name."""
    [node] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray has types in parts
    port = node["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    found: dict[str, dict[str, float]] = {}
    for family in families:
        if family.name.startswith("ray_pixart_"):
            name = family.name.removeprefix("ray_") + "_total" * (family.type == "counter")
            values = found.setdefault(name, {})
            for sample in family.samples:
                if not sample.name.endswith(("_bucket", "_sum")):
                    replica = sample.labels["replica"]
                    values[replica] = values.get(replica, 0) + sample.value
    return found


def read_access_log(session: Path) -> dict[str, dict[str, Any]]:
    """What all replicas wrote, by request."""
    lines = [
        json.loads(line)
        for path in (session / "logs").glob("worker-*.out")
        for line in path.read_text(errors="replace").splitlines()
        if line.startswith('{"time"')
    ]
    return {line["request_id"]: line for line in lines}


def grow_and_shrink(service: Service, session: Path) -> Figures:
    """A load step, and what came of each request."""
    most, drew, seconds, stormy = 0, dict[str, float](), list[float](), list[Answer]()

    def drawn() -> dict[str, float]:
        return {r: n for r, n in scrape().get("pixart_pictures_total", {}).items() if n > 0}

    async def step() -> None:
        nonlocal most, drew
        began, over = time.monotonic(), False
        call = caller(service.url)
        storm = asyncio.ensure_future(come_again(call, STORM, NUM_CALLERS, lambda: over))
        await until(lambda: count_running() == 2, "a second replica", PATIENCE_SECONDS)
        seconds.append(time.monotonic() - began)
        await until(lambda: len(drawn()) == 2, "pictures of both", PATIENCE_SECONDS)
        most, drew, over = count_running(), drawn(), True
        stormy.extend(await storm)
        began = time.monotonic()
        await until(lambda: count_running() == 1, "one to leave", PATIENCE_SECONDS)
        seconds.append(time.monotonic() - began)
        await asyncio.sleep(5)  # for what it had accepted

    answers = call_while(service, 2, step) + stormy
    failed = [a for a in answers if not a.is_good]
    logged = read_access_log(session)
    missing = [a for a in answers if a.headers.get("x-request-id") not in logged]
    text = json.dumps(list(logged.values()))
    told = {a.ask.prompt for a in answers if a.ask.prompt in text}
    strange = set(scrape()) - {meter.name for meter in METERS}
    print(f"scaling    1 -> {most} in {seconds[0]:.0f} s -> 1 in {seconds[1]:.0f} s; "
          f"{len(answers)} pictures, {len(failed)} failed; by the end of the storm the two had "
          f"drawn {sorted(drew.values())}; the log's last line: {list(logged.values())[-1:]}",
          flush=True)  # fmt: skip
    return {
        "replicas_under_load": figure(most, 2),
        "replicas_that_drew": figure(len(drew), 2),
        "scaling_failures": figure(len(failed), 0, at_most=True),
        "requests_not_in_the_access_log": figure(len(missing), 0, at_most=True),
        "prompts_in_the_access_log": figure(len(told), 0, at_most=True),
        "metrics_not_in_the_table": figure(len(strange), 0, at_most=True),
    }


def lose_the_registry(service: Service, root: Path, session: Path) -> Figures:
    """It fails whoever asks for a while; the replica says so, and draws on."""
    before = {p.pid for p in service.replicas()}

    def rename(table: str, name: str) -> None:
        with closing(sqlite3.connect(root / "mlflow.db", timeout=30)) as database, database:
            database.execute(f"ALTER TABLE {table} RENAME TO {name}")

    def noticed() -> bool:
        logs = (session / "logs").glob("worker-*.err")
        return any("cannot follow" in path.read_text(errors="replace") for path in logs)

    async def wait() -> None:
        await asyncio.to_thread(rename, "registered_models", "hidden")
        await until(noticed, "somebody to miss the registry")
        await asyncio.sleep(GIVEN_UP_SECONDS)
        await asyncio.to_thread(rename, "hidden", "registered_models")

    answers = call_while(service, 2, wait)
    failed = sum(not a.is_good for a in answers)
    replaced = len(before - {p.pid for p in service.replicas()})
    print(f"registry   away: {len(answers)} pictures, {failed} failed, {replaced} replaced",
          flush=True)  # fmt: skip
    return {
        "failures_without_a_registry": figure(failed, 0, at_most=True),
        "replicas_replaced_without_a_registry": figure(replaced, 0, at_most=True),
    }


def block_the_engine(service: Service) -> Figures:
    """A step that takes minutes, until another replica draws instead."""
    before = {p.pid for p in service.replicas()}
    began = time.monotonic()
    took = float("inf")

    async def one(size: str) -> Answer:
        turn = 0

        def stop() -> bool:
            nonlocal turn
            turn += 1
            return turn > 1

        [answer] = await come_again(caller(service.url, size=size), STORM, 1, stop)
        return answer

    async def work() -> tuple[Answer, Answer]:
        nonlocal took
        blocking = asyncio.ensure_future(one("2048x2048"))
        await until(
            lambda: service.replicas() and not before & {p.pid for p in service.replicas()},
            "another replica", PATIENCE_SECONDS,
        )  # fmt: skip
        await until(lambda: count_running() == 1, "it to run", PATIENCE_SECONDS)
        took = time.monotonic() - began
        return await blocking, await one("auto")

    blocked, after = asyncio.run(work())
    print(f"stuck      replaced after {took:.0f} s; the picture that blocked it: {blocked.status}, "
          f"the next: {after.status} {after.error}", flush=True)  # fmt: skip
    return {
        "seconds_until_a_stuck_replica_was_replaced": figure(
            took,
            90,
            at_most=True,
            digits=0,  # half of which a new one needs to start
        ),
        "pictures_after_a_stuck_replica": figure(after.is_good, 1),
    }


def main() -> int:
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    quiet_environment()
    with tempfile.TemporaryDirectory() as folder, local_ray(Path(folder) / "logs") as scratch:
        root, session = Path(folder) / "models", scratch / "ray" / "session_latest"
        root.mkdir()
        service = Service(
            register_models(root, 1), max_rows=8, max_queued=64, max_replicas=2, max_side=2048,
            target_wait_seconds=3, upscale_delay_seconds=2, downscale_delay_seconds=5,
            stall_seconds=STALL_SECONDS, max_wait_seconds=86_400,  # else 3. is refused at once
        )  # fmt: skip
        figures = grow_and_shrink(service, session)
        figures |= lose_the_registry(service, root, session)
        figures |= block_the_engine(service)
        stop()
    for name, value in figures.items():
        print(f"{name:45} {value}")
    print(json.dumps(figures))
    return 0 if all(value["ok"] for value in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
