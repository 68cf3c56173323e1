"""Broken and odd pictures and captions, as the web has them, each with what must become of it.

``PICTURES`` and ``CAPTIONS`` map a name to a ``Kind``; ``write_folder`` lays them out as an image
folder. All pictures differ in their bytes. Built once, in half a second.
"""

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

ORIENTATION = 0x0112
RED, GREEN, BLUE, WHITE = (200, 30, 40), (30, 180, 60), (40, 60, 200), (255, 255, 255)
SIZE = WIDTH, HEIGHT = 48, 32
TOO_SMALL, TOO_LARGE, TOO_LONG = "too small", "too large", "too long"
BROKEN, NO_PICTURE, UNSUPPORTED = "broken picture", "not a picture", "unsupported pixels"


@dataclass(frozen=True)
class Kind:
    """A picture and its caption, and what the image table must say of them."""

    data: bytes
    outcome: str = "ok"
    """``ok``, or the kind of the reason it is rejected for."""
    pixel: tuple[int, int, int] = RED
    """Colour of the upright picture's first pixel, in sRGB."""
    size: tuple[int, int] = SIZE
    """Width and height of the upright picture."""
    suffix: str = ".jpg"
    caption: bytes | None = b"a fox"
    """The text file beside it, or None for no file."""
    text: str = "a fox"
    """The raw caption in the table; meant only where the outcome is ok."""


