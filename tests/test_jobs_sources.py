"""Sources: the same items in the same partitions, wherever they are read, and none lost."""

import errno
import io
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import repeatable
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixart_jobs.listing import IMAGE_SUFFIXES, WHOLE, look_through, to_table
from pixart_jobs.pictures import FORMATS
from pixart_jobs.recipe import DataSettings
from pixart_jobs.sources import (
    Blob,
    Collection,
    RawItem,
    SampleScenes,
    Source,
    fetch,
    open_source,
    plan_reads,
)
from pixart_platform.errors import StorageError
from pixart_platform.storage import FileAbsent, Folder, LocalFolder

Files = Mapping[str, bytes | str]


def as_bytes(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content


def fill(place: Path | Folder, files: Files) -> None:
    folder = LocalFolder(place) if isinstance(place, Path) else place
    for name, content in files.items():
        folder.write(name, as_bytes(content))


def make_tar(files: Files, *, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(as_bytes(content))
            archive.addfile(member, io.BytesIO(as_bytes(content)))
    return buffer.getvalue()


def make_parquet(columns: Mapping[str, Any], *, group_rows: int = 3) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(dict(columns)), sink, row_group_size=group_rows)
    return bytes(sink.getvalue())


class SickDisk(LocalFolder):
    """It lists its files, but does not read them."""

    def open(self, name: str) -> IO[bytes]:
        return SickFile(super().open(name).read())


class SickFile(io.BytesIO):
    def read(self, _: int | None = -1) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    readinto = read  # type: ignore[assignment]  # raises, whatever it is given


def forbid(path: Path) -> None:
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")


class Place:
    """Somewhere to put a source and its listing: local or S3, to the tests alike."""

    def __init__(self, folder: Folder) -> None:
        self.folder, self.keep = folder / "source", folder / "tables"

    def open(self, kind: str, only: str = "", rows: int = 2) -> Source:
        uri = f"{self.folder.uri}/{only}".rstrip("/")
        return open_source(DataSettings(source=f"{kind}:{uri}", partition_rows=rows), 0, self.keep)

    def read(self, kind: str, only: str = "", rows: int = 2) -> list[RawItem]:
        source = self.open(kind, only, rows)
        return [item for k in range(source.num_partitions) for item in source.read(k)]


@pytest.fixture
def place(root: Folder) -> Place:
    return Place(root)


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return Place(LocalFolder(tmp_path))


def by_source(items: list[RawItem]) -> dict[str, RawItem]:
    assert len({item.source for item in items}) == len(items)
    return {item.source: item for item in items}


def captions_of(items: list[RawItem]) -> dict[str, str]:
    assert not any(item.problem for item in items)
    return {item.source: item.raw_caption for item in items}


def problems_of(items: list[RawItem]) -> dict[str, str]:
    return {item.source: item.problem for item in items}


# Scenes


@repeatable
@given(st.integers(1, 12), st.integers(1, 14))
def test_partitions_hold_every_scene_once_in_order(num_scenes: int, rows: int) -> None:
    source = SampleScenes("digits", num_scenes, rows, seed=0)
    partitions = [[item.source for item in source.read(k)] for k in range(source.num_partitions)]
    assert [name for part in partitions for name in part] == [
        f"digits:{i}" for i in range(num_scenes)
    ]
    assert all(len(part) == rows for part in partitions[:-1])
    assert partitions[-1]
    assert len(set(source.parts())) == source.num_partitions


def test_a_scene_does_not_depend_on_its_partition() -> None:
    one, other = (
        SampleScenes("digits", 12, 12, seed=4).read(0),
        SampleScenes("digits", 12, 5, seed=4).read(1),
    )
    assert one[5:10] == other
    assert SampleScenes("digits", 12, 12, seed=5).read(0) != one


def test_scenes_carry_caption_label_and_truth() -> None:
    items = SampleScenes("digits", 40, 40, seed=4).read(0)
    assert all(item.data and item.raw_caption and item.truth for item in items)
    assert {item.label is None for item in items} == {True, False}


def test_more_scenes_leave_full_partitions_alone() -> None:
    few, many = (
        SampleScenes("digits", 10, 4, seed=1).parts(),
        SampleScenes("digits", 12, 4, seed=1).parts(),
    )
    assert [a == b for a, b in zip(few, many, strict=True)] == [True, True, False]
    assert not set(many) & set(SampleScenes("digits", 12, 4, seed=2).parts())


def test_a_recipe_names_its_source(tmp_path: Path) -> None:
    settings = DataSettings(source="digits", num_scenes=10, partition_rows=4)
    scenes = open_source(settings, 2, LocalFolder(tmp_path))
    assert scenes == SampleScenes("digits", 10, 4, 2)
    assert scenes.num_partitions == 3


# Folders of images


def test_images_are_found_at_any_depth_sorted_by_path(place: Place) -> None:
    names = ["b.png", "a/z.JPG", "a/deep/er/m.webp", "c.jpeg", "_DSC1.jpg"]
    others = ["notes.txt", "d.svg", "e", ".h.png", ".git/i.png", "a/__MACOSX/j.png", "a/._z.JPG"]
    fill(place.folder, {name: f"bytes of {name}" for name in names + others})
    source = place.open("folder")
    found = [[item.source for item in source.read(k)] for k in range(source.num_partitions)]
    assert found == [["_DSC1.jpg", "a/deep/er/m.webp"], ["a/z.JPG", "b.png"], ["c.jpeg"]]
    assert source.read(1)[0].data == b"bytes of a/z.JPG"
    assert [fetch(item.uri) for item in source.read(0)] == [i.data for i in source.read(0)]


def test_a_caption_is_beside_the_image_in_the_metadata_or_its_name(place: Place) -> None:
    lines = [
        {"file_name": "deep/meta.png", "text": "from the metadata"},
        {"file_name": "both.png", "text": "not this"},
        {"file_name": "./deep//../d.png", "text": "by another path"},
        {"file_name": "nin\u0303o.png", "text": "in two code points"},
        {"file_name": "first.png", "caption": None, "text": "the first that is there"},
    ]
    files: Files = {
        "A_red-fox (2).png": "", "deep/b.png": "", "caf\u00e9.png": "", "___.png": "",
        "deep/b.txt": "  a caption\u2615 with\nlines \n",
        "both.png": "", "both.txt": "text first", "both.json": '{"caption": "not this"}',
        "j.png": "", "j.JSON": '{"width": 3, "prompt": " a prompt "}',
        "list.png": "", "list.json": '{"caption": ["one", "two"]}',
        "null.png": "", "null.json": '{"caption": null}',
        "mark.png": "", "mark.txt": b"\xef\xbb\xbfa fox",
        "empty.png": "", "empty.txt": "",
        "v1.0.png": "", "v1.0.txt": "a version", "v1.0-b.png": "",
        "d.png": "", "ni\u00f1o.png": "", "first.png": "",
        "photo.jpg": "", "photo.orig/1.jpg": "", "photo.txt": "around a folder",
        "deep/meta.png": "", "metadata.jsonl": "\n".join(map(json.dumps, lines)) + "\n\n",
    }  # fmt: skip
    fill(place.folder, files)
    assert captions_of(place.read("folder")) == {
        "A_red-fox (2).png": "A red fox 2",
        "___.png": "",
        "both.png": "text first",
        "caf\u00e9.png": "caf\u00e9",
        "d.png": "by another path",
        "deep/b.png": "a caption\u2615 with\nlines",
        "deep/meta.png": "from the metadata",
        "empty.png": "",
        "first.png": "the first that is there",
        "j.png": "a prompt",
        "list.png": "one",
        "mark.png": "a fox",
        "ni\u00f1o.png": "in two code points",
        "null.png": "",
        "photo.jpg": "around a folder",
        "photo.orig/1.jpg": "1",
        "v1.0-b.png": "v1 0 b",
        "v1.0.png": "a version",
    }


BAD_CAPTIONS: dict[str, tuple[bytes, str]] = {
    "latin.txt": ("caf\u00e9".encode("latin-1"), "'utf-8' codec"),
    "utf16.txt": ("a fox".encode("utf-16"), "'utf-8' codec"),
    "cut.txt": ("\u2615".encode()[:2], "'utf-8' codec"),
    "empty.json": (b"", "Expecting value"),
    "cut.json": (b'{"caption": "a fo', "Unterminated string"),
    "latin.json": ('{"caption": "caf\u00e9"}'.encode("latin-1"), "'utf-8' codec"),
    "list.json": (b'["a fox"]', "not a JSON object"),
    "text.json": (b'"a fox"', "not a JSON object"),
    "keyless.json": (b'{"words": "a fox"}', "none of caption, text, prompt, description in it"),
    "number.json": (b'{"caption": 3}', "its caption is not text but 3"),
    "nested.json": (b'{"caption": {"en": "a fox"}}', "its caption is not text but {'en'"),
    "numbers.json": (b'{"caption": [1, 2]}', "its caption is not text but 1"),
    "surrogate.json": (b'{"caption": "\\ud800"}', "'utf-8' codec"),
    "deep.json": (b"[" * 100_000, "recursion"),
    "digits.json": (b'{"caption": "x", "n": ' + b"9" * 5000 + b"}", "Exceeds the limit"),
    "two.json": (b'{"caption": "a"} {"caption": "b"}', "Extra data"),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_bad_caption_is_a_problem_of_its_row_alone(local: Place, kind: str) -> None:
    files: dict[str, bytes] = {"good.png": b"x", "good.txt": b"a fox"}
    for name, (content, _) in BAD_CAPTIONS.items():
        files |= {name.replace(".", "_") + ".png": b"x"}
        files |= {f"{name.replace('.', '_')}.{name.rpartition('.')[2]}": content}
    fill(local.folder, files if kind == "folder" else {"x.tar": make_tar(files)})
    items = {item.source.removeprefix("x.tar/"): item for item in local.read(kind, rows=9)}
    assert len(items) == len(BAD_CAPTIONS) + 1
    assert (items["good.png"].raw_caption, items["good.png"].problem) == ("a fox", "")
    for name, (_, reason) in BAD_CAPTIONS.items():
        item = items[name.replace(".", "_") + ".png"]
        beside = f"{name.replace('.', '_')}.{name.rpartition('.')[2]}"
        assert item.problem.startswith(f"unreadable caption ({beside}: ")
        assert reason in item.problem
        assert (item.data, item.raw_caption) == (b"x", "")


def test_a_bad_caption_in_the_metadata_is_a_problem_of_its_row(local: Place) -> None:
    lines = ['{"file_name": "a.png", "text": 3}', '{"file_name": "b.png", "text": "b"}']
    fill(local.folder, {"a.png": "", "b.png": "", "metadata.jsonl": "\n".join(lines)})
    assert problems_of(local.read("folder")) == {
        "a.png": "unreadable caption (metadata.jsonl: its caption is not text but 3)",
        "b.png": "",
    }


def test_a_line_of_the_metadata_without_its_image_is_a_row_until_that_comes(place: Place) -> None:
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in ("a.png", "x/../b.png")]
    fill(place.folder, {"a.png": "", "metadata.jsonl": "\n\n".join(lines)})
    alone = {"a.png": "", "b.png": "no such image (in metadata.jsonl alone)"}
    assert problems_of(place.read("folder")) == alone
    fill(place.folder, {"b.png": ""})
    assert captions_of(place.read("folder")) == {"a.png": "x", "b.png": "x"}
    for name in ("a.png", "b.png"):
        place.folder.delete(name)
    with pytest.raises(StorageError, match="no images in it"):
        place.open("folder")


@pytest.mark.parametrize(
    "line",
    [
        "{", '{"text": "a"}', "[1]", "3", "[" * 100_000, b"\xff\xff", '{"file_name": 3}',
        '{"file_name": "\\ud800"}',
    ],
)  # fmt: skip
def test_metadata_that_names_no_file_is_refused_by_line(local: Place, line: bytes | str) -> None:
    good = b'{"file_name": "a.png", "text": "a"}\n'
    fill(local.folder, {"a.png": "", "metadata.jsonl": good + as_bytes(line) + b"\n" + good})
    with pytest.raises(StorageError, match=r"data.source = folder:.*: line 2 of metadata.jsonl is"):
        local.open("folder")


def test_a_growing_metadata_file_changes_only_its_new_lines_parts(local: Place) -> None:
    line = '{"file_name": "%s.png", "text": "%s"}\n'
    fill(local.folder, {f"{name}.png": name for name in "abcd"})
    fill(local.folder, {"metadata.jsonl": "".join(line % (n, n) for n in "abc")})
    first, opened = local.open("folder").parts(), local.open("folder")
    fill(local.folder, {"metadata.jsonl": "".join(line % (n, n * 2) for n in "dabc")})
    with pytest.raises(StorageError, match=r"metadata.jsonl changed since .* run again"):
        opened.read(0)
    fill(local.folder, {"metadata.jsonl": "".join(line % (n, n) for n in "dabc")})
    assert [a == b for a, b in zip(first, local.open("folder").parts(), strict=True)] == [
        True, False,
    ]  # fmt: skip
    assert captions_of(local.read("folder")) == {f"{name}.png": name for name in "abcd"}


@pytest.mark.parametrize("kind", ["folder", "classes"])
@pytest.mark.parametrize("name", ["x/b.png", "x/b.txt"])
@pytest.mark.parametrize("new", [None, "other bytes"])
def test_a_file_that_is_gone_or_changed_under_the_reader_is_no_verdict(
    place: Place, kind: str, name: str, new: str | None
) -> None:
    fill(place.folder, {"x/a.png": "a", "x/b.png": "b", "x/b.txt": "words"})
    source = place.open(kind, rows=9)
    before = source.read(0)
    fill(place.folder, {name: new}) if new else place.folder.delete(name)
    if kind == "classes" and name == "x/b.txt":  # which it has nothing to do with
        assert source.read(0) == before
        return
    with pytest.raises(StorageError, match=f"{name} changed since it was listed; run again"):
        source.read(0)
    gone = "gone from the source" if name == "x/b.png" and not new else ""
    assert problems_of(place.read(kind, rows=9)) == {"x/a.png": "", "x/b.png": gone}
    if gone:
        with pytest.raises(FileAbsent):
            fetch(before[1].uri)


@pytest.mark.parametrize("name", ["a.png", "a.txt", "metadata.jsonl"])
def test_a_file_without_permission_is_an_error_that_names_it(
    local: Place, tmp_path: Path, name: str
) -> None:
    fill(local.folder, {"a.png": "a", "a.txt": "a", "metadata.jsonl": ""})
    forbid(tmp_path / "source" / name)
    with pytest.raises(StorageError, match=f"{name}: .*give read permission or move it away"):
        local.read("folder")


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_an_object_without_permission_is_an_error_that_names_it(
    bucket: Folder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import chaos_s3

    class Refusing(chaos_s3.ChaosS3):
        def _draw(self, environ: Any) -> str:
            return "AccessDenied" if environ["PATH_INFO"].endswith(("a.png", "a.tar")) else ""

    monkeypatch.setitem(chaos_s3.STATUS_OF, "AccessDenied", "403 Forbidden")
    place = Place(bucket)
    fill(place.folder, {"a.png": "a", "a.tar": make_tar({"b.png": "b"})})
    with (
        Refusing() as server,
        chaos_s3.endpoint(server.uri),
        pytest.raises(StorageError, match=r"/a\.\w+: S3 .*give read permission or move it away"),
    ):
        place.read(kind)
    assert problems_of(place.read("folder")) == {"a.png": ""}


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_a_sick_disk_is_an_error_and_not_a_broken_file(
    local: Place, tmp_path: Path, kind: str
) -> None:
    packed = {"x.tar": make_tar({"a.png": "a"}), "x.parquet": make_parquet({"image": [b"a"]})}
    fill(local.folder, packed | {"x.png": b"a"})
    source, sick = local.open(kind), SickDisk(tmp_path / "source")
    assert isinstance(source, Collection)
    with pytest.raises(StorageError, match=r"/x\.\w+: cannot be read \(Input/output error\)"):
        replace(source, folder=sick).read(0)
    if kind != "folder":
        with pytest.raises(StorageError, match=r"/x\.\w+: cannot be read \(Input/output error\)"):
            look_through(kind, sick, "", to_table([]))
    assert problems_of(local.read(kind)) == dict.fromkeys((source.read(0)[0].source,), "")


@pytest.mark.parametrize("kind", ["folder", "classes"])
def test_links_to_folders_are_followed_but_not_in_circles(
    local: Place, tmp_path: Path, kind: str
) -> None:
    fill(local.folder, {"fox/1.png": "a"})
    fill(tmp_path / "elsewhere", {"2.png": "b", "deep/3.png": "c"})
    (tmp_path / "source" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "source" / "fox" / "up").symlink_to(tmp_path / "source")
    (tmp_path / "elsewhere" / "deep" / "self").symlink_to(".")
    items = local.read(kind, rows=9)
    labels = (0, 0, 1) if kind == "classes" else (None,) * 3
    names = ("cat/2.png", "cat/deep/3.png", "fox/1.png")
    assert [(i.source, i.label) for i in items] == list(zip(names, labels, strict=True))


def test_what_can_be_decoded_is_looked_for(local: Place) -> None:
    known = Image.registered_extensions()
    assert {known[end] for end in IMAGE_SUFFIXES} == {*FORMATS}
    names = [f"a{end}" for end in IMAGE_SUFFIXES]
    fill(local.folder, dict.fromkeys(names, "x"))
    assert [item.source for item in local.read("folder")] == names


@pytest.mark.parametrize("kind", ["folder", "classes", "parquet"])
@pytest.mark.parametrize("inside", ["", "runs/tables"])
def test_tables_inside_their_own_source_are_refused(
    root: Folder, tmp_path: Path, kind: str, inside: str
) -> None:
    place = Place(root)
    fill(place.folder, {"x/a.png": "a", "x/b.parquet": make_parquet({"image": [b"x"]})})
    place.keep = place.folder / inside if inside else place.folder
    with pytest.raises(StorageError, match=r"source.*, which the tables go to.*--root"):
        place.open(kind)
    place.keep = root / "source-2"
    place.open(kind)
    if isinstance(root, LocalFolder):
        (tmp_path / "link").symlink_to(tmp_path / "source")
        place.keep = root / "link" / "tables"
        with pytest.raises(StorageError, match="lies inside"):
            place.open(kind)


def test_a_huge_file_is_not_read(local: Place, tmp_path: Path) -> None:
    fill(local.folder, {"a.png": "a", "b.png": "b", "b.txt": ""})
    for name in ("a.png", "b.txt"):
        os.truncate(tmp_path / "source" / name, 1 << 40)
    a, b = local.read("folder")
    assert a.problem == "unreadable file (1099511627776 bytes are over 268435456)"
    assert b.problem == "unreadable caption (b.txt: 1099511627776 bytes are over 268435456)"


def test_a_store_that_cannot_be_reached_is_an_error_and_no_problem(
    bucket: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chaos_s3 import endpoint

    from pixart_platform import object_store

    monkeypatch.setattr(object_store, "_ATTEMPTS", 1)
    place = Place(bucket)
    fill(place.folder, {"a.png": "a"})
    source, listed = place.open("folder"), place.open("folder").read(0)
    with endpoint("http://127.0.0.1:9"):
        with pytest.raises(StorageError):
            source.read(0)
        with pytest.raises(StorageError):
            fetch(listed[0].uri)


def test_a_file_name_that_is_not_utf_8_is_shown_escaped(local: Place, tmp_path: Path) -> None:
    fill(local.folder, {os.fsdecode(b"caf\xe9.png"): b"x", "caf\\xe9.png": "other"})
    (tmp_path / "source" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"\xe9")
    plain, odd = sorted(local.read("folder"), key=lambda item: item.problem)
    assert (plain.source, plain.data, plain.problem) == ("caf\\xe9.png", b"other", "")
    assert (odd.source, odd.data, odd.uri) == ("caf\\xe9.png", b"x", "")
    assert odd.problem.startswith("unreadable caption (caf\\xe9.txt: ")
    pa.table({"problem": [odd.problem]})


@pytest.mark.parametrize("kind", ["folder", "classes", "tar", "parquet"])
def test_a_source_without_images_says_what_it_looks_for(place: Place, kind: str) -> None:
    fill(place.folder, {"notes.txt": "x"})
    sought = f".{kind}" if kind in ("tar", "parquet") else ".avif, .bmp"
    for only in ("", "nowhere", "notes.txt"):
        with pytest.raises(
            StorageError, match=rf"data.source = {kind}:.*: no such place.*{sought}"
        ):
            place.open(kind, only)


def test_a_source_that_seems_emptied_is_refused_and_its_listing_kept(local: Place) -> None:
    fill(local.folder, {"a.png": "a"})
    before = local.open("folder")
    local.folder.delete("a.png")
    with pytest.raises(StorageError, match="no such place, or no images"):
        local.open("folder")
    fill(local.folder, {"b.png": "b"})
    assert local.open("folder").parts()[0] != before.parts()[0]


def test_a_path_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"pictures/a.png": "a"})
    monkeypatch.chdir(tmp_path)
    settings = DataSettings(source="folder:pictures")
    (item,) = open_source(settings, 0, LocalFolder(tmp_path / "kept")).read(0)
    monkeypatch.chdir("/")
    assert fetch(item.uri) == b"a"


def test_the_fingerprint_changes_with_any_image_or_caption(local: Place, tmp_path: Path) -> None:
    fill(local.folder, {"a.png": "a", "b.png": "b", "notes.md": ""})
    root = tmp_path / "source"
    seen = [local.open("folder").fingerprint()]
    os.utime(root / "notes.md", (1, 1))
    assert local.open("folder").fingerprint() == seen[0]
    (root / "a.png").write_bytes(b"longer than it was before")
    seen.append(local.open("folder").fingerprint())
    os.utime(root / "b.png", (1, 1))
    seen.append(local.open("folder").fingerprint())
    (root / "b.txt").write_text("a caption")
    seen.append(local.open("folder").fingerprint())
    (root / "b.txt").write_text("another caption")
    seen.append(local.open("folder").fingerprint())
    (root / "a.png").rename(root / "c.png")
    seen.append(local.open("folder").fingerprint())
    assert len(set(seen)) == 6


# Folders of classes


def test_classes_are_the_sorted_folders_and_captions_their_words(place: Place) -> None:
    names = ["golden_retriever/1.png", "golden-x/deep/2.png", "a b/3.png", ".git/4.png", "5.png"]
    fill(place.folder, dict.fromkeys(names, ""))
    items = by_source(place.read("classes"))
    assert {name: (item.label, item.raw_caption) for name, item in items.items()} == {
        "a b/3.png": (0, "a b"),
        "golden-x/deep/2.png": (1, "golden x"),
        "golden_retriever/1.png": (2, "golden retriever"),
        "5.png": (None, ""),
    }


def test_classes_keep_their_labels_when_more_come_or_one_goes(place: Place) -> None:
    fill(place.folder, {"dog/1.png": "", "fox/1.png": ""})
    first = place.open("classes").parts()
    fill(place.folder, {"cat/1.png": "", "bee/1.png": "", "dog/2.png": ""})
    place.folder.delete("fox/1.png")
    labels = {item.source: item.label for item in place.read("classes")}
    assert labels == {
        "dog/1.png": 0,
        "fox/1.png": 1,
        "bee/1.png": 2,
        "cat/1.png": 3,
        "dog/2.png": 0,
    }
    fill(place.folder, {"fox/1.png": "", "ant/1.png": ""})
    labels |= {"ant/1.png": 4}
    assert {item.source: item.label for item in place.read("classes")} == labels
    assert len(first) == 1


# Tars


SHARD = {
    "./a/0001.jpg": "one", "./a/0001.txt": " a fox ", "./a/0001.cls": " 7\n",
    "./a/0002.left.png": "left", "./a/0002.right.png": "right", "./a/0002.json": '{"text": "two"}',
    "./a/0002.cls": "-1", "a/4.v1.png": "4", "a/4.v1.cls": "5",
    "a/notes.md": "", "a/._0001.jpg": "", "a/0003.webp": "",
}  # fmt: skip


def test_members_of_a_tar_are_grouped_by_key(place: Place) -> None:
    fill(place.folder, {"b.tar": make_tar(SHARD), "deep/a.TAR": make_tar({"sa_1.jpg": "sa"})})
    fill(place.folder, {"_old.tar": make_tar(SHARD), "index.json": "{}"})
    items = by_source(place.read("tar"))
    assert {name: (i.data, i.raw_caption, i.label) for name, i in items.items()} == {
        "b.tar/a/0001.jpg": (b"one", "a fox", 7),
        "b.tar/a/0002.left.png": (b"left", "two", -1),
        "b.tar/a/0002.right.png": (b"right", "two", -1),
        "b.tar/a/0003.webp": (b"", "", None),
        "b.tar/a/4.v1.png": (b"4", "", 5),
        "deep/a.TAR/sa_1.jpg": (b"sa", "", None),
    }
    assert not any(item.problem for item in items.values())
    for item in items.values():
        assert "#offset=" in item.uri
        assert fetch(item.uri) == item.data


def test_masks_of_segment_anything_are_no_caption(local: Place) -> None:
    masks = json.dumps({"image": {"image_id": 1, "width": 3}, "annotations": [{"area": 2}]})
    shard = {"./sa_1.jpg": "1", "./sa_1.json": masks, "./sa_2.json": "{}", "./sa_2.jpg": "2"}
    fill(local.folder, {"sa_000000.tar": make_tar(shard)})
    one, two = local.read("tar")
    assert (one.raw_caption, one.problem) == ("", "")
    assert two.problem.startswith("unreadable caption (sa_2.json: none of caption, text")


def test_one_tar_is_a_source_too(place: Place) -> None:
    fill(place.folder, {"a.tar": make_tar(SHARD), "b.tar": make_tar({"x.png": "x"})})
    assert [item.source for item in place.read("tar", "b.tar")] == ["b.tar/x.png"]
    assert len(place.read("tar")) == 6


UNSAFE = ["../up.png", "/etc/abs.png", "a/../../b.png", "..", "..\\win.png", "a/.."]


def test_members_that_lead_out_of_their_tar_are_rejected_rows(local: Place) -> None:
    names = [*UNSAFE[:3], UNSAFE[4], "a..b/ok.png", "ok..png"]
    fill(local.folder, {"x.tar": make_tar(dict.fromkeys(names, "x"))})
    items = by_source(local.read("tar"))
    assert set(items) == {f"x.tar/{name}" for name in names}
    for name in (*UNSAFE[:3], UNSAFE[4]):
        item = items[f"x.tar/{name}"]
        assert (item.problem, item.data, item.uri) == ("unsafe name in a tar", b"", "")
    assert items["x.tar/a..b/ok.png"].data == items["x.tar/ok..png"].data == b"x"


def test_links_and_devices_in_a_tar_are_rejected_rows(local: Place) -> None:
    buffer = io.BytesIO()
    kinds = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("real.png"))
        for k, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"{k}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        link = tarfile.TarInfo("c.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "real.txt"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("c.png"))
    fill(local.folder, {"x.tar": buffer.getvalue()})
    reason = "not a plain file in a tar (a link, a device or sparse)"
    assert problems_of(local.read("tar")) == {
        "x.tar/real.png": "", "x.tar/c.png": reason, **{f"x.tar/{k}.png": reason for k in range(4)},
    }  # fmt: skip


