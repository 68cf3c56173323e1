"""From tables to batches: which rows a stage may use, and reading them ahead of the step.

``RowIndex`` turns aligned tables and a condition into the counts an Order needs and back from
sample numbers to rows: a byte a row, and a few a block (row group). Payloads stay in the mapped
file until a batch copies them (``blocks``). ``map_ahead`` reads and decodes the next batches on
threads, so that a step never waits for storage.
"""

import operator
import re
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pixart_platform.blocks import Block, read_block
from pixart_platform.errors import RecipeError
from pixart_platform.order import Bucket
from pixart_platform.tables import OK, ROW_GROUP_ROWS, SCHEMAS, Table, check_aligned

_OPERATORS: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne,
    ">": operator.gt, "<": operator.lt,
}  # fmt: skip
READ_THREADS, SCAN_THREADS = 16, 64  # requests under way at a time: of a rank; of one for all
_CACHE_BYTES = 4 << 30
_BLOCK_BYTES = 256 << 10  # counted for a block whose payloads are mapped; keeps maps below 65,530


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

    def check(self, images: Table, place: str) -> None:
        """Raise RecipeError, naming ``place``, unless the columns are numbers of ``images``."""
        known = [f.name for f in SCHEMAS[images.manifest.schema] if _is_number(f.type)]
        for column in self.columns:
            if column not in known:
                raise RecipeError(
                    f"{place}: the image table has no column {column!r} of numbers; one of "
                    f"{', '.join(known)}"
                )

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


class _Part(NamedTuple):
    """Eligible rows of a partition in one bucket: blocks that have some, how many, which."""

    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]
    rows: NDArray[np.uint8]  # within their block


