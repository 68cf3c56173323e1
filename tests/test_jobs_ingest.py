"""Ingest: every item becomes a row, upright sRGB or a reason, whatever its bytes are."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from broken import (
    CAPTIONS,
    ORIENTATION,
    PICTURE,
    PICTURES,
    QUARTERS,
    Kind,
    encode,
    make_png,
    tag_png,
    write_folder,
)
from builders import repeatable
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pixart_jobs.ingest import _Inspect, clean_text, inspect_item
from pixart_jobs.pictures import (
    PictureError,
    _describe,
    decode_image,
    hash_picture,
    measure_quality,
    read_picture,
)
from pixart_jobs.recipe import DataSettings
from pixart_jobs.scenes import compose, sample_reading
from pixart_jobs.sources import RawItem, open_source
from pixart_platform.storage import FileAbsent, open_folder
from pixart_platform.tables import SCHEMAS, count_statuses

SETTINGS = DataSettings()
SMALL = DataSettings(min_side=1, max_pixels=10**6)


def inspect(data: bytes, settings: DataSettings = SETTINGS) -> dict[str, Any]:
    return inspect_item(RawItem("a.png", data, "caption"), settings)


@pytest.mark.parametrize("kind", PICTURES.values(), ids=PICTURES)
def test_a_picture_comes_out_upright_in_srgb_or_is_rejected_with_the_reason(kind: Kind) -> None:
    row = inspect(kind.data)
    assert (row["source"], row["raw_caption"]) == ("a.png", "caption")
    if kind.outcome == "ok":
        assert (row["status"], row["bytes"]) == ("ok", kind.data)
        pixels = decode_image(row["bytes"])
        assert (row["width"], row["height"]) == pixels.shape[1::-1] == kind.size
        assert np.abs(pixels[0, 0].astype(int) - kind.pixel).max() <= 4
    else:
        (counted,) = count_statuses(pa.table({"status": [row["status"]]}))
        assert counted == f"rejected: {kind.outcome}"
        assert (row["bytes"], row["width"], row["height"]) == (b"", 0, 0)
        assert (row["quality"], row["phash"]) == (None, 0)


def test_a_folder_of_everything_gives_a_row_each_and_counts_that_add_up(tmp_path: Path) -> None:
    (tmp_path / "pile").mkdir()
    kinds = PICTURES | CAPTIONS
    assert len(kinds) >= 40
    write_folder(tmp_path / "pile", kinds.items())
    settings = DataSettings(source=f"folder:{tmp_path / 'pile'}", partition_rows=30)
    source = open_source(settings, 0, open_folder(tmp_path / "keep"))
    rows = [
        inspect_item(item, settings)
        for k in range(source.num_partitions)
        for item in source.read(k)
    ]
    assert {row["source"] for row in rows} == {f"{n}{kind.suffix}" for n, kind in kinds.items()}
    assert len({row["id"] for row in rows}) == len(rows) == len(kinds)
    for row in rows:
        kind = kinds[Path(row["source"]).stem]
        expected = kind.outcome if kind.outcome == "ok" else f"rejected: {kind.outcome}"
        assert row["status"].startswith(expected)
        assert kind.outcome != "ok" or row["raw_caption"] == kind.text
    table = pa.Table.from_pylist(rows, SCHEMAS["images/2"])
    assert sum(count_statuses(table).values()) == len(kinds)


def test_grey_of_16_bits_keeps_its_tones() -> None:
    ramp = np.linspace(0, 65535, 12 * 20).astype(np.uint16).reshape(12, 20)
    for kind in ("PNG", "TIFF"):
        grey = decode_image(encode(Image.fromarray(ramp), kind))
        assert np.abs(grey[..., 0] - ramp / 257).max() <= 1
        assert (grey[..., 0] == grey[..., 2]).all()


def test_a_huge_picture_is_rejected_without_being_decoded() -> None:
    whole = make_png(8100, 8100)
    started = time.monotonic()
    for _ in range(20):
        assert inspect(whole)["status"].startswith("rejected: too large (8100x8100, data.max_")
        assert inspect(make_png(60_000, 60_000))["status"].startswith("rejected: too large")
    assert time.monotonic() - started < 2, "decoding one of them takes seconds"


def test_limits_are_the_recipes() -> None:
    data = encode(PICTURE, "PNG")  # 48x32
    for limits, reason in (
        ({"min_side": 33}, "too small (48x32, data.min_side = 33)"),
        ({"max_pixels": 1535}, "too large (48x32, data.max_pixels = 1535)"),
        ({"max_aspect": 1.4}, "too long (48x32, data.max_aspect = 1.4)"),
        ({"min_side": 32, "max_pixels": 1536, "max_aspect": 1.5}, ""),
    ):
        row = inspect(data, DataSettings.model_validate(limits))
        assert row["status"] == (f"rejected: {reason}" if reason else "ok")


EXIF = Image.Exif()
EXIF[ORIENTATION] = 6
EXIF[0x010E] = "a description"
NOISE = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
WHOLE = {
    "png": encode(Image.fromarray(NOISE), "PNG", exif=EXIF),
    "jpeg": encode(Image.fromarray(NOISE), "JPEG", exif=EXIF),
    "webp": encode(Image.fromarray(NOISE), "WEBP", exif=EXIF),
    "gif": encode(Image.fromarray(NOISE), "GIF"),
    "bmp": encode(Image.fromarray(NOISE), "BMP"),
    "palette": encode(Image.fromarray(NOISE).quantize(16), "PNG", transparency=0),
}
# The description's tag has become that of the width: Pillow fails with struct.error.
WIDTH_AS_TEXT = WHOLE["jpeg"].replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")


@repeatable
@given(
    st.sampled_from(list(WHOLE.values())),
    st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    st.integers(0, 2**16) | st.none(),
)
@example(WIDTH_AS_TEXT, [], None)
def test_damaged_bytes_never_raise(
    whole: bytes, changes: list[tuple[int, int]], length: int | None
) -> None:
    data = bytearray(whole if length is None else whole[: length % len(whole)])
    for place, value in changes:
        if data:
            # Headers are where a wrong byte does most.
            data[place % min(len(data), 200 if place % 2 else len(data))] = value
    row = inspect(bytes(data), SMALL)
    if row["status"] == "ok":
        assert decode_image(bytes(data)).shape == (row["height"], row["width"], 3)
    else:
        assert row["status"].startswith("rejected: ")
        assert not row["bytes"]


def test_no_reason_holds_what_differs_between_processes() -> None:
    """Pillow's own words may hold an object's address, and tables are compared by digest."""
    fault = OSError("cannot read <_io.BytesIO object at 0x7f2a11> at 0x7f2a12\n")
    assert _describe(fault) == "cannot read  at"
    assert _describe(OSError("\0")) == "OSError"


def test_a_readers_problem_is_the_rows_reason() -> None:
    item = RawItem("a.png", b"", problem="unreadable file (Permission denied)")
    row = inspect_item(item, SETTINGS)
    assert row["status"] == "rejected: unreadable file (Permission denied)"


def test_ids_are_hashes_of_the_bytes_or_else_of_the_name() -> None:
    data = encode(PICTURE, "PNG")
    assert inspect(data)["id"] == hashlib.sha256(data).hexdigest()
    missing = [inspect_item(RawItem(name, b""), SETTINGS)["id"] for name in ("a.png", "b.png")]
    assert missing == [hashlib.sha256(n).hexdigest() for n in (b"a.png", b"b.png")]


def test_what_is_no_utf_8_is_stored_all_the_same() -> None:
    odd = "caf\udce9.png"
    row = inspect_item(RawItem(odd, b"", odd, problem=f"unreadable caption ({odd})"), SETTINGS)
    table = pa.Table.from_pylist([row], SCHEMAS["images/2"])
    assert table["source"].to_pylist() == ["caf\\udce9.png"]
    assert table["raw_caption"].to_pylist() == ["caf.png"]


def test_bytes_or_the_place_to_fetch_them_from_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode(PICTURE, "PNG"))
    item = RawItem("a.png", path.read_bytes(), uri=str(path))
    copied = inspect_item(item, SETTINGS)
    linked = inspect_item(item, DataSettings(copy_bytes=False))
    assert (copied["bytes"], copied["uri"]) == (item.data, "")
    assert (linked["bytes"], linked["uri"]) == (b"", str(path))
    composed = inspect_item(RawItem("digits:0", item.data), DataSettings(copy_bytes=False))
    assert composed["bytes"] == item.data, "what nothing can fetch again is kept"

    for row in (copied, linked):
        np.testing.assert_array_equal(read_picture(row), QUARTERS)
    path.write_bytes(tag_png("another"))
    np.testing.assert_array_equal(read_picture(copied), QUARTERS)
    with pytest.raises(PictureError, match="changed at its source"):
        read_picture(linked)
    path.unlink()
    with pytest.raises(FileAbsent, match=r"a\.png changed since it was listed; run again"):
        read_picture(linked)


def test_a_partition_keeps_every_row_in_order() -> None:
    good, bad = encode(PICTURE, "PNG"), b"no image"
    items = [RawItem(f"{i}", d, label=i) for i, d in enumerate([good, bad, b"", good])]
    rows = pa.Table.from_pylist([vars(item) for item in items])
    found = _Inspect(SETTINGS)(rows)
    assert found.schema == SCHEMAS["images/2"]
    assert found["label"].to_pylist() == [0, 1, 2, 3]
    assert [s == "ok" for s in found["status"].to_pylist()] == [True, False, False, True]


@repeatable
@given(st.text(st.characters(), max_size=40) | st.text(" \0\n\x85\ud800\ufeffab", max_size=40))
def test_cleaned_text_is_one_storable_line_with_its_words_in_order(text: str) -> None:
    line = clean_text(text)
    assert line == " ".join(line.split()) == clean_text(line)
    assert not set(line) & {"\0", "\x1b", "\x7f", "\ufeff"}
    assert line.encode().decode() == line
    if text.isascii() and text.isprintable():
        assert line.split() == text.split()


def test_long_text_is_cut_at_a_words_end() -> None:
    assert clean_text("fox " * 10_000) == "fox " * 2499 + "fox"
    exact = "x" * 5000 + " " + "y" * 4999
    assert clean_text(exact) == exact
    assert clean_text(exact + "y") == "x" * 5000


def count_different_bits(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> int:
    return (hash_picture(one) ^ hash_picture(other)).bit_count()


def test_perceptual_hashes_tell_copies_from_other_pictures() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    one, other = (Image.fromarray(c).resize((256, 256), Image.Resampling.BICUBIC) for c in coarse)
    copies = [
        decode_image(encode(one, "JPEG", quality=60)),
        decode_image(encode(one.resize((180, 180)), "PNG")),
        np.clip(np.asarray(one) * 0.9 + 10, 0, 255).astype(np.uint8),
    ]
    pixels = np.asarray(one)
    assert 0 < hash_picture(pixels) < 2**64
    assert max(count_different_bits(pixels, copy) for copy in copies) <= 4
    assert count_different_bits(pixels, np.asarray(other)) > 16


def quality_of(noise: Callable[[np.random.Generator], float]) -> list[float]:
    """Qualities of scenes with noise of a chosen standard deviation added to clean ones."""
    rng = np.random.default_rng(3)
    found: list[float] = []
    while len(found) < 25:
        scene = compose(sample_reading(rng, held_out=False), "train", rng)
        if measure_quality(scene.image) > 0.7:
            noisy = scene.image + rng.normal(0, noise(rng), scene.image.shape)
            found.append(measure_quality(np.clip(noisy, 0, 255).astype(np.uint8)))
    return found


def test_quality_tells_noisy_scenes_from_clean_ones() -> None:
    assert min(quality_of(lambda _: 0.0)) > 0.75
    assert max(quality_of(lambda rng: rng.uniform(12, 16))) < 0.65


def test_quality_of_a_flat_picture_is_one_and_of_a_speck_zero() -> None:
    assert measure_quality(np.full((20, 20, 3), 77, np.uint8)) == 1
    assert measure_quality(np.full((2, 20, 3), 77, np.uint8)) == 0
