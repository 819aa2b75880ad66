"""The tables of docs/reference/accuracy.md: the periodic network and its peers. `python bench/accuracy.py PART…`

All networks are the point that hpo/studies/periodic-search.toml starts from, trained as it says with one seed; scores
are of the default data set's test split, unless a line says otherwise. Parts, each its own lines: `peers` (no training:
minutes), `cells` (learning curve), `more=DIR` (2,000 other cells: `hpo data make DIR --count 2000 --seed 1`), `without`
(one morphology left out of the training), `contrast=DIR` (the same cells, a stiffer phase: `hpo data make DIR
--inclusion 350 0.22`), `larger`, `swapped` (the network of 364 cells on other cells), `physics` (what each last layer
brings), `first` (what the design of the study began with, three seeds). A training takes about eight minutes of a core;
the network of 364 cells is trained once for all parts of a call. `peers` needs scikit-learn.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from machine import machine

from data_pipeline import dataset as data_sets
from data_pipeline.components import vector
from data_pipeline.dataset import Dataset
from data_pipeline.homogenize import homogenize
from data_pipeline.split import split
from data_pipeline.synthesize import draw
from hpo import study
from hpo.planning.physics import constants
from models import metrics, specs
from models.regressor import Regressor, predict
from models.training import Training

SEED = 1
KINDS = ("isotropic", "anisotropic", "particles", "bands")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    functions = (_peers, _cells, _more, _without, _contrast, _larger, _swapped, _physics, _first)
    named = {function.__name__.removeprefix("_"): function for function in functions}
    help_ = f"{', '.join(named)}; =ARGUMENT: a folder, a count of cells or a kind, to do that one alone"
    parser.add_argument("parts", nargs="+", metavar="PART[=ARGUMENT]", help=help_)
    parts = [each.partition("=") for each in parser.parse_args().parts]
    if unknown := [name for name, _, _ in parts if name not in named]:
        parser.error(f"expected parts out of {', '.join(named)}, found {', '.join(unknown)}")
    if bare := [name for name, _, argument in parts if name in ("more", "contrast") and not argument]:
        parser.error(f"expected {bare[0]}=DIR")
    torch.set_num_threads(1)
    data = data_sets.load(data_sets.DEFAULT)
    print(f"{machine()}; torch {torch.__version__}, one thread")
    print(f"{'':44} {'NMSE':>8} {'R2':>8} {'lowest':>8} {'MAPE %':>7} {'seconds':>8}", flush=True)
    for name, _, argument in parts:
        named[name](data, argument)


def train(
    data: Dataset,
    cells: np.ndarray,
    validation: np.ndarray | None = None,
    other: Dataset | None = None,
    seed: int = SEED,
    point: Mapping[str, object] | None = None,
    **changes: object,
) -> tuple[Regressor, float]:
    """The best epoch's network of a training on those cells (of `other`, if given), and its seconds."""
    plan = study.load("periodic-search", [f"{key}={value}" for key, value in changes.items()])
    model, training = plan.trial(plan.start[0] | (point or {}))
    parts = split(len(data.images))
    source = other or data
    checked = parts.validation if validation is None else validation
    begin = time.process_time()
    run = Training(
        specs.from_dict(model),
        specs.training_from_dict(training),
        train=(source.images[cells], source.targets[cells]),
        validation=(data.images[checked], data.targets[checked]),
        seed=seed,
        symmetries=data.symmetries,
        phases=constants(data),
        target_names=data.target_names,
    )
    for epoch in run.epochs():
        if sys.stderr.isatty():
            print(f"\r\033[Kepoch {epoch.number} of {run.training.epochs}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return run.best_regressor(), time.process_time() - begin


@cache
def whole() -> tuple[Regressor, float]:
    """The network of all training cells of the default data set."""
    data = data_sets.load(data_sets.DEFAULT)
    return train(data, split(len(data.images)).train)


def line(
    name: str, predicted: np.ndarray, truth: np.ndarray, variance: np.ndarray, seconds: float | None = None
) -> None:
    scores = metrics.scores(predicted, truth, train_variance=variance)
    r2 = [score for score in scores.per_target["r2"] if score is not None]
    mape = None if scores.mape is None else 100 * scores.mape
    numbers = (_number(scores.nmse), _number(scores.r2), _number(min(r2, default=None)), _number(mape, "7.2f"))
    print(f"{name:44} {' '.join(numbers)} {_number(seconds, '8.0f')}", flush=True)


def _number(value: float | None, form: str = "8.5f") -> str:
    """Return the number in that form, a dash of the same width if it does not exist (R² of a single cell)."""
    return f"{'-':>{form[0]}}" if value is None else format(value, form)


def kinds(data: Dataset) -> np.ndarray:
    """The morphology of each cell, from its file's name."""
    return np.array([name.partition("_")[2].removesuffix(".png") for name in data.names])


def _parts(data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training and test indices of the split, and the variance of the training labels."""
    parts = split(len(data.images))
    return parts.train, parts.test, data.targets[parts.train].var(axis=0)


def _cells(data: Dataset, count: str) -> None:
    learned, test, variance = _parts(data)
    for n in [int(count)] if count else (50, 100, 200, len(learned)):
        regressor, seconds = whole() if n == len(learned) else train(data, learned[:n])
        line(f"{n} cells", predict(regressor, data.images[test]), data.targets[test], variance, seconds)


def _more(data: Dataset, folder: str) -> None:
    other = data_sets.load(Path(folder))
    learned, test, variance = _parts(data)
    plan = study.load("periodic-search")
    epochs = round(plan.training["epochs"] * len(learned) / len(other.images))  # as many batches as with 364 cells
    regressor, seconds = train(data, np.arange(len(other.images)), other=other, **{"training.epochs": epochs})
    name = f"{len(other.images)} other cells, {epochs} epochs"
    line(name, predict(regressor, data.images[test]), data.targets[test], variance, seconds)


def _without(data: Dataset, kind: str) -> None:
    learned, test, variance = _parts(data)
    validation, of = split(len(data.images)).validation, kinds(data)
    for left in [kind] if kind else KINDS:
        mine = test[of[test] == left]
        line(f"{left}, all in training", predict(whole()[0], data.images[mine]), data.targets[mine], variance)
        regressor, seconds = train(data, learned[of[learned] != left], validation[of[validation] != left])
        line(f"{left}, none in training", predict(regressor, data.images[mine]), data.targets[mine], variance, seconds)


def _contrast(data: Dataset, folder: str) -> None:
    stiff = data_sets.load(Path(folder))
    assert stiff.phases is not None and np.array_equal(stiff.images, data.images), "expected the default images"
    learned, test, variance = _parts(stiff)
    ratio = stiff.phases["inclusion"].young_modulus / stiff.phases["matrix"].young_modulus
    cubic = metrics.volume_fraction_predictor(stiff.images[learned], stiff.targets[learned])
    line(f"contrast {ratio:g}, volume fraction", cubic(stiff.images[test]), stiff.targets[test], variance)
    regressor, seconds = train(stiff, learned)
    line(f"contrast {ratio:g}", predict(regressor, stiff.images[test]), stiff.targets[test], variance, seconds)


def _larger(data: Dataset, count: str) -> None:
    _, _, variance = _parts(data)
    assert data.phases is not None
    for size in (64, 96, 128):
        images = [draw(5, index, size=size).image for index in range(int(count or 40))]
        labels = np.stack([vector(homogenize(image, **data.phases)) for image in images])
        predicted = predict(whole()[0], np.stack(images)[:, None].astype(np.float32), batch_size=16)
        line(f"{len(images)} new cells of {size} x {size} pixels", predicted, labels, variance)


def _swapped(data: Dataset, _: str) -> None:
    _, test, variance = _parts(data)
    assert data.phases is not None
    images = 1 - data.images[test]
    labels = np.stack([vector(homogenize(image[0] > 0.5, **data.phases)) for image in images])
    line("test cells, phases swapped", predict(whole()[0], images), labels, variance)


def _physics(data: Dataset, kind: str) -> None:
    learned, test, variance = _parts(data)
    for each in [kind] if kind else ("none", "hill", "bounded"):
        default = each == "bounded"
        regressor, seconds = whole() if default else train(data, learned, **{"model.physics": each})
        line(f"physics = {each}", predict(regressor, data.images[test]), data.targets[test], variance, seconds)


def _first(data: Dataset, _: str) -> None:
    learned, test, variance = _parts(data)
    first = {"model.physics": "none", "model.stride": 1, "training.epochs": 250}
    for seed in (1, 2, 3):
        regressor, seconds = train(data, learned, seed=seed, point={"width": 16, "relative": 0.0}, **first)
        line(f"first try, seed {seed}", predict(regressor, data.images[test]), data.targets[test], variance, seconds)


# Peers without a network


def two_point(images: np.ndarray) -> np.ndarray:
    """The two-point statistics of each image (n, h * w): its periodic autocorrelation."""
    spectrum = np.fft.fft2(images[:, 0].astype(np.float64))
    return np.fft.ifft2(np.abs(spectrum) ** 2).real.reshape(len(images), -1) / images[0].size


def _peers(data: Dataset, _: str) -> None:
    from sklearn.decomposition import PCA
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, WhiteKernel
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    learned, test, variance = _parts(data)
    validation = split(len(data.images)).validation
    images, targets = data.images, data.targets
    for name, fit in metrics.PREDICTORS.items():
        line(name, fit(images[learned], targets[learned])(images[test]), targets[test], variance)
    statistics = two_point(images)
    scale = np.sqrt(variance)

    def ridge(components: int, alpha: float):
        return make_pipeline(
            PCA(components, whiten=True, random_state=SEED), PolynomialFeatures(2), StandardScaler(), Ridge(alpha)
        )

    def process(components: int, _: float):
        kernel = RBF(np.full(components, 3.0), (0.1, 1e6)) + WhiteKernel(1e-2, (1e-6, 1.0))
        return make_pipeline(
            PCA(components, whiten=True, random_state=SEED), GaussianProcessRegressor(kernel, normalize_y=True)
        )

    def best(name: str, make: Callable, choices: list[tuple[int, float]]) -> None:
        """The one of those settings with the lowest validation error, on the test split."""
        begin = time.process_time()
        made = []
        for components, alpha in choices:
            model = make(components, alpha).fit(statistics[learned], targets[learned] / scale)
            error = ((model.predict(statistics[validation]) * scale - targets[validation]) ** 2 / variance).mean()
            made.append((error, (components, alpha), model))
        _, chosen, model = min(made, key=lambda each: each[0])
        seconds = time.process_time() - begin
        line(
            f"{name} {chosen[0]} components", model.predict(statistics[test]) * scale, targets[test], variance, seconds
        )

    best("two-point + ridge,", ridge, [(n, alpha) for n in (5, 10, 20, 40) for alpha in (0.1, 1.0, 10.0, 100.0)])
    best("two-point + Gaussian process,", process, [(n, 0.0) for n in (5, 10, 20)])


if __name__ == "__main__":
    main()
