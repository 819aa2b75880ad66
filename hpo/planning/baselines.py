"""The baseline predictors, fitted on the training split."""

from collections.abc import Callable

from data_pipeline.dataset import Dataset
from data_pipeline.split import Split
from hpo.study.records import SplitScores
from models import metrics

LEARNED = {"mean": "the mean of the training labels", "volume fraction": "a cubic polynomial in the volume fraction"}


def predictors(data: Dataset, parts: Split) -> dict[str, SplitScores]:
    """Validation scores of the baseline predictors. The test split is not looked at here."""
    learned = data.part(parts.train)
    images, truth, *inputs = data.part(parts.validation)

    def scores(fit: Callable[..., metrics.Predictor]) -> metrics.Scores:
        predicted = fit(*learned)(images, *inputs)
        return metrics.scores_of_part(predicted, truth, learned=learned[1], in_unit=data.in_unit)

    return {name: SplitScores(validation=scores(fit)) for name, fit in metrics.PREDICTORS.items()}