def test_long_and_odd_names_in_either_format_are_kept(local: Place) -> None:
    names = ["d" * 150 + "/" + "n" * 120 + ".png", "caf\u00e9 \u2615.png"]
    for k, kind in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        fill(local.folder, {f"{k}.tar": make_tar({name: name for name in names}, format=kind)})
    fill(
        local.folder,
        {"2.tar": make_tar({os.fsdecode(b"\xe9.png"): "x"}, format=tarfile.GNU_FORMAT)},
    )
    items = by_source(local.read("tar"))
    assert set(items) == {f"{k}.tar/{name}" for k in (0, 1) for name in names} | {"2.tar/\\xe9.png"}
    assert all(items[f"1.tar/{name}"].data == name.encode() for name in names)


def test_a_name_twice_in_a_tar_is_two_rows_with_a_caption_each(local: Place) -> None:
    first = make_tar({"a.png": "old", "a.txt": "old words"})
    buffer = io.BytesIO(first)
    with tarfile.open(fileobj=buffer, mode="a") as archive:
        for name, content in (("a.png", b"new"), ("a.txt", b"new words")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    fill(local.folder, {"x.tar": buffer.getvalue()})
    assert captions_of(local.read("tar")) == {
        "x.tar/a.png": "old words", "x.tar#2/a.png": "new words",
    }  # fmt: skip


@pytest.mark.parametrize("label", ["", "cat", "1.5", "99999999999", "\u0661"])
def test_a_label_that_is_no_number_is_a_problem_of_its_row(local: Place, label: str) -> None:
    fill(local.folder, {"x.tar": make_tar({"a.png": "x", "a.cls": label})})
    (item,) = local.read("tar")
    assert item.problem == "unreadable label (a.cls: not a number)"


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.TAR.ZST", "x.tar.xz", "x.tbz2"])
def test_compressed_tars_are_refused_with_the_way_out(local: Place, name: str) -> None:
    fill(local.folder, {name: b"x", "sound.tar": make_tar({"a.png": "x"})})
    for only in ("", name):
        with pytest.raises(StorageError, match=f"{name} is compressed.*decompress it"):
            local.open("tar", only)


def test_what_lies_beside_tars_does_not_make_them_compressed(local: Place) -> None:
    beside = dict.fromkeys(["x.tar.md5", "x.tar.idx", "x.tar.json", "x.tar.sha256"], "x")
    fill(local.folder, beside | {"x.tar": make_tar({"a.png": "x"})})
    assert problems_of(local.read("tar")) == {"x.tar/a.png": ""}


def damage(shard: bytes, name: str) -> bytes:
    return {
        "cut in a member": shard[: 512 * 3 + 100],
        "cut in a header": shard[: 512 * 2 + 100],
        "cut between": shard[: 512 * 4 - 1],
        "header overwritten": shard[: 512 * 2] + b"\xff" * 512 + shard[512 * 3 :],
        "size negative": shard[: 512 * 2 + 124] + b"\xff" * 12 + shard[512 * 2 + 136 :],
        "no tar": b"<html>" + b"x" * 2000,
        "empty": b"",
    }[name]


@pytest.mark.parametrize(
    ("name", "reason", "num_sound"),
    [
        ("cut in a member", "cut off", 1),
        ("cut in a header", "damaged header at byte 1024", 1),
        ("cut between", "cut off", 1),
        ("header overwritten", "damaged header at byte 1024", 1),
        ("size negative", "damaged header", 1),
        ("no tar", "", 0),
        ("empty", "empty file", 0),
    ],
)
def test_what_comes_before_the_damage_in_a_tar_is_kept(
    local: Place, name: str, reason: str, num_sound: int
) -> None:
    shard = make_tar(
        {"a.png": "a" * 512, "b.png": "b" * 1000, "c.png": "c"}, format=tarfile.GNU_FORMAT
    )
    fill(local.folder, {"x.tar": damage(shard, name), "y.tar": make_tar({"d.png": "d"})})
    items = by_source(local.read("tar"))
    assert items.pop("y.tar/d.png").data == b"d"
    fault = items.pop("x.tar")
    assert fault.problem.startswith("broken tar file (")
    assert reason in fault.problem
    assert sum(len(item.data) == 512 for item in items.values()) == num_sound


@settings(repeatable, max_examples=20)
@given(st.data())
def test_no_bytes_of_a_tar_stop_the_listing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shard = bytearray(make_tar({"a.png": "a", "a.txt": "b", "\u00e9" * 60 + ".png": "c"}))
    for _ in range(data.draw(st.integers(1, 6))):
        shard[data.draw(st.integers(0, len(shard) - 1))] = data.draw(st.integers(0, 255))
    local = Place(LocalFolder(tmp_path_factory.mktemp("tar")))
    fill(local.folder, {"x.tar": bytes(shard), "y.tar": make_tar({"d.png": "d"})})
    items = local.read("tar")
    assert items[-1].source == "y.tar/d.png"
    pa.table({"problem": [item.problem for item in items], "source": [i.source for i in items]})


def test_a_tar_that_was_replaced_under_the_reader_is_not_trusted(place: Place) -> None:
    fill(place.folder, {"x.tar": make_tar({"a.png": "a"})})
    source = place.open("tar")
    fill(place.folder, {"x.tar": make_tar({"b.png": "other", "a.png": "a"})})
    with pytest.raises(StorageError, match=r"x.tar changed since it was listed; run again"):
        source.read(0)
    again = place.open("tar")
    assert again.num_partitions == 2
    assert [again.read(k)[0].data for k in range(2)] == [b"a", b"other"]
    place.folder.delete("x.tar")
    fill(place.folder, {"y.tar": make_tar({"c.png": "c"})})
    with pytest.raises(StorageError, match=r"x.tar changed since it was listed; run again"):
        again.read(0)
    assert problems_of(place.read("tar")) == {
        "x.tar/a.png": "gone from the source", "x.tar/b.png": "gone from the source",
        "y.tar/c.png": "",
    }  # fmt: skip


def test_tars_that_have_not_changed_are_not_opened_again(local: Place, tmp_path: Path) -> None:
    fill(local.folder, {"a.tar": make_tar({"a.png": "a"}), "b.tar": b"broken"})
    first = local.read("tar")
    for name in ("a.tar", "b.tar"):  # other bytes of the same size and time
        path = tmp_path / "source" / name
        stat = path.stat()
        path.write_bytes(bytes(stat.st_size))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    fill(local.folder, {"c.tar": make_tar({"c.png": "c"})})
    assert problems_of(local.read("tar")) == problems_of(first) | {"c.tar/c.png": ""}


def test_a_tar_without_permission_leaves_no_trace_once_it_can_be_read(
    local: Place, tmp_path: Path
) -> None:
    fill(local.folder, {"a.tar": make_tar({"a.png": "a"}), "b.tar": make_tar({"b.png": "b"})})
    forbid(tmp_path / "source" / "a.tar")
    with pytest.raises(StorageError, match=r"a.tar: .*give read permission or move it away"):
        local.open("tar")
    (tmp_path / "source" / "a.tar").chmod(0o600)
    assert problems_of(local.read("tar")) == {"a.tar/a.png": "", "b.tar/b.png": ""}


@repeatable
@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.integers(1, 300), st.integers(0, 150)), max_size=12
    )
)
def test_every_blob_is_read_once_in_few_bounded_reads(blobs: list[tuple[str, int, int]]) -> None:
    mega = 1 << 20
    asked, place = [Blob("whole", WHOLE, 5), Blob("whole too", WHOLE, 9)], 0
    for file, gap, size in blobs:
        place += gap * mega // 100
        asked.append(Blob(file, place, size * mega))
        place += size * mega
    plan = list(plan_reads(asked))
    assert sorted(blob for together in plan for blob in together) == sorted(asked)
    for together in plan:
        assert len({blob.file for blob in together}) == 1
        assert WHOLE not in [blob.offset for blob in together] or len(together) == 1
        end = together[-1].offset + together[-1].num_bytes
        assert end - together[0].offset <= 64 * mega or len(together) == 1


