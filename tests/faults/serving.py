"""Fault campaign of the drawing service: callers notice nothing, or are told honestly.

    .venv/bin/python tests/faults/serving.py [--quick] [--only NAME,...]

A real service on a real Ray Serve, with tiny models of random weights, under callers without pause:

``swaps``     the alias moves 30 times, once to a version with a flipped bit. No request fails, and
              each picture is what the version it names draws offline
``overload``  five times what the service can draw, for two minutes, everyone with a deadline.
              Who is accepted gets it in time, who is not is told at once when to come back
``killed``    one of two replicas is killed (SIGKILL). Only what it was drawing fails, with an error
              that clients retry
``fuzz``      thousands of requests that no sensible client sends (``odd_requests``, and those that
              schemathesis makes of the service's own OpenAPI page). Each is answered, none by a 5xx

About 8 minutes on 2 cores; ``--quick`` about 3, with 6 swaps. The last line is one JSON object of
figures; the exit code is 1 when one misses its bar. Only processes that this script started are
killed.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import numpy as np
import psutil
import yarl
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent))
from faults.odd_requests import OddRequest, odd_requests
from processes import kill
from recording import figure
from serving_load import (
    Answer,
    Ask,
    Models,
    caller,
    come_again,
    come_at_random,
    draw_asks,
    quantile,
    register_models,
)
from test_serve_follower import flip_one_bit
from test_serve_snapshots import build_drawer, write_snapshot

from pixart_cluster.local import local_ray, quiet_environment
from pixart_cluster.server import free_port
from pixart_models.snapshot import WEIGHTS_FILE
from pixart_platform.tracking import Tracker
from pixart_serve.app import start, stop
from pixart_serve.settings import ServeSettings

DEADLINE_SECONDS = 6.0
LEEWAY_SECONDS = 0.5  # of a deadline: HTTP, and this process, which shares the cores
TIMES_CAPACITY = 5
Figures = dict[str, Any]


class Service:
    """The service in this Ray, with its registry; ``url`` is where pictures are asked for."""

    def __init__(self, models: Models, **settings: Any) -> None:
        self.models = models
        given = ServeSettings(port=free_port(), poll_seconds=0.5, **settings)
        self.base = start(
            given, registry_uri=models.uri, model_name="digits", default_steps=12,
            default_guidance=2.5,
        )  # fmt: skip
        self.url = f"{self.base}/v1/images/generations"

    @property
    def version(self) -> int:
        """What is live."""
        with urllib.request.urlopen(f"{self.base}/healthz", timeout=10) as reply:
            found: int = json.load(reply)["version"]
            return found

    @staticmethod
    def replicas() -> list[psutil.Process]:
        """Its replicas' processes, all below this one."""
        ours = psutil.Process().children(recursive=True)
        return [p for p in ours if p.is_running() and "ServeReplica:pixart" in _name(p)]


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


async def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> None:
    """Ask on a thread, so that the callers go on."""
    deadline = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        if time.monotonic() > deadline:
            raise SystemExit(f"waited {seconds:.0f} s for {what}")
        await asyncio.sleep(0.1)


def call_while(
    service: Service, num_callers: int, work: Callable[[], Awaitable[None]], seed: int = 1
) -> list[Answer]:
    """All answers that callers without pause got while ``work`` was done."""

    async def both() -> list[Answer]:
        done = asyncio.ensure_future(work())
        calls = come_again(caller(service.url), draw_asks(seed, 5000), num_callers, done.done)
        answers = await calls
        await done
        return answers

    return asyncio.run(both())


# --- scenarios -------------------------------------------------------------------------------


