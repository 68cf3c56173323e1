"""From tables to batches: which rows a stage may use, and reading them ahead of the step.

``RowIndex`` turns aligned tables and a condition into the counts an Order needs and back from
sample numbers to rows. ``Prefetcher`` reads and decodes the next batches on a thread, so that a
step never waits for storage.
"""

import operator
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pixart_platform.errors import RecipeError
from pixart_platform.order import Bucket
from pixart_platform.tables import OK, ROW_GROUP_ROWS, SCHEMAS, Table, check_aligned

_OPERATORS: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_CACHED_BLOCKS = 256


@dataclass(frozen=True)
class Condition:
    """A curated subset: ``column op number`` terms joined by ``and``."""

    terms: tuple[tuple[str, str, float], ...]

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Parse e.g. ``quality >= 0.6 and label >= 0``. Raises ValueError."""
        terms = []
        for part in filter(None, (p.strip() for p in text.split(" and "))):
            match = re.fullmatch(r"(\w+)\s*(>=|<=|==|!=|>|<)\s*(-?\d+(?:\.\d+)?)", part)
            if not match:
                raise ValueError(f"{part!r} is not 'column op number', e.g. 'quality >= 0.6'")
            terms.append((match[1], match[2], float(match[3])))
        return cls(tuple(terms))

    @property
    def columns(self) -> list[str]:
        return sorted({column for column, _, _ in self.terms})

    def select(self, rows: pa.Table) -> NDArray[np.bool_]:
        """(rows,) True where every term holds; a null satisfies none."""
        chosen = np.ones(rows.num_rows, bool)
        for column, op, number in self.terms:
            values = rows[column].to_numpy(zero_copy_only=False).astype(float)
            with np.errstate(invalid="ignore"):
                chosen &= _OPERATORS[op](values, number) & ~np.isnan(values)
        return chosen


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


class RowIndex:
    """Eligible rows of aligned tables, by bucket and block (row group), in table order.

    ``tables`` maps a prefix to (table, columns to read). A row is eligible when its status is ok
    in every table and ``where`` holds on the table prefixed ``images``.
    """

    def __init__(self, tables: dict[str, tuple[Table, list[str]]], where: Condition) -> None:
        check_aligned([table for table, _ in tables.values()])
        self._tables = tables
        latents = tables["latents"][0]
        by_bucket: dict[Bucket, list[tuple[int, NDArray[np.int64]]]] = {}
        block = 0
        self._blocks: list[tuple[int, int]] = []  # (partition, row group)
        for k in range(latents.num_partitions):
            chosen = self._eligible(k, where)
            shapes = latents.read(k, ["bucket_h", "bucket_w"])
            height, width = (shapes[c].to_numpy() for c in ("bucket_h", "bucket_w"))
            for group, start in enumerate(range(0, len(chosen), ROW_GROUP_ROWS)):
                rows = np.flatnonzero(chosen[start : start + ROW_GROUP_ROWS])
                self._blocks.append((k, group))
                shape = np.stack([height, width], 1)[start + rows]
                for bucket in {(int(h), int(w)) for h, w in shape}:
                    of_bucket = rows[(shape == bucket).all(1)]
                    by_bucket.setdefault(bucket, []).append((block, of_bucket))
                block += 1
        self._rows: dict[Bucket, NDArray[np.int64]] = {}  # (samples, 2): block, row in block
        self.counts: dict[Bucket, list[int]] = {}
        for bucket, parts in by_bucket.items():
            self._rows[bucket] = np.concatenate(
                [np.stack([np.full(len(r), b), r], 1) for b, r in parts]
            )
            self.counts[bucket] = [len(rows) for _, rows in parts]
        self._read_block = lru_cache(maxsize=_CACHED_BLOCKS)(self._read_block_uncached)

    def _eligible(self, k: int, where: Condition) -> NDArray[np.bool_]:
        images = self._tables["images"][0]
        known = [f.name for f in SCHEMAS[images.manifest.schema] if _is_number(f.type)]
        for column in where.columns:
            if column not in known:
                raise RecipeError(
                    f"where: the image table has no column {column!r} of numbers; one of {known}"
                )
        chosen = where.select(images.read(k, [*where.columns, "status"]))
        for table, _ in self._tables.values():
            chosen &= np.array([s == OK for s in table.read(k, ["status"])["status"].to_pylist()])
        return chosen

    def _read_block_uncached(self, block: int) -> dict[str, list[Any]]:
        k, group = self._blocks[block]
        columns: dict[str, list[Any]] = {}
        for prefix, (table, names) in self._tables.items():
            rows = pq.ParquetFile(table.path(k)).read_row_group(group, columns=names)
            columns |= {f"{prefix}.{name}": rows[name].to_pylist() for name in names}
        return columns

    def fetch(self, bucket: Bucket, samples: NDArray[np.int64]) -> dict[str, list[Any]]:
        """Columns ``prefix.name`` of these samples, in their order."""
        columns: dict[str, list[Any]] = {
            f"{prefix}.{name}": [] for prefix, (_, names) in self._tables.items() for name in names
        }
        for block, row in self._rows[bucket][samples].tolist():
            values = self._read_block(block)
            for name, column in columns.items():
                column.append(values[name][row])
        return columns


Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Items ``first..last - 1`` of a function, computed ahead on one thread, in order."""

    def __init__(self, make: Callable[[int], Item], first: int, last: int, depth: int = 4) -> None:
        self._make, self._next, self._last, self._depth = make, first, last, depth

    def __iter__(self) -> Iterator[Item]:
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
            waiting: list[Future[Item]] = []
            try:
                while waiting or self._next < self._last:
                    while self._next < self._last and len(waiting) < self._depth:
                        waiting.append(pool.submit(self._make, self._next))
                        self._next += 1
                    yield waiting.pop(0).result()
            finally:
                for future in waiting:
                    future.cancel()
