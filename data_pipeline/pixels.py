"""What the pixels of a data set mean: grey values, colours, or phases; and the images in 0..1 that networks see."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_pipeline import memory
from data_pipeline.dataset_keys import MOST_PHASES, Layout
from data_pipeline.messages import RESIZE
from data_pipeline.sources import Notes

LARGEST_TOTAL = 2**29  # numbers of all images together: 2 GiB as float32
BYTES = 6  # of memory that a number takes while images are read: as float32, as in a picture, and what is computed

_BLOCK = 256  # images that are looked at together


class PixelProblem(ValueError):
    """The pixels do not fit what is said of them; the message says why."""


@dataclass(frozen=True, eq=False)
class Images:
    """Images for networks, and the layout with which images of the same kind are converted alike."""

    images: np.ndarray  # (n, c, h, w) float32 in 0..1
    layout: Layout  # levels, range or colours
    greys: str  # what the pixels were


def axes_of(shape: Sequence[int], lengths: set[int], notes: Notes) -> str:
    """Return which axis of an array of images is which, as "nhw"; `lengths` are the numbers of rows of the tables.

    Ask and return "" if that is not clear.
    """
    if len(shape) == 2:
        return "np"
    options = ["nhw", "hwn"] if len(shape) == 3 else ["nhwc", "nchw", "hwcn"]
    few = [axes for axes in options if "c" not in axes or shape[axes.index("c")] <= MOST_PHASES]
    fitting = [axes for axes in few if shape[axes.index("n")] in lengths]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting and not lengths and few:
        return few[0]
    lines = [f'axes = "{axes}"' for axes in fitting or few or options]
    rows = " or ".join(map(str, sorted(lengths))) or "no"
    notes.ask(
        f"The images are an array of the shape {tuple(shape)}, the labels have {rows} rows. Which axis is which?",
        *lines,
    )
    return ""


def stacked(array: np.ndarray, axes: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """Return an array of images as (n, h, w) or (n, h, w, c). Raise PixelProblem if `shape` does not fit lines."""
    if axes == "np":
        side = round(array.shape[1] ** 0.5)
        height, width = shape[:2] if shape else (side, side)
        if height * width != array.shape[1]:
            raise PixelProblem(
                f"expected lines of {height} x {width} numbers, found {array.shape[1]}. "
                "Add shape = [height, width] to dataset.toml."
            )
        return array.reshape(len(array), height, width)
    return array.transpose([axes.index(letter) for letter in "nhwc" if letter in axes])


def understand(raw: np.ndarray, layout: Layout, notes: Notes, *, slack: float = 0.0) -> Images:
    """Return raw pixels (n, h, w) or (n, h, w, c) as images. Raise PixelProblem if they are not as the layout says;
    `slack` is that of `converted`."""
    if raw.dtype.kind == "f" and not all(np.isfinite(block).all() for block in _blocks(raw)):
        raise PixelProblem("expected finite pixels, found NaN or infinity.")
    colours = _distinct(raw)
    low, high = min(float(block.min()) for block in _blocks(raw)), max(float(block.max()) for block in _blocks(raw))
    if low == high:
        raise PixelProblem(f"expected pixels that vary, found {low:g} everywhere.")
    greys = f"{low:g} to {high:g}" if colours is None else f"{len(colours)} values: {_listed(colours)}"
    levels = layout.levels or _guess_levels(raw, colours)
    if levels == "phases" and layout.colours is None:
        if colours is None or len(colours) > MOST_PHASES:
            raise PixelProblem(f'levels = "phases": expected at most {MOST_PHASES} values or colours, found more.')
        layout = replace(layout, colours=colours)
    if levels == "grey" and colours and len(colours) > 2 and not layout.levels:
        notes.doubts.append(f'The pixels have {len(colours)} values only. levels = "phases" gives each a channel.')
    if levels != "phases" and layout.range is None:
        layout = replace(layout, range=_guess_range(raw.dtype, low, high))
    layout = replace(layout, levels=levels)
    return Images(converted(raw, layout, slack=slack), layout, greys)


def converted(raw: np.ndarray, layout: Layout, *, slack: float = 0.0) -> np.ndarray:
    """Return raw pixels (n, h, w) or (n, h, w, c) as float32 in 0..1, (n, channels, h, w), by the layout's levels,
    range and colours. Raise PixelProblem for a pixel that these do not have.

    `slack` is how far grey values may lie beyond the range, as a share of it."""
    if layout.levels == "grey" and raw.ndim == 4 and raw.shape[3] == 3:
        raw = (raw.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)).round()  # as Pillow converts
    if raw.ndim == 3:
        raw = raw[..., np.newaxis]
    raw = raw.astype(np.uint8) if raw.dtype == bool else raw
    n, height, width, channels = raw.shape
    if layout.levels == "phases":
        return _phases(raw, layout.colours or ())
    if layout.levels == "rgb" and channels == 1:
        channels = 3  # grey pictures among coloured ones
    check_total(n, channels, height, width)
    low, high = layout.range or (0.0, 1.0)
    images = np.empty((n, channels, height, width), np.float32)
    with np.errstate(over="ignore"):  # infinity, which is out of range
        images[:] = raw.transpose(0, 3, 1, 2)
    beyond = slack * (high - low)
    if images.size and (images.min() < low - beyond or images.max() > high + beyond):
        hint = " Save it on the scale of the images trained on." if slack else ""
        there = f"{images.min():g} to {images.max():g}"
        raise PixelProblem(f"expected pixels from {low:g} to {high:g}, found {there}.{hint}")
    images -= np.float32(low)
    images /= np.float32(high - low)
    return images


def _phases(raw: np.ndarray, colours: Sequence[Sequence[int]]) -> np.ndarray:
    """Return a channel for every phase; one channel, of the second, if there are two."""
    if raw.shape[3] == 1 and colours and len(colours[0]) == 3:
        raw = np.repeat(raw, 3, axis=3)  # grey pictures among coloured ones
    n, height, width, channels = raw.shape
    chosen = colours[1:] if len(colours) == 2 else colours
    check_total(n, len(chosen), height, width)
    if any(len(colour) != channels for colour in colours):
        kinds = {1: "grey pixels", 3: "coloured pixels"}
        expected, there = (kinds.get(count, f"pixels of {count} numbers") for count in (len(colours[0]), channels))
        raise PixelProblem(f"expected {expected}, as the phases have, found {there}.")
    images = np.empty((n, len(chosen), height, width), np.float32)
    left = np.ones((n, height, width), bool)
    for colour in colours:
        places = (raw == np.array(colour)).all(axis=3)
        left &= ~places
        if colour in chosen:
            images[:, list(chosen).index(colour)] = places
    if left.any():
        image, row, column = np.argwhere(left)[0].tolist()
        where = f"image {image}, " if n > 1 else ""
        raise PixelProblem(
            f"expected one of the {len(colours)} phases' colours ({_listed(colours)}), found "
            f"{_listed((tuple(raw[image, row, column].tolist()),))} in {where}row {row}, column {column}, and "
            f"{left.sum() - 1} more such pixels."
        )
    return images


def check_total(count: int, channels: int, height: int, width: int) -> None:
    """Raise PixelProblem, with the size that fits, for more images than can be held."""
    numbers, fit = count * channels * height * width, memory.room() // BYTES
    if numbers > (most := min(LARGEST_TOTAL, fit)):
        here = ", as the memory here holds" if fit < LARGEST_TOTAL else ""
        raise PixelProblem(
            f"{count} images of {height} x {width} pixels are too many to hold at once (at most {most:,} numbers"
            f"{here}). Give a data.image_size of at most {int(min(height, width) * (most / numbers) ** 0.5)} in the "
            "study file."
        )


def _blocks(raw: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(raw), _BLOCK):
        yield raw[start : start + _BLOCK]


def _distinct(raw: np.ndarray) -> tuple[tuple[int, ...], ...] | None:
    """Return the values or colours of whole numbers, in order; None for fractions, or if there are more than phases."""
    colours: set[tuple[int, ...]] = set()
    for block in _blocks(raw):
        pixels = block.reshape(-1, block.shape[3]) if block.ndim == 4 else block.reshape(-1, 1)
        if pixels.dtype.kind == "f" and (pixels != np.rint(pixels)).any():
            return None
        if pixels.shape[1] == 1:
            values = np.unique(pixels)[:, np.newaxis]
        elif pixels.shape[1] == 3 and pixels.dtype == np.uint8:
            codes = np.unique(pixels.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32))
            values = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)
        else:
            return None
        if len(values) > MOST_PHASES:
            return None
        colours |= {tuple(map(int, colour)) for colour in values.tolist()}
        if len(colours) > MOST_PHASES:
            return None
    return tuple(sorted(colours))


def _guess_levels(raw: np.ndarray, colours: tuple[tuple[int, ...], ...] | None) -> str:
    if raw.ndim == 4 and raw.shape[3] > 1:
        return "phases" if colours else "rgb"
    labels = [colour[0] for colour in colours or ()]
    return "phases" if len(labels) > 2 and labels == list(range(labels[0], labels[0] + len(labels))) else "grey"


def _guess_range(dtype: np.dtype[Any], low: float, high: float) -> tuple[float, float]:
    """Return 0..1 for masks and fractions, 0..255 for bytes, what occurs for everything else."""
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (0.0, 255.0) if dtype == np.uint8 else (low, high)


def _listed(colours: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(colour[0]) if len(colour) == 1 else str(list(colour)) for colour in colours)


def read_all(names: Sequence[str], reader: Callable[[str], np.ndarray], notes: Notes) -> np.ndarray | None:
    """Return the pixels of all files (n, h, w) or (n, h, w, 3), of one size; None, and errors, if that is not so."""
    pixels: list[np.ndarray] = []
    sizes: dict[tuple[int, ...], list[str]] = {}
    for name in names:
        try:
            image = reader(name)
        except ValueError as problem:
            notes.errors.append(f"{name}: {problem}")
            continue
        check_total(len(names), image.shape[2] if image.ndim == 3 else 1, *image.shape[:2])
        sizes.setdefault(image.shape[:2], []).append(name)
        pixels.append(image)
    if len(sizes) > 1:
        counts = [f"{height} x {width} ({len(of)}, such as {of[0]})" for (height, width), of in sizes.items()]
        notes.errors.append(f"expected images of one size, found {', '.join(counts[:3])}. {RESIZE}")
    if not pixels or len(pixels) < len(names) or len(sizes) > 1:
        return None
    if any(image.ndim == 3 for image in pixels):
        pixels = [image if image.ndim == 3 else np.repeat(image[..., np.newaxis], 3, axis=2) for image in pixels]
    return np.stack(pixels)
