"""The Optuna side of a study: its sampler, its space, and one trial per planned point, for ever.

Optuna's own loop (`study.optimize`, `ask`, `tell`) is not used: measured, four processes of it train a grid of 24
points 27 times. The queue decides who trains what; this module plans the trials and shows their states, so that
plain Optuna and optuna-dashboard read the study like any other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import QueuePool

from hpo.errors import ServiceError
from hpo.queue import CONNECT, Job, lost, postgres_url
from hpo.study import BEST, Choices, Interval, Study

STATES = {
    "waiting": TrialState.WAITING,
    "running": TrialState.RUNNING,
    "done": TrialState.COMPLETE,
    "diverged": TrialState.FAIL,
    "pruned": TrialState.PRUNED,
    "dead": TrialState.FAIL,
    "cancelled": TrialState.FAIL,
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@contextmanager
def database() -> Iterator[None]:
    """Raise DatabaseLost where the database is lost, also where Optuna wraps that into an error of its own."""
    try:
        yield
    except (StorageInternalError, DBAPIError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) else error
        if not isinstance(cause, DBAPIError) or (found := lost(cause)) is None:
            raise
        raise found from error


@database()
def storage(url: str, *, patience: float = 0) -> optuna.storages.RDBStorage:
    """Return Optuna's storage in the queue's database; its sessions speak UTC. Raise ServiceError for the tables of
    another Optuna.

    A statement that waits longer than `patience` seconds for a lock of somebody else (0: never) raises DatabaseLost.
    """
    connect = CONNECT | {"options": f"{CONNECT['options']} -c lock_timeout={round(1000 * patience)}"}
    try:
        return optuna.storages.RDBStorage(
            postgres_url(url).render_as_string(hide_password=False),
            engine_kwargs={"poolclass": QueuePool, "pool_pre_ping": True, "connect_args": connect},
        )
    except RuntimeError as error:  # another schema version
        raise ServiceError(f"The database holds the tables of another Optuna, nothing was changed: {error}") from None


def schema(url: str) -> str:
    """The schema of Optuna's tables in the queue's database; made if they are not there. ServiceError for another's."""
    store = storage(url)
    found = store.get_current_version()
    store.remove_session()
    store.engine.dispose()
    return found


def sampler(study: Study, number: int = 0) -> optuna.samplers.BaseSampler:
    """The study's sampler for its trial `number`: whichever worker asks, the same past gives the same point."""
    if study.sampler == "grid":
        return optuna.samplers.GridSampler(_search_space(study), seed=study.seed)
    seed = int(np.random.SeedSequence([study.seed, number]).generate_state(1)[0])
    if study.sampler in ("random", BEST):  # best points are all planned: none is left to draw
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, constant_liar=True, multivariate=study.multivariate)


@database()
def plan(store: optuna.storages.RDBStorage, name: str, study: Study) -> list[FrozenTrial]:
    """Create the study and its waiting trials as far as they are missing; return all, by number.

    The caller holds the planning lock. A grid's trial carries its point, Optuna's `grid_id`, and the config number
    (`user_attrs["config"]`), which counts in the order of the file; GridSampler sorts and shuffles, so the two differ.
    """
    chosen = sampler(study)
    made = optuna.create_study(
        study_name=name, storage=store, sampler=chosen, load_if_exists=True, direction="minimize"
    )
    present = made.get_trials(deepcopy=False)
    grid = study.sampler == "grid"
    points = study.grid() if grid else [*study.start, *[{}] * (study.trials - len(study.start))]
    for config, point in enumerate(points[len(present) :], start=len(present)):
        attributes: dict[str, Any] = {}
        if isinstance(chosen, optuna.samplers.GridSampler):
            attributes = {
                "grid_id": chosen._all_grids.index(tuple(point[key] for key in chosen._param_names)),
                "search_space": chosen._search_space,
            }
        store.create_new_trial(
            made._study_id,
            create_trial(
                state=TrialState.WAITING,
                params=point,
                distributions=distributions(study) if point else {},
                user_attrs={"config": config} if grid else {},
                system_attrs=attributes,
            ),
        )
    return made.get_trials(deepcopy=False)


class _Draft(optuna.storages._CachedStorage):
    """A study that is read as it is and in which nothing is written: the point counts once its row has it."""

    def set_trial_param(self, *words: Any, **more: Any) -> None:
        pass

    def set_trial_system_attr(self, *words: Any, **more: Any) -> None:
        pass


@database()
def suggest(store: optuna.storages.RDBStorage, name: str, study: Study, number: int) -> dict[str, Any]:
    """The point that the sampler chooses for a planned trial; one that has its point keeps it. Changes nothing."""
    loaded = optuna.load_study(study_name=name, storage=_Draft(store), sampler=sampler(study, number))
    trial = optuna.Trial(loaded, store.get_trial_id_from_study_id_trial_number(loaded._study_id, number))
    return {key: trial._suggest(key, each) for key, each in distributions(study).items()}