def test_a_tar_on_s3_is_listed_and_read_in_few_requests(bucket: Folder) -> None:
    from chaos_s3 import ChaosS3, endpoint

    place = Place(bucket)
    shard = {f"{k:03d}.{end}": b"x" * 10_000 for k in range(60) for end in ("jpg", "txt", "md")}
    with ChaosS3() as server, endpoint(server.uri):
        fill(place.folder, {"x.tar": make_tar(shard)})
        server.calls.clear()
        items = place.read("tar", rows=60)
        assert len(items) == 60
        assert all(item.data == b"x" * 10_000 for item in items)
        assert server.calls.total() < 25


def test_on_a_bad_day_of_s3_the_items_are_the_same(bucket: Folder) -> None:
    from chaos_s3 import ChaosS3, endpoint

    place = Place(bucket)
    fill(
        place.folder, {f"{k}.{end}": f"{k}.{end}" * 99 for k in range(20) for end in ("png", "txt")}
    )
    fill(place.folder, {"x.tar": make_tar(SHARD)})
    expected = place.read("folder", rows=9), place.read("tar")
    kinds = ["InternalError", "SlowDown", "torn download", "lost answer"]
    with ChaosS3(0.2, 3, kinds) as server, endpoint(server.uri):
        assert (place.read("folder", rows=9), place.read("tar")) == expected
    assert server.faults.total() > 5


