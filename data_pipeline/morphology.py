"""Random two-phase microstructures: the default mixture. Lengths are in pixels; every cell is periodic.

A cell is a level set: the pixels where a random function is smallest are the inclusion, as many as the volume fraction
needs. A vote among neighbours then removes features narrower than about 4 pixels, and small islands. A cell in which
features still touch at a corner only, which no pixel grid resolves, is drawn again.

All random numbers come from NumPy's legacy RandomState, whose streams NumPy has frozen; those of its newer Generator
may change from one release to the next.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import RandomState
from scipy import ndimage

from data_pipeline.errors import DatasetError

# Of ten cells in a row: 40 % isotropic and 30 % anisotropic Gaussian fields, 20 % discs or ellipses, 10 % wavy bands.
MIXTURE = ("isotropic",) * 4 + ("anisotropic",) * 3 + ("particles",) * 2 + ("bands",)
VOLUME_FRACTION = (0.1, 0.9)
CORRELATION_LENGTH = (3.0, 8.0)
ASPECT = (1.5, 4.0)
RADIUS = (4.0, 14.0)
FEATURE = 4  # approximate width of the smallest features
SMALLEST_SIDE = 48  # of a cell: the mixture hardly fits into a smaller one

_ISLAND = 12  # pixels: a disc of diameter 4
_TOLERANCE = 0.01  # largest difference from the volume fraction that was drawn
_DRAWS = 2000  # attempts at one cell
_PATIENCE = 50  # attempts with the same parameters

Level = np.ndarray  # (size, size): the inclusion is where it is smallest


@dataclass(frozen=True)
class Cell:
    """One microstructure."""

    image: np.ndarray  # (size, size) bool, true for the inclusion
    morphology: str  # one of MIXTURE


def draw(seed: int, index: int, *, size: int) -> Cell:
    """Return cell `index` of the mixture; it depends on seed, index and size (pixels) only, not on their number.

    Raise DatasetError in the unlikely case that no cell is resolved.
    """
    morphology = MIXTURE[index % len(MIXTURE)]
    volume_fraction = _random(seed, index, 0).uniform(*VOLUME_FRACTION)
    for attempt in range(_DRAWS):
        # The parameters stay the same for many attempts: fine structures fail more often, but must not become rare.
        fixed = _random(seed, index, 1, attempt // _PATIENCE)
        level = _DRAW[morphology](fixed, _random(seed, index, 2, attempt), volume_fraction, size)
        image = None if level is None else _cut(level, volume_fraction)
        if image is not None and not _touches_at_a_corner(image):
            return Cell(image, morphology)
    raise DatasetError(
        f"Cell {index} of seed {seed}: none of {_DRAWS} draws of {morphology} is resolved by {size} pixels. "
        "Choose a larger size, or another seed."
    )


def _random(*key: int) -> RandomState:
    return RandomState(np.random.MT19937(np.random.SeedSequence(key)))


# --- the four morphologies: every function returns a level, or None if this draw does not fit ---
# `fixed`, the same in many attempts, draws the parameters; `random` everything else.


def _isotropic(fixed: RandomState, random: RandomState, volume_fraction: float, size: int) -> Level:
    length = fixed.uniform(*CORRELATION_LENGTH)
    return _field(random, (length, length), 0.0, size)


def _anisotropic(fixed: RandomState, random: RandomState, volume_fraction: float, size: int) -> Level:
    aspect = fixed.uniform(*ASPECT)
    shortest, longest = (
        CORRELATION_LENGTH[0],
        1.5 * CORRELATION_LENGTH[1],
    )  # a longer one would overlap its own periodic image
    minor = fixed.uniform(shortest, max(shortest, longest / aspect))
    return _field(random, (minor * aspect, minor), fixed.uniform(0, np.pi), size)


def _field(random: RandomState, lengths: tuple[float, float], angle: float, size: int) -> Level:
    """Return a Gaussian field of correlation exp(-r^2), r the distance over the lengths along and across the angle."""
    noise = random.standard_normal((size, size))
    wave = 2 * np.pi * np.fft.fftfreq(size)
    along = wave * np.cos(angle) + wave[:, None] * np.sin(angle)
    across = wave[:, None] * np.cos(angle) - wave * np.sin(angle)
    amplitude = np.exp(-((along * lengths[0]) ** 2 + (across * lengths[1]) ** 2) / 8)  # root of the spectral density
    field: np.ndarray = np.fft.ifft2(np.fft.fft2(noise) * amplitude).real
    return field


def _particles(fixed: RandomState, random: RandomState, volume_fraction: float, size: int) -> Level | None:
    """Discs or ellipses of either phase, overlapping or apart, until they cover the fraction, then shrunk to fit."""
    inverted = fixed.uniform() < 0.5
    apart = fixed.uniform() < 0.5
    aspect = 1.0 if fixed.uniform() < 0.5 else fixed.uniform(1.2, 2.5)
    radius = fixed.uniform(*RADIUS)  # of the disc of the same area
    spread = fixed.uniform(0, 0.3)  # of the radii within a cell
    covered = 1 - volume_fraction if inverted else volume_fraction
    apart = apart and covered <= 0.3  # more cannot be placed one after the other
    level = np.full((size, size), np.inf)  # 1 on the edge of the nearest particle, 0 in its middle
    misplaced = 0
    while misplaced < 60:
        own = float(np.clip(radius * random.uniform(1 - spread, 1 + spread), *RADIUS))
        centre, angle = random.uniform(0, size, 2), random.uniform(0, np.pi)
        axes = own * np.sqrt(aspect), own / np.sqrt(aspect)
        if apart:
            wider = _ellipse(centre, angle, (axes[0] + FEATURE, axes[1] + FEATURE), size)
            if np.any((wider < 1) & (level < 1)):
                misplaced += 1
                continue
        level = np.minimum(level, _ellipse(centre, angle, axes, size))
        if np.mean(level < 1) >= covered:
            shrink = np.sort(level, axis=None)[round(covered * level.size)]
            return None if shrink * radius < 0.85 * RADIUS[0] else (-level if inverted else level)
    return None


def _ellipse(centre: np.ndarray, angle: float, axes: tuple[float, float], size: int) -> Level:
    """Return every pixel's distance from the centre's nearest image, over the ellipse's radius in that direction."""
    level = np.full((size, size), np.inf)
    middle = np.arange(size) + 0.5
    for shift_x in (-size, 0, size):
        for shift_y in (-size, 0, size):
            x, y = middle - centre[0] + shift_x, (middle - centre[1] + shift_y)[:, None]
            along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
            level = np.minimum(level, np.hypot(along / axes[0], across / axes[1]))
    return level