@database()
def tell(store: optuna.storages.RDBStorage, study: Study, job: Job, point: Mapping[str, Any]) -> None:
    """Let the job's trial run and have its point, for the sampler's next choice. Idempotent; nothing is changed that
    others have made of the trial meanwhile."""
    study_id = store.get_study_id_from_name(job.study)
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, job.number)
    _run(store, trial_id, job)
    known = store.get_trial(trial_id).params
    with suppress(UpdateFinishedTrialError):  # it was cancelled meanwhile, say
        for key, each in distributions(study).items():
            if key not in known:
                store.set_trial_param(trial_id, key, each.to_internal_repr(point[key]), each)


def _run(store: optuna.storages.RDBStorage, trial_id: int, job: Job) -> None:
    """Show a trial as running while our claim of it holds. It may wait, have been dead or cancelled, or have other
    repeats that are done."""
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


@database()
def show(store: optuna.storages.RDBStorage, name: str, job: Job, repeats: Sequence[Job]) -> None:
    """Give the job's trial the job's state, and its value when it is done. Idempotent.

    Of a point trained several times `repeats` are all the jobs: its value is their mean, and it ends with the last.
    """
    shown, value = together(repeats)
    study_id = store.get_study_id_from_name(name)
    trial_id = store.get_trial_id_from_study_id_trial_number(study_id, job.number)
    trial, state = store.get_trial(trial_id), STATES[shown]
    again = trial.state.is_finished() and (trial.state != state or trial.value != value)
    if again and _reopen(store, trial_id):  # it was dead or cancelled, or one of its repeats was, and came back
        trial = store.get_trial(trial_id)
    _show_judged(store, trial_id, job)
    if trial.state == state or trial.state.is_finished():
        return
    with suppress(UpdateFinishedTrialError):  # somebody else shows the same right now
        store.set_trial_user_attr(trial_id, "attempt", job.attempt)
        if job.run_id:
            store.set_trial_user_attr(trial_id, "run_id", job.run_id)
        store.set_trial_state_values(
            trial_id, state, values=[value] if state == TrialState.COMPLETE and value is not None else None
        )


@database()
def show_judged(store: optuna.storages.RDBStorage, name: str, job: Job) -> None:
    """Give the job's trial the epochs that the pruner has judged as its intermediate values. Idempotent; nothing
    happens to a trial that has ended in Optuna meanwhile, nor once somebody else holds the job."""
    if job.judged is not None:
        study_id = store.get_study_id_from_name(name)
        _show_judged(store, store.get_trial_id_from_study_id_trial_number(study_id, job.number), job)


def _show_judged(store: optuna.storages.RDBStorage, trial_id: int, job: Job) -> None:
    """In one statement: Optuna's own call takes a commit for each epoch."""
    if job.judged is None:
        return
    found = {"job": job.id, "fence": job.fence, "trial": trial_id, "judged": job.judged["epoch"]}
    with store.engine.begin() as connection:
        if job.discarded:  # its curve was cut back: what Optuna shows beyond is of another network
            connection.execute(
                text("""
                    DELETE FROM trial_intermediate_values v USING hpo.job j, trials t
                    WHERE j.id = :job AND j.fence = :fence AND t.trial_id = :trial AND t.state IN ('WAITING', 'RUNNING')
                      AND v.trial_id = t.trial_id AND NOT EXISTS (
                          SELECT FROM hpo.epoch e WHERE e.job = j.id AND e.number = v.step
                            AND (e.metrics->>'val/nmse')::float8 IS NOT DISTINCT FROM v.intermediate_value)
                """),
                found,
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
            found,
        )


def together(repeats: Sequence[Job]) -> tuple[str, float | None]:
    """The state and value of a point, from those of its repeats."""
    states = [job.state for job in repeats]
    if "running" in states or "waiting" in states:
        begun = any(state != "waiting" for state in states)
        return ("running" if begun else "waiting"), None
    values = [job.result["best_val_nmse"] for job in repeats if job.state == "done" and job.result]
    return ("done", sum(values) / len(values)) if values else (states[0], None)


def _reopen(store: optuna.storages.RDBStorage, trial_id: int) -> bool:
    """Let a failed or complete trial wait again; whether it was one. Optuna's own calls refuse to: to it a trial that
    has ended has ended for ever."""
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


def _search_space(study: Study) -> Mapping[str, Any]:
    return {key: parameter.values for key, parameter in study.space.items() if isinstance(parameter, Choices)}
