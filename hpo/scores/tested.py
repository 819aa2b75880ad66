"""Labelled images that no training saw, with what models and the baseline predictors predict for them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipeline.dataset import Dataset
from data_pipeline.phase import Phase
from hpo.scores import analysis
from hpo.text import utf8
from models import metrics
from models.metrics import Scores

_KIND = re.compile(r"\d+_(.+)\.png", re.IGNORECASE)
WORST = 10  # images that are shown
KINDS = 12  # more than so many different names are no kinds of microstructure


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The test split of a data set, or all images of a new one. The first model is the one that is looked at."""

    dataset: Dataset
    indices: np.ndarray  # (n,) of the images, in the data set
    name: str = "test split"  # in titles
    image: str = "test cell"  # one of them
    score: str = "test NMSE"
    models: Mapping[str, np.ndarray]  # what they predict, (n, k), by their titles
    predictors: Mapping[str, np.ndarray]  # what the baseline predictors predict, (n, k); none if they are unknown
    train_variance: np.ndarray  # (k,) of the training labels, label's unit squared; NaN if they are unknown
    phases: Mapping[str, Phase] | None

    @property
    def truth(self) -> np.ndarray:
        """(n, k); NaN where missing."""
        return self.dataset.targets[self.indices]

    @property
    def title(self) -> str:
        """The title of the first model."""
        return next(iter(self.models))

    @property
    def predicted(self) -> np.ndarray:
        """What the first model predicts, (n, k)."""
        return self.models[self.title]

    @cached_property
    def nrmse(self) -> np.ndarray:
        """NRMSE of the first model for each image, (n,), over the labels that it has.

        Infinite if a prediction is not finite; NaN of an image without a label of a target that varies. The spread of
        these labels stands in for that of the training labels if that is unknown.
        """
        variance = np.where(np.isnan(self.train_variance), metrics.spread(self.truth), self.train_variance)
        counted = ~np.isnan(self.truth) & (variance > 0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            squares = np.where(counted, (self.predicted - self.truth) ** 2 / variance, 0)
            nrmse = np.sqrt(squares.sum(axis=1) / counted.sum(axis=1))
        return np.where(counted.any(axis=1) & np.isnan(nrmse), np.inf, nrmse)

    @property
    def worst(self) -> np.ndarray:
        """The images with the highest NRMSE of the first model, the worst first: places among those tested."""
        return np.argsort(-self.nrmse, kind="stable")[:WORST]

    @cached_property
    def fractions(self) -> np.ndarray:
        """Mean grey value of each image, (n,): the inclusions' volume fraction of a two-phase image."""
        return self.dataset.images[self.indices].mean(axis=(1, 2, 3), dtype=np.float64)

    @cached_property
    def by_phase(self) -> dict[str, np.ndarray]:
        """Volume fraction of each phase, (n,), by name; of colours the mean of each channel."""
        return self.dataset.fractions(self.indices)

    @cached_property
    def kinds(self) -> list[str] | None:
        """The kind of microstructure of each image, by the word behind the number in its file's name; None if the
        names are no kinds."""
        names = [_KIND.fullmatch(self.dataset.names[index]) for index in self.indices]
        kinds = [utf8(match[1]) for match in names if match]
        if len(kinds) < len(names) or not 1 < len(set(kinds)) <= min(KINDS, len(kinds) // 2):
            return None
        return kinds

    @cached_property
    def drawn(self) -> np.ndarray:
        """The bootstrap's resamples of the images, the same for every model."""
        return analysis.resamples(len(self.truth))

    def scores(self, predicted: np.ndarray) -> Scores:
        """Return the scores of predictions (n, k)."""
        return metrics.scores(predicted, self.truth, train_variance=self.train_variance)

    def samples(self, predicted: np.ndarray) -> dict[str, np.ndarray]:
        """Return resampled scores of predictions (n, k), by the name of the score."""
        return analysis.score_samples(self.truth, predicted, train_variance=self.train_variance, drawn=self.drawn)
