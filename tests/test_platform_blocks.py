"""Payloads found in a mapped Parquet file: what pyarrow reads, and errors for what is broken."""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import Row, make_rows, repeatable, write_table
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.blocks import PlainColumn, read_block
from pixart_platform.copies import make_room
from pixart_platform.errors import ManifestError
from pixart_platform.storage import Folder
from pixart_platform.tables import ROW_GROUP_ROWS

payloads = st.lists(st.none() | st.binary(max_size=40), min_size=1, max_size=70)


def write_chunk(values: list[bytes | None], page_bytes: int, page_rows: int) -> memoryview:
    """The bytes of a column chunk, in pages as small as asked for."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table({"moments": pa.array(values, pa.binary())}), sink, compression="none",
        use_dictionary=False, write_statistics=False, data_page_size=page_bytes,
        write_batch_size=page_rows,
    )  # fmt: skip
    file = sink.getvalue()
    chunk = pq.ParquetFile(pa.BufferReader(file)).metadata.row_group(0).column(0)
    start = chunk.data_page_offset
    return memoryview(file).cast("B")[start : start + chunk.total_compressed_size]


@repeatable
@given(payloads, st.integers(1, 300), st.integers(1, 40))
def test_any_values_are_found_in_pages_of_any_size(
    values: list[bytes | None], page_bytes: int, page_rows: int
) -> None:
    column = PlainColumn(write_chunk(values, page_bytes, page_rows))
    assert [column[row] for row in range(len(column))] == [value or b"" for value in values]


def test_values_are_views_of_the_chunk() -> None:
    chunk = write_chunk([b"one", b"three"], 1000, 100)
    assert PlainColumn(chunk)[1].obj is chunk.obj


@repeatable
@given(payloads, st.data())
def test_a_chunk_that_is_cut_off_or_flipped_is_refused_or_read_and_never_hangs(
    values: list[bytes | None], data: st.DataObject
) -> None:
    broken = bytearray(write_chunk(values, 100, 10))
    place = data.draw(st.integers(0, len(broken) - 1))
    broken[place] ^= data.draw(st.integers(1, 255))
    end = data.draw(st.integers(1, len(broken)))
    try:
        column = PlainColumn(memoryview(broken)[:end])
    except (ValueError, LookupError):
        return
    assert all(len(column[row]) <= len(broken) for row in range(len(column)))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_block_is_what_its_row_group_holds(tmp_path: Path, compression: str) -> None:
    rows = [{"features": b"%d" % n * 30, "num_tokens": [n, 0]} for n in range(ROW_GROUP_ROWS + 9)]
    table = write_table(tmp_path, "text/2", [rows])
    if compression != "none":  # not as our writer writes it, but read all the same
        path = tmp_path / table.manifest.files[0].name
        group = ROW_GROUP_ROWS
        pq.write_table(make_rows("text/2", rows), path, group, compression=compression)
    block, num_bytes = read_block(table, 0, 1, ["num_tokens", "features"])
    assert [block["features"](row) for row in range(9)] == [r["features"] for r in rows[-9:]]
    assert [block["num_tokens"](row) for row in range(9)] == [r["num_tokens"] for r in rows[-9:]]
    payload = sum(len(row["features"]) for row in rows[-9:])
    assert (num_bytes > payload) == (compression == "zstd"), "mapped payloads take no memory"


def test_a_broken_row_group_is_named(tmp_path: Path) -> None:
    table = write_table(tmp_path, "text/2", [[{"features": b"f" * 1000, "num_tokens": [1]}]])
    path = tmp_path / table.manifest.files[0].name
    data = bytearray(path.read_bytes())
    data[data.index(b"f" * 1000) - 1] ^= 64  # a length
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=rf"{path.name}: row group 0 cannot be read .*fill"):
        read_block(table, 0, 0, ["features"])


def test_a_table_on_s3_is_read_from_a_verified_copy(
    bucket: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIXART_CACHE", str(tmp_path / "cache"))
    rows: list[Row] = [{"features": bytes([i]) * 40, "num_tokens": [5]} for i in range(6)]
    table = write_table(bucket / "text", "text/2", [rows, rows[:2]])
    block, _ = read_block(table, 0, 0, ["features", "num_tokens"])
    assert [bytes(block["features"](i)) for i in range(6)] == [row["features"] for row in rows]
    names = [file.name for file in table.manifest.files]
    table.folder.delete(names[0])
    again, _ = read_block(table, 0, 0, ["features"])
    assert bytes(again["features"](3)) == rows[3]["features"], "copied once"

    damaged = bytearray(table.folder.read(names[1]))
    damaged[len(damaged) // 2] ^= 1
    table.folder.write(names[1], bytes(damaged))
    with pytest.raises(ManifestError, match=r"not the ones the manifest lists; restore"):
        read_block(table, 1, 0, ["features"])


def test_copies_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate(("new", "older", "oldest")):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(bytes(100))
        os.utime(path, (1000 - age, 1000 - age))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200))  # room for 250
    make_room(tmp_path, 100)
    assert [path.stem for path in sorted(tmp_path.iterdir())] == ["new"]
