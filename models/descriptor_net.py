"""The classical predictor as a module: descriptors, principal components, a regressor. Fitted once, not trained."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models import descriptors
from models.regressors import REGRESSORS
from models.scalars import Scalars, beside
from models.sizes import plain_count, reach
from models.specs import DescriptorsSpec

BATCH = 2**21  # numbers of the images whose descriptors are computed together: some hundred megabytes


class DescriptorNet(nn.Module):
    """Maps (batch, channels, height, width) images in 0..1, and (batch, n_inputs) scalars, to (batch, n_targets).

    The descriptors are computed in double precision, standardised by the training images, and given to the regressor
    with the scalars. Principal components have one scale, that of the first.
    """

    level: Tensor  # (channels,) above which a pixel belongs to the channel's phase
    centre: Tensor  # (p,) mean two-point statistics
    axes: Tensor  # (p, components)
    mean: Tensor  # (d,) of the descriptors
    scale: Tensor  # (d,)

    def __init__(
        self, spec: DescriptorsSpec, image_shape: tuple[int, int, int], n_targets: int, n_inputs: int = 0
    ) -> None:
        super().__init__()
        self.spec, longest = spec, reach(spec, image_shape)
        self.longest, self.plain = longest, plain_count(spec, image_shape)
        vectors = image_shape[0] * (2 * longest + 1) * (longest + 1) * spec.two_point
        components = spec.components * spec.two_point
        shapes = {"level": (image_shape[0],), "centre": (vectors,), "axes": (vectors, components)}
        for name, shape in (shapes | dict.fromkeys(("mean", "scale"), (self.plain + components,))).items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))
        self.scalars = Scalars(n_inputs) if n_inputs else None
        self.regressor = REGRESSORS[spec.regressor](spec, self.plain + components + n_inputs, n_targets)

    def learn_levels(self, images: np.ndarray) -> None:
        """Take the level of each channel from training images: 1/2 between phases, else their mean grey value."""
        is_phase = ((images == 0) | (images == 1)).all(axis=(0, 2, 3))
        self.level.copy_(torch.from_numpy(np.where(is_phase, 0.5, images.mean(axis=(0, 2, 3), dtype=np.float64))))

    def extract(self, images: Tensor) -> Tensor:
        """Return the descriptors (b, d + p): the plain ones, then the two-point statistics as they are."""
        images = images.double()
        parts = [descriptors.plain(self.spec, images, self.level)]
        if self.spec.two_point:
            parts.append(descriptors.two_point(images, self.longest, periodic=self.spec.edges == "periodic"))
        return torch.cat(parts, dim=1)

    def prepare(self, images: Tensor, cache: Path | None, alive: Callable[[], object]) -> Tensor:
        """Return what a fit and its evaluation start from: the descriptors (n, d + p)."""
        batches = []
        for batch in torch.split(images, max(1, BATCH // images[0].numel())):
            batches.append(self.extract(batch))
            alive()
        return torch.cat(batches)

    def forward(self, images: Tensor, inputs: Tensor | None = None) -> Tensor:
        extracted = self.extract(images) if images.ndim == 4 else images
        targets: Tensor = self.regressor(self._features(extracted, inputs)).float()
        return targets

    def _features(self, extracted: Tensor, inputs: Tensor | None) -> Tensor:
        """Return what the regressor sees, (b, d + components + m).

        In single precision equal descriptors are equal whatever the order of sums, and no tree tells them apart.
        """
        reduced = (self._reduced(extracted) - self.mean) / self.scale
        return beside(reduced.float(), self.scalars, inputs).double()

    def _reduced(self, extracted: Tensor) -> Tensor:
        plain, statistics = extracted[:, : self.plain], extracted[:, self.plain :]
        return torch.cat([plain, (statistics - self.centre) @ self.axes], dim=1) if self.spec.two_point else plain

    def fit(self, extracted: Tensor, targets: Tensor, inputs: Tensor | None, alive: Callable[[], object]) -> None:
        """Fit to the descriptors (n, d + p), scaled targets (n, k), NaN where missing, and scalars (n, m).

        The same numbers, thread count and library versions give the same bits.
        """
        self.standardise(extracted)
        self.regress(extracted, targets, inputs, alive)

    def regress(self, extracted: Tensor, targets: Tensor, inputs: Tensor | None, alive: Callable[[], object]) -> None:
        """Fit the regressor alone, to standardised descriptors; else as `fit`."""
        features = self._features(extracted, inputs).cpu().numpy()
        with _threads():
            self.regressor.fit(features, targets.cpu().numpy().astype(np.float64), alive)

    def standardise(self, extracted: Tensor) -> None:
        """Find the principal components, and the mean and scale of all descriptors (n, d + p)."""
        with _threads():
            if self.spec.two_point:
                self._find_axes(extracted[:, self.plain :].cpu().numpy())
            reduced = self._reduced(extracted)
            deviation = reduced.std(0, correction=0)
            if self.spec.two_point:
                deviation[self.plain :] = deviation[self.plain :].max()
            self.mean.copy_(reduced.mean(0))
            self.scale.copy_(torch.where(deviation > 1e-9, deviation, 1.0))  # one that is constant stays so

    def _find_axes(self, statistics: np.ndarray) -> None:
        from sklearn.decomposition import PCA

        analysis = PCA(min(self.spec.components, *statistics.shape), svd_solver="full").fit(statistics)
        self.centre.copy_(torch.from_numpy(analysis.mean_))
        self.axes.zero_()[:, : len(analysis.components_)] = torch.from_numpy(analysis.components_.T)


def _threads() -> AbstractContextManager[object]:
    """Return a context in which scikit-learn has as many threads as torch: some sums depend on it."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(torch.get_num_threads())
    return limits