def test_neighbours_in_a_tar_are_one_read(local: Place) -> None:
    shard = {f"{k:03d}.{end}": "x" * 1000 for k in range(50) for end in ("jpg", "txt", "md")}
    fill(local.folder, {"x.tar": make_tar(shard)})
    source = local.open("tar", rows=50)
    assert len(source.read(0)) == 50
    offsets = [int(i.uri.partition("#offset=")[2].partition("&")[0]) for i in source.read(0)]
    assert len(list(plan_reads(Blob("x.tar", offset, 1000) for offset in offsets))) == 1


# Parquet


@pytest.mark.parametrize("rows", [2, 5])
def test_rows_of_parquet_files_are_items(place: Place, rows: int) -> None:
    hugging = {
        "image": [{"bytes": b"%d" % k, "path": f"{k}.png"} for k in range(7)],
        "text": [f"caption {k} " for k in range(7)],
        "label": pa.array([*range(6), None], pa.int64()),
    }
    plain = {"jpg": [b"x", b"y"], "prompt": ["p", None]}
    fill(place.folder, {"data/a.parquet": make_parquet(hugging), "b.PARQUET": make_parquet(plain)})
    fill(place.folder, {"_delta_log/c.parquet": b"x", "README.md": b"x"})
    items = place.read("parquet", rows=rows)
    assert [(i.source, i.data, i.raw_caption, i.label) for i in items] == [
        ("b.PARQUET:0", b"x", "p", None),
        ("b.PARQUET:1", b"y", "", None),
        *[
            (f"data/a.parquet:{k}", b"%d" % k, f"caption {k}", k if k < 6 else None)
            for k in range(7)
        ],
    ]
    assert not any(item.problem or item.uri for item in items)
    assert [i.source for i in place.read("parquet", "b.PARQUET")] == ["b.PARQUET:0", "b.PARQUET:1"]


