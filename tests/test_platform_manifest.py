"""Manifests: what happened, proven byte by byte, and written once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_platform.errors import ManifestError
from pixart_platform.manifest import (
    MANIFEST_FILE,
    FileRecord,
    Manifest,
    load_manifest,
    verify_folder,
)

CONTENTS = {"part-0": bytes(range(256)) * 3, "part-1": b"short"}


def fill(folder: Path) -> Manifest:
    """A folder with two files, and the manifest it would have."""
    folder.mkdir(exist_ok=True)
    for name, data in CONTENTS.items():
        (folder / name).write_bytes(data)
    counts = ({"ok": 3, "rejected": 1}, {"ok": 2})
    records = [FileRecord.of(folder / n, c) for n, c in zip(CONTENTS, counts, strict=True)]
    return Manifest("images/1", {"side": [1, 2]}, {"images": "abc"}, tuple(records), {"width": 8})


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A committed folder; a test that damages it must mend it."""
    folder = tmp_path_factory.mktemp("sealed")
    fill(folder).commit_to(folder)
    return folder


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


def test_the_digest_does_not_say_who_wrote_it(tmp_path: Path) -> None:
    manifest = fill(tmp_path)
    assert replace(manifest, producer="another", commit="f00").digest == manifest.digest


def change(manifest: Manifest, name: str) -> Manifest:
    first, *rest = manifest.files
    changed: dict[str, dict[str, Any]] = {
        "schema": {"schema": "images/2"},
        "setting": {"settings": {"side": [1, 3]}},
        "input": {"inputs": {"images": "abd"}},
        "extra": {"extra": {"width": 9}},
        "file digest": {"files": (replace(first, sha256="0" * 64), *rest)},
        "file name": {"files": (replace(first, name="part-9"), *rest)},
        "row count": {"files": (replace(first, counts={"ok": 4}), *rest)},
        "file order": {"files": (*rest, first)},
    }
    return replace(manifest, **changed[name])


@pytest.mark.parametrize(
    "name",
    ["schema", "setting", "input", "extra", "file digest", "file name", "row count", "file order"],
)
def test_the_digest_changes_with_the_content(tmp_path: Path, name: str) -> None:
    manifest = fill(tmp_path)
    assert change(manifest, name).digest != manifest.digest


@repeatable
@given(st.data())
def test_any_flipped_bit_is_found_and_its_file_named(sealed: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(list(CONTENTS)))
    damaged = bytearray(CONTENTS[name])
    place = data.draw(st.integers(0, len(damaged) - 1))
    damaged[place] ^= 1 << data.draw(st.integers(0, 7))
    (sealed / name).write_bytes(damaged)
    try:
        with pytest.raises(ManifestError, match=f"{name}: its bytes are not the ones"):
            verify_folder(sealed)
    finally:
        (sealed / name).write_bytes(CONTENTS[name])
    verify_folder(sealed)


@pytest.mark.parametrize("wrong", [b"", CONTENTS["part-0"][:-1], CONTENTS["part-0"] + b"x"])
def test_a_file_of_another_length_is_found(sealed: Path, wrong: bytes) -> None:
    (sealed / "part-0").write_bytes(wrong)
    try:
        with pytest.raises(ManifestError, match="part-0: its bytes"):
            verify_folder(sealed)
    finally:
        (sealed / "part-0").write_bytes(CONTENTS["part-0"])


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    fill(tmp_path).commit_to(tmp_path)
    (tmp_path / "part-1").unlink()
    with pytest.raises(ManifestError, match="part-1: missing, though the manifest lists it"):
        verify_folder(tmp_path)


def test_a_second_writer_with_other_content_is_refused_and_overwrites_nothing(
    tmp_path: Path,
) -> None:
    first = fill(tmp_path)
    first.commit_to(tmp_path)
    before = (tmp_path / MANIFEST_FILE).read_bytes()
    second = change(first, "setting")
    with pytest.raises(ManifestError) as caught:
        second.commit_to(tmp_path)
    assert first.digest in str(caught.value)
    assert second.digest in str(caught.value)
    assert "give one of them another folder" in str(caught.value)
    assert (tmp_path / MANIFEST_FILE).read_bytes() == before


def test_committing_the_same_content_twice_is_no_conflict(tmp_path: Path) -> None:
    manifest = fill(tmp_path)
    assert manifest.commit_to(tmp_path) == manifest.commit_to(tmp_path)


def test_a_folder_without_a_manifest_is_unfinished(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"is unfinished or not ours.*run the job that writes"):
        load_manifest(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="nowhere does not exist"):
        load_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"files": 5}', '{"files": [{"nome": 1}]}', '{"files": []}'],
)
def test_a_malformed_manifest_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST_FILE).write_text(text)
    with pytest.raises(ManifestError, match=r"manifest.json: unreadable .*restore it or redo"):
        load_manifest(tmp_path)


def test_a_manifest_from_another_release_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path).commit_to(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    with pytest.raises(ManifestError, match="colour"):
        load_manifest(tmp_path)
