"""Nothing is lost or doubled: scans, a folder of photographs and a set of tars, broken ones among
them, through ingest, selection, captions and encoding.

    .venv/bin/python tests/faults/sources.py [--quick] [--seed N]

Every item of a source must be a row, ok or rejected for the documented reason; ids of rows that are
ok must be unique and every table must verify. Then the folder grows, and no partition that was
there may be made again. 10,000 photographs, about 10 minutes on 2 idle cores; ``--quick`` 600,
about 2 minutes. The last line is one JSON object of figures; the exit code is 1 when one misses.
"""

import argparse
import io
import json
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parent.parent))
from broken import CAPTIONS, PICTURES, write_folder
from processes import Silence

from pixart_cluster.local import local_ray, quiet_environment
from pixart_platform.tables import OK, Table, verify_table

NUM_DUPLICATES, NUM_GROWN = 40, 300


def paint(i: int, seed: int) -> bytes:
    """A JPEG of 256 x 192 with the statistics of a photograph: smooth forms, fine noise."""
    rng = np.random.default_rng([seed, i])
    forms = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    smooth = np.asarray(forms.resize((256, 192), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(smooth + rng.integers(-9, 10, (192, 256, 1)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def write_photographs(folder: Path, numbers: range, seed: int) -> None:
    for i in numbers:
        (folder / f"{i:06d}.jpg").write_bytes(paint(i, seed))
        if i % 2:
            (folder / f"{i:06d}.txt").write_text(f"photograph number {i}, of soft forms")


def write_sources(root: Path, count: int, seed: int) -> dict[str, tuple[str, int]]:
    """Sources by name: their recipe's ``data.source``, and how many items they have."""
    folder, tars = root / "folder", root / "tars"
    folder.mkdir()
    tars.mkdir()
    write_photographs(folder, range(count), seed)
    for i in range(NUM_DUPLICATES):
        (folder / f"again-{i}.jpg").write_bytes(paint(i, seed))
    odd = PICTURES | CAPTIONS
    write_folder(folder, odd.items())
    listed = sorted(path for path in folder.iterdir())
    for k in range(4):
        with tarfile.open(tars / f"{k}.tar", "w") as tar:
            for path in listed:
                if hash_of(path.stem) % 4 == k:
                    tar.add(path, path.name)
            info = tarfile.TarInfo("../../outside.jpg")
            data = paint(10**6 + k, seed)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pictures = count + NUM_DUPLICATES + len(odd)
    return {
        "scans": ("digits", 600), "folder": (f"folder:{folder}", pictures),
        "tars": (f"tar:{tars}", pictures + 4),
    }  # fmt: skip


def hash_of(stem: str) -> int:
    """The same for a picture and its caption."""
    return sum(stem.encode())


def make_tables(root: Path, scratch: Path, source: str) -> dict[str, Table]:
    from pixart_jobs import pipeline
    from pixart_jobs.recipe import Recipe
    from pixart_jobs.workspace import Workspace

    stage = {
        "condition_on": "text", "start_from": "scratch", "resolution": 32, "images": 64,
        "optimizer": {"learning_rate": 1e-3},
    }  # fmt: skip
    recipe = Recipe.model_validate({
        "name": "sources", "data": {"source": source, "num_scenes": 600, "partition_rows": 250},
        "encode": {"resolutions": [32]}, "stages": {"align": stage},
    })  # fmt: skip
    vars(pipeline)["Registry"] = lambda *_: None
    space = Workspace.under(root, scratch)
    return pipeline.Pipeline(recipe, space, Silence()).make_tables()


def count_wrong(tables: dict[str, Table]) -> int:
    """Known kinds whose row is not what ``broken`` says."""
    wrong = 0
    kinds = PICTURES | CAPTIONS
    images = tables["images"]
    for k in range(images.num_partitions):
        for row in images.read(k, ["source", "status"]).to_pylist():
            name = row["source"].rpartition("/")[2].rpartition(".")[0]
            if kind := kinds.get(name):
                expected = OK if kind.outcome == OK else f"rejected: {kind.outcome}"
                if not row["status"].startswith(expected):
                    print(f"           {name}: {row['status']}, not {expected}")
                    wrong += 1
    return wrong


def unaccounted(tables: dict[str, Table], num_items: int) -> int:
    """Rows too few or too many, over all tables; raises if one does not verify."""
    total = 0
    for name, table in tables.items():
        verify_table(table.folder)
        counts = Counter(table.manifest.counts)
        print(f"           {name:14}{counts[OK]:7} ok {counts.total() - counts[OK]:6} rejected")
        total += abs(counts.total() - num_items)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    quiet_environment()
    figures: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        count = 600 if options.quick else 10_000
        sources = write_sources(root, count, options.seed)
        with local_ray(root / "logs") as scratch:
            for kind, (source, num_items) in sources.items():
                print(f"{kind:10} {num_items} items")
                tables = make_tables(root / f"run-{kind}", scratch, source)
                figures[f"{kind}_rows_unaccounted"] = unaccounted(tables, num_items)
                figures[f"{kind}_kinds_wrong"] = count_wrong(tables)
            source, num_items = sources["folder"]
            before = make_tables(root / "run-folder", scratch, source)
            grown = range(10**6, 10**6 + NUM_GROWN)
            write_photographs(root / "folder", grown, options.seed)
            print(f"grown      {num_items + NUM_GROWN} items")
            after = make_tables(root / "run-folder", scratch, source)
            figures["grown_rows_unaccounted"] = unaccounted(after, num_items + NUM_GROWN)
            figures["partitions_made_again"] = sum(
                not file.folder
                for kind, table in before.items()
                for file in after[kind].manifest.files[: table.num_partitions]
            )
    result = {name: {"value": n, "bar": 0, "ok": n == 0} for name, n in figures.items()}
    print(json.dumps(result))
    sys.exit(not all(entry["ok"] for entry in result.values()))


if __name__ == "__main__":
    main()
