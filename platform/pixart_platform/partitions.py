"""A Ray Data job over partitions: read -> model -> write, resumable at any point.

Each partition is one block from end to end (``target_max_block_size = None`` and
``batch_size=None``), so a killed job redoes at most the partitions in flight. Reading and writing
are tasks; the model lives in a pool of actors, so decode and model work overlap.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext

from pixart_platform.tables import TableWriter, count_statuses

_PARTITION = "__partition__"
Transform = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Sink:
    """A table to write: which columns of the transform's output it takes, by the table's names."""

    writer: TableWriter
    columns: dict[str, str]

    def write(self, k: int, rows: pa.Table) -> None:
        chosen = {name: rows[source] for name, source in self.columns.items()}
        self.writer.write(k, pa.table(chosen))


def run_partitions(
    *,
    num_partitions: int,
    read: Callable[[int], pa.Table],
    transform: type,
    transform_kwargs: dict[str, Any],
    sinks: list[Sink],
    num_actors: int,
    num_gpus: float = 0,
) -> Iterable[tuple[int, dict[str, int]]]:
    """Run the unfinished partitions; yields (partition, rows by status) as each is written.

    ``transform`` is a class: instances are built once per actor and called with a partition's
    rows. Raises the transform's own error when a whole partition fails.
    """
    pending = [
        k for k in range(num_partitions) if not all(sink.writer.is_written(k) for sink in sinks)
    ]
    if not pending:
        return
    # The driver's context is one per process and Ray copies it into each dataset: set it first.
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    dataset = (
        ray.data.from_items([{_PARTITION: k} for k in pending], override_num_blocks=len(pending))
        .map_batches(_Read(read), batch_format="pyarrow", batch_size=None)
        .map_batches(
            _Apply,
            fn_constructor_args=(transform, transform_kwargs),
            compute=ActorPoolStrategy(size=min(num_actors, len(pending))),
            batch_format="pyarrow",
            batch_size=None,
            num_gpus=num_gpus,
        )
        .map_batches(_Write(sinks), batch_format="pyarrow", batch_size=None)
    )
    for row in dataset.iter_rows():
        yield row[_PARTITION], dict(zip(row["statuses"], row["counts"], strict=True))


@dataclass(frozen=True)
class _Read:
    read: Callable[[int], pa.Table]

    def __call__(self, batch: pa.Table) -> pa.Table:
        (k,) = batch[_PARTITION].to_pylist()
        rows = self.read(k)
        return rows.append_column(_PARTITION, pa.array([k] * rows.num_rows, pa.int64()))


class _Apply:
    def __init__(self, transform: type, kwargs: dict[str, Any]) -> None:
        self._transform: Transform = transform(**kwargs)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = self._transform(batch.drop_columns([_PARTITION]))
        assert rows.num_rows == batch.num_rows, "a transform must keep every row"
        return rows.append_column(_PARTITION, batch[_PARTITION])


@dataclass(frozen=True)
class _Write:
    sinks: list[Sink]

    def __call__(self, batch: pa.Table) -> pa.Table:
        k = batch[_PARTITION][0].as_py()
        for sink in self.sinks:
            if not sink.writer.is_written(k):
                sink.write(k, batch)
        counts = count_statuses(pa.table({"status": batch[self.sinks[0].columns["status"]]}))
        return pa.table(
            {
                _PARTITION: pa.array([k], pa.int64()),
                "statuses": pa.array([list(counts)], pa.list_(pa.string())),
                "counts": pa.array([list(counts.values())], pa.list_(pa.int64())),
            }
        )
