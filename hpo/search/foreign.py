"""Everything that reaches into the inside of Optuna: its tables, and attributes that are not its public interface.

`tests/service/test_search_foreign.py` holds it to the version of Optuna that is installed.
"""

import itertools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, text

from hpo.errors import StudyError
from hpo.queue import Job
from hpo.study import Choices, Interval, has_place, violations
from hpo.study.records import LearnedTrial

MOST_DRAWS = 10_000  # of a configuration within the bounds
BEYOND = 10**9  # number of the first trial of another study: no study has so many of its own
OBJECTIVE_NAMES = "dashboard:objective_names"  # system attribute of a study
CONSTRAINT = "constraints:"  # system attribute of a trial, with the constraint's name: above 0 it is not feasible

Accepts = Callable[[Mapping[str, Any]], bool]  # whether a configuration is within the bounds
Space = Mapping[str, Choices | Interval]


class _Draft(optuna.storages._CachedStorage):
    """A storage in which nothing is written: a study is seen as it is, with trials of others that it learns from."""

    learned: Sequence[FrozenTrial] = ()

    def get_all_trials(self, study_id: int, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        own: list[FrozenTrial] = super().get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [*own, *(trial for trial in self.learned if states is None or trial.state in states)]

    def set_trial_param(self, *arguments: Any, **options: Any) -> None:
        pass

    def set_trial_system_attr(self, *arguments: Any, **options: Any) -> None:
        pass


class SobolSampler(optuna.samplers.QMCSampler):
    """Optuna's QMC (scrambled Sobol), whose point is that of a place in the sequence.

    Optuna's own counts the places in the study's attributes, where a worker that died leaves a gap, and takes the space
    from the first trial, which it draws at random. With `accepts` only the points count that it is true of.
    """

    def __init__(
        self, place: int, distributions: dict[str, BaseDistribution], *, seed: int, accepts: Accepts | None = None
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # since version 3.0 of Optuna
            super().__init__(seed=seed, scramble=True)
        self._number, self._place = place, place
        self._distributions, self._accepts = distributions, accepts

    def infer_relative_search_space(self, *_: Any) -> dict[str, BaseDistribution]:
        return self._distributions

    def sample_relative(self, *study_and_trial: Any) -> dict[str, Any]:
        if self._accepts is None:
            return super().sample_relative(*study_and_trial)
        points = (self._at(place, *study_and_trial) for place in range(MOST_DRAWS * (self._number + 1)))
        accepted = itertools.islice(filter(self._accepts, points), self._number, None)
        point = next(accepted, None)
        return _none_accepted() if point is None else point

    def _at(self, place: int, *study_and_trial: Any) -> dict[str, Any]:
        self._place = place
        return super().sample_relative(*study_and_trial)

    def _find_sample_id(self, *_: Any) -> int:
        return self._place


def draw(
    store: optuna.storages.RDBStorage,
    name: str,
    sampler: optuna.samplers.BaseSampler,
    number: int,
    distributions: Mapping[str, BaseDistribution],
    space: Space,
    learned: Sequence[FrozenTrial] = (),
) -> dict[str, Any]:
    """Return the point that a sampler chooses for a trial; write nothing. `learned`: trials of other studies."""
    draft = _Draft(store)
    draft.learned = learned
    study = optuna.load_study(study_name=name, storage=draft, sampler=sampler)
    trial = optuna.Trial(study, store.get_trial_id_from_study_id_trial_number(study._study_id, number))
    point: dict[str, Any] = {}
    for key, distribution in distributions.items():
        if has_place(space[key], point):
            point[key] = trial._suggest(key, distribution)
    return point


def draw_at_random(
    distributions: Mapping[str, BaseDistribution], space: Space, *, seed: int, accepts: Accepts
) -> dict[str, Any]:
    """Return the first accepted point of those that Optuna's RandomSampler draws one after the other.

    Raise StudyError if there is none among many.
    """
    sampler: Any = optuna.samplers.RandomSampler(seed=seed)
    for _ in range(MOST_DRAWS):
        point: dict[str, Any] = {}
        for key, distribution in distributions.items():
            if has_place(space[key], point):
                point[key] = sampler.sample_independent(None, None, key, distribution)  # which looks at no trial
        if accepts(point):
            return point
    return _none_accepted()


def _none_accepted() -> dict[str, Any]:
    raise StudyError(
        f"Expected configurations of [space] within [bounds], found none among {MOST_DRAWS:,}: give the study wider "
        "bounds, or a space of smaller networks."
    )


def grid_attributes(sampler: optuna.samplers.GridSampler) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Return what gives a point the system attributes by which Optuna's GridSampler knows a trial of its grid."""
    names, space = sampler._param_names, sampler._search_space
    ids = {values: number for number, values in enumerate(sampler._all_grids)}
    return lambda point: {"grid_id": ids[tuple(point[key] for key in names)], "search_space": space}


def planned(store: optuna.storages.RDBStorage, study_id: int) -> list[tuple[int, int | None]]:
    """Return number and config number (None outside grids) of a study's trials, by number.

    Optuna's own call reads each trial with its whole space.
    """
    with store.engine.begin() as connection:
        rows = connection.execute(
            text("""
                SELECT number, cast(value_json AS int)
                FROM trials t LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND key = 'config'
                WHERE study_id = :study ORDER BY number
            """),
            {"study": study_id},
        )
        return [(number, config) for number, config in rows]


def outcomes(store: optuna.storages.RDBStorage, study_id: int) -> dict[int, tuple[TrialState, list[float]]]:
    """Return state and values of a study's trials, by number. Optuna's own call reads each with its whole space."""
    with store.engine.begin() as connection:
        rows = connection.execute(
            text("""
                SELECT number, state::text, array_remove(array_agg(value ORDER BY objective), NULL)
                FROM trials LEFT JOIN trial_values USING (trial_id)
                WHERE study_id = :study GROUP BY number, state ORDER BY number
            """),
            {"study": study_id},
        )
        return {number: (TrialState[state], values) for number, state, values in rows}


def learned_trials(
    learned: Sequence[LearnedTrial],
    distributions: Mapping[str, BaseDistribution],
    *,
    objectives: Sequence[str],
    bounds: Mapping[str, int],
) -> list[FrozenTrial]:
    """Return finished trials of other studies as a sampler sees them beside those of its own study."""
    trials = []
    for number, one in enumerate(learned, start=BEYOND):
        own, sizes = {key: distributions[key] for key in one.point}, one.sizes or {}
        trial = waiting(one.point, distributions=own, user_attrs={}, system_attrs=constraints(bounds, sizes))
        trial.number = trial._trial_id = number
        trial.state = TrialState.COMPLETE
        trial.values = [one.nmse, *(sizes[name] for name in objectives[1:])]
        trials.append(trial)
    return trials


def refused_trial(
    point: Mapping[str, Any], distributions: Mapping[str, BaseDistribution], *, number: int
) -> FrozenTrial:
    """Return a running trial of a point that is not accepted: the next choice keeps away from it."""
    own = {key: distributions[key] for key in point}
    trial = waiting(point, distributions=own, user_attrs={}, system_attrs={})
    trial.number = trial._trial_id = number
    trial.state = TrialState.RUNNING
    return trial


def constraints(bounds: Mapping[str, int], sizes: Mapping[str, float]) -> dict[str, Any]:
    """Return the system attributes that Optuna's own `Trial.set_constraint` gives a trial whose network is so large."""
    return {f"{CONSTRAINT}{name}": value for name, value in violations(bounds, sizes).items()}


def waiting(
    point: Mapping[str, Any],
    *,
    distributions: dict[str, BaseDistribution],
    user_attrs: dict[str, Any],
    system_attrs: dict[str, Any],
) -> FrozenTrial:
    """Return the waiting trial of a point.

    Optuna's own `create_trial` compares all values of the whole space for each trial.
    """
    return FrozenTrial(
        number=-1,
        trial_id=-1,
        state=TrialState.WAITING,
        value=None,
        datetime_start=None,
        datetime_complete=None,
        params=dict(point),
        distributions=distributions,
        user_attrs=user_attrs,
        system_attrs=system_attrs,
        intermediate_values={},
    )


def create_waiting(
    store: optuna.storages.RDBStorage, study_id: int, trials: Sequence[FrozenTrial], *, first: int
) -> None:
    """Insert waiting trials under the numbers `first`, `first` + 1, ..., all or none.

    The rows are those of Optuna's `create_new_trial`, which needs a transaction and some 10 ms for each. Nobody else
    may create trials of the study meanwhile.
    """
    with store.engine.begin() as connection:
        connection.execute(text("SELECT FROM studies WHERE study_id = :study FOR UPDATE"), {"study": study_id})
        inserted = connection.execute(
            text("""
                INSERT INTO trials (number, study_id, state)
                SELECT number, :study, 'WAITING'::trialstate
                FROM generate_series(cast(:first AS int), cast(:last AS int)) AS number
                ORDER BY number RETURNING trial_id
            """),
            {"study": study_id, "first": first, "last": first + len(trials) - 1},
        )
        numbered = list(zip(sorted(inserted.scalars()), trials, strict=True))
        params: dict[tuple[str, BaseDistribution], list[tuple[int, float]]] = {}
        for trial_id, trial in numbered:
            for name, distribution in trial.distributions.items():
                value = distribution.to_internal_repr(trial.params[name])
                params.setdefault((name, distribution), []).append((trial_id, value))
        for (name, distribution), values in params.items():
            connection.execute(
                text("""
                    INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
                    SELECT trial, :name, value, :distribution  -- sent once: that of a long list is long
                    FROM unnest(cast(:trials AS int[]), cast(:values AS float8[])) AS point (trial, value)
                """),
                {
                    "name": name,
                    "distribution": distribution_to_json(distribution),
                    "trials": [trial_id for trial_id, _ in values],
                    "values": [value for _, value in values],
                },
            )
        _insert_attributes(connection, "user", [(trial_id, trial.user_attrs) for trial_id, trial in numbered])
        _insert_attributes(connection, "system", [(trial_id, trial.system_attrs) for trial_id, trial in numbered])


def append_waiting(connection: Connection, name: str, trials: int) -> None:
    """Insert the waiting trials, without a point, that a study of so many lacks; rows as those of `create_waiting`."""
    values = {"name": name, "trials": trials}
    connection.execute(text("SELECT FROM studies WHERE study_name = :name FOR UPDATE"), values)
    connection.execute(
        text("""
            INSERT INTO trials (number, study_id, state)
            SELECT number, study_id, 'WAITING'::trialstate
            FROM studies, generate_series((SELECT count(*) FROM trials t WHERE t.study_id = studies.study_id),
                cast(:trials AS int) - 1) AS number
            WHERE study_name = :name ORDER BY number
        """),
        values,
    )


def _insert_attributes(connection: Connection, table: str, attributes: Sequence[tuple[int, Mapping[str, Any]]]) -> None:
    """Insert the attributes of trials, by their ids, into the table of users or that of the system."""
    values_of: dict[str, list[tuple[int, Any]]] = {}
    for trial_id, of_trial in attributes:
        for key, value in of_trial.items():
            values_of.setdefault(key, []).append((trial_id, value))
    for key, rows in values_of.items():
        distinct = list({id(value): value for _, value in rows}.values())
        place = {id(value): number for number, value in enumerate(distinct, start=1)}
        connection.execute(
            text(f"""
                INSERT INTO trial_{table}_attributes (trial_id, key, value_json)
                SELECT trial, :key, value  -- a space that all trials share is sent once
                FROM unnest(cast(:trials AS int[]), cast(:numbers AS int[])) AS attribute (trial, number)
                JOIN unnest(cast(:texts AS text[])) WITH ORDINALITY AS shared (value, number) USING (number)
            """),
            {
                "key": key,
                "trials": [trial_id for trial_id, _ in rows],
                "numbers": [place[id(value)] for _, value in rows],
                "texts": [json.dumps(value) for value in distinct],
            },
        )


def name_metrics(store: optuna.storages.RDBStorage, study_id: int, names: Sequence[str]) -> None:
    """Name what the values of a trial are, for optuna-dashboard.

    After Optuna's own `Study.set_metric_names` the data frame of the trials would have no column `value` any more.
    """
    if store.get_study_system_attrs(study_id).get(OBJECTIVE_NAMES) != list(names):
        store.set_study_system_attr(study_id, OBJECTIVE_NAMES, list(names))


def set_running(store: optuna.storages.RDBStorage, trial_id: int, job: Job) -> None:
    """Let a trial run while our claim of its job holds.

    It may wait, have been dead or cancelled, or have other repeats that are done.
    """
    with store.engine.begin() as connection:
        begun = connection.execute(
            text("""
                UPDATE trials SET state = 'RUNNING', datetime_start = clock_timestamp() AT TIME ZONE 'UTC',
                    datetime_complete = NULL
                WHERE trial_id = :trial AND state IN ('WAITING', 'FAIL', 'COMPLETE')
                  AND EXISTS (SELECT FROM hpo.job WHERE id = :job AND fence = :fence AND state = 'running')
            """),
            {"trial": trial_id, "job": job.id, "fence": job.fence},
        )
        if begun.rowcount:
            connection.execute(text("DELETE FROM trial_values WHERE trial_id = :trial"), {"trial": trial_id})


def reopen(store: optuna.storages.RDBStorage, trial_id: int) -> bool:
    """Let a failed or complete trial wait again; return whether it was one.

    Optuna's own calls refuse to: to Optuna the end of a trial is final.
    """
    with store.engine.begin() as connection:
        reopened = connection.execute(
            text("""
                UPDATE trials SET state = 'WAITING', datetime_start = NULL, datetime_complete = NULL
                WHERE trial_id = :trial AND state IN ('FAIL', 'COMPLETE')
            """),
            {"trial": trial_id},
        )
        if reopened.rowcount:
            connection.execute(text("DELETE FROM trial_values WHERE trial_id = :trial"), {"trial": trial_id})
        return reopened.rowcount > 0


def update_judged(store: optuna.storages.RDBStorage, trial_id: int, job: Job) -> None:
    """Store what the pruner has judged as intermediate values, in one statement: Optuna's call commits each epoch."""
    assert job.judged is not None
    values = {"job": job.id, "fence": job.fence, "trial": trial_id, "judged": job.judged.epoch}
    with store.engine.begin() as connection:
        if job.discarded:  # its curve was cut back: the values beyond are of another network
            connection.execute(
                text("""
                    DELETE FROM trial_intermediate_values v USING hpo.job j, trials t
                    WHERE j.id = :job AND j.fence = :fence AND t.trial_id = :trial AND t.state IN ('WAITING', 'RUNNING')
                      AND v.trial_id = t.trial_id AND NOT EXISTS (
                          SELECT FROM hpo.epoch e WHERE e.job = j.id AND e.number = v.step
                            AND (e.metrics->>'val/nmse')::float8 IS NOT DISTINCT FROM v.intermediate_value)
                """),
                values,
            )
        connection.execute(
            text("""
                INSERT INTO trial_intermediate_values
                    (trial_id, step, intermediate_value, intermediate_value_type)
                SELECT t.trial_id, e.number, (e.metrics->>'val/nmse')::float8,
                    (CASE WHEN e.metrics->>'val/nmse' IS NULL THEN 'NAN' ELSE 'FINITE' END)::trialintermediatevaluetype
                FROM hpo.epoch e JOIN hpo.job j ON j.id = e.job, trials t
                WHERE j.id = :job AND j.fence = :fence AND t.trial_id = :trial AND t.state IN ('WAITING', 'RUNNING')
                  AND e.number <= :judged AND e.number > coalesce(
                      (SELECT max(step) FROM trial_intermediate_values v WHERE v.trial_id = t.trial_id), 0)
                ON CONFLICT (trial_id, step) DO NOTHING
            """),
            values,
        )
