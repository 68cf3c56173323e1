"""Sources: the same items in the same partitions, wherever they are read."""

import os
from pathlib import Path

import pytest
from builders import repeatable
from hypothesis import given
from hypothesis import strategies as st

from pixart_jobs.recipe import DataSettings
from pixart_jobs.sources import DigitScenes, ImageFolder, open_source
from pixart_platform.errors import StorageError


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {name}".encode())
    return folder


@repeatable
@given(st.integers(1, 12), st.integers(1, 14))
def test_partitions_hold_every_scene_once_in_order(num_scenes: int, rows: int) -> None:
    source = DigitScenes(num_scenes, rows, seed=0)
    partitions = [[item.source for item in source.read(k)] for k in range(source.num_partitions)]
    assert [name for part in partitions for name in part] == [
        f"digits:{i}" for i in range(num_scenes)
    ]
    assert all(len(part) == rows for part in partitions[:-1])
    assert partitions[-1]


def test_a_scene_does_not_depend_on_its_partition() -> None:
    one, other = DigitScenes(12, 12, seed=4).read(0), DigitScenes(12, 5, seed=4).read(1)
    assert one[5:10] == other
    assert DigitScenes(12, 12, seed=5).read(0) != one


def test_scenes_carry_caption_label_and_truth() -> None:
    items = DigitScenes(40, 40, seed=4).read(0)
    assert all(item.data and item.raw_caption and item.truth for item in items)
    assert {item.label is None for item in items} == {True, False}


def test_images_are_found_at_any_depth_sorted_by_path(tmp_path: Path) -> None:
    fill(tmp_path, "b.png", "a/z.JPG", "a/deep/er/m.webp", "c.jpeg", "notes.txt", "d.svg", "e")
    source = ImageFolder.scan(tmp_path, partition_rows=2)
    names = [item.source for k in range(source.num_partitions) for item in source.read(k)]
    assert names == ["a/deep/er/m.webp", "a/z.JPG", "b.png", "c.jpeg"]
    assert [len(source.read(k)) for k in range(source.num_partitions)] == [2, 2]
    assert source.read(1)[0].data == b"bytes of b.png"


def test_a_text_file_is_the_caption_else_the_words_of_the_name(tmp_path: Path) -> None:
    fill(tmp_path, "A_red-fox (2).png", "deep/b.png", "caf\u00e9.png", "___.png")
    (tmp_path / "deep" / "b.txt").write_text("  a caption\u2615 with\nlines \n", encoding="utf-8")
    captions = {i.source: i.raw_caption for i in ImageFolder.scan(tmp_path, 9).read(0)}
    assert captions == {
        "A_red-fox (2).png": "A red fox 2",
        "deep/b.png": "a caption\u2615 with\nlines",
        "caf\u00e9.png": "caf\u00e9",
        "___.png": "",
    }


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a fox", encoding="utf-8-sig")
    assert ImageFolder.scan(tmp_path, 9).read(0)[0].raw_caption == "a fox"


def test_a_caption_that_is_not_utf_8_is_a_problem_of_its_row(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes("caf\u00e9".encode("latin-1"))
    bad, good = ImageFolder.scan(tmp_path, 9).read(0)
    assert "unreadable caption a.txt ('utf-8' codec" in bad.problem
    assert not good.problem


def test_a_file_that_cannot_be_read_is_a_problem_of_its_row(tmp_path: Path) -> None:
    fill(tmp_path, "a.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    source = ImageFolder.scan(tmp_path, 9)
    problems = {item.source: item.problem for item in source.read(0)}
    assert problems == {
        "a.png": "",
        "folder.png": "unreadable file (Is a directory)",
        "gone.png": "unreadable file (No such file or directory)",
    }
    assert source.fingerprint()


def test_a_file_name_that_is_not_utf_8_is_shown_escaped(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(b"x")
    source = ImageFolder.scan(tmp_path, 9)
    (item,) = source.read(0)
    assert (item.source, item.data, item.problem) == ("caf\\xe9.png", b"x", "")
    item.raw_caption.encode()
    assert source.fingerprint()


def test_no_such_folder_is_refused_by_name(tmp_path: Path) -> None:
    fill(tmp_path, "file.png")
    for name in ("nowhere", "file.png"):
        with pytest.raises(StorageError, match=f"data.source = folder:.*{name}: no such folder"):
            open_source(DataSettings(source=f"folder:{tmp_path / name}"), seed=0)


def test_a_folder_without_images_says_which_it_looks_for(tmp_path: Path) -> None:
    fill(tmp_path, "notes.txt")
    with pytest.raises(StorageError, match=r"no image files in it \(.bmp, .gif, .jpeg"):
        open_source(DataSettings(source=f"folder:{tmp_path}"), seed=0)


def test_the_fingerprint_changes_with_any_image_or_caption(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png", "notes.md")

    def fingerprint() -> str:
        return ImageFolder.scan(tmp_path, 9).fingerprint()

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    os.utime(tmp_path / "notes.md", (1, 1))
    assert fingerprint() == seen[0]
    (tmp_path / "a.png").write_bytes(b"longer than it was before")
    seen.append(fingerprint())
    os.utime(tmp_path / "b.png", (1, 1))
    seen.append(fingerprint())
    (tmp_path / "b.txt").write_text("a caption")
    seen.append(fingerprint())
    (tmp_path / "b.txt").write_text("another caption")
    seen.append(fingerprint())
    (tmp_path / "a.png").rename(tmp_path / "c.png")
    seen.append(fingerprint())
    assert len(set(seen)) == 6


def test_a_recipe_names_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "pictures", "a.png")
    monkeypatch.chdir(tmp_path)
    opened = open_source(DataSettings(source="folder:pictures", partition_rows=3), seed=0)
    assert opened == ImageFolder(("a.png",), str(tmp_path / "pictures"), 3)
    scenes = open_source(DataSettings(source="digits", num_scenes=10, partition_rows=4), seed=2)
    assert scenes == DigitScenes(10, 4, 2)
    assert scenes.num_partitions == 3
