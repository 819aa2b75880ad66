"""The cheapest classical predictor, beside which every study is reported: ridge on descriptors of the image."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from models import metrics
from models.descriptor_net import DescriptorNet
from models.metrics import Predictor
from models.regressor import Regressor, predict
from models.regressors import Ridge
from models.sizes import check_image
from models.specs import DescriptorsSpec
from models.splits import Scaling, Split, inputs_of, tensor

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
MOST_IMAGES = 2000  # that it learns from; a principal component analysis of more takes minutes
LARGEST = 2**25  # numbers of their two-point statistics: 256 MiB; many channels leave fewer images
BATCH = 2**21  # numbers of the images that are predicted together


def ridge_baseline(
    train: Split,
    validation: Split,
    *,
    periodic: bool,
    input_names: Sequence[str] = (),
    alive: Callable[[], object] = lambda: None,
) -> Predictor:
    """Return ridge on the default descriptors, fitted to (some of) the training images; of PENALTIES the one with the
    lowest NMSE of the validation split. Raise SpecError if the images are too small."""
    spec, shape = DescriptorsSpec(edges="periodic" if periodic else "open"), train[0].shape[1:]
    check_image(spec, shape)
    network = DescriptorNet(spec, (shape[0], shape[1], shape[2]), train[1].shape[1], len(input_names))
    most = min(MOST_IMAGES, LARGEST // len(network.centre))
    train, validation = (_some(part, most) for part in (train, validation))
    images, labels = train[0], np.asarray(train[1], np.float64)
    network.learn_levels(images)
    inputs = [None if numbers is None else tensor(numbers) for numbers in map(inputs_of, (train, validation))]
    if inputs[0] is not None and network.scalars is not None:
        network.scalars.learn(inputs[0])
    scaling = Scaling.of(labels, "standard")
    scaling = Scaling(scaling.mean, np.where(scaling.scale > 0, scaling.scale, 1.0), scaling.variance)
    learned, seen = (network.prepare(tensor(part[0]), None, alive) for part in (train, validation))
    targets = scaling.apply(labels)
    network.standardise(learned)

    def fit(penalty: float) -> float:
        """Fit with this penalty and return the NMSE of the validation split."""
        assert isinstance(network.regressor, Ridge)
        network.regressor.penalty = penalty
        network.regress(learned, targets, inputs[0], alive)
        predicted = network(seen, inputs[1]).double().numpy() * scaling.scale + scaling.mean
        nmse = metrics.scores(predicted, validation[1], train_variance=scaling.variance).nmse
        return np.inf if nmse is None else nmse

    fit(min(PENALTIES, key=fit))
    mean, scale = torch.from_numpy(scaling.mean), torch.from_numpy(scaling.scale)
    regressor = Regressor(network, mean, scale, input_names=input_names)
    return partial(predict, regressor, batch_size=max(1, BATCH // images[0].size), alive=alive)


def _some(split: Split, most: int) -> Split:
    """Return at most so many images of a split, evenly spread."""
    count = len(split[0])
    chosen = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    images, targets, *inputs = (part[chosen] for part in split)
    return (images, targets, inputs[0]) if inputs else (images, targets)
