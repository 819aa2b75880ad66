"""The Optuna side of a study: its sampler, its space, and one trial for each configuration.

Optuna's own loop (`study.optimize`, `ask`, `tell`) is not used: measured, four processes of it train a grid of 24
configurations 27 times. The queue decides which worker trains what; this module plans the trials and keeps their states
up to date, so that plain Optuna and optuna-dashboard read the study like any other.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from hpo.errors import ServiceError
from hpo.queue import Job, State, engine_arguments, lost, postgres_url
from hpo.search import foreign
from hpo.study import BEST, LEARNING, NMSE, Choices, Interval, Study, pruned
from hpo.study.records import LearnedTrial
from hpo.text import duration

STATES = {
    State.WAITING: TrialState.WAITING,
    State.RUNNING: TrialState.RUNNING,
    State.DONE: TrialState.COMPLETE,
    State.DIVERGED: TrialState.FAIL,
    State.PRUNED: TrialState.PRUNED,
    State.DEAD: TrialState.FAIL,
    State.CANCELLED: TrialState.FAIL,
}

BATCH = 1000  # trials that are planned in one transaction
METRICS = {NMSE: "best_val_nmse"}  # what a trial's values are called, as in MLflow, if not as the objective
TRIES = 5  # of TPE and GP for a configuration within the bounds, each beside those before as if they were running

log = logging.getLogger("hpo")

optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def database() -> Iterator[None]:
    """Raise DatabaseLost where the database is lost, also where Optuna wraps that into an error of its own."""
    try:
        yield
    except (StorageInternalError, DBAPIError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        if not isinstance(cause, DBAPIError) or (passing := lost(cause)) is None:
            raise
        raise passing from error


@database()
def storage(url: str, *, patience: float = 0) -> optuna.storages.RDBStorage:
    """Return Optuna's storage in the queue's database; its sessions speak UTC. Raise ServiceError for the tables of
    another Optuna.

    A statement that waits longer than `patience` seconds for a lock of somebody else (0: never) raises DatabaseLost.
    """
    try:
        return optuna.storages.RDBStorage(
            postgres_url(url).render_as_string(hide_password=False),
            engine_kwargs={"poolclass": QueuePool} | engine_arguments(patience=patience),
        )
    except RuntimeError as error:  # another schema version
        raise ServiceError(f"The database holds the tables of another Optuna, nothing was changed: {error}") from None


def schema(url: str) -> str:
    """Return the schema of Optuna's tables in the queue's database; create them if they are not there.

    Raise ServiceError for the tables of another Optuna.
    """
    store = storage(url)
    version = store.get_current_version()
    store.remove_session()
    store.engine.dispose()
    return version


def sampler(
    study: Study, number: int = 0, *, attempt: int = 0, accepts: foreign.Accepts | None = None
) -> optuna.samplers.BaseSampler:
    """Return the study's sampler for its trial `number`: on every worker the same past gives the same point.

    Each `attempt` gives another point. With `accepts` the points of QMC are those that it is true of.
    """
    if study.sampler == "grid":
        return _grid_sampler(study)
    seed = _seed(study, number, attempt) if attempt else _seed(study, number)
    if study.sampler in ("random", BEST):  # the best configurations are all planned: none is left to draw
        return optuna.samplers.RandomSampler(seed=seed)
    if study.sampler == "qmc":
        place, whole = number - len(study.start), distributions(study)
        own = None if accepts is None else lambda point, accepts=accepts: accepts(pruned(study.space, point))
        return foreign.SobolSampler(place, whole, seed=study.seed, accepts=own)
    if study.sampler == "gp":  # which imports torch: in the suggester alone
        return optuna.samplers.GPSampler(seed=seed, warn_independent_sampling=False)
    if study.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=study.multivariate)
    raise ValueError(f"no sampler {study.sampler!r}")


def _seed(study: Study, *numbers: int) -> int:
    return int(np.random.SeedSequence([study.seed, *numbers]).generate_state(1)[0])


@database()
def plan(
    store: optuna.storages.RDBStorage, name: str, study: Study, configs: Sequence[int] | None = None
) -> list[tuple[int, int | None]]:
    """Create the study and its waiting trials as far as they are missing; return number and config number of all.

    The caller holds the planning lock. A grid's trial carries its point, Optuna's `grid_id`, and the config number
    (`user_attrs["config"]`), which counts in the order of the file; GridSampler sorts and shuffles, so the two differ.
    `configs`: the config numbers of a grid that are planned; all without them.
    """
    directions = [StudyDirection.MINIMIZE] * len(study.objectives)
    optuna.create_study(study_name=name, storage=store, load_if_exists=True, directions=directions)
    study_id = store.get_study_id_from_name(name)
    grid = study.sampler == "grid"
    points = [*study.start, *[{}] * (study.trials - len(study.start))] if not grid else study.grid()
    numbered = list(enumerate(points)) if configs is None else [(config, points[config]) for config in configs]
    space = distributions(study)
    attributes = foreign.grid_attributes(_grid_sampler(study)) if grid else lambda point: {}
    foreign.name_metrics(store, study_id, [METRICS.get(name, name) for name in study.objectives])
    begin, present = time.monotonic(), len(foreign.planned(store, study_id))
    for first in range(present, len(numbered), BATCH):
        trials = [
            foreign.waiting(
                point,
                distributions={key: space[key] for key in point},
                user_attrs={"config": config} if grid else {},
                system_attrs=attributes(point),
            )
            for config, point in numbered[first : first + BATCH]
        ]
        foreign.create_waiting(store, study_id, trials, first=first)
        count = first + len(trials)
        if len(numbered) > BATCH:
            left = (time.monotonic() - begin) / (count - present) * (len(numbered) - count)
            log.info(f"{name}: {count:,} of {len(numbered):,} configurations are planned, {duration(left)} left")
    return foreign.planned(store, study_id)


@database()
def outcomes(store: optuna.storages.RDBStorage, name: str) -> dict[int, tuple[TrialState, list[float]]]:
    """Return state and values of a study's trials in Optuna, by number. Raise KeyError if there is no such study."""
    return foreign.outcomes(store, store.get_study_id_from_name(name))


