"""How a picture of any size becomes the input of a model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pictures"]


@dataclass(frozen=True)
class Pictures:
    """Resizing, then cropping the centre.

    Attributes:
        resize: new length of the short side in pixels, or new (height, width) whatever the shape.
        crop: (height, width) of the centre to keep; None for everything.
        interpolation: ``"nearest"``, ``"bilinear"``, ``"bicubic"``, ``"lanczos"``, ``"box"`` or
            ``"hamming"``.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None = None
    interpolation: str = "bicubic"

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of the result, None if it depends on the picture."""
        if self.crop is not None:
            return self.crop
        return None if isinstance(self.resize, int) else self.resize

    def at(self, side: int) -> Pictures:
        """The same for square images of another size: the share that is cropped is kept."""
        if self.size is None:
            return Pictures(side, (side, side), self.interpolation)
        height, resize = self.size[0], self.resize
        if isinstance(resize, int):
            resize = round(resize * side / height)
        else:
            resize = (round(resize[0] * side / height), round(resize[1] * side / height))
        return Pictures(resize, None if self.crop is None else (side, side), self.interpolation)
