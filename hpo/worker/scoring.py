"""Scores of a downloaded model, and tables of predictions."""

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

import numpy as np
import pandas

from data_pipeline.dataset import Dataset
from data_pipeline.errors import DatasetError
from data_pipeline.folds import folds, outside_test
from data_pipeline.image_checks import copies
from data_pipeline.parts import joined
from data_pipeline.split import Split
from hpo import crash
from hpo.study.records import GROUPS, NETWORK, NEW, OLD, VARIANCE, SplitScores, version_key
from hpo.text import first_line, for_csv, utf8
from hpo.worker import protocol
from hpo.worker.channel import Send, signs_of_life
from hpo.worker.inputs import load_data
from models import bundle, metrics, user
from models.regressor import predict
from models.ridge_baseline import ridge_baseline

Described = tuple[dict[str, metrics.Scores], dict[str, np.ndarray]]
_described: dict[Path, Described | None] = {}  # of the newest data set


def answer(request: protocol.Score, send: Send, stop: Event) -> protocol.Scored | protocol.NotScored:
    """Return what `score` does; of a model of an earlier data set why it cannot be scored on this one."""
    try:
        return score(request, send, stop)
    except Exception as error:  # its network may be code of its author
        if not request.is_older or isinstance(error, DatasetError | OSError):
            raise
        return protocol.NotScored(reason=user.fault(error) or first_line(error))


def score(request: protocol.Score, send: Send, stop: Event) -> protocol.Scored:
    """Return the scores of a downloaded model and the baseline predictors; write the model's predictions as CSV, and
    those of descriptors for the test split."""
    crash.at("scoring")
    alive = signs_of_life(send)
    dataset, parts = load_data(request.data)
    regressor, spec = bundle.load(request.folder)
    regressor.levels = regressor.ranges = None  # these images are on the scale of training, however bright
    bundle.check_shape(spec, dataset.images.shape[1:], where="the data set")
    first = ("training", outside_test(parts)) if request.folds else ("validation", parts.validation)
    learned = dataset.part(parts.train)
    predictors = {name: fit(*learned) for name, fit in metrics.PREDICTORS.items()}
    predictors[NETWORK] = lambda images, inputs=None: predict(regressor, images, inputs, alive=alive)
    scores: dict[str, dict[str, metrics.Scores]] = {name: {} for name in predictors}
    validated = folds(dataset, request.folds) if request.folds else (parts,)
    errors = _baseline_errors(dataset, validated) | {VARIANCE: metrics.moments(learned[1])[1]}
    tables, tests = [], None
    for field, (part, indices) in (("validation", first), ("test", ("test", parts.test))):
        images, truth, *inputs = dataset.part(indices)
        trained = truth if part == "training" else learned[1]
        for name, predictor in predictors.items():
            predicted = predictor(images, *inputs)
            scores[name][field] = metrics.scores_of_part(predicted, truth, learned=trained, in_unit=dataset.in_unit)
            if name == NETWORK:
                errors |= {NETWORK: (predicted - truth) ** 2} if part == "validation" else {}
                tables.append(prediction_table(dataset, indices, predicted))
                tables[-1].insert(1, "split", part)
        if part == "test" and request.earlier is not None:
            tests = _tests(dataset, request.earlier, predicted)
    if (described := _by_descriptors(request.data, alive)) is not None:
        scores[metrics.DESCRIPTORS], ridge = described
        tables[-1][[f"{name} {metrics.DESCRIPTORS}" for name in dataset.target_names]] = ridge["test"]
        if request.folds is None:
            errors[metrics.DESCRIPTORS] = (ridge["validation"] - dataset.targets[parts.validation]) ** 2
    write_table(pandas.concat(tables), request.predictions)
    np.savez(request.errors, allow_pickle=False, **errors)
    both = {name: SplitScores(**by_part) for name, by_part in scores.items()}
    return protocol.Scored(model=both.pop(NETWORK), predictors=both, tests=tests)


