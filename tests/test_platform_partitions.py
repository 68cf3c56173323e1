"""Data jobs of several pipelines at once: none may keep the others from their turn."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from pixart_platform.partitions import Sink, run_partitions
from pixart_platform.storage import LocalFolder
from pixart_platform.tables import OK, TableWriter

pytestmark = pytest.mark.slow
COLUMNS = ("id", "status", "prompt", "seed", "png")
CPUS, PARTITIONS = 2, 6


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    ray.init(num_cpus=CPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def read(k: int) -> pa.Table:
    return pa.table({
        "id": [f"{k:016x}"], "status": [OK], "prompt": ["a"], "seed": [k], "png": [b"png"],
    })  # fmt: skip


class Same:
    def __call__(self, rows: pa.Table) -> pa.Table:
        return rows


def start(root: Path, name: str) -> Iterator[tuple[int, dict[str, int]]]:
    """A job with as many actors as there are CPUs."""
    parts = [f"{name}-{k}" for k in range(PARTITIONS)]
    writer = TableWriter.under(LocalFolder(root), name, "drawings/1", {}, {}, parts)
    return iter(run_partitions(
        read=read, transform=Same, transform_kwargs={}, sinks=[Sink.of(writer, COLUMNS)],
        num_readers=CPUS, num_actors=CPUS,
    ))  # fmt: skip


def test_a_job_that_holds_its_actors_leaves_room_for_another(tmp_path: Path) -> None:
    """With a whole CPU for each actor the second waited for a reader as long as the first lived."""
    first = start(tmp_path, "first")
    next(first)  # its actors are there, and stay while nobody asks for more
    done: list[int] = []
    second = threading.Thread(
        target=lambda: done.extend(k for k, _ in start(tmp_path, "second")), daemon=True
    )
    second.start()
    second.join(60)
    assert sorted(done) == list(range(PARTITIONS))
    assert len(list(first)) == PARTITIONS - 1
