"""The data plane: the Ray Data pipeline against a bare loop, and tables against other formats.

    python tests/benchmarks/bench_data.py [--quick] [--only PART ...]

Parts: ``pipeline`` (encoding with the same models, readers and writers by a bare loop on one
thread, by one actor, by two; rates between the first finished partition and the last, so Ray's
start is not in them), ``reading`` (batches of moments and text features as a training step takes
them, against webdataset and Hugging Face datasets on the same samples, each shuffled, best of one
process and two workers; coming back in the middle of an epoch; and bytes of a sample against one
file a sample, fp32, padded to 120 tokens), ``order`` (the first batch of a billion samples) and
``memory`` (of a run over a million rows). Peers need ``pip install webdataset datasets``.

``--quick`` shortens all parts to about 3 minutes together on 2 cores; only a full run of all parts
writes results/. The last line is one JSON object of figures and bars.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, Protocol

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from pixart_jobs import caption, encode, ingest, selection
from pixart_jobs.recipe import Recipe
from pixart_jobs.sources import open_source
from pixart_jobs.stage_task import LatentTask
from pixart_models.config import get_preset
from pixart_models.snapshot import SnapshotConfig
from pixart_platform.batches import Condition, RowIndex, map_ahead
from pixart_platform.order import Order
from pixart_platform.partitions import Sink, run_partitions
from pixart_platform.seeds import SampleDraws
from pixart_platform.storage import Folder, open_folder
from pixart_platform.tables import SCHEMAS, Table, TableWriter

sys.path.insert(0, str(Path(__file__).parents[1]))
from recording import figure, record

TEXT_WIDTH = 4096
PADDED_TOKENS = 120
Figures = dict[str, Any]


@contextmanager
def ray_session() -> Iterator[None]:
    from pixart_cluster.local import local_ray, quiet_environment

    quiet_environment()
    with tempfile.TemporaryDirectory() as logs, local_ray(Path(logs)):
        yield


# --- the pipeline against a bare loop --------------------------------------------------------


def write_pictures(folder: Path, count: int) -> None:
    """Noise over gradients: JPEGs of 512 pixels that decode like photographs."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 512)
    for i in range(count):
        noise = rng.integers(0, 55, (64, 64, 3)).astype(np.uint8)
        texture = np.asarray(Image.fromarray(noise).resize((512, 512), Image.Resampling.BICUBIC))
        picture = texture + np.roll(ramp, 8 * i)[None, :, None]
        Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i:05d} a grey sea.jpg")


