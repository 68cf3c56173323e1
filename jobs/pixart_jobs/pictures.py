"""Pictures: bytes from anywhere -> upright sRGB pixels, or the reason why not.

What cannot be trusted is checked in this order: the format (by content, never by name; only those
below, since Pillow would hand an EPS to Ghostscript), the size (from the header, before a pixel is
decoded), the pixels. What a viewer would shrug at, broken EXIF or a broken colour profile, is
ignored. A reason's text up to its bracket is its kind and never changes, so that rejects can be
counted by it. A 512x512 JPEG takes about 3 ms to decode, 3 to hash and 1.5 to judge.
"""

import hashlib
import io
import re
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from pixart_jobs.sources import fetch
from pixart_platform.batches import map_ahead
from pixart_platform.tables import OK

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000")
_FETCHES = 8  # at a time
_SRGB = ImageCms.createProfile("sRGB")


class PictureError(ValueError):
    """A picture that cannot be used; the message is a table's reason, ``kind (detail)``."""


def decode_image(
    data: bytes, min_side: int = 1, max_pixels: int = 10**9, max_aspect: float = float("inf")
) -> NDArray[np.uint8]:
    """Decode to upright sRGB (H, W, 3). Raises PictureError with the reason it cannot be used.

    Transparency is laid on white; of an animation or a file of several pictures the first is used;
    deep grey is scaled to 8 bits, deep colour loses its low ones; an embedded colour profile is
    converted.
    """
    if not data:
        raise PictureError("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image.size, min_side, max_pixels, max_aspect)
            image.load()
            _turn_upright(image)
            return np.asarray(_lay_on_white(_to_srgb(_to_8_bits(image))).convert("RGB"))
    except PictureError:
        raise
    except Image.DecompressionBombError as error:
        raise PictureError(f"too large ({error})") from error
    except UnidentifiedImageError as error:
        raise PictureError("not a picture") from error
    except Exception as error:  # Pillow's readers raise anything on damaged bytes
        raise PictureError(f"broken picture ({_describe(error)})") from error


def _describe(error: Exception) -> str:
    """The error in a few words that are the same in every process: no addresses, no raw bytes."""
    text = re.sub(r"<.*?>|0x\w+|[^ -~]", "", str(error))
    return text[:80].strip() or type(error).__name__


def _check_size(size: tuple[int, int], min_side: int, max_pixels: int, max_aspect: float) -> None:
    width, height = size
    if width * height > max_pixels:
        raise PictureError(f"too large ({width}x{height}, data.max_pixels = {max_pixels})")
    if min(size) < min_side:
        raise PictureError(f"too small ({width}x{height}, data.min_side = {min_side})")
    if max(size) > max_aspect * min(size):
        raise PictureError(f"too long ({width}x{height}, data.max_aspect = {max_aspect:g})")


def _turn_upright(image: Image.Image) -> None:
    """Apply the EXIF orientation in place, where there is a readable one."""
    # Raised before the turn by what cannot be read, after it by what cannot be written again.
    with suppress(LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Deep grey scaled to 0-255, where Pillow's own conversion would clip it to white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):
        raise PictureError(f"unsupported pixels (mode {image.mode}; save it with 8 bits)")
    return image


def _to_srgb(image: Image.Image) -> Image.Image:
    """Colours of an embedded profile as sRGB's; left alone where the profile does not fit."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    transform = _find_transform(profile, image.mode, mode)
    return (ImageCms.applyTransform(image, transform) if transform else None) or image


@lru_cache(maxsize=32)
def _find_transform(profile: bytes, mode: str, to: str) -> ImageCms.ImageCmsTransform | None:
    """None where it is sRGB already (most are: 8 ms saved on 512x512), broken or of other modes."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(source):
            return None
        return ImageCms.buildTransform(source, _SRGB, mode, to)
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None


def _lay_on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def read_pictures(
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[NDArray[np.uint8] | PictureError | None]:
    """The picture (H, W, 3) of each row of the image table, why there is none, or None where the
    row's status is not ok. Bytes that are not in the table are fetched ahead, on threads.

    Raises StorageError where a source is down or a picture not there: a disk may be unmounted.
    """
    away = any(row["status"] == OK and not row["bytes"] for row in rows)
    return map_ahead(_try_read, rows, _FETCHES) if away else map(_try_read, rows)


def _try_read(row: Mapping[str, Any]) -> NDArray[np.uint8] | PictureError | None:
    if row["status"] != OK:
        return None
    try:
        return read_picture(row)
    except PictureError as error:
        return error


def read_picture(row: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Pixels (H, W, 3) of a row of the image table: from its bytes, or fetched from its source.

    Raises PictureError when these bytes have changed at the source, StorageError when it is down or
    has no such file.
    """
    data = row["bytes"]
    if not data:
        data = fetch(row["uri"])
        if hashlib.sha256(data).hexdigest() != row["id"]:
            raise PictureError(f"changed at its source ({row['uri']})")
    return decode_image(data)


def hash_picture(pixels: NDArray[np.uint8]) -> int:
    """The 64-bit perceptual hash (DCT of the brightness at 32x32, its 8x8 lowest frequencies)."""
    bits = imagehash.phash(Image.fromarray(pixels)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def measure_quality(pixels: NDArray[np.uint8]) -> float:
    """How free of noise a picture is, 1 (clean) to 0: 1 / (1 + sigma / 8), sigma in grey levels.

    sigma is Immerkaer's estimate (1996): the mean absolute response to a Laplacian difference,
    here with the median in place of the mean, so that strokes do not count as noise.
    """
    if min(pixels.shape[:2]) < 3:
        return 0.0
    red, green, blue = (pixels[..., c].astype(np.int16) for c in range(3))
    grey = red + green + blue  # three times grey, exact
    rows = grey[:-2] + grey[2:] - 2 * grey[1:-1]
    response = np.abs(rows[:, :-2] + rows[:, 2:] - 2 * rows[:, 1:-1]).ravel()  # at most 12240
    response.partition(response.size // 2)
    sigma = float(response[response.size // 2]) / (3 * 0.6745 * 6)
    return round(1 / (1 + sigma / 8), 4)
