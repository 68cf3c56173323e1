"""Tables: partitions written in any order by anyone, committed once, aligned row by row."""

import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from builders import Row, make_rows, make_writer, repeatable, write_table
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.errors import ManifestError
from pixart_platform.manifest import MANIFEST_FILE, verify_folder
from pixart_platform.storage import Folder, LocalFolder
from pixart_platform.tables import (
    SCHEMAS,
    Table,
    TableWriter,
    check_aligned,
    count_statuses,
    find_rejects,
    verify_table,
)

ROWS: dict[str, list[Row]] = {
    "images/2": [
        {
            "source": "a.png", "uri": "s3://b/a.png", "bytes": bytes(range(256)), "width": 3,
            "height": 2, "raw_caption": "caf\u00e9 \u2615", "label": 7, "quality": 0.5,
            "phash": 2**64 - 1, "truth": "{}",
        },
        {"status": "rejected: empty file", "bytes": b"", "width": 0, "height": 0},
    ],
    "selection/1": [{}, {"status": "rejected: duplicate"}],
    "captions/2": [
        {"captions": ["a red three", "", "raw"]}, {"status": "rejected: x", "captions": []},
    ],
    "text/2": [
        {"features": b"\x00\xff" * 8, "num_tokens": [3, 0, 1]},
        {"features": b"", "num_tokens": []},
    ],
    "latents/1": [
        {"moments": b"\x01\x02", "bucket_h": 8, "bucket_w": 4, "width": 32, "height": 64},
        {"moments": b"", "bucket_h": 0, "bucket_w": 0, "width": 0, "height": 0},
    ],
    "drawings/1": [{"prompt": "a red three", "seed": 2**63 - 1, "png": bytes(range(256))}],
    "judgements/1": [{"seen": "[]", "features": b"\x00\xff"}, {"seen": "", "features": b""}],
}  # fmt: skip


def captions(*statuses: str, text: str = "x") -> pa.Table:
    return make_rows("captions/2", [{"status": s, "captions": [text]} for s in statuses])


def names_of(folder: Folder) -> list[str]:
    return [entry.name for entry in folder.walk()]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_rows_are_read_as_they_were_written(root: Folder, schema: str) -> None:
    expected = make_rows(schema, ROWS[schema])
    write_table(root, schema, [ROWS[schema], []])
    table = Table.open(root.uri)
    assert table.read(0).equals(expected)
    assert table.read(0).schema == SCHEMAS[schema]
    assert table.read(1).num_rows == 0
    assert table.num_partitions == 2
    verify_folder(root)


def test_a_reader_may_ask_for_some_columns_or_row_groups(root: Folder) -> None:
    rows = [{"width": i, "moments": bytes(1000)} for i in range(600)]
    table = write_table(root, "latents/1", [rows])
    assert table.read(0, ["width", "id"]).slice(1, 1).to_pydict() == {"width": [1], "id": ["0001"]}
    with table.file(0) as file:
        assert file.read_row_group(1, ["width"])["width"].to_pylist() == list(range(256, 512))


def test_columns_come_in_any_order_and_width_and_land_in_the_schema(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "extra": ["dropped"],
            "num_tokens": pa.array([[5]], pa.list_(pa.int64())),
            "features": [b"ab"],
            "status": ["ok"],
            "id": ["x"],
        }
    )
    writer = make_writer(tmp_path, "text/2", 1)
    writer.write(0, rows)
    assert writer.commit().read(0).schema == SCHEMAS["text/2"]


def test_a_number_that_does_not_fit_its_column_is_refused(tmp_path: Path) -> None:
    rows = make_rows("text/2", ROWS["text/2"]).drop_columns(["num_tokens"])
    wide = pa.array([[2**40], [0]], pa.list_(pa.int64()))
    writer = make_writer(tmp_path, "text/2", 1)
    with pytest.raises(pa.ArrowInvalid):
        writer.write(0, rows.append_column("num_tokens", wide))
    assert not writer.is_written(0)


def test_a_partition_is_written_only_when_its_record_is(root: Folder) -> None:
    writer = make_writer(root, "captions/2", 3)
    assert writer.written() == set()
    writer.write(1, captions("ok"))
    again = make_writer(root, "captions/2", 3)
    assert [again.is_written(k) for k in range(3)] == [False, True, False]
    (data,) = (name for name in names_of(root) if name.startswith("part-00001-"))
    root.write(data.replace("00001", "00002"), root.read(data))
    assert again.written() == {1}, "data without its record is what a killed writer leaves"


