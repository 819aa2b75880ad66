"""What is wrong or doubtful with the labels of a data set: column by column, and beside the images."""

from collections.abc import Iterator, Sequence

import numpy as np

from data_pipeline.findings import Finding, listed
from data_pipeline.messages import counted

FARTHEST = 20  # robust z of a label
ALONE = 6  # of its logarithm, if it is twice as far from all others as these are from each other
SENTINELS = (-1.0, -9.0, -99.0, -999.0, -9999.0, -99999.0, 99.0, 999.0, 9999.0, 99999.0, 1e20, 1e30)
APART = 2.0  # decades between two clusters
FEW = 0.4  # of the labels, that have the other sign
GAP = 0.05  # around zero, of the median size, where labels of either sign are two kinds
NOTHING, SOMETHING = 0.1, 0.3  # R² of labels that images do not explain, and of those that they do
MOST_EXPLAINED = 2000  # images that are enough to see what they explain

_SHARE = 0.01  # of the labels in the smaller one of two clusters, and three of them


def of_column(name: str, labels: np.ndarray, where: Sequence[str]) -> Iterator[Finding]:
    """Yield what is doubtful about the labels (n,) of a target; NaN where missing."""
    odd = np.zeros(len(labels), bool)  # what one finding names is not named by the next
    there = np.isfinite(labels)
    if there.sum() < 4:
        return
    for find in (_sentinels, _two_scales, _flipped, _outliers):
        if explained := find(labels, there & ~odd):
            indices, finding, verb, text = explained
            odd[indices] = True
            those = counted(len(indices), "label", verb, of=len(labels))
            yield Finding(
                name=finding,
                sentence=f"{name}: {those} {text}: {listed(where, indices)}.",
                images=tuple(indices.tolist()),
                target=name,
            )


Doubt = tuple[np.ndarray, str, str, str] | None  # the images, the finding's name, verb and what is said of the labels


def _sentinels(labels: np.ndarray, there: np.ndarray) -> Doubt:
    for value in (*SENTINELS, 0.0):
        is_it = there & (labels == value)
        others = labels[there & ~is_it]
        if not is_it.any() or is_it.sum() > len(others):
            continue
        size, is_outside = np.median(np.abs(others)), value < others.min() or value > others.max()
        if value:
            is_far = abs(value) > 5 * np.abs(others).max() or is_it.sum() > 1 or (value < 0) != (others.min() < 0)
            has_sign = value > 0 or others.min() >= 0 or is_it.sum() > 1
        else:
            is_far, has_sign = np.abs(others).min() > GAP * size, True
        if is_outside and is_far and has_sign:
            return np.flatnonzero(is_it), "sentinels", "are", f"{value:g}, which may stand for a missing one"
    return None


def _two_scales(labels: np.ndarray, there: np.ndarray) -> Doubt:
    """Two clusters of sizes, such as gigapascals among pascals."""
    sizes = np.where(there & (labels != 0), np.abs(labels), np.nan)
    if np.isfinite(sizes).sum() < 8:
        return None
    order = np.argsort(sizes)[: int(np.isfinite(sizes).sum())]
    decades = np.log10(sizes[order])
    step = int(np.diff(decades).argmax())
    lower, upper = order[: step + 1], order[step + 1 :]
    few, many = sorted((lower, upper), key=len)
    gap = float(np.diff(decades)[step])
    wide = (
        np.ptp(np.log10(sizes[few])),
        np.quantile(np.log10(sizes[many]), 0.9) - np.quantile(np.log10(sizes[many]), 0.1),
    )
    if gap < APART or gap < max(wide) or len(few) < max(3, _SHARE * len(order)):
        return None
    medians = [float(np.median(sizes[part])) for part in (few, many)]
    return (
        np.sort(few),
        "two-scales",
        "are",
        f"about {medians[0]:.2g}, the others about {medians[1]:.2g}: are these two units",
    )


