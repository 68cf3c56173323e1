"""The drawing service against what one would put on Ray Serve without it, under the same callers.

    python tests/benchmarks/bench_serving.py [--quick]

Three deployments of one replica and one thread each serve the same weights (the demo's network,
random weights) behind the same proxy, one after the other under load:

``ours``     the drawing service
``batched``  ``@serve.batch`` around diffusers' pipeline: what came together and agrees in steps and
             scale is drawn in one call
``plain``    the tutorial's: a call of diffusers' pipeline a request

Callers want 8 to 40 steps and three guidance scales, mixed. Saturation is what a deployment draws
a second while 64 callers ask without a pause. Then callers come at random, not waiting for each
other (Poisson): at 70 % of the better peer's saturation, where latencies are compared; and at
higher rates, to find what ours sustains with no worse a p95 than that peer has there.
Last, row-steps a second of the saturated service beside those of a bare loop over the network's
batch, in a process with one thread: what HTTP, Serve, text, decoding and encoding cost together.
They cost the same milliseconds for any network: with the demo's, of 2 ms a row-step, that is
another share than with one that services draw with. So it is measured with the smallest published
one too (S/2, 30 M parameters), on the demo's small latents.

``--quick`` takes about 8 minutes on 2 cores, a full run 19, which writes results/; ``--overhead``
alone 7, which writes its own. The last line is one JSON object of figures and bars.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from ray import serve

from pixart_cluster.local import local_ray, quiet_environment
from pixart_cluster.server import free_port
from pixart_models.drawing import load_drawer
from pixart_models.export import export_pipeline
from pixart_serve.app import start, stop
from pixart_serve.prompts import PromptFeatures
from pixart_serve.rows import DrawRequest, LoadedVersion, Ticket, begin_rows, step_rows
from pixart_serve.settings import ServeSettings

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.serving_peers import Batched, Plain
from recording import figure, record
from serving_load import (
    Answer,
    Ask,
    caller,
    come_again,
    come_at_random,
    draw_asks,
    quantile,
    register_models,
)

NUM_CALLERS = 64
MAX_ROWS = 32
SHARE = 0.7  # of the better peer's saturation, where latencies are compared
WARM_SECONDS = 8.0
Figures = dict[str, Any]


def saturate(url: str, seconds: float, warm: float = WARM_SECONDS) -> tuple[float, float]:
    """Pictures and row-steps a second, with as many callers as there is room for."""
    began = time.monotonic()
    end = began + warm + seconds
    answers = asyncio.run(
        come_again(caller(url), draw_asks(1, 1000), NUM_CALLERS, lambda: time.monotonic() > end)
    )
    assert all(answer.is_good for answer in answers), [a.error or a.body for a in answers][:3]
    done = [a for a in answers if began + warm < a.asked_at + a.seconds <= end]
    return len(done) / seconds, sum(a.ask.row_steps for a in done) / seconds


def load(url: str, per_second: float, seconds: float, seed: int = 2) -> list[Answer]:
    """Callers that come at random for that long; the first ones warm up and do not count."""
    asks = draw_asks(seed, round(per_second * seconds))
    answers = asyncio.run(come_at_random(caller(url), asks, per_second, seed))
    return answers[len(answers) // 8 :]


def p95(answers: Sequence[Answer]) -> float:
    """Seconds; a failed request took forever."""
    return quantile([a.seconds if a.is_good else float("inf") for a in answers], 0.95)


def find_rate(url: str, low: float, high: float, budget: float, seconds: float) -> float:
    """The highest rate found by halving at which the p95 is within ``budget`` seconds.

    ``low`` is sustained; ``high`` is saturation, beyond which queues grow as long as one waits.
    """
    for _ in range(4):
        rate = (low + high) / 2
        found = p95(load(url, rate, seconds))
        print(f"{'ours':10} {rate:6.2f} a second: p95 {found:.2f} s", flush=True)
        low, high = (rate, high) if found <= budget else (low, rate)
    return low


def step_bare(folder: str, seconds: float, told: Any) -> None:
    """Row-steps a second of a full batch that goes round and round."""
    torch.set_num_threads(1)
    drawer = load_drawer(Path(folder))
    version, asks = LoadedVersion(1, drawer), draw_asks(3, 10_000)
    side, taken, used = drawer.config.resolution, list[Ask](), 0
    for ask in asks:  # a mix as callers want it, that fills the batch
        rows = 1 if ask.guidance == 1 else 2
        if used + rows <= MAX_ROWS:
            taken, used = [*taken, ask], used + rows
    requests = [DrawRequest(a.prompt, a.seed, 40, a.guidance, side, side) for a in taken]
    prompts, num_row_steps = PromptFeatures(), 0
    with torch.inference_mode():
        began = -1.0
        for turn in range(10**6):
            if turn % 40 == 0:
                tickets = [Ticket(r, None, version, None) for r in requests]  # type: ignore[arg-type]  # nobody waits
                rows_now = begin_rows(tickets, prompts)
            if turn == 10:
                began, num_row_steps = time.monotonic(), 0
            step_rows(rows_now)
            num_row_steps += used
            if turn > 10 and time.monotonic() - began > seconds:
                break
    told.put(num_row_steps / (time.monotonic() - began))


def measure_bare(folder: Path, seconds: float) -> float:
    spawn = get_context("spawn")
    told = spawn.Queue()
    process = spawn.Process(target=step_bare, args=(str(folder), seconds, told))
    process.start()
    found: float = told.get()
    process.join()
    return found


def judge_overhead(bare: Sequence[float], served: float) -> dict[str, Any]:
    print(f"{'bare':10} {bare} row-steps a second, {served:.1f} in the service", flush=True)
    return figure(1 - served / (sum(bare) / len(bare)), 0.05, at_most=True)


def measure_overhead(folder: Path, preset: str, seconds: float) -> Figures:
    """With another network, alone."""
    models, snapshot = register_models(folder, 1, preset), folder / "snapshots" / "1"
    settings = ServeSettings(port=free_port(), max_rows=MAX_ROWS, max_queued=1000)
    url = start(
        settings, registry_uri=models.uri, model_name="digits", default_steps=12,
        default_guidance=2.5,
    )  # fmt: skip
    bare = [measure_bare(snapshot, seconds / 4)]
    _, row_steps = saturate(f"{url}/v1/images/generations", seconds, seconds / 3)
    bare.append(measure_bare(snapshot, seconds / 4))
    stop()
    return {"overhead_over_bare_steps_s2": judge_overhead(bare, row_steps)}


def compare(urls: dict[str, str], snapshot: Path, seconds: float) -> Figures:
    """All that is measured, for at least ``seconds`` each."""
    bare = [measure_bare(snapshot, seconds / 2)]
    full, row_steps = dict[str, float](), dict[str, float]()
    for name, url in urls.items():
        full[name], row_steps[name] = saturate(url, seconds)
        print(f"{name:10} {full[name]:6.2f} pictures a second at most", flush=True)
    bare.append(measure_bare(snapshot, seconds / 2))
    better = max(("batched", "plain"), key=full.__getitem__)
    rate = SHARE * full[better]
    latency = {name: p95(load(urls[name], rate, 2 * seconds)) for name in (better, "ours")}
    print(f"{'at random':10} {rate:6.2f} a second: p95 {latency}", flush=True)
    sustained = find_rate(urls["ours"], rate, full["ours"], latency[better], seconds)
    return {
        "sustained_of_better_peer": figure(sustained / rate, 1.5),
        "p95_of_better_peer": figure(latency["ours"] / latency[better], 0.6, at_most=True),
        "saturation_of_better_peer": {"value": round(full["ours"] / full[better], 3)},
        "overhead_over_bare_steps": judge_overhead(bare, row_steps["ours"]),
        "pictures_a_second": {n: round(v, 3) for n, v in full.items()},
        "p95_seconds": {n: round(v, 3) for n, v in latency.items()},
        "rate": round(rate, 3), "better_peer": better,
    }  # fmt: skip


def wait_for(url: str) -> None:
    """Until a peer has drawn its first picture."""
    body = json.dumps(Ask("a red one", 1, 2, 2.5).body).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as reply:
        assert reply.headers["content-type"] == "image/png"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--overhead", action="store_true", help="with S/2 alone")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    quiet_environment()
    with tempfile.TemporaryDirectory() as folder, local_ray(Path(folder) / "logs"):
        root, small = Path(folder), Path(folder) / "s2"
        small.mkdir()
        heavy = measure_overhead(small, "pixart-s-2-256", 24.0 if options.quick else 180.0)
        if options.overhead:
            record("serving_overhead", heavy, ("torch", "ray"))
            print(json.dumps(heavy))
            return
        models = register_models(root, 1, "digits")
        told = export_pipeline(models.drawers[1], root / "pipeline")
        settings = ServeSettings(port=free_port(), max_rows=MAX_ROWS, max_queued=1000)
        base = start(
            settings, registry_uri=models.uri, model_name="digits", default_steps=12,
            default_guidance=2.5,
        )  # fmt: skip
        urls = {"ours": f"{base}/v1/images/generations"}
        peers: dict[str, Any] = {"batched": Batched, "plain": Plain}
        for name, deployment in peers.items():
            bound = deployment.bind(str(root / "pipeline"), told)
            serve.run(bound, name=name, route_prefix=f"/{name}")
            urls[name] = f"{base}/{name}"
            wait_for(urls[name])
        figures = compare(urls, root / "snapshots" / "1", 12.0 if options.quick else 40.0) | heavy
        stop()
    if not options.quick:
        record("serving", figures, ("torch", "ray", "diffusers", "fastapi"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