def _tests(dataset: Dataset, key: str, predicted: np.ndarray) -> dict[str, metrics.Scores]:
    """Return the scores of predictions of the test split (n, k) on the images of an earlier data set, and on the others
    if there are any. All are of the variance of the training labels of this data set."""
    test, learned = dataset.split.test, dataset.targets[dataset.split.train]
    own = next(one for one in dataset.earlier if version_key(one.digest, one.split) == key).within(test)
    parts = {OLD: np.isin(test, own), NEW: ~np.isin(test, own)}
    return {
        name: metrics.scores_of_part(
            predicted[chosen], dataset.targets[test[chosen]], learned=learned, in_unit=dataset.in_unit
        )
        for name, chosen in parts.items()
        if chosen.any()
    }


def _baseline_errors(dataset: Dataset, splits: Sequence[Split]) -> dict[str, np.ndarray]:
    """Return the squared errors (n, k) of each baseline predictor on the validation images of each fold, fold after
    fold; of the split's if there is only that. And which of these images belong together."""
    errors: dict[str, list[np.ndarray]] = {name: [] for name in metrics.PREDICTORS}
    for parts in splits:
        learned = dataset.part(parts.train)
        images, truth, *inputs = dataset.part(parts.validation)
        for name, fit in metrics.PREDICTORS.items():
            errors[name].append((fit(*learned)(images, *inputs) - truth) ** 2)
    groups = _groups(dataset, np.concatenate([parts.validation for parts in splits]))
    return {name: np.concatenate(own) for name, own in errors.items()} | groups


def _groups(dataset: Dataset, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return which of these images belong together, as they are equal or in a group; nothing if none do."""
    same = copies(dataset.images, dataset.inputs)
    labels = np.array(joined(dataset.groups, same) or same)
    names, members = np.unique(labels[indices], return_inverse=True)
    return {GROUPS: members} if len(names) < len(indices) else {}


def _by_descriptors(path: Path, alive: Callable[[], None]) -> Described | None:
    """Return the scores of ridge on descriptors and what it predicts, by the name of the split; None if it cannot be
    fitted, such as to images of less than three pixels a side.

    It is fitted to the training split, and the validation split selects its penalty, whatever the folds of a study.
    """
    if path not in _described:  # a closing may score many models
        _described.clear()
        _described[path] = _describe(path, alive)
    return _described[path]


def _describe(path: Path, alive: Callable[[], None]) -> Described | None:
    dataset, parts = load_data(path)
    learned, validation = dataset.part(parts.train), dataset.part(parts.validation)
    periodic, names = dataset.is_periodic, dataset.input_names
    scores, predicted = {}, {}
    try:
        predictor = ridge_baseline(learned, validation, periodic=periodic, input_names=names, alive=alive)
        for field, (images, truth, *inputs) in (("validation", validation), ("test", dataset.part(parts.test))):
            predicted[field] = predictor(images, *inputs)
            scores[field] = metrics.scores_of_part(predicted[field], truth, learned=learned[1], in_unit=dataset.in_unit)
    except Exception as error:  # no baseline predictor keeps a study from closing
        print(f"no ridge on descriptors: {first_line(error)}")
        return None
    return scores, predicted


def prediction_table(dataset: Dataset, indices: np.ndarray, predicted: np.ndarray) -> pandas.DataFrame:
    """Return the columns `image`, `C11 true` for each target, then `C11 predicted` for each, in the label's unit."""
    names = dataset.target_names
    table = pandas.DataFrame(dataset.targets[indices], columns=[f"{name} true" for name in names])
    table[[f"{name} predicted" for name in names]] = predicted
    table.insert(0, "image", [utf8(dataset.names[index]) for index in indices])
    return table


def write_table(table: pandas.DataFrame, path: Path) -> None:
    for_csv(table).to_csv(path, index=False)
