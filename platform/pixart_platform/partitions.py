"""A Ray Data job over partitions: read -> model -> write, resumable at any point.

Each partition is one block from end to end (``target_max_block_size = None`` and
``batch_size=None``), so a killed job redoes at most the partitions in flight. Reading (and decoding
pictures) and writing are tasks on CPUs, the model lives in a pool of actors: the pools are sized
apart, and while one partition is in the model the next are being read. How many are under way
follows from the pools alone, never from how many there are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, TaskPoolStrategy

from pixart_platform.tables import TableWriter, count_statuses

_PARTITION = "__partition__"
_QUEUED_PER_ACTOR = 2  # one in the model, one ready
# Where pool sizes and CPUs agree, Ray runs tasks inside the actors after them: no overlap.
_READER_CPUS = 0.99
# Actors hold what they are given to the end: those of two pipelines took all CPUs of a node, and
# both waited for readers for ever. So few that readers get theirs, and enough to be a demand.
_ACTOR_CPUS = 0.01
Transform = Callable[[pa.Table], pa.Table]
Progress = Iterable[tuple[int, dict[str, int]]]


@dataclass(frozen=True)
class Sink:
    """A table to write: which columns of the transform's output it takes, by the table's names."""

    writer: TableWriter
    columns: dict[str, str]

    @classmethod
    def of(cls, writer: TableWriter, names: Iterable[str]) -> "Sink":
        """Columns that are called the same on both sides."""
        return cls(writer, {name: name for name in names})

    def write(self, k: int, rows: pa.Table) -> None:
        chosen = {name: rows[source] for name, source in self.columns.items()}
        self.writer.write(k, pa.table(chosen))


def run_partitions(
    *,
    read: Callable[[int], pa.Table],
    transform: type,
    transform_kwargs: dict[str, Any],
    sinks: list[Sink],
    num_readers: int,
    num_actors: int,
    num_gpus: float = 0,
    nodes: Mapping[str, str] | None = None,
    reader_nodes: Mapping[str, str] | None = None,
    engine: Callable[[Dataset], Dataset] | None = None,
    only: Iterable[int] | None = None,
) -> Progress:
    """Run the unfinished partitions; yields (partition, rows by status) as each is written.

    ``transform`` is a class: instances are built once per actor and called with a partition's
    rows. Raises the transform's own error when a whole partition fails. An ``engine`` that brings
    its own actors may stand in for it; it may join blocks, but not split or reorder them. ``only``
    some partitions are run. Actors keep to ``nodes``, reading and writing to ``reader_nodes``.
    """
    written = [sink.writer.written() for sink in sinks]
    asked = range(sinks[0].writer.num_partitions) if only is None else only
    pending = [k for k in asked if not all(k in done for done in written)]
    if not pending:
        return
    # The driver's context is one per process and Ray copies it into each dataset: set it first.
    context = DataContext.get_current()
    context.target_max_block_size = None
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # Ray's own around it loses what it came from
    dataset = ray.data.from_items(
        [{_PARTITION: k} for k in pending], override_num_blocks=len(pending)
    ).map_batches(
        _Read(read), compute=TaskPoolStrategy(size=num_readers), num_cpus=_READER_CPUS,
        batch_format="pyarrow", batch_size=None, label_selector=_selector(reader_nodes),
    )  # fmt: skip
    if engine:
        dataset = engine(dataset)
    else:
        dataset = dataset.map_batches(
            _Apply,
            fn_constructor_args=(transform, transform_kwargs),
            compute=ActorPoolStrategy(
                size=min(num_actors, len(pending)), max_tasks_in_flight_per_actor=_QUEUED_PER_ACTOR
            ),
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=_ACTOR_CPUS,
            num_gpus=num_gpus,
            label_selector=_selector(nodes),
        )
    dataset = dataset.map_batches(
        _Write(sinks), batch_format="pyarrow", batch_size=None,
        label_selector=_selector(reader_nodes),
    )  # fmt: skip
    for row in dataset.iter_rows():
        yield row[_PARTITION], dict(zip(row["statuses"], row["counts"], strict=True))


def _selector(labels: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(labels) if labels else None


@dataclass(frozen=True)
class _Read:
    read: Callable[[int], pa.Table]

    def __call__(self, batch: pa.Table) -> pa.Table:
        (k,) = batch[_PARTITION].to_pylist()
        rows = self.read(k)
        return rows.append_column(_PARTITION, pa.array([k] * rows.num_rows, pa.int64()))


class _Apply:
    def __init__(self, transform: type, kwargs: dict[str, Any]) -> None:
        self._fault: Exception | None = None
        try:
            self._transform: Transform = transform(**kwargs)
        except Exception as error:  # an actor that dies here takes what it died of with it
            self._fault = error

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self._fault:
            raise self._fault
        rows = self._transform(batch.drop_columns([_PARTITION]))
        assert rows.num_rows == batch.num_rows, "a transform must keep every row"
        return rows.append_column(_PARTITION, batch[_PARTITION])


@dataclass(frozen=True)
class _Write:
    sinks: list[Sink]

    def __call__(self, batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [self._write(k, batch) for k in pc.unique(batch[_PARTITION]).to_pylist()]
        )

    def _write(self, k: int, batch: pa.Table) -> dict[str, Any]:
        rows = batch.filter(pc.equal(batch[_PARTITION], k))
        for sink in self.sinks:
            if not sink.writer.is_written(k):  # one of several may be, by an earlier try
                sink.write(k, rows)
        counts = count_statuses(pa.table({"status": rows[self.sinks[0].columns["status"]]}))
        return {_PARTITION: k, "statuses": [*counts], "counts": [*counts.values()]}
