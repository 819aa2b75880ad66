"""Which parameters of a search matter, as Optuna sees it."""

from collections.abc import Sequence

import optuna

from hpo.search.sampling import distributions
from hpo.study import Study
from hpo.study.records import Point

FEWEST = 10  # configurations from which importances are computed


def importances(study: Study, scored: Sequence[tuple[Point, float]]) -> dict[str, float]:
    """Return the share of each parameter in the variance of the score (fANOVA), from configurations with their scores.

    Nothing for fewer than FEWEST of them, or if their scores do not differ.
    """
    if len(scored) < FEWEST:
        return {}
    space, trials = distributions(study), optuna.create_study()
    for point, score in scored:
        own = {key: space[key] for key in point}
        trials.add_trial(optuna.trial.create_trial(params=point, distributions=own, value=score))
    try:
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(optuna.importance.get_param_importances(trials, evaluator=evaluator))
    except (ValueError, RuntimeError):  # scores that do not differ
        return {}