def paint() -> NDArray[np.uint8]:
    """(H, W, 3): red, green over blue, white, a quarter each."""
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    top, left = slice(HEIGHT // 2), slice(WIDTH // 2)
    pixels[:] = WHITE
    pixels[top], pixels[:, left] = GREEN, BLUE
    pixels[top, left] = RED
    return pixels


QUARTERS = paint()
PICTURE = Image.fromarray(QUARTERS)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    if kind in ("JPEG", "WEBP", "AVIF"):
        options = {"quality": 95} | options
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def make_png(
    width: int, height: int, pixels: bytes = b"", *, depth: int = 1, color: int = 0
) -> bytes:
    """A PNG of any size from raw rows, each with a filter byte before; without them cut short."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(pixels or bytes(9))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tag_png(note: str) -> bytes:
    """The picture as a PNG whose bytes no other note has."""
    info = PngImagePlugin.PngInfo()
    info.add_text("note", note)
    return encode(PICTURE, "PNG", pnginfo=info)


def turn(orientation: int, method: Image.Transpose, kind: str = "JPEG") -> Kind:
    """The picture stored turned, with the EXIF tag that turns it back."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"subsampling": 0} if kind == "JPEG" else {}
    return Kind(encode(PICTURE.transpose(method), kind, exif=exif, **options))


def make_profile(*, swapped: bool = False, space: bytes = b"RGB ", name: str = "wide") -> bytes:
    """sRGB's ICC profile, but red and blue ``swapped``, or for another colour ``space``."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = data.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))
    if swapped:
        data = data.replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")
    return data[:16] + space + data[20:]


def _make_odd() -> dict[str, Kind]:
    """Pictures that must come out right."""
    grey, clear = PICTURE.convert("L"), PICTURE.convert("RGBA")
    alpha = np.full((HEIGHT, WIDTH), 255, np.uint8)
    alpha[: HEIGHT // 2, : WIDTH // 2] = 0  # the red quarter shows the white below
    clear.putalpha(Image.fromarray(alpha))
    level = int(np.asarray(grey)[0, 0])
    flat, last = (level,) * 3, Image.new("RGB", SIZE, "lime")
    ink = grey.convert("1", dither=Image.Dither.NONE)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    deep_rows = (QUARTERS.astype(int) * 256 + 255).astype(">u2")
    rgb16 = b"".join(b"\0" + row.tobytes() for row in deep_rows)
    broken_exif = Image.Exif()
    broken_exif[ORIENTATION], broken_exif[0x010E] = 6, "a description"
    spoilt = encode(PICTURE.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=broken_exif)
    spoilt = spoilt.replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")  # the width has become text
    frames: dict[str, Any] = {"save_all": True, "append_images": [last], "duration": 100}
    return {
        "jpeg": Kind(encode(PICTURE, "JPEG")),
        "progressive jpeg": Kind(encode(PICTURE, "JPEG", progressive=True)),
        "png named jpg": Kind(encode(PICTURE, "PNG")),
        "jpeg named png": Kind(encode(PICTURE, "JPEG", quality=96), suffix=".png"),
        "webp named gif": Kind(encode(PICTURE, "WEBP", lossless=True), suffix=".gif"),
        "avif named webp": Kind(encode(PICTURE, "AVIF"), suffix=".webp"),
        "jpeg 2000 named jpg": Kind(encode(PICTURE, "JPEG2000")),
        "bmp": Kind(encode(PICTURE, "BMP"), suffix=".bmp"),
        "tiff lzw": Kind(encode(PICTURE, "TIFF", compression="tiff_lzw"), suffix=".tif"),
        "grey": Kind(encode(grey, "JPEG"), pixel=flat),
        "black and white": Kind(encode(ink, "PNG"), pixel=(0, 0, 0)),
        "palette": Kind(encode(PICTURE.quantize(8), "PNG")),
        "palette with a clear tone": Kind(encode(clear.quantize(8), "PNG"), pixel=WHITE),
        "gif with a clear tone": Kind(encode(clear, "GIF"), pixel=WHITE, suffix=".gif"),
        "rgba": Kind(encode(clear, "PNG"), pixel=WHITE),
        "grey with alpha": Kind(encode(clear.convert("LA"), "PNG"), pixel=WHITE),
        "grey with a clear tone": Kind(encode(grey, "PNG", transparency=level), pixel=WHITE),
        "webp with alpha": Kind(encode(clear, "WEBP", lossless=True), pixel=WHITE, suffix=".webp"),
        "grey png of 16 bits": Kind(encode(deep, "PNG"), pixel=flat),
        "grey tiff of 16 bits": Kind(encode(deep, "TIFF"), pixel=flat, suffix=".tiff"),
        "rgb png of 16 bits": Kind(make_png(*SIZE, rgb16, depth=16, color=2)),
        "cmyk jpeg, inverted as Adobe's": Kind(encode(PICTURE.convert("CMYK"), "JPEG")),
        "cmyk tiff": Kind(encode(PICTURE.convert("CMYK"), "TIFF"), suffix=".tif"),
        "animated gif": Kind(encode(PICTURE, "GIF", **frames), suffix=".gif"),
        "animated png": Kind(encode(PICTURE, "PNG", **frames), suffix=".png"),
        "animated webp": Kind(encode(PICTURE, "WEBP", lossless=True, **frames), suffix=".webp"),
        "tiff of two pages": Kind(encode(PICTURE, "TIFF", save_all=True, append_images=[last])),
        "jpeg of two pictures": Kind(encode(PICTURE, "MPO", save_all=True, append_images=[last])),
        "mirrored, by exif": turn(2, Image.Transpose.FLIP_LEFT_RIGHT),
        "upside down, by exif": turn(3, Image.Transpose.ROTATE_180),
        "on its side, by exif": turn(6, Image.Transpose.ROTATE_90),
        "on its other side, by exif": turn(8, Image.Transpose.ROTATE_270),
        "png on its side": turn(6, Image.Transpose.ROTATE_90, "PNG"),
        "webp on its side": turn(6, Image.Transpose.ROTATE_90, "WEBP"),
        "tiff on its side": turn(6, Image.Transpose.ROTATE_90, "TIFF"),
        "on its side, by exif in part nonsense": Kind(spoilt),
        "exif that is no exif": Kind(encode(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*garbage" * 9)),
        "profile that is srgb": Kind(
            encode(PICTURE, "JPEG", icc_profile=make_profile(name="sRGB"))
        ),
        "profile with red and blue swapped": Kind(
            encode(PICTURE, "JPEG", icc_profile=make_profile(swapped=True)), pixel=RED[::-1]
        ),
        "palette with a profile": Kind(
            encode(PICTURE.quantize(8), "PNG", icc_profile=make_profile(swapped=True)),
            pixel=RED[::-1],
        ),
        "profile of another colour space": Kind(
            encode(PICTURE, "JPEG", icc_profile=make_profile(space=b"CMYK"))
        ),
        "profile that is garbage": Kind(encode(PICTURE, "JPEG", icc_profile=b"garbage" * 99)),
        "profile cut off": Kind(encode(PICTURE, "PNG", icc_profile=make_profile()[:400])),
        "jpeg with more behind it": Kind(encode(PICTURE, "JPEG", quality=94) + b"<html>" * 99),
        "png without its end": Kind(tag_png("cut")[:-12]),
    }  # fmt: skip


def _make_broken() -> dict[str, Kind]:
    """Pictures that must be refused."""
    jpeg, png, gif = (encode(PICTURE, kind) for kind in ("JPEG", "PNG", "GIF"))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    lab = ImageCms.applyTransform(
        PICTURE,
        ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        ),
    )
    assert lab is not None
    whole, real = (Image.fromarray(np.full(SIZE, 70_000, d)) for d in (np.int32, np.float32))
    damaged = bytearray(encode(noise, "PNG"))
    damaged[len(damaged) // 2] ^= 0xFF
    screen = b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + gif[10:]
    return {
        "empty file": Kind(b"", "empty file"),
        "zero bytes": Kind(bytes(1000), NO_PICTURE),
        "text": Kind(b"a caption saved under the wrong name\n" * 20, NO_PICTURE),
        "web page": Kind(b"<!doctype html><title>404 Not Found</title>", NO_PICTURE),
        "svg": Kind(b"<svg xmlns='http://www.w3.org/2000/svg'/>", NO_PICTURE),
        "postscript": Kind(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n", NO_PICTURE),
        "zip": Kind(b"PK\x03\x04" + bytes(60), NO_PICTURE),
        "compressed jpeg": Kind(zlib.compress(jpeg), NO_PICTURE),
        "byte too many before a jpeg": Kind(b"\n" + jpeg, NO_PICTURE),
        "png header damaged": Kind(png[:20] + b"\xff" + png[21:], NO_PICTURE),
        "png data damaged": Kind(bytes(damaged), BROKEN),
        "first bytes of a jpeg": Kind(jpeg[:20], NO_PICTURE),
        "jpeg cut in half": Kind(encode(noise, "JPEG")[:1500], BROKEN),
        "progressive jpeg cut": Kind(encode(noise, "JPEG", progressive=True)[:1500], BROKEN),
        "png cut in half": Kind(encode(noise, "PNG")[:6000], BROKEN),
        "gif cut in half": Kind(encode(noise, "GIF")[:2000], BROKEN, suffix=".gif"),
        "webp cut in half": Kind(encode(noise, "WEBP")[:1500], BROKEN, suffix=".webp"),
        "tiff cut in half": Kind(encode(noise, "TIFF")[:6000], BROKEN, suffix=".tif"),
        "bmp cut in half": Kind(encode(noise, "BMP")[:6000], BROKEN, suffix=".bmp"),
        "less than its header says": Kind(make_png(100, 100), BROKEN),
        "1x1": Kind(encode(PICTURE.crop((0, 0, 1, 1)), "PNG"), TOO_SMALL),
        "no width": Kind(make_png(0, 100), NO_PICTURE),
        "30000x30000": Kind(make_png(30_000, 30_000), TOO_LARGE),
        "9000x9000": Kind(make_png(9_000, 9_000), TOO_LARGE),
        "gif of 65535x65535": Kind(screen, TOO_LARGE, suffix=".gif"),
        "strip": Kind(encode(PICTURE.resize((800, 16)), "PNG"), TOO_LONG),
        "tower": Kind(encode(PICTURE.resize((16, 800)), "PNG"), TOO_LONG),
        "tiff of 32 bits": Kind(encode(whole, "TIFF"), UNSUPPORTED),
        "tiff of floats": Kind(encode(real, "TIFF"), UNSUPPORTED),
        "tiff in lab": Kind(encode(lab, "TIFF"), UNSUPPORTED),
    }  # fmt: skip


def _make_captions() -> dict[str, Kind]:
    """Captions beside a sound picture."""
    many = [f"word{i}" for i in range(10_000)]
    kept = " ".join(many)[:10_001].rpartition(" ")[0]
    unreadable = "unreadable caption"
    found: dict[str, tuple[bytes | None, str, str]] = {
        "no caption": (None, "ok", "no caption"),
        "empty caption": (b"", "ok", ""),
        "blank caption": (b" \n\t ", "ok", ""),
        "lines and tabs": (b" a\tfox\r\n  in\n\nsnow\n", "ok", "a fox in snow"),
        "10,000 words": (" ".join(many).encode(), "ok", kept),
        "one word of 100,000 letters": (b"x" * 100_000, "ok", "x" * 10_000),
        "nul characters": (b"a\0 f\0ox\0", "ok", "a fox"),
        "control characters": (b"\x1b[31ma\x07 fox\x7f\xc2\x80", "ok", "[31ma fox"),
        "byte order mark": (b"\xef\xbb\xbfa fox", "ok", "a fox"),
        "byte order mark inside": (b"a \xef\xbb\xbffox", "ok", "a fox"),
        "emoji": ("a \U0001f468\u200d\U0001f469 \ufb01ne \u72d0".encode(), "ok",
                  "a \U0001f468\u200d\U0001f469 \ufb01ne \u72d0"),
        "markup": (b"<b>a</b> fox'); --", "ok", "<b>a</b> fox'); --"),
        "latin-1": ("ein m\xfcder Fuchs".encode("latin-1"), unreadable, ""),
        "utf-16": ("a fox".encode("utf-16"), unreadable, ""),
        "utf-8 cut in a character": ("\u72d0".encode()[:2], unreadable, ""),
        "lone surrogate": (b"a fox \xed\xa0\x80", unreadable, ""),
    }  # fmt: skip
    return {
        name: Kind(tag_png(name), outcome, caption=caption, text=text)
        for name, (caption, outcome, text) in found.items()
    }


PICTURES = _make_odd() | _make_broken()
CAPTIONS = _make_captions()


def write_folder(folder: Path, kinds: Iterable[tuple[str, Kind]]) -> None:
    """Each picture and its caption, under the kind's name."""
    for name, kind in kinds:
        (folder / f"{name}{kind.suffix}").write_bytes(kind.data)
        if kind.caption is not None:
            (folder / f"{name}.txt").write_bytes(kind.caption)
