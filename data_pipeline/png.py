"""Grey pixels of a PNG file; an unsuitable file is refused before anything large is decoded."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

LARGEST_SIDE = 2048  # pixels
LARGEST_FILE = 32 * 2**20  # bytes
MOST_CHUNKS = 10_000  # of a PNG; with the usual 8 KiB of pixels a chunk, the largest file has 4096

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">8sI4sIIBB")  # signature, chunk length, "IHDR", width, height, bits a sample, colour type


class ImageProblem(Exception):
    """A file is not an image of the kind expected; the message says why, without the file's name."""


def png_size(path: Path, *, most_bits: int = 8) -> tuple[int, int]:
    """Return height and width in pixels from the header alone. Raise ImageProblem if the image cannot be used."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
    except OSError as error:
        raise ImageProblem(f"cannot be read ({error.strerror}). Check the file and its permissions.") from None
    if not header:
        raise ImageProblem("is empty. Write the image again.")
    if not header.startswith(_SIGNATURE[: len(header)]):
        raise ImageProblem("is not a PNG file, whatever its name says. Convert it to PNG.")
    if len(header) < _HEADER.size:
        raise ImageProblem("is truncated within its header. Write the image again.")
    _, _, chunk, width, height, bits, _ = _HEADER.unpack(header)
    if chunk != b"IHDR" or not width or not height:
        raise ImageProblem("has a damaged PNG header. Write the image again.")
    if max(width, height) > LARGEST_SIDE:
        raise ImageProblem(
            f"expected at most {LARGEST_SIDE} pixels a side, found {width} x {height} (width x height). "
            "It was not decoded. Make it smaller."
        )
    if size > LARGEST_FILE:
        raise ImageProblem(
            f"expected at most {LARGEST_FILE // 2**20} MiB, found {size / 2**20:.0f} MiB. It was not decoded."
        )
    if bits > most_bits:
        raise ImageProblem(f"expected at most 8 bits a sample, found {bits}. Save it as an 8-bit grey image.")
    return height, width


def read_png(path: Path, *, image_size: int | None = None) -> tuple[np.ndarray, str, tuple[int, int]]:
    """Return grey pixels (h, w) as uint8, the mode and the size (h, w) of the file. Raise ImageProblem if unusable.

    Any 8-bit mode is converted to grey (transparency is ignored); with `image_size` the image is resized to a square of
    that side, nearest pixel.
    """
    size = png_size(path)
    try:
        content = path.read_bytes()
        check_whole(content)
        # Only PNG: no file reaches Pillow's other decoders. Its warnings are about unusual chunks.
        with warnings.catch_warnings(), Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            warnings.simplefilter("ignore")
            if image.size != size[::-1] or getattr(image, "n_frames", 1) != 1:
                raise ImageProblem("expected one still image, found several frames. Save it as a plain PNG.")
            mode = image.mode
            if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
                raise ImageProblem(f"expected an 8-bit grey image, found mode {mode}. Save it as an 8-bit grey image.")
            image.load()
            image.info.pop("transparency", None)
            grey = image if mode == "L" else image.convert("L")
            if image_size is not None and size != (image_size, image_size):
                grey = grey.resize((image_size, image_size), Image.Resampling.NEAREST)
            return np.array(grey, dtype=np.uint8), mode, size
    except ImageProblem:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error
        raise ImageProblem(f"is truncated or damaged ({error}). Write the image again.") from None


def is_in_alpha(path: Path) -> bool:
    """Return whether only the transparency of a PNG varies, which `read_png` has read."""
    with warnings.catch_warnings(), Image.open(path, formats=["PNG"]) as image:
        warnings.simplefilter("ignore")
        return hides_structure(image)


def hides_structure(image: Image.Image) -> bool:
    """Return whether an image has one colour, and transparency that varies."""
    if image.mode not in ("LA", "PA", "RGBA") and "transparency" not in image.info:
        return False
    *colours, alpha = image.convert("RGBA").split()
    return len(set(np.array(alpha).flat)) > 1 and all(np.ptp(np.array(colour)) == 0 for colour in colours)


def check_whole(content: bytes) -> None:
    """Raise ValueError unless all chunks are there, undamaged, with as many bytes of pixels as the header says.

    Pillow itself leaves pixels black, without an error, when a small file ends early.
    """
    position, kind, pixels, chunks = len(_SIGNATURE), b"", [], 0
    while kind != b"IEND":
        chunks += 1
        if chunks > MOST_CHUNKS:  # millions of empty ones take Pillow many seconds
            raise ValueError(f"it has more than {MOST_CHUNKS} chunks")
        if position + 12 > len(content):
            raise ValueError("the file ends too early")
        (length,) = struct.unpack_from(">I", content, position)
        kind, chunk = content[position + 4 : position + 8], content[position + 8 : position + 8 + length]
        position += 12 + length
        if position > len(content):
            raise ValueError("the file ends too early")
        if struct.unpack_from(">I", content, position - 4)[0] != zlib.crc32(kind + chunk):
            raise ValueError("a checksum does not match")
        if kind == b"IDAT":
            pixels.append(chunk)
    width, height, bits, colour, _, _, interlaced = struct.unpack_from(">IIBBBBB", content, 16)
    if not interlaced:  # the rows of an interlaced file have several lengths
        samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(colour, 1)  # a pixel, by colour type
        expected = height * (1 + (width * bits * samples + 7) // 8)  # one byte a row names its filter
        if len(zlib.decompressobj().decompress(b"".join(pixels), expected)) < expected:
            raise ValueError("it has fewer pixels than its header says")