@database()
def suggest(
    store: optuna.storages.RDBStorage,
    name: str,
    study: Study,
    number: int,
    learned: Sequence[LearnedTrial] = (),
    accepts: foreign.Accepts | None = None,
) -> dict[str, Any]:
    """Return the point that the sampler chooses for a planned trial; one that has its point keeps it. `learned`: trials
    of other studies that the sampler knows. With `accepts` the point is one that it is true of.

    Change nothing: the point counts once the job's row has it. Raise StudyError if no point is accepted.
    """
    space = distributions(study)
    others = foreign.learned_trials(learned, space, objectives=study.objectives, bounds=study.bounds)
    if accepts is None:
        return foreign.draw(store, name, sampler(study, number), number, space, study.space, others)
    for attempt in range(TRIES if study.sampler in LEARNING else 1):
        chosen = sampler(study, number, attempt=attempt, accepts=accepts)
        point = foreign.draw(store, name, chosen, number, space, study.space, others)
        if accepts(point):
            return point
        others.append(foreign.refused_trial(point, space, number=foreign.BEYOND + len(others)))
    return foreign.draw_at_random(space, study.space, seed=_seed(study, number, TRIES), accepts=accepts)


@database()
def tell(store: optuna.storages.RDBStorage, study: Study, job: Job, point: Mapping[str, Any]) -> None:
    """Let the job's trial run and have its point, for the sampler's next choice. Idempotent.

    Nothing is changed of a trial that others have ended meanwhile.
    """
    study_id = store.get_study_id_from_name(job.study)
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, job.number)
    foreign.set_running(store, trial_id, job)
    params = store.get_trial(trial_id).params
    with suppress(UpdateFinishedTrialError):  # it was cancelled meanwhile, for example
        _constrain(store, trial_id, study, job)
        for key, distribution in distributions(study).items():
            if key in point and key not in params:
                store.set_trial_param(trial_id, key, distribution.to_internal_repr(point[key]), distribution)