def write_autoencoder(folder: Path) -> None:
    """Random weights, heavy enough that the model is the bottleneck, as it is in earnest."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(32, 64, 64, 64), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, latent_channels=4,
        norm_num_groups=8, mid_block_add_attention=False,
    ).save_pretrained(folder)  # fmt: skip


def prepare_tables(root: Path, num_partitions: int, rows: int) -> tuple[Recipe, dict[str, Table]]:
    pictures = root / "pictures"
    pictures.mkdir()
    write_pictures(pictures, num_partitions * rows)
    write_autoencoder(root / "autoencoder")
    stage = {
        "condition_on": "text", "start_from": "scratch", "resolution": 256, "images": 64,
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    recipe = Recipe.model_validate({
        "name": "bench", "data": {"source": f"folder:{pictures}", "partition_rows": rows},
        "encode": {"autoencoder": str(root / "autoencoder"), "resolutions": [256],
                   "batch_images": 4, "num_readers": 1},
        "stages": {"align": stage},
    })  # fmt: skip
    store = open_folder(root / "tables")
    source = open_source(recipe.data, recipe.seed, store)
    writer = ingest.plan(recipe, store, source)
    list(ingest.run(recipe, source, writer))
    tables = {"images": writer.commit()}
    writer = selection.plan(recipe, store, tables["images"])
    list(selection.run(recipe, tables["images"], writer))
    tables["selection"] = writer.commit()
    writer = caption.plan(recipe, store, tables)
    list(caption.run(recipe, tables, writer))
    return recipe, tables | {"captions": writer.commit()}


def encode_writers(
    recipe: Recipe, tables: dict[str, Table], name: str
) -> tuple[TableWriter, dict[int, TableWriter]]:
    root: Folder = tables["images"].folder.parent.parent / name
    return encode.plan(recipe, root, tables)


def bare_loop(recipe: Recipe, tables: dict[str, Table], name: str) -> float:
    """Rows per second of the same reader, model and writer, called in turn on one thread."""
    text, latents = encode_writers(recipe, tables, name)
    shapes = encode.choose_shapes(recipe.encode, patch=2)
    read = encode._Read(
        {kind: t.folder.uri for kind, t in tables.items()}, shapes, refuse_extreme=False
    )
    model = encode._Encode(recipe.encode, tuple(shapes), text=True)
    sinks = encode.make_sinks(text, latents)
    ends = []
    for k in range(text.num_partitions):
        rows = model(read(k))
        for sink in sinks:
            sink.write(k, rows)
        ends.append(time.perf_counter())
    return rate(ends, recipe.data.partition_rows)


def ray_pipeline(recipe: Recipe, tables: dict[str, Table], name: str, actors: int) -> float:
    settings = recipe.encode.model_copy(update={"num_workers": actors})
    recipe = recipe.model_copy(update={"encode": settings})
    text, latents = encode_writers(recipe, tables, name)
    ends = [time.perf_counter() for _ in encode.run(recipe, tables, text, latents)]
    return rate(ends, recipe.data.partition_rows)


def rate(ends: list[float], rows: int) -> float:
    return (len(ends) - 1) * rows / (ends[-1] - ends[0])


def bench_pipeline(quick: bool) -> Figures:
    rounds, num_partitions = (1, 8) if quick else (3, 16)
    torch.set_num_threads(1)  # as an actor has
    bare, one, two = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder, ray_session():
        recipe, tables = prepare_tables(Path(folder), num_partitions, rows=8)
        for n in range(rounds):
            bare.append(bare_loop(recipe, tables, f"bare{n}"))
            one.append(ray_pipeline(recipe, tables, f"one{n}", 1))
            two.append(ray_pipeline(recipe, tables, f"two{n}", 2))
            print(f"pipeline   bare {bare[-1]:.1f}, 1 actor {one[-1]:.1f}, 2 {two[-1]:.1f} rows/s")
    return {
        "pipeline_of_bare_loop": figure(
            median(o / b for o, b in zip(one, bare, strict=True)), 0.95
        ),
        "two_actors_of_one": figure(median(t / o for t, o in zip(two, one, strict=True)), 1.8),
    }


# --- reading batches -------------------------------------------------------------------------


def caption_lengths(count: int) -> list[int]:
    """Tokens of dense captions: 60 on average, at most 120, as in bench_network."""
    draw = 60 + 20 * np.random.default_rng(0).standard_normal(count)
    return [int(length) for length in np.clip(draw.round(), 8, PADDED_TOKENS)]


def make_samples(count: int) -> list[tuple[bytes, bytes, int]]:
    """(moments, features, tokens) of 256-pixel pictures and their captions."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 2**16, 8 * 32 * 32 + PADDED_TOKENS * TEXT_WIDTH, np.uint16)
    noise &= 0xBFFF  # no infinities
    found: list[tuple[bytes, bytes, int]] = []
    for tokens in caption_lengths(count):
        moments = rng.standard_normal(8 * 32 * 32).astype(np.float16).tobytes()
        found.append((moments, np.roll(noise, len(found))[: tokens * TEXT_WIDTH].tobytes(), tokens))
    return found


