"""Descriptors of microstructures in closed form: what classical predictors see of an image.

Images are (n, c, h, w) in 0..1, double precision. A pixel belongs to the phase of a channel if its value is above the
channel's level. `periodic`: images wrap around; else only what lies within the image counts.

Sources: S. Torquato, Random Heterogeneous Materials, Springer 2002 (two-point statistics, lineal path, chord lengths);
A. Cecen, T. Fast, S. R. Kalidindi, Integr. Mater. Manuf. Innov. 5 (2016) 1 (by FFT, with and without wrapping around);
T. Ojala, M. Pietikäinen, T. Mäenpää, IEEE Trans. Pattern Anal. Mach. Intell. 24 (2002) 971 (local binary patterns).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from models.sizes import PATTERNS, lengths, reach
from models.specs import DescriptorsSpec

AROUND = ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1))  # a pixel's neighbours, in a circle
PLAIN = 1e-12  # variance of the grey values of an image in which all are the same


def plain(spec: DescriptorsSpec, images: Tensor, level: Tensor) -> Tensor:
    """Return all descriptors (n, p) of the specification but the two-point statistics; `level` is (c,)."""
    means = images.mean((2, 3))
    parts = [means, means**2, means**3]
    is_periodic, inside = spec.edges == "periodic", (images > level[:, None, None]).to(images.dtype)
    phases = torch.cat([inside, 1 - inside], dim=1)  # each channel's phase, then all that is not of it
    longest = reach(spec, images.shape[1:])
    optional: list[tuple[bool, Callable[[], Tensor]]] = [
        (spec.lineal_path, partial(lineal_path, phases, lengths(longest), periodic=is_periodic)),
        (spec.chords, partial(chord_lengths, phases, periodic=is_periodic)),
        (spec.grey, partial(grey_moments, images)),
        (spec.patterns, partial(binary_patterns, images, periodic=is_periodic)),
    ]
    return torch.cat([*parts, *(compute() for chosen, compute in optional if chosen)], dim=1)


def two_point(images: Tensor, longest: int, *, periodic: bool) -> Tensor:
    """Return the two-point statistics of each channel, (n, c * (2 r + 1) * (r + 1)): S(y, x), the mean of f(p) f(p + v)
    over the pixels p, for the vectors v = (y, x), y from -r to r and x from 0 to r = `longest` pixels.

    S(-v) = S(v) gives the other half. Of phases S(v) is the probability that both ends of v lie in the phase. Images
    that do not wrap around have (h - |y|) (w - |x|) pairs; others h w.
    """
    height, width = images.shape[2:]
    beyond = 0 if periodic else longest  # zeros: no vector leaves one side and comes in at the other
    size = (height + beyond, width + beyond)
    waves = torch.fft.rfft2(images, s=size)
    sums = torch.fft.irfft2(waves.real**2 + waves.imag**2, s=size)
    rows = torch.cat([sums[:, :, -longest:], sums[:, :, : longest + 1]], dim=2)[..., : longest + 1]
    down = torch.arange(-longest, longest + 1, device=images.device).abs()[:, None]
    right = torch.arange(longest + 1, device=images.device)
    pairs = height * width if periodic else (height - down) * (width - right)
    return (rows / pairs).flatten(1)


def lineal_path(phases: Tensor, along: Sequence[int], *, periodic: bool) -> Tensor:
    """Return the probability that a segment of so many pixels, along a column or a row, lies within the phase:
    (n, c * 2 * lengths), for `phases` (n, c, h, w) of 0 and 1 and the lengths 2, 4, 8, …
    """
    paths = []
    for dim in (2, 3):
        segments = phases  # 1 where a segment that lies within begins
        for length in along:
            half = length // 2
            if periodic:
                segments = segments * segments.roll(-half, dim)
            else:
                count = segments.shape[dim] - half
                segments = segments.narrow(dim, 0, count) * segments.narrow(dim, half, count)
            paths.append(segments.mean((2, 3)))
    return torch.cat(paths, dim=1) if paths else phases.new_zeros(len(phases), 0)


def chord_lengths(phases: Tensor, *, periodic: bool) -> Tensor:
    """Return the mean chord length in pixels along columns, then rows: (n, c * 2), for `phases` of 0 and 1.

    A chord is a whole run of a phase in a column or row: its mean is pixels / runs. An edge ends it unless the images
    wrap around; then a line that is full has one chord, of its own length. 0 without the phase. How lengths are
    distributed shows in the lineal path, whose second derivative is their density.
    """
    means = []
    for dim in (2, 3):
        before = phases.roll(1, dim)
        if not periodic:
            before = torch.cat(
                [torch.zeros_like(phases.narrow(dim, 0, 1)), phases.narrow(dim, 0, phases.shape[dim] - 1)], dim
            )
        starts = (phases * (1 - before)).sum(dim)
        runs = torch.maximum(starts, phases.amax(dim)).sum(2)
        means.append(phases.sum((2, 3)) / runs.clamp(min=1))
    return torch.cat(means, dim=1)


def grey_moments(images: Tensor) -> Tensor:
    """Return deviation, skewness and excess kurtosis of each channel's grey values, (n, 3 c); 0 of a plain image."""
    shifted = images - images.mean((2, 3), keepdim=True)
    variance, third, fourth = ((shifted**power).mean((2, 3)) for power in (2, 3, 4))
    is_plain, safe = variance < PLAIN, variance.clamp(min=PLAIN)
    moments = (variance.sqrt(), third / safe**1.5, fourth / safe**2 - 3)
    return torch.cat([torch.where(is_plain, 0.0, moment) for moment in moments], dim=1)


def binary_patterns(images: Tensor, *, periodic: bool) -> Tensor:
    """Return how often each local binary pattern is there, (n, 10 c): "riu2" of eight neighbours at distance 1.

    A pixel's pattern is the number, 0 to 8, of its neighbours that are as bright or brighter, if these stand together
    in the circle; 9 if not. Without wrapping around the outermost pixels have none.
    """
    brighter = torch.stack([(images.roll((-y, -x), (2, 3)) >= images).to(images.dtype) for y, x in AROUND])
    changes = (brighter - brighter.roll(1, 0)).abs().sum(0)
    pattern = torch.where(changes <= 2, brighter.sum(0), PATTERNS - 1.0)
    if not periodic:
        pattern = pattern[:, :, 1:-1, 1:-1]
    return torch.cat([(pattern == number).to(images.dtype).mean((2, 3)) for number in range(PATTERNS)], dim=1)
