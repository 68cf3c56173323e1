"""Writers of tables: named by what is asked, taking over what there is, and of two one wins."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from builders import Row, make_rows, make_writer, write_and_commit, write_table

from pixart_platform.errors import ManifestError
from pixart_platform.manifest import verify_folder
from pixart_platform.storage import Folder, LocalFolder
from pixart_platform.tables import Table, TableWriter


def captions(text: str) -> pa.Table:
    """A partition of one row."""
    return make_rows("captions/2", [{"captions": [text]}])


def data_files(folder: Folder) -> set[str]:
    return {entry.name for entry in folder.walk("part-")}


def ask(root: Folder, **changed: Any) -> TableWriter:
    """The writer of some settings, inputs and parts, of which a test changes some."""
    asked: dict[str, Any] = {
        "schema": "captions/2", "settings": {"prompt": "a", "n": 1, "_all": "2 parts"},
        "inputs": {}, "parts": ["one", "two"],
    }  # fmt: skip
    return TableWriter.under(root, "captions", **(asked | changed))


@pytest.mark.parametrize(
    "changed",
    [{"schema": "text/2"}, {"settings": {"prompt": "b"}}, {"settings": {"_all": "3 parts"}}],
)
def test_other_settings_or_schema_get_another_folder(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    root = LocalFolder(tmp_path)
    assert ask(root) == ask(root)
    turned = {"_all": "2 parts", "n": 1, "prompt": "a"}
    assert ask(root, settings=turned) == ask(root)
    assert ask(root, **changed).folder != ask(root).folder


def test_other_inputs_get_another_folder_and_other_keys_where_their_files_differ(
    tmp_path: Path,
) -> None:
    root = LocalFolder(tmp_path)
    same: Row = {"source": "same"}
    images = [
        write_table(tmp_path / name, "images/2", [[same], [{"source": name}]]) for name in "ab"
    ]
    one, other = (ask(root, inputs={"images": table}, parts=()) for table in images)
    assert one.folder != other.folder
    assert one.keys[0] == other.keys[0]
    assert one.keys[1] != other.keys[1]
    assert one.inputs == {"images": images[0].digest}


def test_a_key_names_the_part_and_what_was_asked_and_nothing_else(tmp_path: Path) -> None:
    root = LocalFolder(tmp_path)
    keys = ask(root).keys
    assert len(set(keys)) == 2
    assert ask(root, parts=["one", "two", "three"]).keys[:2] == keys
    assert ask(root, settings={"prompt": "a", "n": 1, "_all": "others"}).keys == keys
    for changed in ({"settings": {"prompt": "b"}}, {"schema": "text/2"}, {"parts": ["x", "y"]}):
        assert not set(ask(root, **changed).keys) & set(keys)


def write_all(writer: TableWriter, texts: Sequence[str]) -> Table:
    for k, text in enumerate(texts):
        if not writer.is_written(k):
            writer.write(k, captions(text))
    return writer.commit()


def grow(root: Folder, parts: Sequence[str]) -> TableWriter:
    """The writer over a source of these parts."""
    return ask(root, settings={"prompt": "a", "_all": list(parts)}, parts=parts)


def test_a_table_that_grew_takes_over_what_its_neighbours_made(root: Folder) -> None:
    first = write_all(grow(root, "ab"), "ab")
    second = grow(root, "abc")
    assert second.adopt() == 2
    assert second.adopt() == 0
    assert second.written() == {0, 1}
    table = write_all(second, ["", "", "c"])
    assert [table.read(k)["captions"].to_pylist() for k in range(3)] == [
        [["a"]], [["b"]], [["c"]],
    ]  # fmt: skip
    assert len(data_files(second.folder)) == 1
    verify_folder(second.folder)
    assert [record.folder for record in table.manifest.files] == [first.folder.name] * 2 + [""]


def test_a_table_may_adopt_from_one_that_adopted_itself(root: Folder) -> None:
    first = write_all(grow(root, "a"), "a")
    for parts in ("ab", "abc", "bca"):
        writer = grow(root, parts)
        assert writer.adopt() == len(parts) - (parts != "bca")
        table = write_all(writer, parts)
    assert [table.read(k)["captions"].to_pylist() for k in range(3)] == [
        [["b"]], [["c"]], [["a"]],
    ]  # fmt: skip
    assert table.manifest.files[2].folder == first.folder.name, "where the file is, in one step"
    verify_folder(table.folder)


def test_an_adopted_table_has_the_digest_of_one_made_anew(root: Folder) -> None:
    write_all(grow(root / "one", "ab"), "ab")
    adopting = grow(root / "one", "abc")
    adopting.adopt()
    adopted = write_all(adopting, "abc")
    anew = write_all(grow(root / "other", "abc"), "abc")
    assert adopted.digest == anew.digest


def test_nothing_is_adopted_from_the_unfinished_or_from_other_settings(root: Folder) -> None:
    unfinished = grow(root, "ab")
    unfinished.write(0, captions("a"))
    write_all(ask(root, settings={"prompt": "b", "_all": ["a"]}, parts="a"), "a")
    assert grow(root, "abc").adopt() == 0


def race(writers: Sequence[TableWriter], texts: Sequence[str]) -> list[Future[str]]:
    """Every writer writes its text to all partitions and commits, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(len(writers)).wait
    with ProcessPoolExecutor(len(writers), mp_context=context, initializer=together) as pool:
        jobs = zip(writers, texts, strict=True)
        return [
            pool.submit(write_and_commit, writer, [captions(text)] * writer.num_partitions)
            for writer, text in jobs
        ]


def test_of_two_processes_with_other_settings_one_wins_and_the_other_says_so(root: Folder) -> None:
    writers = [
        replace(make_writer(root, "captions/2", 8), settings={"prompt": text}) for text in "ab"
    ]
    outcomes = race(writers, "ab")
    lost = [outcome.exception() for outcome in outcomes if outcome.exception()]
    (digest,) = (outcome.result() for outcome in outcomes if not outcome.exception())
    assert len(lost) == 1
    assert isinstance(lost[0], ManifestError)
    assert f"another writer has committed digest {digest}" in str(lost[0])
    assert verify_folder(root).digest == digest


def test_two_processes_with_the_same_work_both_end_well(root: Folder) -> None:
    outcomes = race([make_writer(root, "captions/2", 8)] * 2, "aa")
    assert {outcome.result() for outcome in outcomes} == {verify_folder(root).digest}
    assert len(data_files(root)) == 8


def test_two_processes_with_other_results_of_the_same_work_agree_on_one_table(root: Folder) -> None:
    outcomes = race([make_writer(root, "captions/2", 8)] * 2, "ab")
    assert {outcome.result() for outcome in outcomes} == {verify_folder(root).digest}
    listed = {record.name for record in Table.open(root).manifest.files}
    assert listed == data_files(root)
