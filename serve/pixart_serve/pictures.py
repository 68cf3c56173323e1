"""Pictures as files: PNG, JPEG or WebP that say what drew them and that nobody photographed it.

The marks are metadata, the floor of what provenance asks for: readable by anyone, gone after a
screenshot.
"""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

OutputFormat = Literal["png", "jpeg", "webp"]
# IPTC's term for a picture made by a trained model.
_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_EXIF_DESCRIPTION, _EXIF_SOFTWARE = 0x010E, 0x0131


def encode_picture(
    picture: NDArray[np.uint8], file_format: OutputFormat, quality: int, marks: dict[str, str]
) -> bytes:
    """A picture (H, W, 3) uint8 as a file; ``quality`` 0-100 is for JPEG and WebP."""
    marks = {"Source": "AI-generated", "DigitalSourceType": _SOURCE_TYPE, **marks}
    image, file = Image.fromarray(picture), io.BytesIO()
    if file_format == "png":
        info = PngInfo()
        for key, value in marks.items():
            info.add_text(key, value)
        image.save(file, "png", pnginfo=info)
        return file.getvalue()
    exif = Image.Exif()
    exif[_EXIF_SOFTWARE] = "pixart-ray"
    exif[_EXIF_DESCRIPTION] = "; ".join(f"{key}: {value}" for key, value in marks.items())
    image.save(file, file_format, quality=max(quality, 1), exif=exif)
    return file.getvalue()
