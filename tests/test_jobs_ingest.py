"""Ingest: every item becomes a row, upright RGB or a reason, whatever its bytes are."""

import hashlib
import io
import struct
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from builders import repeatable
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pixart_jobs.ingest import _Inspect, decode_image, inspect_item, measure_quality
from pixart_jobs.scenes import compose, sample_reading
from pixart_jobs.sources import RawItem
from pixart_platform.tables import SCHEMAS

MIN_SIDE, MAX_PIXELS = 8, 64_000_000
ORIENTATION = 0x0112

# Left half red, right half blue; 20 wide, 12 high.
HALVES = np.zeros((12, 20, 3), np.uint8)
HALVES[:, :10, 0] = 255
HALVES[:, 10:, 2] = 255


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def inspect(data: bytes) -> dict[str, Any]:
    return inspect_item(RawItem("a.png", data, "caption"), MIN_SIDE, MAX_PIXELS)


def make_png(width: int, height: int, bit_depth: int = 1) -> bytes:
    """A grey PNG of any size in under a hundred bytes, its pixel data cut short."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 9)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def assert_halves(pixels: NDArray[np.uint8], tolerance: int = 0) -> None:
    difference = np.abs(pixels.astype(int) - HALVES)
    difference[:, 8:12] = 0  # lossy codecs blur the edge
    assert difference.max() <= tolerance


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        (encode(Image.fromarray(HALVES), "PNG"), 0),
        (encode(Image.fromarray(HALVES), "BMP"), 0),
        (encode(Image.fromarray(HALVES), "GIF"), 0),
        (encode(Image.fromarray(HALVES), "TIFF", compression="tiff_lzw"), 0),
        (encode(Image.fromarray(HALVES), "WEBP", lossless=True), 0),
        (encode(Image.fromarray(HALVES).quantize(8), "PNG"), 0),
        (encode(Image.fromarray(HALVES).convert("RGBA"), "PNG"), 0),
        (encode(Image.fromarray(HALVES), "JPEG", quality=95), 8),
        (encode(Image.fromarray(HALVES), "JPEG", quality=95, progressive=True), 8),
        (encode(Image.fromarray(HALVES).convert("CMYK"), "JPEG", quality=95), 8),
    ],
    ids=["png", "bmp", "gif", "tiff", "webp", "palette", "rgba", "jpeg", "progressive", "cmyk"],
)
def test_every_common_encoding_decodes_to_the_same_rgb(data: bytes, tolerance: int) -> None:
    assert_halves(decode_image(data), tolerance)
    row = inspect(data)
    assert (row["status"], row["width"], row["height"]) == ("ok", 20, 12)
    assert row["bytes"] == data


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_taken_on_its_side_is_turned_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turn a quarter clockwise to view
    lying = Image.fromarray(HALVES).transpose(Image.Transpose.ROTATE_90)
    options: dict[str, Any] = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    data = encode(lying, kind, exif=exif, **options)
    assert_halves(decode_image(data), 60)
    assert (inspect(data)["width"], inspect(data)["height"]) == (20, 12)


def test_grey_of_16_bits_keeps_its_tones() -> None:
    ramp = np.linspace(0, 65535, 12 * 20).astype(np.uint16).reshape(12, 20)
    for kind in ("PNG", "TIFF"):
        grey = decode_image(encode(Image.fromarray(ramp), kind))
        assert np.abs(grey[..., 0] - ramp / 257).max() <= 1
        assert (grey[..., 0] == grey[..., 2]).all()


def test_grey_and_black_and_white_become_rgb() -> None:
    grey = np.tile(np.arange(20, dtype=np.uint8) * 12, (12, 1))
    np.testing.assert_array_equal(
        decode_image(encode(Image.fromarray(grey), "PNG")), np.repeat(grey[..., None], 3, axis=2)
    )
    bits = decode_image(encode(Image.fromarray(grey > 99), "PNG"))
    assert set(np.unique(bits).tolist()) == {0, 255}


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_rejected_rather_than_clipped(dtype: type) -> None:
    data = encode(Image.fromarray(np.full((12, 20), 70_000, dtype)), "TIFF")
    assert inspect(data)["status"].startswith("rejected: pixels of mode")


def half_clear() -> NDArray[np.uint8]:
    """Red, its right half fully transparent: (12, 20, 4)."""
    pixels = np.zeros((12, 20, 4), np.uint8)
    pixels[..., 0], pixels[:, :10, 3] = 255, 255
    return pixels


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(half_clear()), "PNG"),
        encode(Image.fromarray(half_clear()), "WEBP", lossless=True),
        encode(Image.fromarray(half_clear()), "GIF"),
        encode(Image.fromarray(half_clear()).quantize(4), "PNG"),
        encode(
            Image.fromarray((half_clear()[..., 3] > 0).astype(np.uint8) * 200), "PNG",
            transparency=0,
        ),
    ],
    ids=["rgba", "webp", "gif", "palette", "grey with a transparent tone"],
)  # fmt: skip
def test_transparency_is_laid_on_white(data: bytes) -> None:
    pixels = decode_image(data)
    assert (pixels[:, 10:] == 255).all()
    assert not (pixels[:, :10] == 255).all()


def test_of_an_animation_the_first_frame_is_used() -> None:
    frames = [Image.fromarray(HALVES), Image.new("RGB", (20, 12), "lime")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert_halves(decode_image(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"a caption saved under the wrong name\n" * 20, "not an image Pillow can read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image Pillow can read"),
        (encode(Image.fromarray(HALVES), "PNG")[:60], "broken image (image file is truncated"),
        (encode(Image.fromarray(HALVES), "JPEG")[:-60], "broken image (Truncated File Read"),
        (encode(Image.fromarray(HALVES), "JPEG")[:40], "broken image (Truncated File Read"),
        (make_png(1, 1), "1x1 is under data.min_side = 8"),
        (make_png(5000, 7), "5000x7 is under data.min_side = 8"),
        (make_png(9000, 9000), "9000x9000 is over data.max_pixels = 64000000"),
        (make_png(30_000, 30_000), "decompression bomb"),
        (make_png(100, 100), "broken image"),
    ],
)
def test_what_cannot_be_used_becomes_a_row_with_the_reason(data: bytes, reason: str) -> None:
    row = inspect(data)
    assert row["status"].startswith(f"rejected: {reason}")
    assert (row["bytes"], row["width"], row["height"], row["quality"]) == (b"", 0, 0, None)
    assert (row["source"], row["raw_caption"]) == ("a.png", "caption")


def test_a_huge_picture_is_rejected_without_being_decoded() -> None:
    whole = make_png(8100, 8100)
    started = time.monotonic()
    for _ in range(20):
        assert inspect(whole)["status"].startswith("rejected: 8100x8100 is over")
        assert inspect(make_png(60_000, 60_000))["status"].startswith("rejected: decompression")
    assert time.monotonic() - started < 2, "decoding one of them takes seconds"


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
    row = inspect_item(RawItem("x", bytes(data)), 1, 10**6)
    if row["status"] == "ok":
        assert decode_image(bytes(data)).shape == (row["height"], row["width"], 3)
    else:
        assert row["status"].startswith("rejected: ")
        assert not row["bytes"]


def test_a_readers_problem_is_the_rows_reason() -> None:
    item = RawItem("a.png", b"", problem="unreadable file (Permission denied)")
    assert inspect_item(item, 1, 10)["status"] == "rejected: unreadable file (Permission denied)"


def test_ids_are_hashes_of_the_bytes_or_else_of_the_name() -> None:
    data = encode(Image.fromarray(HALVES), "PNG")
    assert inspect(data)["id"] == hashlib.sha256(data).hexdigest()
    missing = [inspect_item(RawItem(name, b""), 1, 10)["id"] for name in ("a.png", "b.png")]
    assert missing == [hashlib.sha256(n).hexdigest() for n in (b"a.png", b"b.png")]


def test_a_partition_keeps_every_row_in_order() -> None:
    good, bad = encode(Image.fromarray(HALVES), "PNG"), b"no image"
    items = [RawItem(f"{i}", d, label=i) for i, d in enumerate([good, bad, b"", good])]
    rows = pa.Table.from_pylist([vars(item) for item in items])
    found = _Inspect(MIN_SIDE, MAX_PIXELS)(rows)
    assert found.schema == SCHEMAS["images/1"]
    assert found["label"].to_pylist() == [0, 1, 2, 3]
    assert [s == "ok" for s in found["status"].to_pylist()] == [True, False, False, True]


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