class RowIndex:
    """Eligible rows of aligned tables, by bucket and block, in table order.

    ``tables`` maps a prefix to (table, columns to read). A row is eligible when its status is ok
    in every table and ``where`` holds on the table prefixed ``images``. ``counts`` are of the
    blocks that have eligible rows. To make one is to ask for every partition, so it is made once
    and pickled to whoever reads.
    """

    def __init__(
        self,
        tables: dict[str, tuple[Table, list[str]]],
        where: Condition,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        check_aligned([table for table, _ in tables.values()])
        where.check(tables["images"][0], "where")
        self._tables, self._cache_bytes = tables, cache_bytes
        files = tables["latents"][0].manifest.files
        self._num_rows = [sum(file.counts.values()) for file in files]
        blocks = [-(-num_rows // ROW_GROUP_ROWS) for num_rows in self._num_rows]
        self._first_blocks = np.cumsum([0, *blocks])  # of each partition
        self._parts = self._scan(where)
        self._ends = {b: np.cumsum(p.counts, dtype=np.int64) for b, p in self._parts.items()}
        self._prepare_reading()

    def _prepare_reading(self) -> None:
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="read")
        self._blocks: OrderedDict[int, Future[Block]] = OrderedDict()  # the latest used last
        self._sizes: dict[int, int] = {}  # of those that are there
        self._held = 0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_tables", "_cache_bytes", "_num_rows", "_first_blocks", "_parts", "_ends")
        return {name: vars(self)[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._prepare_reading()

    @property
    def counts(self) -> dict[Bucket, NDArray[np.int32]]:
        return {bucket: part.counts for bucket, part in self._parts.items()}

    def _scan(self, where: Condition) -> dict[Bucket, _Part]:
        found: defaultdict[Bucket, list[_Part]] = defaultdict(list)
        with ThreadPoolExecutor(SCAN_THREADS, thread_name_prefix="scan") as pool:
            scanned = pool.map(partial(self._scan_partition, where), range(len(self._num_rows)))
            for bucket, part in (item for items in scanned for item in items):
                found[bucket].append(part)
        return {
            bucket: _Part(*map(np.concatenate, zip(*parts, strict=True)))
            for bucket, parts in sorted(found.items())
        }

    def _scan_partition(self, where: Condition, k: int) -> list[tuple[Bucket, _Part]]:
        """A status is read only where the manifest counts others than ok."""
        needed = {"images": where.columns, "latents": ["bucket_h", "bucket_w"]}
        chosen = np.ones(self._num_rows[k], bool)
        for prefix, (table, _) in self._tables.items():
            has_rejects = not set(table.manifest.files[k].counts) <= {OK}
            names = [*needed.get(prefix, ()), *(["status"] if has_rejects else [])]
            rows = table.read(k, names) if names else pa.table({})
            if has_rejects:
                chosen &= pc.equal(rows["status"], OK).to_numpy()
            if prefix == "images" and where.terms:
                chosen &= where.select(rows)
            if prefix == "latents":
                sides = (rows[side].to_numpy().astype(np.int64) for side in needed[prefix])
                shapes = next(sides) << 32 | next(sides)
        eligible = np.flatnonzero(chosen)
        parts = []
        for shape in np.unique(shapes[eligible]).tolist():
            group, row = divmod(eligible[shapes[eligible] == shape], ROW_GROUP_ROWS)
            groups, counts = np.unique(group, return_counts=True)
            blocks = (self._first_blocks[k] + groups).astype(np.int32)
            part = _Part(blocks, counts.astype(np.int32), row.astype(np.uint8))
            parts.append(((shape >> 32, shape & 0xFFFFFFFF), part))
        return parts

    def fetch(self, bucket: Bucket, samples: NDArray[np.int64]) -> dict[str, list[Any]]:
        """Columns ``prefix.name`` of these samples, in their order; payloads are memoryviews."""
        part = self._parts[bucket]
        places = np.searchsorted(self._ends[bucket], samples, side="right")
        blocks, rows = part.blocks[places].tolist(), part.rows[samples].tolist()
        loading = {block: self._load(block) for block in dict.fromkeys(blocks)}
        loaded = {block: future.result() for block, future in loading.items()}
        return {
            f"{prefix}.{name}": [
                loaded[block][f"{prefix}.{name}"](row)
                for block, row in zip(blocks, rows, strict=True)
            ]
            for prefix, (_, names) in self._tables.items()
            for name in names
        }

    def _load(self, block: int) -> Future[Block]:
        """A block, read once, whoever asks for it meanwhile."""
        with self._lock:
            if block not in self._blocks:
                self._blocks[block] = self._pool.submit(self._read_block, block)
            self._blocks.move_to_end(block)
            return self._blocks[block]

    def _read_block(self, block: int) -> Block:
        k = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        columns: Block = {}
        num_bytes = _BLOCK_BYTES
        for prefix, (table, names) in self._tables.items():
            if names:
                read, in_memory = read_block(table, k, block - int(self._first_blocks[k]), names)
                columns |= {f"{prefix}.{name}": column for name, column in read.items()}
                num_bytes += in_memory
        with self._lock:
            self._sizes[block] = num_bytes
            self._held += num_bytes
            while self._held > self._cache_bytes:
                oldest = next(block for block in self._blocks if block in self._sizes)
                del self._blocks[oldest]
                self._held -= self._sizes.pop(oldest)
        return columns


Item = TypeVar("Item")
Made = TypeVar("Made")


def map_ahead(make: Callable[[Item], Made], items: Iterable[Item], depth: int) -> Iterator[Made]:
    """``map`` on ``depth`` threads, in order, at most that many results ahead of the reader."""
    pool = ThreadPoolExecutor(depth, thread_name_prefix="ahead")
    waiting: deque[Future[Made]] = deque()
    try:
        for item in items:
            if len(waiting) == depth:
                yield waiting.popleft().result()
            waiting.append(pool.submit(make, item))
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Not joined: if the reader left early, the garbage collector ends this in any thread, also
        # in one that is starting and holds the lock that a join takes (CPython 3.11, threading.py).
        pool.shutdown(wait=False, cancel_futures=True)
