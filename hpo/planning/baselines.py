"""The baseline predictors, fitted on the training split."""

from data_pipeline.dataset import Dataset
from data_pipeline.split import Split
from hpo.study.records import SplitScores
from models import metrics

LEARNED = {"mean": "the mean of the training labels", "volume fraction": "a cubic polynomial in the volume fraction"}


def predictors(data: Dataset, parts: Split) -> dict[str, SplitScores]:
    """Validation scores of the baseline predictors. The test split is not looked at here."""
    learned = data.part(parts.train)
    images, truth, *inputs = data.part(parts.validation)
    _, variance = metrics.moments(learned[1])
    return {
        name: SplitScores(validation=metrics.scores(fit(*learned)(images, *inputs), truth, train_variance=variance))
        for name, fit in metrics.PREDICTORS.items()
    }
