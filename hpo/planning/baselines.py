"""The baseline predictors, fitted on the training split."""

from collections.abc import Callable, Sequence

from data_pipeline.dataset import Dataset
from data_pipeline.split import Split
from hpo.study.records import SplitScores
from models import metrics

LEARNED = {"mean": "the mean of the training labels", "volume fraction": "a cubic polynomial in the volume fraction"}


def predictors(data: Dataset, folds: Sequence[Split]) -> dict[str, SplitScores]:
    """Return the validation scores of the baseline predictors, means over the folds of a cross-validation; else there
    is one split. The test split is not looked at here."""
    scores = [_scores(data, parts) for parts in folds]
    return {
        name: SplitScores(validation=metrics.mean_of([fold[name] for fold in scores])) for name in metrics.PREDICTORS
    }


def _scores(data: Dataset, parts: Split) -> dict[str, metrics.Scores]:
    learned = data.part(parts.train)
    images, truth, *inputs = data.part(parts.validation)

    def scores(fit: Callable[..., metrics.Predictor]) -> metrics.Scores:
        predicted = fit(*learned)(images, *inputs)
        return metrics.scores_of_part(predicted, truth, learned=learned[1], in_unit=data.in_unit)

    return {name: scores(fit) for name, fit in metrics.PREDICTORS.items()}