def _flipped(labels: np.ndarray, there: np.ndarray) -> Doubt:
    """Few labels of the other sign, as large as the others, and none near zero."""
    positive, negative = there & (labels > 0), there & (labels < 0)
    few, many = (negative, positive) if negative.sum() <= positive.sum() else (positive, negative)
    if few.sum() < 2 or few.sum() > FEW * there.sum() or (there & (labels == 0)).any():
        return None
    sizes, others = np.abs(labels[few]), np.abs(labels[many])
    gap = (sizes.min() + others.min()) / np.median(others)
    usual = np.median(np.diff(np.sort(labels[there])))  # between neighbours
    is_alike = np.quantile(others, 0.02) <= np.median(sizes) <= np.quantile(others, 0.98)
    if gap < 2 * GAP or gap * np.median(others) < 5 * usual or not is_alike:
        return None
    return np.flatnonzero(few), "flipped-signs", "have", "the other sign, as if taken times -1"


def _outliers(labels: np.ndarray, there: np.ndarray) -> Doubt:
    far = _robust(labels, there) > FARTHEST
    if (labels[there] > 0).all():  # of sizes over decades the logarithms
        with np.errstate(divide="ignore", invalid="ignore"):
            sizes = np.log(labels)
        distance = _robust(sizes, there)
        usual = sizes[there & (distance <= ALONE)]
        gap = np.maximum(usual.min() - sizes, sizes - usual.max())
        far &= (distance > FARTHEST / 2) | ((distance > ALONE) & (gap > 2 * np.ptp(usual)))
    if not far.any():
        return None
    return np.flatnonzero(far), "outliers", "are", f"far from the median {np.median(labels[there]):.3g}"


def _robust(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Return the distance to the median, (n,), in standard deviations as the median distance tells them."""
    distance = np.where(there, np.abs(values - np.median(values[there])), 0.0)
    usual = 1.4826 * np.median(distance[there])
    return distance / usual if usual > 0 else np.zeros(len(values))


def of_rows(images: np.ndarray, targets: np.ndarray) -> Iterator[Finding]:
    """Yield a finding if the images do not explain the targets (n, k), but would with rows shifted by one."""
    images, targets = images[:MOST_EXPLAINED], targets[:MOST_EXPLAINED]
    features = _features(images)
    if len(images) < 3 * features.shape[1] or len(images) < 20:
        return
    if _explained(features, targets) > NOTHING:
        return
    for shift in (-1, 1):
        score = _explained(features, np.roll(targets, shift, axis=0))
        if score > SOMETHING + 5 / len(images):
            other = "next" if shift < 0 else "previous"
            yield Finding(
                name="shifted-rows",
                sentence="The images do not explain any target at all, but they would explain up to "
                f"{score:.0%} of one if each had the labels of the {other} row. Is the table shifted by a row?",
            )
            return


def _features(images: np.ndarray) -> np.ndarray:
    """Return of each channel its mean, and how many edges it has in which direction, (n, 5 c), as far as they vary."""
    means = images.mean(axis=(2, 3))
    along, down = np.diff(images, axis=3), np.diff(images, axis=2)
    diagonal = (along[:, :, :-1] * down[:, :, :, :-1]).mean(axis=(2, 3))
    edges = [(steps**2).mean(axis=(2, 3)) for steps in (along, down)]
    features: np.ndarray = np.concatenate([means, means**2, *edges, diagonal], axis=1, dtype=np.float64)
    spread: np.ndarray = features.std(axis=0)
    varied: np.ndarray = (features - features.mean(axis=0))[:, spread > 1e-9] / spread[spread > 1e-9]
    return varied


def _explained(features: np.ndarray, targets: np.ndarray) -> float:
    """Return the largest R² of the targets' ranks, each predicted by a line through all other images."""
    best = -np.inf
    for column in targets.T:
        there = np.isfinite(column)
        ranks = column[there].argsort().argsort().astype(np.float64)
        if len(ranks) < 3 * features.shape[1] or np.ptp(column[there]) == 0:
            continue
        design = np.c_[np.ones(len(ranks)), features[there]]
        inverse = np.linalg.inv(design.T @ design + 1e-3 * np.eye(design.shape[1]))
        leverage = ((design @ inverse) * design).sum(axis=1)
        misses = (ranks - design @ (inverse @ (design.T @ ranks))) / np.maximum(1 - leverage, 1e-9)
        best = max(best, 1 - float((misses**2).sum() / ((ranks - ranks.mean()) ** 2).sum()))
    return best
