"""Rows of a table's row group, or block: payloads stay where they lie in the file.

A batch wants a few rows of each of many blocks, and a Parquet reader decodes a whole one for each:
130 MB for 0.5 MB at T5-XXL's width. Our payload columns are plain and uncompressed, so a page is a
header, a note of which rows are null, then each value after its length: a walk over the lengths
finds every value in the mapped file, and only the pages of memory that a batch copies are read.

Of a table on S3 the partition is copied to this machine's disk first, whole and verified, once for
all ranks; the copies used longest ago make room.

Source: the Parquet format's README, Encodings.md and parquet.thrift (data pages of version 1).
"""

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pixart_platform.copies import cache_folder, make_room
from pixart_platform.errors import ManifestError
from pixart_platform.manifest import FileRecord
from pixart_platform.storage import Folder, LocalFolder, write_atomic
from pixart_platform.tables import SCHEMAS, Table

_TRIES = 5
_COPYING = BoundedSemaphore(4)  # whole partitions in memory at a time
Block = dict[str, Callable[[int], Any]]  # of each column, the value by row


def read_block(table: Table, k: int, group: int, names: list[str]) -> tuple[Block, int]:
    """Columns of a row group of partition ``k``, and the bytes of memory that they keep.

    Payloads come as memoryviews of bytes. Raises ManifestError.
    """
    schema = SCHEMAS[table.manifest.schema]
    payloads = {n for n in names if schema.field(n).type in (pa.binary(), pa.large_binary())}
    block: Block = {}
    record = table.manifest.files[k]
    home = record.home(table.folder)
    try:
        mapped = _open_local(home, record)
        with pq.ParquetFile(mapped) as file:
            for name in payloads:
                if column := _map_column(mapped, file, group, name):
                    block[name] = column.__getitem__
            rest = file.read_row_group(
                group, [n for n in names if n not in block], use_threads=False
            )
    except (OSError, ValueError, LookupError) as error:
        raise ManifestError(
            f"{home.uri}/{record.name}: row group {group} cannot be read ({error}); restore it"
        ) from error
    for name in rest.column_names:
        values = rest[name]
        block[name] = partial(_view, values) if name in payloads else values.to_pylist().__getitem__
    return block, rest.nbytes


def _open_local(home: Folder, record: FileRecord) -> pa.MemoryMappedFile:
    for _ in range(_TRIES):
        with suppress(FileNotFoundError):  # another rank made room in between
            return pa.memory_map(str(find_local(home, record)))
    raise FileNotFoundError(f"no room for it in the cache, or it is gone: {home.uri}")


def find_local(home: Folder, record: FileRecord) -> Path:
    """The file on this machine's disk: in its place, or copied to ``PIXART_CACHE`` and verified.

    Raises ManifestError.
    """
    if isinstance(home, LocalFolder):
        return home.path / record.name
    cache = cache_folder()
    path = cache / f"{record.sha256}.parquet"
    try:
        os.utime(path)
    except FileNotFoundError:
        with _COPYING:
            data = home.read(record.name)
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise ManifestError(
                f"{home.uri}/{record.name}: its bytes are not the ones the manifest lists; restore "
                f"the file"
            ) from None
        make_room(cache, len(data))
        write_atomic(path, data)
    return path


def _view(values: pa.ChunkedArray, row: int) -> memoryview:
    return memoryview(values[row].as_buffer() or b"").cast("B")


def _map_column(
    mapped: pa.MemoryMappedFile, file: pq.ParquetFile, group: int, name: str
) -> "PlainColumn | None":
    """A binary column of a row group, mapped; None if its values are not plain in the file."""
    place = [file.schema.column(i).path for i in range(len(file.schema))].index(name)
    column, chunk = file.schema.column(place), file.metadata.row_group(group).column(place)
    if (
        chunk.compression != "UNCOMPRESSED"
        or not set(chunk.encodings) <= {"PLAIN", "RLE"}
        or (column.max_definition_level, column.max_repetition_level) != (1, 0)
    ):
        return None
    mapped.seek(chunk.data_page_offset)
    payload = mapped.read_buffer(chunk.total_compressed_size)
    return PlainColumn(memoryview(payload).cast("B"))


class PlainColumn:
    """The values of one column chunk, given its bytes; a null reads as empty.

    Raises ValueError or LookupError for bytes that are no such chunk.
    """

    def __init__(self, chunk: memoryview) -> None:
        self._chunk = chunk
        spans: list[tuple[int, int]] = []
        place = 0
        while place < len(chunk):
            header, place = _read_struct(chunk, place)
            spans += _find_values(chunk, place, header)
            place += header[_PAGE_SIZE]
        self._spans = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, row: int) -> memoryview:
        start, stop = self._spans[row].tolist()
        return self._chunk[start:stop]


_PAGE_TYPE, _PAGE_SIZE, _DATA_PAGE, _NUM_VALUES = 1, 3, 5, 1  # fields of PageHeader


def _find_values(chunk: memoryview, start: int, header: dict[int, Any]) -> list[tuple[int, int]]:
    """Where each value of a page begins and ends."""
    if header[_PAGE_TYPE] != 0:
        raise ValueError(f"a page of type {header[_PAGE_TYPE]}, not a data page of version 1")
    stop, place = start + header[_PAGE_SIZE], start + 4
    num_bytes = int.from_bytes(chunk[start:place], "little")
    present = _read_levels(chunk[place : place + num_bytes], header[_DATA_PAGE][_NUM_VALUES])
    place += num_bytes
    spans = []
    for is_there in present:
        if is_there:
            first = place + 4
            place = first + int.from_bytes(chunk[place:first], "little")
            spans.append((first, place))
        else:
            spans.append((place, place))
    if place != stop:
        raise ValueError("a page's values do not fill it")
    return spans


def _read_levels(data: memoryview, count: int) -> list[int]:
    """Definition levels 0 or 1: runs of one value, or of bits in groups of eight."""
    levels: list[int] = []
    place = 0
    while len(levels) < count:
        run, place = _read_varint(data, place)
        if run & 1:
            packed = np.frombuffer(data[place : place + (run >> 1)], np.uint8)
            levels += np.unpackbits(packed, bitorder="little").tolist()
            place += run >> 1
        else:
            levels += [data[place]] * (run >> 1)
            place += 1
    return levels[:count]


def _read_struct(data: memoryview, place: int) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol, by field number, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[place]:
        number, place = number + (kind >> 4), place + 1
        if kind >> 4 == 0:
            raise ValueError("a page header with far apart fields")
        if kind & 15 in (1, 2):  # true, false
            fields[number] = kind & 15 == 1
        elif kind & 15 in (4, 5, 6):  # integers, zigzag
            value, place = _read_varint(data, place)
            fields[number] = (value >> 1) ^ -(value & 1)
        elif kind & 15 == 8:  # bytes
            size, place = _read_varint(data, place)
            place += size
        elif kind & 15 == 12:
            fields[number], place = _read_struct(data, place)
        else:
            raise ValueError(f"a page header with a field of type {kind & 15}")
    return fields, place + 1


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while data[place] & 128:
        value |= (data[place] & 127) << shift
        place, shift = place + 1, shift + 7
    return value | data[place] << shift, place + 1
