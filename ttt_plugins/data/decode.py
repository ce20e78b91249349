"""One picture, encoded in a file or in bytes, to RGB pixels: as timm reads it, or an error."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from ..errors import DataError

__all__ = ["PICTURE_SUFFIXES", "PictureError", "decode"]

#: File names that end so are taken for pictures, in lower or upper case.
PICTURE_SUFFIXES = tuple(IMG_EXTENSIONS)

#: Pillow's modes of more than 8 bits a channel. Its conversion to RGB, and so timm's, cuts their
#: values off at 255, which makes most such pictures white.
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class PictureError(DataError):
    """A picture that cannot be decoded; the only error that ``skip_damaged`` passes over."""


def decode(encoded: bytes | Path, name: str) -> Image.Image:
    """Decode a picture to RGB.

    As in timm, greyscale, palette and CMYK pictures are converted, an alpha channel is dropped,
    and an orientation in the EXIF data is not applied.

    Args:
        encoded: a file, or its content.
        name: what to call the picture in an error.

    Raises:
        PictureError: it is missing, damaged, cut short, or has more than 8 bits a channel.
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
    except Exception as error:  # a damaged picture surfaces as whatever its decoder raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"{name}: damaged picture ({reason})") from error
    raise PictureError(
        f"{name}: more than 8 bits a channel (mode {mode}), which would be cut off at white; "
        "save it with 8 bits a channel"
    )