def _bands(fixed: RandomState, random: RandomState, volume_fraction: float, size: int) -> Level | None:
    """Parallel bands whose middle lines are waves. Only whole numbers of periods fit into the cell."""
    narrow = min(volume_fraction, 1 - volume_fraction)
    shortest = max(3 * FEATURE, 1.5 * FEATURE / narrow)  # period, such that the narrower phase is wide enough
    angle = random.uniform(0, np.pi)
    count = random.uniform(1, max(1.0, size / shortest))
    across = np.rint(count * np.array([np.cos(angle), np.sin(angle)]))
    along = np.rint(random.uniform(1, 3) * np.array([-np.sin(angle), np.cos(angle)]))
    if not across.any() or not along.any() or np.hypot(*across) * shortest > max(size, shortest) + 1e-9:
        return None
    period = size / np.hypot(*across)
    slope = random.uniform(0.1, 0.8)  # of the middle line, at its steepest
    amplitude = min(slope * size / (2 * np.pi * np.hypot(*along)), period)
    middle = (np.arange(size) + 0.5) / size
    x, y = middle, middle[:, None]
    wave = amplitude / period * np.sin(2 * np.pi * (along[0] * x + along[1] * y + random.uniform()))
    level: Level = np.cos(2 * np.pi * (across[0] * x + across[1] * y + wave + random.uniform()))
    return level


_DRAW: dict[str, Callable[[RandomState, RandomState, float, int], Level | None]] = {
    "isotropic": _isotropic,
    "anisotropic": _anisotropic,
    "particles": _particles,
    "bands": _bands,
}


# --- from a level to an image ---


def _cut(level: Level, volume_fraction: float) -> np.ndarray | None:
    """Return the level's lowest pixels, smoothed, of that volume fraction within 0.01; None if no cut gives it."""
    ranks = np.empty(level.size, dtype=np.int64)
    ranks[np.argsort(level, axis=None, kind="stable")] = np.arange(level.size)
    rank = ranks.reshape(level.shape)
    low, high = 0, level.size  # the vote changes the volume fraction: bisect for the cut that gives the right one
    while low < high:
        middle = (low + high) // 2
        image = _voted(rank < middle)
        if image is not None and abs(image.mean() - volume_fraction) <= _TOLERANCE:
            return image
        if image is None or image.mean() < volume_fraction:
            low = middle + 1
        else:
            high = middle
    return None


def _voted(image: np.ndarray) -> np.ndarray | None:
    """Return the image when every pixel has the phase of most of the 21 around it (5 x 5, no corners).

    Small pieces change their phase, too. None if the vote does not end.
    """
    around = np.ones((5, 5), dtype=np.int64)
    around[[0, 0, 4, 4], [0, 4, 0, 4]] = 0
    for _ in range(100):
        voted = ndimage.convolve(image.astype(np.int64), around, mode="wrap") > around.sum() // 2
        if np.array_equal(voted, image):
            voted = image ^ _islands(image) ^ _islands(~image)
            if np.array_equal(voted, image):
                return image
        image = voted
    return None


def _islands(phase: np.ndarray) -> np.ndarray:
    """Return the pixels of all pieces of a phase with fewer than 12 pixels."""
    # In four copies every piece is whole somewhere; one that the outer edge cuts is counted in its other copy.
    labels, count = ndimage.label(np.tile(phase, (2, 2)))
    small = np.bincount(labels.ravel(), minlength=count + 1) < _ISLAND
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        small[edge] = False
    small[0] = False  # the other phase
    rows, columns = phase.shape
    four = small[labels].reshape(2, rows, 2, columns)
    islands: np.ndarray = four.any(axis=(0, 2))
    return islands


def _touches_at_a_corner(image: np.ndarray) -> bool:
    """Return whether four pixels around some corner look like a chess board."""
    right, below = np.roll(image, -1, axis=1), np.roll(image, -1, axis=0)
    diagonal = np.roll(right, -1, axis=0)
    return bool(np.any((image == diagonal) & (right == below) & (image != right)))
