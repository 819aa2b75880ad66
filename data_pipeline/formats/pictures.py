"""Pictures: PNG, JPEG, TIFF, BMP and GIF by Pillow; refused by their header before anything large is decoded."""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.formats.limits import FormatProblem, check_file
from data_pipeline.png import LARGEST_FILE, LARGEST_SIDE, ImageProblem, check_whole, hides_structure, png_size

KINDS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
    ".gif": "GIF",
}
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass(frozen=True)
class Picture:
    """The pixels of a picture and what was left out of it."""

    pixels: np.ndarray  # (h, w) or (h, w, 3): uint8, uint16, int32 or float32
    note: str = ""
    is_bilevel: bool = False  # one bit a pixel: 0 and 1, which others store as 0 and 255
    is_hidden: bool = False  # only what was left out varies
    is_resized: bool = False


def read_picture(path: Path, size: tuple[int, int] | None = None) -> Picture:
    """Return the picture, resized to `size` (height, width), nearest pixel, if one is given. Raise FormatProblem."""
    kind = KINDS[path.suffix.lower()]
    check_file(path, LARGEST_FILE)
    try:
        content = path.read_bytes()
        if kind == "PNG":
            png_size(path, most_bits=16)
            check_whole(content)
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=[kind]) as image:
            warnings.simplefilter("ignore")
            if max(image.size) > LARGEST_SIDE:
                raise FormatProblem(
                    f"expected at most {LARGEST_SIDE} pixels a side, found {image.width} x {image.height} (width x "
                    "height). It was not decoded. Make it smaller."
                )
            if getattr(image, "is_animated", False):
                raise FormatProblem("expected one still image, found several frames. Save each as a file of its own.")
            if kind == "PNG" and content[24] == 16 and content[25] != 0:
                raise FormatProblem(f"expected a grey or RGB image, found mode {image.mode}. Convert it.")
            return picture(image, size)
    except (FormatProblem, MemoryError):
        raise
    except ImageProblem as problem:
        raise FormatProblem(str(problem)) from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error
        raise FormatProblem(f"is truncated, damaged or no {kind} file ({error!s:.80}). Write it again.") from None


def picture(image: Image.Image, size: tuple[int, int] | None = None) -> Picture:
    """Return an open image, which itself changes, as `read_picture` does. Raise FormatProblem for other modes."""
    if image.mode not in _MODES:
        raise FormatProblem(f"expected a grey or RGB image, found mode {image.mode}. Convert it.")
    image.load()
    note = "transparency is ignored" if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info else ""
    is_hidden = bool(note) and hides_structure(image)
    image.info.pop("transparency", None)
    if image.mode in ("P", "PA", "RGBA"):
        image = image.convert("RGB")
    elif image.mode == "LA":
        image = image.convert("L")
    pixels = np.array(image)
    if is_bilevel := pixels.dtype == bool:
        pixels = pixels.astype(np.uint8)
    if pixels.ndim == 3 and (pixels == pixels[..., :1]).all():
        pixels = pixels[..., 0]  # grey, stored as colours
    is_resized = size is not None and pixels.shape[:2] != size
    return Picture(resized(pixels, size), note, is_bilevel, is_hidden, is_resized)


def resized(pixels: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """Return pixels (h, w, ...) of another size, each the nearest of the given ones."""
    if size is None or pixels.shape[:2] == size:
        return pixels
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in zip(size, pixels.shape, strict=False)
    )
    smaller: np.ndarray = pixels[rows][:, columns]
    return smaller