def swap(root: Path, *, quick: bool) -> Figures:
    """The alias moves under load."""
    num_swaps, quiet_seconds = (6, 8.0) if quick else (30, 30.0)
    models = register_models(root, num_swaps + 1)
    service = Service(models, max_rows=16)
    refused = register_damaged(models, root)

    async def wait() -> None:
        await asyncio.sleep(quiet_seconds)

    async def move() -> None:
        numbers = sorted(set(models.drawers) - {1})
        for k, number in enumerate(numbers):
            if k == num_swaps // 2:
                before = await asyncio.to_thread(lambda: service.version)
                await promote(refused)
                await asyncio.sleep(3)
                assert await asyncio.to_thread(lambda: service.version) == before, "it went live"
            await promote(number)
            await until(lambda number=number: service.version == number, f"version {number}")  # type: ignore[misc]  # mypy sees no default
            await asyncio.sleep(0.5)

    async def promote(number: int) -> None:
        version = await asyncio.to_thread(models.registry.get, str(number))
        await asyncio.to_thread(models.registry.set_alias, "champion", version)

    call_while(service, 4, wait, seed=9)  # warms up
    calm = call_while(service, 4, wait, seed=2)
    during = call_while(service, 4, move, seed=3)
    stop()
    failed = [a for a in during if not a.is_good]
    print(f"swaps      {len(during)} pictures, {len(failed)} failed: {_reasons(failed)}")
    versions = {a.body["data"][0]["model_version"] for a in during if a.is_good}
    late = [quantile([a.seconds for a in answers], 0.99) for answers in (during, calm)]
    return {
        "swaps": figure(len(versions) - 1, num_swaps),
        "swap_failures": figure(len(failed), 0, at_most=True),
        "swap_pictures_not_its_versions": figure(
            count_foreign(models, during), 0, at_most=True
        ),
        "corrupted_version_seen": figure(int(refused in versions), 0, at_most=True),
        "swap_p99_of_calm": figure(late[0] / late[1], 1.5, at_most=True),
        "swap_pictures": {"value": len(during)},
    }  # fmt: skip


def register_damaged(models: Models, root: Path) -> int:
    """A version whose weights have one flipped bit."""
    folder = write_snapshot(root / "snapshots" / "damaged", build_drawer(99))
    tracker = Tracker.start(models.uri, "serving", "damaged", "damaged", artifacts=root)
    version = models.registry.register(folder, tracker.run_id, {})
    tracker.finish()
    flip_one_bit(folder / WEIGHTS_FILE)
    return version.number


def count_foreign(models: Models, answers: Sequence[Answer]) -> int:
    """Pictures that are not what the version they name draws, alone and offline.

    One grey level is a rounding of what is equal to 1e-4.
    """
    alike = defaultdict(list)
    for answer in answers:
        if answer.is_good:
            (entry,) = answer.body["data"]
            alike[entry["model_version"], answer.ask.steps].append((answer.ask, entry))
    foreign = 0
    for (number, steps), drawn in alike.items():
        wanted = models.drawers[number].draw(
            [ask.prompt for ask, _ in drawn], [ask.seed for ask, _ in drawn], steps=steps,
            guidance=[ask.guidance for ask, _ in drawn],
        )  # fmt: skip
        for picture, (_, entry) in zip(wanted, drawn, strict=True):
            file = io.BytesIO(base64.b64decode(entry["b64_json"]))
            found = np.asarray(Image.open(file), dtype=int)
            foreign += int(np.abs(found - picture).max() > 1)
    return foreign


