"""Tiny real tables for unit tests, and Hypothesis settings that draw the same examples each run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import HealthCheck, settings

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


def write_table(
    folder: Path,
    schema: str,
    partitions: Sequence[Sequence[Row]],
    extra: dict[str, Any] | None = None,
) -> Table:
    """A committed table with these partitions."""
    writer = TableWriter(folder, schema, {}, {})
    for k, rows in enumerate(partitions):
        writer.write(k, make_rows(schema, rows))
    return writer.commit(len(partitions), extra)