def _constrain(store: optuna.storages.RDBStorage, trial_id: int, study: Study, job: Job) -> None:
    """Give a trial its constraints, as far as the size of its network is known."""
    for key, value in foreign.constraints(study.bounds, job.sizes(tuple(study.bounds))).items():
        store.set_trial_system_attr(trial_id, key, value)


@database()
def update_trial(store: optuna.storages.RDBStorage, study: Study, job: Job, repeats: Sequence[Job]) -> None:
    """Give the job's trial the job's state, and its values when it is done. Idempotent.

    `repeats` are all jobs of its configuration: the trial's score is their mean, and it ends with the last.
    """
    together_state, values = objective_values(study, repeats)
    study_id = store.get_study_id_from_name(job.study)
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, job.number)
    trial, state = store.get_trial(trial_id), STATES[together_state]
    is_outdated = trial.state.is_finished() and (trial.state != state or (trial.values or []) != values)
    if is_outdated and foreign.reopen(store, trial_id):  # it was dead or cancelled, or one of its repeats was
        trial = store.get_trial(trial_id)
    if job.judged is not None and len(study.objectives) == 1:  # Optuna's own calls store none of several
        foreign.update_judged(store, trial_id, job)
    if trial.state == state or trial.state.is_finished():
        return
    with suppress(UpdateFinishedTrialError):  # another worker writes the same right now
        _constrain(store, trial_id, study, job)
        store.set_trial_user_attr(trial_id, "attempt", job.attempt)
        if job.run_id:
            store.set_trial_user_attr(trial_id, "run_id", job.run_id)
        store.set_trial_state_values(trial_id, state, values=values if state == TrialState.COMPLETE else None)


@database()
def update_judged(store: optuna.storages.RDBStorage, name: str, job: Job) -> None:
    """Give the job's trial the epochs that the pruner has judged as its intermediate values. Idempotent.

    Nothing happens to a trial that has ended in Optuna meanwhile, nor once another worker holds the job.
    """
    if job.judged is not None:
        study_id = store.get_study_id_from_name(name)
        foreign.update_judged(store, store.get_trial_id_from_study_id_trial_number(study_id, job.number), job)


def together(repeats: Sequence[Job]) -> tuple[State, float | None]:
    """Return the state and value of a configuration, from those of its repeats, or of its folds, which all count."""
    states = [job.state for job in repeats]
    if State.RUNNING in states or State.WAITING in states:
        has_begun = any(state != State.WAITING for state in states)
        return (State.RUNNING if has_begun else State.WAITING), None
    values = [job.result.best_val_nmse for job in repeats if job.state == State.DONE and job.result]
    lacks_fold = len(values) < len(repeats) and any(job.spec and job.spec.fold for job in repeats)
    if lacks_fold:
        return next(state for state in states if state != State.DONE), None
    return (State.DONE, sum(values) / len(values)) if values else (states[0], None)


def objective_values(study: Study, repeats: Sequence[Job]) -> tuple[State, list[float]]:
    """Return the state of a configuration, and its values of the study's objectives once it is done."""
    state, value = together(repeats)
    if value is None:
        return state, []
    finished = next(job for job in repeats if job.state == State.DONE)
    return state, [value, *finished.sizes(study.objectives[1:]).values()]


@database()
def delete(store: optuna.storages.RDBStorage, name: str) -> None:
    """Delete the study and its trials; nothing happens if there is none."""
    try:
        optuna.delete_study(study_name=name, storage=store)
    except KeyError:
        return


def distributions(study: Study) -> dict[str, BaseDistribution]:
    return {key: _distribution(parameter) for key, parameter in study.space.items()}


def _distribution(parameter: Choices | Interval) -> BaseDistribution:
    if isinstance(parameter, Choices):
        return CategoricalDistribution(parameter.values)
    if isinstance(parameter.low, int) and isinstance(parameter.high, int):
        step = int(parameter.step) if parameter.step else 1
        return IntDistribution(parameter.low, int(parameter.top), log=parameter.log, step=step)
    return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


def _grid_sampler(study: Study) -> optuna.samplers.GridSampler:
    space = {key: parameter.values for key, parameter in study.space.items() if isinstance(parameter, Choices)}
    return optuna.samplers.GridSampler(space, seed=study.seed)