def test_only_the_rows_of_a_partition_come_from_large_row_groups(local: Place) -> None:
    columns = {
        "image": [b"%d" % k for k in range(300)],
        "caption": [[f"{k}", "no"] for k in range(300)],
    }
    fill(local.folder, {"a.parquet": make_parquet(columns, group_rows=200)})
    source = local.open("parquet", rows=70)
    for k in range(source.num_partitions):
        expected = range(300)[70 * k : 70 * k + 70]
        assert [int(item.data) for item in source.read(k)] == list(expected)
        assert [int(item.raw_caption) for item in source.read(k)] == list(expected)


def test_bad_rows_of_parquet_are_problems_of_theirs_alone(local: Place) -> None:
    columns = {
        "image": [{"bytes": b"x"}, None, {"bytes": None}, {"bytes": b""}, *[{"bytes": b"x"}] * 2],
        "caption": pa.array([b"caf\xe9", b"", b"", b"", None, b"\xef\xbb\xbfa fox"]),
        "cls": pa.array([0, 0, 0, 0, 2**40, 0]),
    }
    fill(local.folder, {"a.parquet": make_parquet(columns), "b.parquet": b"PAR1 not at all"})
    items = by_source(local.read("parquet", rows=20))
    assert [items[f"a.parquet:{k}"].problem.partition(" (")[0] for k in range(6)] == [
        "unreadable caption", *["unreadable file"] * 3, "unreadable label", "",
    ]  # fmt: skip
    assert items["a.parquet:1"].problem == "unreadable file (no image in its row)"
    assert (items["a.parquet:5"].data, items["a.parquet:5"].raw_caption) == (b"x", "a fox")
    assert items["a.parquet:4"].label is None
    assert items["b.parquet"].problem.startswith("broken parquet file (")


