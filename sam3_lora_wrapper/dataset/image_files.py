"""Image files: opening them, and what their headers say without decoding."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sam3_lora_wrapper.errors import UserError

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


@dataclass(frozen=True)
class Header:
    """What an image file says of itself.

    Args:
        size: (width, height) in pixels, its EXIF orientation applied.
        orientation: EXIF orientation; 1 is upright.
    """

    size: tuple[int, int]
    orientation: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) as the pixels are stored, before the orientation is applied."""
        return self.size[::-1] if self.orientation in TRANSPOSED else self.size


def _read(path: str | Path, use):
    """`use(image)` for an opened image; whatever Pillow raises for a bad file is a UserError."""
    try:
        with Image.open(path) as image:
            return use(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    # Broken files make Pillow's decoders raise nearly anything.
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError,
            Image.DecompressionBombError) as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def _header(image: Image.Image) -> Header:
    # PNG's own getexif decodes the image.
    orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    orientation = orientation if orientation in range(1, 9) else 1
    size = image.size[::-1] if orientation in TRANSPOSED else image.size
    return Header(size, orientation)


def read_header(path: str | Path) -> Header:
    """Size and orientation of an image.

    Raises:
        UserError: the file is missing or no image.
    """
    return _read(path, _header)


def open_image(path: str | Path) -> Image.Image:
    """Open an image as RGB, its EXIF orientation applied.

    Raises:
        UserError: the file is missing or no image.
    """
    return _read(path, lambda image: ImageOps.exif_transpose(image).convert("RGB"))


def read_pixels(path: str | Path) -> np.ndarray:
    """Values of an image as they are stored: (height, width), or with channels behind.

    Raises:
        UserError: the file is missing or no image.
    """
    return _read(path, np.asarray)


def write_upright(source: Path, target: Path) -> None:
    """Copy an image without its EXIF orientation, its pixels as they are stored."""
    def save(image: Image.Image) -> None:
        exif = image.getexif()
        exif.pop(ExifTags.Base.Orientation, None)
        quality = {"quality": "keep"} if image.format == "JPEG" else {}
        image.save(target, format=image.format, exif=exif, **quality)

    _read(source, save)
