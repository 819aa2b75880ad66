"""What is wrong or doubtful with the images of a data set. Images are (n, c, h, w) in 0..1."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import scipy  # whose modules are imported at their first use

from data_pipeline.findings import MOST_NAMED, Finding, listed
from data_pipeline.messages import counted
from data_pipeline.split import Split

SAME_LABEL = 0.01  # of a target's standard deviation, by which labels of equal images may differ
NEAR = 0.02  # mean squared difference of two images of mean 0 and variance 1; of unlike images it is 2
FAINT = 2 / 255  # the brightest pixel of an image that was written with levels 0 and 1 of 255
FEW = 0.2  # of the images, that are the exception among all others

_DIRECTIONS = 8  # random ones, onto which images are projected: near images are near there, too
_BLOCK = 512  # images that are looked at together


def copies(images: np.ndarray, inputs: np.ndarray | None = None) -> np.ndarray:
    """Return for each image the first one that is equal and has equal inputs, (n,)."""
    first: dict[bytes, int] = {}
    numbers = [b""] * len(images) if inputs is None else [row.tobytes() for row in inputs]
    keys = (
        hashlib.sha256(np.ascontiguousarray(image).data).digest() + row
        for image, row in zip(images, numbers, strict=True)
    )
    return np.array([first.setdefault(key, index) for index, key in enumerate(keys)], dtype=np.int64)


def of_copies(same: np.ndarray, targets: np.ndarray, parts: Split | None, where: Sequence[str]) -> Iterator[Finding]:
    """Yield what is wrong with equal images; `same` as `copies` returns it, `targets` (n, k), NaN where missing."""
    if len(same) > 1 and not same.any():
        yield Finding(name="images-all-equal", sentence=f"All {len(same)} images are equal: there is nothing to learn.")
        return
    doubled = np.flatnonzero(same != np.arange(len(same)))
    difference = np.abs(targets[doubled] - targets[same[doubled]])
    spread = np.nanstd(targets, axis=0)
    differ = doubled[(difference > SAME_LABEL * spread).any(axis=1)]  # false for NaN
    if len(differ):
        pairs = "; ".join(f"{where[same[index]]} and {where[index]}" for index in differ[:MOST_NAMED])
        more = f"; and {len(differ) - MOST_NAMED} more pairs" if len(differ) > MOST_NAMED else ""
        yield Finding(
            name="equal-images-other-labels",
            sentence=f"{counted(len(differ), 'pair')} of equal images, labelled differently: {pairs}{more}.",
            images=tuple(differ.tolist()),
            others=tuple(same[differ].tolist()),
        )
    if parts is None:
        return
    side = _sides(parts, len(same))
    across = doubled[(side[doubled] != side[same[doubled]]) & (side[doubled] >= 0) & (side[same[doubled]] >= 0)]
    if len(across):
        pairs = "; ".join(f"{where[same[index]]} and {where[index]}" for index in across[:MOST_NAMED])
        more = f"; and {len(across) - MOST_NAMED} more" if len(across) > MOST_NAMED else ""
        images = counted(len(across), "image", "are")
        yield Finding(
            name="copies-across-split",
            sentence=f"{images} equal to one on another side of the split: {pairs}{more}. Scores flatter.",
            images=tuple(across.tolist()),
            others=tuple(same[across].tolist()),
        )


def of_near(images: np.ndarray, same: np.ndarray, parts: Split, where: Sequence[str]) -> Iterator[Finding]:
    """Yield images that are nearly equal to one of another side of the split."""
    projected, varies = _projected(images)
    pairs: dict[int, int] = {}
    for others, those in ((parts.train, parts.validation), (np.r_[parts.train, parts.validation], parts.test)):
        others, those = others[varies[others]], those[varies[those]]
        if not len(others) or not len(those):
            continue
        # A distance in few random directions may be larger than in all of them, hardly ever three times as large.
        nearest = (
            scipy.spatial.KDTree(projected[others])
            .query(projected[those], k=min(4, len(others)), distance_upper_bound=(3 * NEAR) ** 0.5)[1]
            .reshape(len(those), -1)
        )
        for image, candidates in zip(those.tolist(), nearest, strict=True):
            for other in others[candidates[candidates < len(others)]].tolist():
                if same[image] != same[other] and _distance(images[image], images[other]) < NEAR:
                    pairs.setdefault(image, other)
    if pairs:
        named = "; ".join(f"{where[image]} and {where[other]}" for image, other in list(pairs.items())[:MOST_NAMED])
        more = f"; and {len(pairs) - MOST_NAMED} more" if len(pairs) > MOST_NAMED else ""
        near = counted(len(pairs), "image", "are")
        yield Finding(
            name="near-duplicates",
            sentence=f"{near} nearly equal to one on another side of the split: {named}{more}.",
            images=tuple(pairs),
            others=tuple(pairs.values()),
        )


def of_levels(images: np.ndarray, where: Sequence[str]) -> Iterator[Finding]:
    """Yield doubtful levels of the pixels, and channels without structure."""
    axes = (1, 2, 3)
    brightest, low, high = images.max(axis=axes), float(images.min()), float(images.max())
    if 0 < high <= FAINT:
        yield Finding(
            name="levels-0-1",
            sentence=f"The pixels of all images are at most {high * 255:.0f} of 255. Are 0 and 255 meant?",
        )
        return
    faint = np.flatnonzero((brightest > 0) & (brightest <= FAINT))
    if 0 < len(faint) <= FEW * len(images):
        yield _other_levels(faint, f"pixels of at most {brightest[faint].max() * 255:.0f} of 255", where)
    two = np.concatenate(
        [_has_two(images[start : start + _BLOCK], low, high) for start in range(0, len(images), _BLOCK)]
    )
    grey = np.setdiff1d(np.flatnonzero(~two), faint)
    if 0 < len(grey) <= FEW * len(images):
        yield _other_levels(grey, "greys between the two levels of the others", where)
    for channel in np.flatnonzero(images.min(axis=(0, 2, 3)) == images.max(axis=(0, 2, 3))).tolist():
        if images.shape[1] > 1:
            value = float(images[0, channel, 0, 0])
            sentence = f"Channel {channel + 1} of {images.shape[1]} is {value:.3g} in every pixel of every image."
            yield Finding(name="constant-channel", sentence=sentence)


def _other_levels(few: np.ndarray, what: str, where: Sequence[str]) -> Finding:
    sentence = f"{counted(len(few), 'image', 'have', of=len(where))} {what}: {listed(where, few)}."
    return Finding(name="other-levels", sentence=sentence, images=tuple(few.tolist()))


def _has_two(images: np.ndarray, low: float, high: float) -> np.ndarray:
    result: np.ndarray = ((images == np.float32(low)) | (images == np.float32(high))).all(axis=(1, 2, 3))
    return result


def _projected(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return images of mean 0 and variance 1 in a few random directions (n, d), and which images vary (n,).

    Their squared distances are about the mean squared differences of the images.
    """
    size = images[0].size
    directions = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (size, _DIRECTIONS))
    sums, projected = directions.sum(axis=0), np.empty((len(images), _DIRECTIONS))
    varies = np.empty(len(images), bool)
    for start in range(0, len(images), _BLOCK):
        block = images[start : start + _BLOCK].reshape(-1, size)
        mean, spread = block.mean(axis=1, keepdims=True), block.std(axis=1, keepdims=True)
        varies[start : start + _BLOCK] = spread[:, 0] > 0
        projected[start : start + _BLOCK] = (block @ directions - mean * sums) / np.where(spread > 0, spread, 1)
    return projected / (size * _DIRECTIONS) ** 0.5, varies


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean squared difference of two images after each has got mean 0 and variance 1."""
    one, other = ((image - image.mean()) / image.std() for image in (one, other))
    return float(((one - other) ** 2).mean())


def _sides(parts: Split, count: int) -> np.ndarray:
    side = np.full(count, -1)
    for number, part in enumerate((parts.train, parts.validation, parts.test)):
        side[part] = number
    return side