def test_text_columns_that_are_not_utf_8_are_problems_of_their_rows(local: Place) -> None:
    text = pa.array([b"caf\xe9", b"a fox"])
    text = pa.StringArray.from_buffers(2, text.buffers()[1], text.buffers()[2])
    fill(local.folder, {"a.parquet": make_parquet({"png": [b"x", b"y"], "text": text})})
    bad, good = local.read("parquet")
    assert bad.problem.startswith("unreadable caption (text: 'utf-8' codec")
    assert (good.raw_caption, good.problem) == ("a fox", "")


def test_damaged_pages_are_problems_of_their_file(local: Place) -> None:
    whole = bytearray(make_parquet({"image": [os.urandom(200)] * 40}))
    whole[4:60] = b"\xff" * 56
    fill(local.folder, {"a.parquet": bytes(whole), "b.parquet": make_parquet({"image": [b"b"]})})
    items = local.read("parquet", rows=50)
    assert len(items) == 41
    assert items[0].problem.startswith("unreadable file (broken parquet file: ")
    assert items[-1].data == b"b"


@pytest.mark.parametrize(
    "columns", [{"a": [1], "text": ["x"]}, {"image": ["path.png"]}, {"image": [{"path": "x"}]}]
)
def test_parquet_without_image_bytes_is_refused_by_its_columns(
    local: Place, columns: dict[str, Any]
) -> None:
    fill(local.folder, {"a.parquet": make_parquet(columns)})
    had = ", ".join(columns)
    with pytest.raises(StorageError, match=rf"a.parquet has no column of image.*\(it has {had}\)"):
        local.open("parquet")