def overload(root: Path, *, quick: bool) -> Figures:
    """Far more callers than there is room for."""
    seconds = 20.0 if quick else 120.0
    service = Service(register_models(root, 1, "digits"), max_rows=16, max_queued=64)
    (replica,) = service.replicas()

    async def wait() -> None:
        await asyncio.sleep(15)

    calm = call_while(service, 24, wait)
    capacity = len([a for a in calm if a.seconds + a.asked_at < calm[0].asked_at + 15]) / 15
    memory = list[int]()

    async def storm() -> list[Answer]:
        async def weigh() -> None:
            while True:
                memory.append(replica.memory_info().rss)
                await asyncio.sleep(1)

        weighing = asyncio.ensure_future(weigh())
        rate = TIMES_CAPACITY * capacity
        asks = draw_asks(5, round(rate * seconds))
        call = caller(service.url, max_wait_seconds=DEADLINE_SECONDS)
        try:
            return await come_at_random(call, asks, rate, 5)
        finally:
            weighing.cancel()

    answers = asyncio.run(storm())
    ended = time.monotonic()
    alone = asyncio.run(come_at_random(caller(service.url), draw_asks(6, 1), 100.0, 6))
    recovered = time.monotonic() - ended if alone[0].is_good else float("inf")
    stop()
    good = [a for a in answers if a.is_good]
    refused = [a for a in answers if a.status in (429, 503)]
    told = [a for a in refused if a.headers.get("retry-after", "").isdigit()]
    late = [a for a in good if a.seconds > DEADLINE_SECONDS + LEEWAY_SECONDS]
    half = len(memory) // 2
    print(
        f"overload   {len(answers)} asked, {capacity:.1f} a second is the capacity: {len(good)} "
        f"drawn, {len(refused)} refused, {len(late)} late, others: "
        f"{_reasons([a for a in answers if a not in good and a not in refused])}; refusals took "
        f"{quantile([a.seconds for a in refused], 0.5):.3f} s, at the 99th "
        f"{quantile([a.seconds for a in refused], 0.99):.2f} s"
    )
    return {
        "overload_asked_of_capacity": {"value": round(len(answers) / seconds / capacity, 2)},
        "overload_neither_drawn_nor_refused": figure(
            len(answers) - len(good) - len(refused), 0, at_most=True
        ),
        "overload_drawn_late_share": figure(len(late) / max(len(good), 1), 0.01, at_most=True),
        "overload_refused_without_retry_after": figure(
            len(refused) - len(told), 0, at_most=True
        ),
        "overload_drawn_of_capacity": figure(len(good) / seconds / capacity, 0.8),
        "overload_memory_growth": figure(
            max(memory[half:]) / max(memory[:half]) - 1, 0.05, at_most=True
        ),
        "overload_recovery_seconds": figure(recovered, 10, at_most=True),
    }  # fmt: skip


def lose_replica(root: Path, *, quick: bool) -> Figures:
    """A replica is killed while it draws."""
    num_callers = 8
    service = Service(register_models(root, 1), max_rows=16, num_replicas=2)
    before = service.replicas()
    assert len(before) == 2, before
    moment = 0.0

    async def strike() -> None:
        nonlocal moment
        await asyncio.sleep(5)
        moment = time.monotonic()
        kill(before[0])
        old = {p.pid for p in before}
        await until(lambda: any(p.pid not in old for p in service.replicas()), "another replica")
        await asyncio.sleep(5 if quick else 20)

    answers = call_while(service, num_callers, strike)
    stop()
    failed = [a for a in answers if not a.is_good]
    in_flight = [a for a in failed if a.asked_at <= moment <= a.asked_at + a.seconds]
    retried = [a for a in failed if a.status in (429, 500, 502, 503)]
    refuses = [a for a in failed if a.headers.get("x-should-retry") == "false"]
    print(f"killed     {len(answers)} pictures, {len(failed)} failed: {_reasons(failed)}")
    return {
        "killed_failures": figure(len(failed), num_callers, at_most=True),
        "killed_failures_not_in_flight": figure(
            len(failed) - len(in_flight), 0, at_most=True
        ),
        "killed_failures_not_retried": figure(
            len(failed) - len(retried) + len(refuses), 0, at_most=True
        ),
    }  # fmt: skip


