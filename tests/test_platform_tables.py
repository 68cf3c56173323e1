"""Tables: partitions written in any order by anyone, committed once, aligned row by row."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import Row, make_rows, repeatable, write_table
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.errors import ManifestError
from pixart_platform.manifest import MANIFEST_FILE, verify_folder
from pixart_platform.tables import SCHEMAS, Table, TableWriter, check_aligned, count_statuses

ROWS: dict[str, list[Row]] = {
    "images/1": [
        {
            "source": "a.png", "bytes": bytes(range(256)), "width": 3, "height": 2,
            "raw_caption": "caf\u00e9 \u2615", "label": 7, "quality": 0.5, "truth": "{}",
        },
        {"status": "rejected: empty file", "bytes": b"", "width": 0, "height": 0},
    ],
    "captions/1": [{"caption": "a red three"}, {"status": "rejected: x", "caption": ""}],
    "text/1": [{"features": b"\x00\xff" * 8, "num_tokens": 4}, {"features": b"", "num_tokens": 0}],
    "latents/1": [
        {"moments": b"\x01\x02", "bucket_h": 8, "bucket_w": 4, "width": 32, "height": 64},
        {"moments": b"", "bucket_h": 0, "bucket_w": 0, "width": 0, "height": 0},
    ],
}  # fmt: skip


def captions(*statuses: str) -> pa.Table:
    return make_rows("captions/1", [{"status": status, "caption": "x"} for status in statuses])


@pytest.mark.parametrize("schema", SCHEMAS)
def test_rows_are_read_as_they_were_written(tmp_path: Path, schema: str) -> None:
    expected = make_rows(schema, ROWS[schema])
    write_table(tmp_path, schema, [ROWS[schema], []])
    table = Table.open(tmp_path, schema)
    assert table.read(0).equals(expected)
    assert table.read(0).schema == SCHEMAS[schema]
    assert table.read(1).num_rows == 0
    assert table.num_partitions == 2
    verify_folder(tmp_path)


def test_a_reader_may_ask_for_some_columns(tmp_path: Path) -> None:
    table = write_table(tmp_path, "latents/1", [ROWS["latents/1"]])
    assert table.read(0, ["width", "id"]).to_pydict() == {"width": [32, 0], "id": ["0000", "0001"]}


def test_columns_come_in_any_order_and_width_and_land_in_the_schema(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "extra": ["dropped"],
            "num_tokens": pa.array([5], pa.int64()),
            "features": [b"ab"],
            "status": ["ok"],
            "id": ["x"],
        }
    )
    writer = TableWriter(tmp_path, "text/1", {}, {})
    writer.write(0, rows)
    assert writer.commit(1).read(0).schema == SCHEMAS["text/1"]


def test_a_number_that_does_not_fit_its_column_is_refused(tmp_path: Path) -> None:
    rows = make_rows("text/1", ROWS["text/1"]).drop_columns(["num_tokens"])
    rows = rows.append_column("num_tokens", pa.array([2**40, 0], pa.int64()))
    writer = TableWriter(tmp_path, "text/1", {}, {})
    with pytest.raises(pa.ArrowInvalid):
        writer.write(0, rows)
    assert not writer.is_written(0)


def test_a_partition_is_written_only_when_its_record_is(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, "captions/1", {}, {})
    writer.write(1, captions("ok"))
    again = TableWriter(tmp_path, "captions/1", {}, {})
    assert [again.is_written(k) for k in range(3)] == [False, True, False]
    (tmp_path / "part-00002.parquet").write_bytes((tmp_path / "part-00001.parquet").read_bytes())
    assert not again.is_written(2), "data without its record is what a killed writer leaves"


def test_writing_a_partition_again_changes_nothing(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, "captions/1", {}, {})
    writer.write(0, captions("ok", "ok"))
    before = (tmp_path / "part-00000.parquet").read_bytes()
    writer.write(0, captions("ok", "ok"))
    assert (tmp_path / "part-00000.parquet").read_bytes() == before


def test_committing_without_every_partition_is_refused_by_name(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, "captions/1", {}, {})
    writer.write(0, captions("ok"))
    writer.write(2, captions("ok"))
    with pytest.raises(ManifestError, match=r"00001.json: .*run the job again"):
        writer.commit(3)
    assert not writer.is_committed
    with pytest.raises(ManifestError, match="is unfinished"):
        Table.open(tmp_path)
    writer.write(1, captions("ok"))
    assert writer.commit(3).num_partitions == 3
    assert writer.is_committed


def test_a_half_written_record_is_refused_by_name(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, "captions/1", {}, {})
    writer.write(0, captions("ok"))
    (tmp_path / "_records" / "00000.json").write_text('{"name": "part-0')
    with pytest.raises(ManifestError, match=r"00000.json: .*run the job again"):
        writer.commit(1)


statuses = st.sampled_from(["ok", "rejected: empty file", "rejected: 3x4: too small", "rejected"])


@repeatable
@given(st.lists(statuses, max_size=30))
def test_every_row_is_counted_once_under_the_kind_of_its_status(found: list[str]) -> None:
    counts = count_statuses(captions(*found))
    assert sum(counts.values()) == len(found)
    assert counts.get("ok", 0) == found.count("ok")
    assert set(counts) <= {"ok", "rejected"}


def test_the_manifest_counts_rows_over_all_partitions(tmp_path: Path) -> None:
    writer = TableWriter(tmp_path, "captions/1", {"prompt": "p"}, {"images": "abc"})
    writer.write(0, captions("ok", "rejected: a"))
    writer.write(1, captions("rejected: b", "ok", "ok"))
    table = writer.commit(2, {"width": 16})
    assert table.manifest.counts == {"ok": 3, "rejected": 2}
    assert table.manifest.num_rows == 5
    assert table.manifest.extra == {"width": 16}
    assert (table.manifest.settings, table.manifest.inputs) == ({"prompt": "p"}, {"images": "abc"})


def test_opening_a_table_of_another_schema_is_refused(tmp_path: Path) -> None:
    write_table(tmp_path, "captions/1", [ROWS["captions/1"]])
    with pytest.raises(ManifestError, match="holds captions/1, but latents/1 is needed"):
        Table.open(tmp_path, "latents/1")


def test_every_rejected_row_is_listed_with_its_source_and_reason(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"source": "a.png"},
        {"source": "b.png", "status": "rejected: empty file"},
        {"source": "c.png", "status": "rejected: 1x1"},
    ]
    table = write_table(tmp_path / "images", "images/1", [rows, rows[1:2]])
    listed = [(row["source"], row["status"]) for row in table.rejects()]
    assert listed == [
        ("b.png", "rejected: empty file"),
        ("c.png", "rejected: 1x1"),
        ("b.png", "rejected: empty file"),
    ]
    other = write_table(tmp_path / "captions", "captions/1", [ROWS["captions/1"]])
    assert list(other.rejects()) == [{"id": "0001", "status": "rejected: x"}]


def test_a_lost_or_damaged_partition_is_named(tmp_path: Path) -> None:
    table = write_table(tmp_path, "captions/1", [ROWS["captions/1"]])
    table.path(0).write_bytes(b"PAR1 no more")
    with pytest.raises(ManifestError, match=r"part-00000.parquet: cannot be read .*restore it"):
        table.read(0)
    table.path(0).unlink()
    with pytest.raises(ManifestError, match=r"part-00000.parquet: cannot be read"):
        table.read(0)


def test_tables_line_up_when_partitions_and_rows_do(tmp_path: Path) -> None:
    def table(name: str, *sizes: int) -> Table:
        partitions = [[{"caption": "x"}] * size for size in sizes]
        return write_table(tmp_path / name, "captions/1", partitions)

    first = table("first", 3, 2)
    check_aligned([first, table("same", 3, 2)])
    for name, sizes in {"rows": (2, 3), "fewer": (3,), "more": (3, 2, 0)}.items():
        with pytest.raises(ManifestError, match=f"{name} does not line up with .*first"):
            check_aligned([first, table(name, *sizes)])


@pytest.mark.parametrize(
    "changed",
    [{"schema": "text/1"}, {"settings": {"prompt": "b"}}, {"inputs": {"images": "other"}}],
)
def test_other_settings_inputs_or_schema_get_another_folder(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {
        "schema": "captions/1", "settings": {"prompt": "a", "n": 1}, "inputs": {"images": "one"},
    }  # fmt: skip
    folder = TableWriter.under(tmp_path, "captions", **asked).folder
    assert TableWriter.under(tmp_path, "captions", **asked).folder == folder
    turned = asked | {"settings": {"n": 1, "prompt": "a"}}
    assert TableWriter.under(tmp_path, "captions", **turned).folder == folder
    assert TableWriter.under(tmp_path, "captions", **(asked | changed)).folder != folder


def test_two_tables_of_the_same_rows_have_the_same_digest(tmp_path: Path) -> None:
    tables = [write_table(tmp_path / n, "captions/1", [ROWS["captions/1"]]) for n in "ab"]
    assert tables[0].digest == tables[1].digest
    assert (tables[0].folder / MANIFEST_FILE).is_file()
