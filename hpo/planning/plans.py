"""Planning a study: write down its study row, its runs and every trial once.

Everything is idempotent: a planner that died, or two at once, leave the same rows as one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import optuna

from hpo import study
from hpo.errors import StudyConflict
from hpo.planning import study_run
from hpo.planning.content import require_content
from hpo.planning.earlier import follow, learn
from hpo.planning.preparation import Plan, check_trials
from hpo.planning.study_run import Draw
from hpo.queue import NewJob, Queue, StudyRow, require_whole
from hpo.search import sampling
from hpo.search.foreign import append_waiting
from hpo.settings import Settings
from hpo.tracking import experiments
from hpo.tracking.client import Tracker


def plan(
    ready: Plan, queue: Queue, tracker: Tracker, settings: Settings, database_url: str, *, draw: Draw | None = None
) -> StudyRow:
    """Write the study down as far as it is not yet; `draw` makes the page on images and labels for its run.

    Raise StudyConflict if its name stands for something else, and StudyError if the one it starts from has not been
    finished.
    """
    earlier = ready.earlier
    if earlier is not None and study.alias(earlier) == study.alias(ready.name):
        raise StudyConflict(
            f"The study {ready.name} begins with a study of the same name or alias, {earlier}: give one of the files "
            "another name."
        )
    with queue.plan_lock(earlier) if earlier else nullcontext(), queue.plan_lock(ready.name):
        rows = {row.name: row for row in queue.studies()}
        row = rows.get(ready.name)
        for name in (ready.name, earlier):
            if name in rows:
                require_whole(rows[name])
        if row is None and (taken := [name for name in rows if study.alias(name) == study.alias(ready.name)]):
            raise StudyConflict(
                f"The study {ready.name} cannot be planned beside {taken[0]}: as aliases of a registered model both "
                f"are called {study.alias(ready.name)}. Give the file another name, or `hpo delete --study {taken[0]}` "
                "first."
            )
        if row is not None and row.identity != ready.identity:
            raise study.conflict(ready.name, row.canonical, ready.canonical)
        if row is not None and row.facts.planned:
            if (row.facts.claims or ()) != ready.study.claims:  # they may change, for they move no number
                queue.amend_facts(row.name, {"claims": [claim.to_dict() for claim in ready.study.claims]})
            return row
        tracker.require_version()
        # A planner that died after it wrote the best configurations down has planned some of them: they stay the best.
        chosen = row.facts.best_of if row is not None else None
        facts = replace(ready.facts, best_of=chosen) if chosen else follow(ready, queue)
        facts = replace(facts, learned=learn(ready, queue))
        specs, owner = ready.specs(facts), queue.database_id()
        with experiments.undone_on_failure(tracker, ready.name, owner=owner):
            facts = study_run.track(ready, facts, tracker, home=settings.home, owner=owner, draw=draw)
        row = StudyRow(name=ready.name, identity=ready.identity, canonical=ready.canonical, facts=facts)
        queue.put_study(row)
        # The best configurations are planned as those that other studies begin with.
        points = tuple(source.point for source in facts.best_of or () if source.point is not None)
        planned = replace(ready.study, start=points, trials=len(points)) if points else ready.study
        with _store(queue, database_url) as store:
            trials = sampling.plan(store, ready.name, planned, ready.configs)
        jobs = [NewJob(kind="closing", number=-1)]
        for repeat in range(ready.study.trainings):
            for number, config in trials:
                spec, cost = (None, 0.0) if config is None else specs[repeat * len(trials) + number]
                jobs.append(NewJob(kind="trial", number=number, repeat=repeat, config=config, cost=cost, spec=spec))
        queue.put_jobs(ready.name, jobs)
        queue.put_study(replace(row, facts=replace(facts, planned=True)))
    return queue.study(ready.name)


def extend(name: str, trials: int, queue: Queue, tracker: Tracker) -> StudyRow:
    """Raise the number of a study's configurations to `trials`; its sampler chooses the new ones. Idempotent.

    The identity stays that of its file. Raise StudyError if it cannot have so many.
    """
    with queue.plan_lock(name):
        row = queue.study(name)
        require_whole(row)
        planned = row.specification
        check_trials(trials, planned, name)
        if trials > planned.trials:
            jobs = [
                NewJob(kind="trial", number=number, repeat=repeat)
                for repeat in range(planned.trainings)
                for number in range(planned.trials, trials)
            ]
            queue.extend(name, trials, jobs, also=partial(append_waiting, name=name, trials=trials))
            row = queue.study(name)
    study_run.renew(tracker, row, owner=queue.database_id())
    return row


@contextmanager
def _store(queue: Queue, database_url: str) -> Iterator[optuna.storages.RDBStorage]:
    """Give Optuna's storage, its tables made."""
    with queue.lock("optuna"):  # Optuna makes its tables without a lock of its own
        store = sampling.storage(database_url)
    try:
        yield store
    finally:
        store.remove_session()
        store.engine.dispose()


def require_contents(ready: Sequence[Plan], queue: Queue) -> None:
    """Raise StudyError if images or labels of a study are wrong that is not planned yet."""
    planned = {row.name for row in queue.studies() if row.facts.planned}
    for plan_ in ready:
        if plan_.name not in planned:
            require_content(plan_.folder, plan_.findings)