def write_tables(root: Path, samples: list[tuple[bytes, bytes, int]]) -> dict[str, Any]:
    store, rows = open_folder(root), 512
    parts = [str(k) for k in range(-(-len(samples) // rows))]
    images = TableWriter.under(store, "images", "images/2", {}, {}, parts)
    for k in range(len(parts)):
        ids = [f"{i:016x}" for i in range(k * rows, min((k + 1) * rows, len(samples)))]
        empty = {"status": "ok", "source": "", "uri": "", "bytes": b"", "width": 256, "height": 256}
        blank = empty | dict.fromkeys(("raw_caption", "label", "quality", "phash", "truth"))
        images.write(k, pa.Table.from_pylist([blank | {"id": i} for i in ids], SCHEMAS["images/2"]))
    table = images.commit()
    text = TableWriter.under(store, "text", "text/2", {}, {"images": table})
    latents = TableWriter.under(store, "latents", "latents/1", {}, {"images": table})
    for k in range(len(parts)):
        chosen = samples[k * rows : (k + 1) * rows]
        ids = table.read(k, ["id", "status"])
        moments, features, tokens = zip(*chosen, strict=True)
        text.write(k, ids.append_column("features", pa.array(features, pa.large_binary()))
                   .append_column("num_tokens", pa.array([[n] for n in tokens])))  # fmt: skip
        latents.write(k, pa.table({
            "id": ids["id"], "status": ids["status"], "moments": pa.array(moments, pa.binary()),
            **{name: pa.array([size] * len(chosen)) for name, size in
               (("bucket_h", 32), ("bucket_w", 32), ("width", 256), ("height", 256))},
        }))  # fmt: skip
    return {
        "images": (table, []), "text": (text.commit(), ["features", "num_tokens"]),
        "latents": (latents.commit(), ["moments", "bucket_h", "bucket_w"]),
    }  # fmt: skip


def our_batches(tables: dict[str, Any], batch: int, first: int = 0) -> Iterator[int]:
    """Tokens of each batch, read and decoded as the training loop does."""
    index = RowIndex(tables, Condition(()))
    order = Order.over(index.counts, batch_images=batch, seed=0)
    config = SnapshotConfig(
        network=get_preset("pixart-xl-2-256"), objective="iddpm", resolution=256, autoencoder="",
        autoencoder_digest="", text_encoder="", text_encoder_digest="",
    )  # fmt: skip
    task = LatentTask(
        snapshot=config, latent_scale=1.0, null_features=torch.zeros(1, TEXT_WIDTH),
        condition_drop=0.1, flow_location=0.0, device=torch.device("cpu"),
    )  # fmt: skip

    def make(n: int) -> int:
        bucket, samples = order.batch(n)
        draws = SampleDraws(0, list(range(n * batch, (n + 1) * batch)))
        decoded = task.decode(index.fetch(bucket, samples), draws)
        assert decoded.features is not None
        return len(decoded.features)

    num_batches = sum(int(c.sum()) for c in index.counts.values()) // batch
    yield from map_ahead(make, range(first, num_batches), 4)


def to_tensors(moments: list[bytes], features: list[bytes]) -> tuple[Tensor, list[Tensor]]:
    """What a peer's batch must become: moments (B, 8, 32, 32) fp32, features (L, 4096) bf16."""
    stacked = np.stack([np.frombuffer(m, np.float16) for m in moments]).reshape(-1, 8, 32, 32)
    texts = [torch.frombuffer(bytearray(f), dtype=torch.bfloat16) for f in features]
    return torch.from_numpy(stacked).float(), [t.view(-1, TEXT_WIDTH) for t in texts]


def collate(rows: list[dict[str, bytes]]) -> tuple[Tensor, list[Tensor]]:
    return to_tensors([row["moments"] for row in rows], [row["features"] for row in rows])


def count_tokens(batch: tuple[Tensor, list[Tensor]]) -> int:
    return sum(len(text) for text in batch[1])


class Peer(Protocol):
    """Another format with the same samples in it, read shuffled."""

    name: str

    def batches(self, batch: int, workers: int) -> Iterator[int]: ...


class WebDatasetPeer:
    name = "webdataset"

    def __init__(self, root: Path, samples: list[tuple[bytes, bytes, int]]) -> None:
        import webdataset

        root.mkdir()
        self.shards = [str(root / f"{k:05d}.tar") for k in range(-(-len(samples) // 512))]
        for k, shard in enumerate(self.shards):
            with webdataset.TarWriter(shard) as tar:
                for i, (moments, features, _) in enumerate(samples[k * 512 : (k + 1) * 512]):
                    tar.write({"__key__": f"{k}-{i}", "moments": moments, "features": features})

    def batches(self, batch: int, workers: int) -> Iterator[int]:
        import webdataset

        data = (
            webdataset.WebDataset(self.shards, shardshuffle=len(self.shards), seed=0)
            .shuffle(1000).to_tuple("moments", "features").batched(batch, collation_fn=_transpose)
            .map(_from_lists)
        )  # fmt: skip
        loader = webdataset.WebLoader(data, batch_size=None, num_workers=workers)
        yield from map(count_tokens, loader)


def _transpose(rows: list[tuple[bytes, bytes]]) -> tuple[list[bytes], list[bytes]]:
    moments, features = zip(*rows, strict=True)
    return list(moments), list(features)


def _from_lists(columns: tuple[list[bytes], list[bytes]]) -> tuple[Tensor, list[Tensor]]:
    return to_tensors(*columns)


class HuggingFacePeer:
    name = "datasets"

    def __init__(self, root: Path, samples: list[tuple[bytes, bytes, int]]) -> None:
        import datasets

        datasets.disable_progress_bars()
        columns = {
            "moments": [moments for moments, _, _ in samples],
            "features": [features for _, features, _ in samples],
        }
        kinds = {"moments": datasets.Value("binary"), "features": datasets.Value("large_binary")}
        datasets.Dataset.from_dict(columns, datasets.Features(kinds)).save_to_disk(root)
        self.root = root

    def batches(self, batch: int, workers: int) -> Iterator[int]:
        import datasets

        data = datasets.load_from_disk(self.root).shuffle(seed=0)
        loader = DataLoader(data, batch, num_workers=workers, collate_fn=collate, drop_last=True)
        yield from map(count_tokens, loader)


def samples_per_second(batches: Callable[[], Iterator[int]], batch: int) -> float:
    started, count = time.perf_counter(), 0
    for _ in batches():
        count += 1
    return count * batch / (time.perf_counter() - started)


def bench_reading(quick: bool) -> Figures:
    count, batch, rounds = (1536, 64, 2) if quick else (6144, 64, 3)
    best: dict[str, list[float]] = {"ours": [], "webdataset": [], "datasets": []}
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(count)
        tables = write_tables(Path(folder) / "tables", samples)
        peers: tuple[Peer, ...] = (
            WebDatasetPeer(Path(folder) / "webdataset", samples),
            HuggingFacePeer(Path(folder) / "datasets", samples),
        )
        ours = sum(len(m) + len(f) + 4 for m, f, _ in samples)
        stored = sum(f.num_bytes for name in ("text", "latents")
                     for f in tables[name][0].manifest.files)  # fmt: skip
        released = released_bytes(Path(folder), samples)
        del samples
        for _ in range(rounds):
            best["ours"].append(samples_per_second(lambda: our_batches(tables, batch), batch))
            for peer in peers:
                rates = [
                    samples_per_second(partial(peer.batches, batch, workers), batch)
                    for workers in (0, 2)
                ]
                best[peer.name].append(max(rates))
        middle = count // batch // 2
        resume = first_after(lambda: our_batches(tables, batch, first=middle), 1)
        reread = first_after(lambda: peers[0].batches(batch, 0), middle + 1)
    print("reading    " + ", ".join(f"{n} {median(r):,.0f}" for n, r in best.items()) + " rows/s")
    print(f"resume     ours {resume:.2f} s, webdataset reads again for {reread:.2f} s")
    per_sample = stored / count
    print(f"bytes      {per_sample:,.0f} a sample ({ours / count:,.0f} of payload), one file a "
          f"sample {released:,.0f}")  # fmt: skip
    return {
        "rows_of_webdataset": ratio(best, "webdataset"),
        "rows_of_datasets": ratio(best, "datasets"),
        "resume_seconds": figure(resume, 1.0, at_most=True),
        "bytes_below_released": figure(released / per_sample, 4.0),
    }


def ratio(rates: dict[str, list[float]], peer: str) -> Figures:
    return figure(median(a / b for a, b in zip(rates["ours"], rates[peer], strict=True)), 2.0)


def first_after(batches: Callable[[], Iterator[int]], count: int) -> float:
    """Seconds until ``count`` batches are there."""
    started = time.perf_counter()
    for n, _ in enumerate(batches(), start=1):
        if n == count:
            break
    return time.perf_counter() - started


def released_bytes(root: Path, samples: list[tuple[bytes, bytes, int]]) -> float:
    """Bytes a sample as PixArt's own tools store it: an npz of features and mask, an npy."""
    place = root / "released"
    place.mkdir()
    chosen = samples[:8]
    for i, (moments, features, tokens) in enumerate(chosen):
        text = torch.zeros(1, PADDED_TOKENS, TEXT_WIDTH)
        values = torch.frombuffer(bytearray(features), dtype=torch.bfloat16)
        text[0, :tokens] = values.view(-1, TEXT_WIDTH)
        mask = (np.arange(PADDED_TOKENS) < tokens)[None].astype(np.int64)
        np.savez(place / f"{i}.npz", caption_feature=text.numpy(), attention_mask=mask)
        np.save(place / f"{i}.npy", np.frombuffer(moments, np.float16).astype(np.float32))
    return sum(path.stat().st_size for path in place.iterdir()) / len(chosen)


# --- the first batch of a billion samples, and memory ----------------------------------------


def peak_of_this_process() -> int:
    """Most KiB held so far. (What getrusage tells is handed down from the parent, through exec.)"""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1])


def first_batch_of_a_billion(pipe: Any) -> None:
    """In a fresh process: seconds and bytes from counts to batch 0 of 2,048."""
    before = peak_of_this_process()
    started = time.perf_counter()
    blocks = np.full(10**9 // 256, 256, np.int32)
    order = Order.over({(32, 32): blocks}, batch_images=2048, seed=0)
    _, samples = order.batch(0)
    seconds = time.perf_counter() - started
    assert len(set(samples.tolist())) == 2048
    pipe.send((seconds, (peak_of_this_process() - before) / 1024))


def bench_order(_quick: bool) -> Figures:
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=first_batch_of_a_billion, args=(theirs,))
    process.start()
    seconds, megabytes = ours.recv()
    process.join()
    print(f"order      first batch of 10^9 samples in {seconds:.2f} s, {megabytes:.0f} MB")
    return {
        "billion_first_batch_seconds": figure(seconds, 1.0, at_most=True),
        "billion_first_batch_megabytes": figure(megabytes, 200, at_most=True, digits=0),
    }


def make_rows(k: int) -> pa.Table:
    rng = np.random.default_rng(k)
    size = 2000
    payload = rng.bytes(size * 1024)
    return pa.table({
        "id": [f"{k * size + i:016x}" for i in range(size)], "status": ["ok"] * size,
        "moments": [payload[i * 1024 : (i + 1) * 1024] for i in range(size)],
        **{name: pa.array([8] * size) for name in ("bucket_h", "bucket_w", "width", "height")},
    })  # fmt: skip


class Pass:
    """A model that changes nothing."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        return rows


def bench_memory(quick: bool) -> Figures:
    """A million rows of 1 KiB: does what the run holds grow with what it has done?"""
    num_partitions = 60 if quick else 500
    samples: list[float] = []
    done = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not done.wait(0.5):
            held = 0
            for process in (me, *me.children(recursive=True)):
                try:
                    held += process.memory_full_info().pss
                except psutil.Error:
                    continue
            samples.append(held / 2**20)

    with tempfile.TemporaryDirectory() as folder, ray_session():
        parts = [str(k) for k in range(num_partitions)]
        writer = TableWriter.under(open_folder(folder), "rows", "latents/1", {}, {}, parts)
        sinks = [Sink.of(writer, ("id", "status", "moments", "bucket_h", "bucket_w", "width",
                                  "height"))]  # fmt: skip
        progress = run_partitions(
            read=make_rows, transform=Pass, transform_kwargs={}, sinks=sinks, num_readers=2,
            num_actors=1,
        )  # fmt: skip
        next(iter(progress))
        watcher = threading.Thread(target=watch)
        watcher.start()
        for _ in progress:
            pass
        done.set()
        watcher.join()
        total = writer.commit().manifest.num_rows
    quarter = len(samples) // 4
    early, late = mean(samples[quarter : 2 * quarter]), mean(samples[-quarter:])
    print(
        f"memory     {total:,} rows: {early:.0f} MB in the second quarter, {late:.0f} in the last"
    )
    return {"memory_last_of_second_quarter": figure(late / early, 1.1, at_most=True)}


PARTS: dict[str, Callable[[bool], Figures]] = {
    "pipeline": bench_pipeline, "reading": bench_reading, "order": bench_order,
    "memory": bench_memory,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    figures: Figures = {}
    for part in options.only:
        figures |= PARTS[part](options.quick)
    if not options.quick and options.only == list(PARTS):
        record("data", figures, ("ray", "pyarrow", "torch", "webdataset", "datasets"))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