def fuzz(root: Path, *, quick: bool) -> Figures:
    """Bad requests, by our own generator and by schemathesis."""
    service = Service(register_models(root, 1), max_rows=16, max_queued=64)
    (replica,) = service.replicas()
    requests = list(odd_requests(7, 1000 if quick else 4000))
    warm = len(requests) // 4
    answers = asyncio.run(send(service.base, requests[:warm]))
    memory = replica.memory_info().rss
    answers += asyncio.run(send(service.base, requests[warm:]))
    others = run_schemathesis(service.base, root / "requests.har", 60 if quick else 400)
    growth = replica.memory_info().rss / memory - 1
    alone = asyncio.run(come_at_random(caller(service.url), draw_asks(6, 1), 100.0, 6))
    stop()
    faults = [a for a in answers if a.status >= 500]
    unanswered = [a for a in answers if not a.status]
    shapeless = [a for a in answers if 400 <= a.status < 500 and not _has_reason(a)]
    print(
        f"fuzz       {len(answers)} odd requests {dict(Counter(a.status for a in answers))}, "
        f"{sum(others.values())} by schemathesis {dict(others)}; faults {_reasons(faults)}, "
        f"unanswered {_reasons(unanswered)}, without a reason {_reasons(shapeless)}"
    )
    return {
        "fuzz_requests": figure(len(answers) + sum(others.values()), 1000 if quick else 5000),
        "fuzz_server_errors": figure(
            len(faults) + sum(n for status, n in others.items() if status >= 500), 0, at_most=True
        ),
        "fuzz_unanswered": figure(len(unanswered) + others[0], 0, at_most=True),
        "fuzz_refused_without_reason": figure(len(shapeless), 0, at_most=True),
        "fuzz_memory_growth": figure(growth, 0.1, at_most=True),
        "fuzz_draws_afterwards": figure(int(alone[0].is_good), 1),
    }  # fmt: skip


async def send(base: str, requests: Sequence[OddRequest]) -> list[Answer]:
    """All answers, 16 at a time."""
    turn = asyncio.Semaphore(16)

    async def one(session: aiohttp.ClientSession, odd: OddRequest) -> Answer:
        async with turn:
            answer = Answer(Ask(odd.body[:300].decode(errors="replace"), 0, 0, 0), time.monotonic())
            url = yarl.URL(base + quote(odd.path, safe="/%?=&"), encoded=True)
            try:
                async with session.request(
                    odd.method, url, data=odd.body, headers=odd.headers,
                    timeout=aiohttp.ClientTimeout(total=30), allow_redirects=False,
                ) as reply:  # fmt: skip
                    answer.body = await reply.read()
                    answer.status = reply.status
                    if odd.method == "HEAD":
                        answer.body = b'{"error": {"message": "left out"}}'
            except (aiohttp.ClientError, TimeoutError) as error:
                answer.error = f"{error!r} {odd.method} {odd.path[:60]} {odd.headers}"[:300]
            return answer

    async with aiohttp.ClientSession() as session:
        return list(await asyncio.gather(*(one(session, odd) for odd in requests)))


def _has_reason(answer: Answer) -> bool:
    """Whether it is OpenAI's error object, with a sentence."""
    try:
        return bool(json.loads(answer.body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return False


def run_schemathesis(base: str, har: Path, num_examples: int) -> Counter[int]:
    """How many of its requests were answered by which status; 0 is none."""
    command = [
        str(Path(sys.executable).parent / "schemathesis"), "run", f"{base}/openapi.json",
        "--mode", "all", "--max-examples", str(num_examples), "--continue-on-failure",
        "--checks", "not_a_server_error", "--request-timeout", "30", "--workers", "2",
        "--report", "har", "--report-har-path", str(har),
    ]  # fmt: skip
    subprocess.run(command, check=False, capture_output=True, timeout=1800, cwd=har.parent)
    entries = json.loads(har.read_text())["log"]["entries"]
    return Counter(int(entry["response"]["status"]) for entry in entries)


def _reasons(answers: Sequence[Answer]) -> dict[str, int]:
    return dict(Counter(a.error or f"{a.status} {a.body}"[:200] for a in answers))


SCENARIOS = {"swaps": swap, "overload": overload, "killed": lose_replica, "fuzz": fuzz}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", default="", help="scenarios: " + ", ".join(SCENARIOS))
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    quiet_environment()
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder, local_ray(Path(folder) / "logs"):
        for name in options.only.split(",") if options.only else SCENARIOS:
            root = Path(folder) / name
            root.mkdir()
            figures |= SCENARIOS[name](root, quick=options.quick)
    for name, value in figures.items():
        print(f"{name:40} {value}")
    print(json.dumps(figures))
    return 0 if all(value.get("ok", True) for value in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
