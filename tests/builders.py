"""Tiny real tables for unit tests, and Hypothesis settings that draw the same examples each run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings

from pixart_platform.storage import Folder, open_folder
from pixart_platform.tables import OK, SCHEMAS, Table, TableWriter

repeatable = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Row = dict[str, Any]


def make_rows(schema: str, rows: Sequence[Row]) -> pa.Table:
    """Rows of a schema; what is left out is null, status ok, and the id the row's number."""
    full = [{"id": f"{i:04d}", "status": OK, **row} for i, row in enumerate(rows)]
    return pa.Table.from_pylist(full, SCHEMAS[schema])


def make_writer(place: Path | Folder, schema: str, num_partitions: int) -> TableWriter:
    """A writer of ``place`` itself, whatever its settings."""
    keys = tuple(f"part {k}" for k in range(num_partitions))
    return TableWriter(open_folder(place), schema, {}, {}, keys)


def write_table(
    place: Path | Folder,
    schema: str,
    partitions: Sequence[Sequence[Row]],
    extra: dict[str, Any] | None = None,
) -> Table:
    """A committed table with these partitions."""
    writer = make_writer(place, schema, len(partitions))
    for k, rows in enumerate(partitions):
        writer.write(k, make_rows(schema, rows))
    return writer.commit(extra)


def write_and_commit(writer: TableWriter, partitions: Sequence[pa.Table]) -> str:
    """What a job does, for a process to run; returns the digest."""
    for k, rows in enumerate(partitions):
        writer.write(k, rows)
    return writer.commit().digest
