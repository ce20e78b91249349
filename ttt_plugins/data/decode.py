"""Decoding of one picture, in a file or in bytes, to RGB pixels as timm reads them."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import DataError

__all__ = ["PICTURE_SUFFIXES", "PictureError", "decode"]

#: Suffixes of picture files, in lower or upper case.
PICTURE_SUFFIXES = tuple(IMG_EXTENSIONS)

#: Pillow's modes with more than 8 bits per channel. Its conversion to RGB, and so timm's, clips
#: their values at 255, which makes most such pictures white.
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class PictureError(DataError):
    """A picture cannot be decoded; the only error that ``skip_damaged`` ignores."""


def decode(encoded: bytes | Path, name: str) -> Image.Image:
    """Decode a picture to RGB.

    As in timm, greyscale, palette and CMYK pictures are converted, an alpha channel is dropped,
    and an orientation in the EXIF data is not applied.

    Args:
        encoded: path of a file, or its content.
        name: name of the picture in errors.

    Raises:
        PictureError: it is missing, damaged, truncated, or has more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded) as picture:
            mode = picture.mode
            if mode not in _DEEP:
                return picture.convert("RGB")
    except Image.UnidentifiedImageError as error:
        raise PictureError(f"{name}: not a picture that Pillow can read") from error
    except FileNotFoundError as error:
        raise PictureError(f"{name}: no such file") from error
    except Exception as error:  # decoders raise anything for damaged pictures
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{name}: damaged picture ({reason})") from error
    raise PictureError(
        f"{name}: more than 8 bits per channel (mode {mode}), which would be clipped to white; "
        "save it with 8 bits per channel"
    )