# Growth


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_a_source_that_grew_leaves_old_partitions_alone(place: Place, kind: str) -> None:
    def add(k: int) -> None:
        names = [f"{9 - k}-{i}.png" for i in range(3)]
        packed: dict[str, Files] = {
            "folder": {name: name for name in names},
            "tar": {f"{9 - k}.tar": make_tar({name: name for name in names})},
            "parquet": {f"{9 - k}.parquet": make_parquet({"image": [n.encode() for n in names]})},
        }
        fill(place.folder, packed[kind])

    add(0)
    first = place.open(kind)
    before = [first.read(k) for k in range(first.num_partitions)]
    add(1)
    second = place.open(kind)
    assert second.parts()[:2] == first.parts()
    assert (first.num_partitions, second.num_partitions) == (2, 4)
    assert [second.read(k) for k in range(2)] == before
    assert {i.data for k in (2, 3) for i in second.read(k)} == {b"8-%d.png" % i for i in range(3)}
    assert first.fingerprint() != second.fingerprint() == place.open(kind).fingerprint()
    assert len(list(place.keep.walk())) == 2


@pytest.mark.parametrize(
    "uri", ["folder:", "webdataset:/x", "/x", "", "digits:3", "s3://bucket/x", "Folder:/x"]
)
def test_a_source_that_is_no_kind_and_uri_is_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="folder, classes, tar or parquet"):
        DataSettings(source=uri)


@pytest.mark.parametrize("uri", ["folder:gs://bucket/x", "tar:https://host/x.tar", "folder:s3://"])
def test_a_store_that_is_not_supported_is_refused(tmp_path: Path, uri: str) -> None:
    with pytest.raises(StorageError, match=r"data.source = .*(use a local path or s3|s3://bucket)"):
        open_source(DataSettings(source=uri), 0, LocalFolder(tmp_path))


def test_a_uri_that_is_none_is_refused() -> None:
    with pytest.raises(StorageError, match="copy_bytes"):
        fetch("")
