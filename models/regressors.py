"""Classical regressors as modules: fitted by scikit-learn, stored as arrays, and computed from these alone.

Each maps features (b, d) to scaled targets (b, k), in double precision, and predicts what scikit-learn's estimator of
the same data predicts, to rounding. Labels that are missing (NaN) leave their image out of that target's fit.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from models import foreign
from models.specs import DescriptorsSpec

LEAF = 5  # training images in a tree's leaf, at least


class Ridge(nn.Module):
    """Linear in the features, with a penalty on the squared weights."""

    def __init__(self, spec: DescriptorsSpec, features: int, targets: int) -> None:
        super().__init__()
        self.penalty = spec.alpha
        self.weights, self.bias = numbers(features, targets), numbers(targets)

    def forward(self, features: Tensor) -> Tensor:
        targets: Tensor = features @ self.weights + self.bias
        return targets

    def fit(self, features: np.ndarray, targets: np.ndarray, alive: Callable[[], object]) -> None:
        """Fit to features (n, d) and scaled targets (n, k). `alive` is called between fits."""
        from sklearn.linear_model import Ridge as Estimator  # takes a second, and only trainers fit

        for rows, columns in _alike(targets):
            fitted = Estimator(alpha=self.penalty, solver="svd").fit(features[rows], targets[rows][:, columns])
            self.weights[:, columns] = torch.from_numpy(np.atleast_2d(fitted.coef_).T).to(self.weights)
            self.bias[columns] = torch.from_numpy(np.atleast_1d(fitted.intercept_)).to(self.bias)
            alive()


class GaussianProcess(nn.Module):
    """The posterior mean of a Gaussian process of mean 0 and variance 1, fitted to some of the images at most."""

    def __init__(self, spec: DescriptorsSpec, features: int, targets: int) -> None:
        super().__init__()
        self.kernel, self.length, self.noise = spec.kernel, spec.length * (2 * features) ** 0.5, spec.alpha
        self.points, self.weights = numbers(spec.images, features), numbers(spec.images, targets)

    def forward(self, features: Tensor) -> Tensor:
        squares = (features**2).sum(1)[:, None] + (self.points**2).sum(1) - 2 * features @ self.points.T
        squares = squares.clamp(min=0) / self.length**2
        if self.kernel == "rbf":
            correlations = torch.exp(-squares / 2)
        elif self.kernel == "matern-3/2":
            scaled = (3 * squares).sqrt()
            correlations = (1 + scaled) * torch.exp(-scaled)
        else:
            scaled = (5 * squares).sqrt()
            correlations = (1 + scaled + scaled**2 / 3) * torch.exp(-scaled)
        targets: Tensor = correlations @ self.weights
        return targets

    def fit(self, features: np.ndarray, targets: np.ndarray, alive: Callable[[], object]) -> None:
        """Fit as `Ridge.fit`; the images, if they are too many, are drawn from torch's generator."""
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import RBF, Matern

        chosen = np.sort(torch.randperm(len(features))[: len(self.points)].numpy())
        nu = {"matern-3/2": 1.5, "matern-5/2": 2.5}.get(self.kernel)
        kernel = RBF(self.length) if nu is None else Matern(self.length, nu=nu)
        features, targets = features[chosen], targets[chosen]
        self.points[: len(chosen)] = torch.from_numpy(features).to(self.points)  # the others have the weight 0
        for rows, columns in _alike(targets):
            process = GaussianProcessRegressor(kernel, alpha=self.noise, optimizer=None)
            process.fit(features[rows], targets[rows][:, columns])
            weights = np.zeros((len(self.points), len(columns)))
            weights[rows] = process.alpha_.reshape(len(rows), -1)
            self.weights[:, columns] = torch.from_numpy(weights).to(self.weights)
            alive()


class Trees(nn.Module):
    """Gradient-boosted trees of each target, each a full binary tree in one row: the children of node i are 2 i + 1 and
    2 i + 2. To the left goes what is not above the threshold."""

    def __init__(self, spec: DescriptorsSpec, features: int, targets: int) -> None:
        super().__init__()
        self.spec = spec
        trees, leaves = targets * spec.trees, 2**spec.tree_depth
        self.feature = nn.Parameter(torch.zeros(trees, leaves - 1, dtype=torch.int32), requires_grad=False)
        self.threshold, self.leaf, self.bias = numbers(trees, leaves - 1), numbers(trees, leaves), numbers(targets)

    def forward(self, features: Tensor) -> Tensor:
        tree = torch.arange(len(self.feature), device=features.device)
        place = torch.zeros(features.shape[0], len(self.feature), dtype=torch.long, device=features.device)
        for _ in range(self.spec.tree_depth):
            values = features.gather(1, self.feature[tree, place].long())
            place = 2 * place + 1 + (values > self.threshold[tree, place]).long()
        leaves = self.leaf[tree, place - (2**self.spec.tree_depth - 1)]
        return leaves.view(-1, len(self.bias), self.spec.trees).sum(2) + self.bias

    def fit(self, features: np.ndarray, targets: np.ndarray, alive: Callable[[], object]) -> None:
        """Fit as `Ridge.fit`."""
        from sklearn.ensemble import HistGradientBoostingRegressor

        for column in range(targets.shape[1]):
            rows = ~np.isnan(targets[:, column])
            boosted = HistGradientBoostingRegressor(
                max_iter=self.spec.trees,
                max_depth=self.spec.tree_depth,
                max_leaf_nodes=None,
                min_samples_leaf=LEAF,
                learning_rate=self.spec.shrinkage,
                l2_regularization=self.spec.alpha,
                early_stopping=False,
                random_state=0,
            ).fit(features[rows], targets[rows, column])
            feature, threshold, leaf, self.bias[column] = foreign.full_trees(boosted, self.spec.tree_depth)
            own = slice(column * self.spec.trees, (column + 1) * self.spec.trees)
            for tensor, values in ((self.feature, feature), (self.threshold, threshold), (self.leaf, leaf)):
                tensor[own] = torch.from_numpy(values).to(tensor)
            alive()


REGRESSORS: dict[str, type[Ridge | GaussianProcess | Trees]] = {
    "ridge": Ridge,
    "gaussian-process": GaussianProcess,
    "trees": Trees,
}


def numbers(*shape: int) -> nn.Parameter:
    """Return zeros that a fit replaces, in double precision."""
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64), requires_grad=False)


def _alike(targets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the images with a label and the targets, for all targets that have the same labels: one fit for these."""
    present = ~np.isnan(targets)
    for rows in np.unique(present, axis=1).T:
        yield np.flatnonzero(rows), np.flatnonzero((present == rows[:, None]).all(axis=0))
