"""What a closing says of the best trial of a group: how it compares with the baseline predictors, and its repeats."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hpo.queue import Job
from hpo.queue.closing_result import ClosingEntry, Gain
from hpo.scores import ranking
from hpo.study import provenance
from hpo.study.records import Scores, SplitScores
from models.metrics import DESCRIPTORS


def verdict(
    validation: Scores, predictors: Mapping[str, SplitScores], certain: Mapping[str, Gain] = MappingProxyType({})
) -> str:
    """Return how a network compares with the baseline predictors; `certain`: its gains over them, as far as known.

    'below mean' is never registered, 'not distinguishable from the mean' is registered and never champion. 'good' is
    promoted, all others are promoted and marked. Ridge on descriptors counts where the gain over it is known.
    """
    for name in ("mean", "volume fraction", *({DESCRIPTORS} & certain.keys())):
        nmse, limit = validation.nmse, predictors[name].validation.nmse
        if nmse is None or limit is None or not nmse < limit:
            return f"below {name}"
        if name in certain and not certain[name].is_certain:
            return f"not distinguishable from the {name}"
    return "good"


def entry(
    best: Job,
    scores: SplitScores,
    predictors: Mapping[str, SplitScores],
    *,
    trials: Sequence[Job],
    certain: dict[str, Gain] | None,
) -> ClosingEntry:
    """Return what the result says of a group's best trial before it is registered.

    `scores`: of its network; `predictors`: of the baseline predictors; `trials`: those of its study; `certain`: its
    gains.
    """
    assert best.spec is not None and scores.test is not None
    own = [trial for trial in trials if trial.number == best.number]
    mean, deviation = ranking.spread(ranking.repeats(own)[best.number])
    return ClosingEntry(
        number=best.number,
        config=best.config,
        point=best.spec.point,
        parameters=best.spec.parameters,
        weights=provenance(best.spec.model),
        verdict=verdict(scores.validation, predictors, certain or {}),
        validation=scores.validation,
        test=scores.test,
        version=None,
        point_nmse=mean,
        point_deviation=deviation,
        incomplete=ranking.incomplete(own),
        unstable=bool(ranking.diverged(own)),
        gains=certain,
    )
