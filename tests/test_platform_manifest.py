"""Manifests: what happened, proven byte by byte, and written once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import Row, make_rows, repeatable, write_table
from hypothesis import given, settings
from hypothesis import strategies as st

from pixart_platform.errors import ManifestError
from pixart_platform.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    load_manifest,
    verify_folder,
)
from pixart_platform.storage import Folder
from pixart_platform.tables import TableWriter

CONTENTS = {"part-0": bytes(range(256)) * 3, "part-1": b"short"}


def fill(place: Path) -> Manifest:
    """A folder with two files, and the manifest it would have."""
    place.mkdir(exist_ok=True)
    for name, data in CONTENTS.items():
        (place / name).write_bytes(data)
    counts = ({"ok": 3, "rejected": 1}, {"ok": 2})
    records = [FileRecord.of(place / n, c) for n, c in zip(CONTENTS, counts, strict=True)]
    return Manifest("images/2", {"side": [1, 2]}, {"images": "abc"}, tuple(records), {"width": 8})


def test_a_manifest_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    manifest = fill(tmp_path)
    written = manifest.commit_to(tmp_path)
    assert load_manifest(tmp_path) == written
    assert replace(written, producer="", commit="") == manifest
    assert written.digest == manifest.digest
    assert written.producer.startswith("pixart-ray ")


def test_counts_are_summed_over_files(tmp_path: Path) -> None:
    manifest = fill(tmp_path)
    assert manifest.counts == {"ok": 5, "rejected": 1}
    assert manifest.num_rows == 6


def change(manifest: Manifest, name: str) -> Manifest:
    first, *rest = manifest.files
    changed: dict[str, dict[str, Any]] = {
        "schema": {"schema": "images/1"},
        "setting": {"settings": {"side": [1, 3]}},
        "input": {"inputs": {"images": "abd"}},
        "extra": {"extra": {"width": 9}},
        "file digest": {"files": (replace(first, sha256="0" * 64), *rest)},
        "file name": {"files": (replace(first, name="part-9"), *rest)},
        "row count": {"files": (replace(first, counts={"ok": 4}), *rest)},
        "file order": {"files": (*rest, first)},
        "writer": {"producer": "another", "commit": "f00"},
        "where a file lies": {"files": (replace(first, folder="images-1234"), *rest)},
        "what a file is made from": {"files": (replace(first, key="abc"), *rest)},
    }
    return replace(manifest, **changed[name])


@pytest.mark.parametrize(
    "name",
    ["schema", "setting", "input", "extra", "file digest", "file name", "row count", "file order"],
)
def test_the_digest_changes_with_the_content(tmp_path: Path, name: str) -> None:
    manifest = fill(tmp_path)
    assert change(manifest, name).digest != manifest.digest


@pytest.mark.parametrize("name", ["writer", "where a file lies", "what a file is made from"])
def test_the_digest_is_of_the_content_alone(tmp_path: Path, name: str) -> None:
    manifest = fill(tmp_path)
    assert change(manifest, name).digest == manifest.digest


def captions(*texts: str) -> list[Row]:
    return [{"captions": [text]} for text in texts]


def write_grown_table(root: Folder) -> Folder:
    """A committed table of three partitions, of which a neighbour made and keeps the first two."""
    settings = {"prompt": "describe", "_all": 2}
    first = TableWriter.under(root, "captions", "captions/2", settings, {}, ["a", "b"])
    for k, texts in enumerate([("one", "two"), ("three",)]):
        first.write(k, make_rows("captions/2", captions(*texts)))
    first.commit()
    grown = TableWriter.under(
        root, "captions", "captions/2", settings | {"_all": 3}, {}, ["a", "b", "c"]
    )
    assert grown.adopt() == 2
    grown.write(2, make_rows("captions/2", captions("four")))
    grown.commit({"width": 8})
    return grown.folder


def files_of(table: Folder) -> list[tuple[Folder, str]]:
    """Every file a table consists of: its manifest, its partitions, the adopted ones."""
    records = load_manifest(table).files
    return [(table, MANIFEST_FILE), *((record.home(table), record.name) for record in records)]


flips = st.sampled_from([1 << bit for bit in range(8)] + [255])


@settings(repeatable, max_examples=24)
@given(st.integers(0, 3), st.floats(0, 1, exclude_max=True), flips)
def test_any_flipped_byte_of_a_table_is_found_and_its_file_named(
    root: Folder, number: int, place: float, flip: int
) -> None:
    table = root / root.children()[1] if root.children() else write_grown_table(root)
    table = table if load_manifest(table).num_rows == 4 else root / root.children()[0]
    home, name = files_of(table)[number]
    sound = home.read(name)
    damaged = bytearray(sound)
    damaged[int(place * len(sound))] ^= flip
    home.write(name, bytes(damaged))
    try:
        with pytest.raises(ManifestError, match=f"{home.name}/{name}: (its bytes|unreadable)"):
            verify_folder(table)
    finally:
        home.write(name, sound)
    assert verify_folder(table).num_rows == 4


@pytest.mark.parametrize("change", [lambda d: d[:0], lambda d: d[:-1], lambda d: d + b"x"])
def test_a_file_of_another_length_is_found(root: Folder, change: Callable[[bytes], bytes]) -> None:
    table = write_table(root, "captions/2", [captions("one")])
    name = table.manifest.files[0].name
    root.write(name, change(root.read(name)))
    with pytest.raises(ManifestError, match=f"{name}: its bytes are not the ones"):
        verify_folder(root)


def test_a_missing_file_is_found_wherever_it_lies(root: Folder) -> None:
    table = write_grown_table(root)
    for home, name in files_of(table)[1:]:
        sound = home.read(name)
        home.delete(name)
        with pytest.raises(ManifestError, match=f"{home.name}/{name}: missing, though"):
            verify_folder(table)
        home.write(name, sound)
    verify_folder(table)


def test_swapped_files_are_found(root: Folder) -> None:
    table = write_table(root, "captions/2", [captions("one"), captions("two")])
    first, second = (record.name for record in table.manifest.files)
    root.write(first, root.read(second))
    with pytest.raises(ManifestError, match=f"{first}: its bytes are not the ones"):
        verify_folder(root)


def test_a_manifest_that_was_edited_by_hand_is_refused(tmp_path: Path) -> None:
    fill(tmp_path).commit_to(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(path.read_text().replace('"ok": 2', '"ok": 3'))
    with pytest.raises(ManifestError, match=r"manifest.json: unreadable .*checksum"):
        load_manifest(tmp_path)


def test_a_manifest_from_before_there_were_checksums_is_read(tmp_path: Path) -> None:
    written = fill(tmp_path).commit_to(tmp_path)
    path = tmp_path / MANIFEST_FILE
    raw = json.loads(path.read_text())
    del raw["checksum"]
    for record in raw["files"]:
        del record["key"], record["folder"]
    path.write_text(json.dumps(raw))
    assert verify_folder(tmp_path) == written


def test_a_second_writer_with_other_content_is_refused_and_overwrites_nothing(
    root: Folder,
) -> None:
    first = Manifest("captions/2", {"side": [1, 2]}, {}, (FileRecord("a", 1, "00"),))
    first.commit_to(root)
    before = root.read(MANIFEST_FILE)
    second = change(first, "setting")
    with pytest.raises(ManifestError) as caught:
        second.commit_to(root)
    assert first.digest in str(caught.value)
    assert second.digest in str(caught.value)
    assert "nothing was overwritten, give one another folder" in str(caught.value)
    assert root.read(MANIFEST_FILE) == before


def test_committing_the_same_content_twice_is_no_conflict(root: Folder) -> None:
    manifest = Manifest("captions/2", {}, {}, (FileRecord("a", 1, "00"),))
    assert manifest.commit_to(root) == replace(manifest, commit="f00").commit_to(root)


def test_a_folder_without_a_manifest_is_unfinished(root: Folder) -> None:
    for folder in (root, root / "nowhere"):
        with pytest.raises(ManifestError, match=r"is unfinished, not ours or not there.*run the"):
            load_manifest(folder)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"files": 5}', '{"files": [{"nome": 1}]}', '{"files": []}',
     '{"checksum": "x"}', "\xff"],
)  # fmt: skip
def test_a_malformed_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError, match=r"manifest.json: unreadable .*restore it or redo"):
        load_manifest(tmp_path)


def test_a_manifest_from_another_release_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path).commit_to(tmp_path)
    path = tmp_path / MANIFEST_FILE
    raw = json.loads(path.read_text()) | {"colour": "red"}
    del raw["checksum"]
    path.write_text(json.dumps(raw))
    with pytest.raises(ManifestError, match="colour"):
        load_manifest(tmp_path)