def test_a_file_is_named_by_its_bytes(root: Folder) -> None:
    writer = make_writer(root, "captions/2", 1)
    writer.write(0, captions("ok"))
    (record,) = writer.commit().manifest.files
    assert record.name == f"part-00000-{record.sha256[:8]}.parquet"
    assert record.key == writer.keys[0]


def test_writing_a_partition_again_changes_nothing(root: Folder) -> None:
    writer = make_writer(root, "captions/2", 1)
    writer.write(0, captions("ok", "ok"))
    before = {name: root.read(name) for name in names_of(root)}
    writer.write(0, captions("ok", "ok"))
    assert {name: root.read(name) for name in names_of(root)} == before


def test_of_two_results_of_a_partition_the_first_stays_and_the_second_says_so(
    root: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    writer = make_writer(root, "captions/2", 1)
    writer.write(0, captions("ok", text="first"))
    before = names_of(root)
    with caplog.at_level(logging.WARNING):
        writer.write(0, captions("ok", text="second"))
    assert f"{root.uri}: another writer finished partition 0 first" in caplog.text
    assert names_of(root) == before
    assert writer.commit().read(0)["captions"].to_pylist() == [["first"]]
    verify_folder(root)


def test_committing_without_every_partition_is_refused_by_name(root: Folder) -> None:
    writer = make_writer(root, "captions/2", 3)
    writer.write(0, captions("ok"))
    writer.write(2, captions("ok"))
    with pytest.raises(ManifestError, match=r"00001.json: .*run the job again"):
        writer.commit()
    assert not writer.is_committed
    with pytest.raises(ManifestError, match="is unfinished"):
        Table.open(root)
    writer.write(1, captions("ok"))
    assert writer.commit().num_partitions == 3
    assert writer.is_committed


@pytest.mark.parametrize("text", ['{"name": "part-0', "[]", "{}", '{"nome": 1}', ""])
def test_a_damaged_record_is_refused_by_name(tmp_path: Path, text: str) -> None:
    writer = make_writer(tmp_path, "captions/2", 1)
    writer.write(0, captions("ok"))
    (tmp_path / "_records" / "00000.json").write_text(text)
    with pytest.raises(ManifestError, match=r"00000.json: .*run the job again"):
        writer.commit()


statuses = st.sampled_from(["ok", "rejected: empty file", "rejected: 3x4: too small", "rejected"])
KINDS = {"ok", "rejected: empty file", "rejected:", "rejected"}


@repeatable
@given(st.lists(statuses, max_size=30))
def test_every_row_is_counted_once_under_the_kind_of_its_status(found: list[str]) -> None:
    counts = count_statuses(captions(*found))
    assert sum(counts.values()) == len(found)
    for kind in ("ok", "rejected: empty file", "rejected"):
        assert counts.get(kind, 0) == found.count(kind)
    assert set(counts) <= KINDS


def test_reasons_that_differ_in_numbers_alone_are_counted_together() -> None:
    found = ("rejected: too small (3x4)", "rejected: too small (1x1)", "rejected: 12 frames", "ok")
    counts = count_statuses(captions(*found, "rejected: too small"))
    assert counts == {"ok": 1, "rejected:": 1, "rejected: too small": 3}


def test_the_manifest_counts_rows_over_all_partitions(tmp_path: Path) -> None:
    writer = TableWriter(
        LocalFolder(tmp_path), "captions/2", {"prompt": "p"}, {"images": "abc"}, ("a", "b")
    )
    writer.write(0, captions("ok", "rejected: a"))
    writer.write(1, captions("rejected: b", "ok", "ok"))
    table = writer.commit({"width": 16})
    assert table.manifest.counts == {"ok": 3, "rejected: a": 1, "rejected: b": 1}
    assert table.manifest.num_rows == 5
    assert table.manifest.extra == {"width": 16}
    assert (table.manifest.settings, table.manifest.inputs) == ({"prompt": "p"}, {"images": "abc"})


def test_a_schema_of_another_release_is_refused(tmp_path: Path) -> None:
    manifest = write_table(tmp_path / "a", "captions/2", [ROWS["captions/2"]]).manifest
    replace(manifest, schema="captions/1").commit_to(tmp_path / "b")
    with pytest.raises(ManifestError, match=r"b: holds captions/1, which .*Run its job again"):
        Table.open(tmp_path / "b")


def test_every_reject_of_a_table_is_listed_with_its_source_and_reason(root: Folder) -> None:
    sources: list[Row] = [{"source": name} for name in ("a.png", "b.png", "c.png")]
    broken: Row = {"source": "d.png", "status": "rejected: empty file"}
    images = write_table(root / "images", "images/2", [[*sources, broken], sources])
    assert list(find_rejects(images, images)) == [
        {"source": "d.png", "id": "0003", "status": "rejected: empty file"}
    ]
    twice = {"status": "rejected: duplicate"}
    kept: list[Row] = [{}, {}, {}]
    selection = write_table(
        root / "selection", "selection/1", [[{}, twice, {}, {"status": broken["status"]}], kept]
    )
    assert list(find_rejects(images, selection, images)) == [
        {"source": "b.png", "id": "0001", "status": "rejected: duplicate"}
    ]
    assert [row["source"] for row in find_rejects(images, selection)] == ["b.png", "d.png"]


def test_a_lost_or_damaged_partition_is_named(root: Folder) -> None:
    table = write_table(root, "captions/2", [ROWS["captions/2"]])
    name = table.manifest.files[0].name
    sound = root.read(name)
    root.write(name, sound[:4] + bytes(len(sound) - 8) + sound[-4:])
    with pytest.raises(ManifestError, match=rf"(?s){name}: cannot be read .*restore it"):
        table.read(0)
    root.write(name, b"PAR1 no more")
    with pytest.raises(ManifestError, match=rf"(?s){name}: cannot be read .*restore it"):
        table.read(0)
    root.delete(name)
    with pytest.raises(ManifestError, match=rf"{name}: cannot be read"):
        table.read(0)


def test_a_sound_table_verifies_and_tells_its_rows(root: Folder) -> None:
    twice: list[Row] = [{"id": "ab", "source": "a"}, {"id": "ab", "source": "b"}]
    write_table(root / "images", "images/2", [twice, [{"id": "cd", "source": "c"}]])
    assert verify_table(root / "images").num_rows == 3, "one picture twice is no fault of a source"
    rejected: Row = {"id": "ab", "status": "rejected: duplicate"}
    write_table(root / "selection", "selection/1", [[{"id": "ab"}, rejected], [{"id": "cd"}]])
    assert verify_table(root / "selection").counts == {"ok": 2, "rejected: duplicate": 1}
    write_table(root / "empty", "selection/1", [])
    assert verify_table(root / "empty").num_rows == 0


def test_a_row_that_is_there_twice_is_found(root: Folder) -> None:
    ids = ["0a" * 32, "0b" * 32, "0a" * 32]
    write_table(root, "selection/1", [[{"id": ids[0]}, {"id": ids[1]}], [{"id": ids[2]}]])
    with pytest.raises(ManifestError, match="two rows that are ok have an id that begins 0a0a"):
        verify_table(root.uri)


def test_a_manifest_that_counts_other_rows_than_there_are_is_found(tmp_path: Path) -> None:
    table = write_table(tmp_path / "a", "selection/1", [[{}], [{}]])
    files = [table.manifest.files[0], replace(table.manifest.files[1], counts={"ok": 2})]
    wrong = tmp_path / "b"
    for record in files:
        LocalFolder(wrong).write(record.name, table.folder.read(record.name))
    replace(table.manifest, files=tuple(files)).commit_to(wrong)
    with pytest.raises(ManifestError, match="b: partition 1 has not the rows it lists"):
        verify_table(wrong)


def test_tables_line_up_when_partitions_and_rows_do(tmp_path: Path) -> None:
    def table(name: str, *sizes: int) -> Table:
        partitions = [[{"captions": ["x"]}] * size for size in sizes]
        return write_table(tmp_path / name, "captions/2", partitions)

    first = table("first", 3, 2)
    check_aligned([first, table("same", 3, 2)])
    for name, sizes in {"rows": (2, 3), "fewer": (3,), "more": (3, 2, 0)}.items():
        with pytest.raises(ManifestError, match=f"{name} does not line up with .*first"):
            check_aligned([first, table(name, *sizes)])


def test_tables_of_other_images_do_not_line_up(tmp_path: Path) -> None:
    images = [
        write_table(tmp_path / name, "images/2", [[{"source": name}]]) for name in ("one", "other")
    ]
    writer = TableWriter.under(
        LocalFolder(tmp_path), "selection", "selection/1", {}, {"images": images[0]}
    )
    writer.write(0, make_rows("selection/1", [{}]))
    selection = writer.commit()
    check_aligned([images[0], selection])
    with pytest.raises(ManifestError, match=r"other, selection-.* from different image tables"):
        check_aligned([images[1], selection])


def test_two_tables_of_the_same_rows_have_the_same_digest(tmp_path: Path) -> None:
    tables = [write_table(tmp_path / n, "captions/2", [ROWS["captions/2"]]) for n in "ab"]
    assert tables[0].digest == tables[1].digest
    assert tables[0].folder.find(MANIFEST_FILE)
