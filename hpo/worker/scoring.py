"""Scores of a downloaded model, and tables of predictions."""

from pathlib import Path
from threading import Event

import numpy as np
import pandas

from data_pipeline.dataset import Dataset
from data_pipeline.folds import outside_test
from hpo import crash
from hpo.study.records import SplitScores
from hpo.text import for_csv, utf8
from hpo.worker import protocol
from hpo.worker.channel import Send, signs_of_life
from hpo.worker.inputs import load_data
from models import bundle, metrics
from models.regressor import predict


def score(request: protocol.Score, send: Send, stop: Event) -> protocol.Scored:
    """Return the scores of a downloaded model and the baseline predictors; write the model's predictions as CSV."""
    crash.at("scoring")
    alive = signs_of_life(send)
    dataset, parts = load_data(request.data)
    regressor, spec = bundle.load(request.folder)
    regressor.levels = regressor.ranges = None  # these images are on the scale of training, however bright
    bundle.check_shape(spec, dataset.images.shape[1:], where="the data set")
    first = ("training", outside_test(parts)) if request.is_refit else ("validation", parts.validation)
    learned = dataset.part(parts.train)
    predictors = {name: fit(*learned) for name, fit in metrics.PREDICTORS.items()}
    predictors["model"] = lambda images, inputs=None: predict(regressor, images, inputs, alive=alive)
    scores: dict[str, dict[str, metrics.Scores]] = {name: {} for name in predictors}
    tables = []
    for field, (part, indices) in (("validation", first), ("test", ("test", parts.test))):
        images, truth, *inputs = dataset.part(indices)
        trained = truth if part == "training" else learned[1]
        for name, predictor in predictors.items():
            predicted = predictor(images, *inputs)
            scores[name][field] = metrics.scores_of_part(predicted, truth, learned=trained, in_unit=dataset.in_unit)
            if name == "model":
                tables.append(prediction_table(dataset, indices, predicted))
                tables[-1].insert(1, "split", part)
    write_table(pandas.concat(tables), request.predictions)
    both = {name: SplitScores(**by_part) for name, by_part in scores.items()}
    return protocol.Scored(model=both.pop("model"), predictors=both)


def prediction_table(dataset: Dataset, indices: np.ndarray, predicted: np.ndarray) -> pandas.DataFrame:
    """Return the columns `image`, `C11 true` for each target, then `C11 predicted` for each, in the label's unit."""
    names = dataset.target_names
    table = pandas.DataFrame(dataset.targets[indices], columns=[f"{name} true" for name in names])
    table[[f"{name} predicted" for name in names]] = predicted
    table.insert(0, "image", [utf8(dataset.names[index]) for index in indices])
    return table


def write_table(table: pandas.DataFrame, path: Path) -> None:
    for_csv(table).to_csv(path, index=False)
