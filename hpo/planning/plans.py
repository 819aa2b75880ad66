"""Planning a study: write down its study row, its runs and every trial once.

Everything is idempotent: a planner that died, or two at once, leave the same rows as one.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna

from data_pipeline import npz
from data_pipeline.dataset import Dataset
from data_pipeline.findings import Finding
from hpo import study
from hpo.errors import StudyConflict
from hpo.machine import now_ms
from hpo.planning.baselines import LEARNED
from hpo.planning.content import require_content
from hpo.planning.earlier import earlier_name, follow, learn
from hpo.planning.preparation import Plan, check_trials
from hpo.queue import NewJob, Queue, StudyRow, require_whole
from hpo.search import sampling
from hpo.search.foreign import append_waiting
from hpo.settings import Settings
from hpo.study.records import DataFacts, StudyFacts
from hpo.text import counted, doubts_text, first_line, for_markdown
from hpo.tracking import data_sets as data_files
from hpo.tracking import experiments, foreign
from hpo.tracking.client import Tracker
from models import user

Draw = Callable[[Dataset, Sequence[str], Sequence[Finding]], str]  # the page on images, their rows and what was found

log = logging.getLogger("hpo")


def plan(
    ready: Plan, queue: Queue, tracker: Tracker, settings: Settings, database_url: str, *, draw: Draw | None = None
) -> StudyRow:
    """Write the study down as far as it is not yet; `draw` makes the page on images and labels for its run.

    Raise StudyConflict if its name stands for something else, and StudyError if the one it starts from has not been
    finished.
    """
    earlier = earlier_name(ready, "best_of" if ready.study.best_of else "starts_from") if ready.study.follows else None
    if earlier is not None and study.alias(earlier) == study.alias(ready.name):
        raise StudyConflict(
            f"The study {ready.name} begins with a study of the same name or alias, {earlier}: give one of the files "
            "another name."
        )
    with lock_plan(queue, earlier) if earlier else nullcontext(), lock_plan(queue, ready.name):
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
        owner = queue.database_id()
        with experiments.undone_on_failure(tracker, ready.name, owner=owner):
            facts = _track(ready, facts, tracker, settings, owner, draw)
        row = StudyRow(name=ready.name, identity=ready.identity, canonical=ready.canonical, facts=facts)
        queue.put_study(row)
        # The best configurations are planned as those that other studies begin with.
        points = tuple(source.point for source in facts.best_of or () if source.point is not None)
        planned = replace(ready.study, start=points, trials=len(points)) if points else ready.study
        with _store(queue, database_url) as store:
            trials = sampling.plan(store, ready.name, planned)
        specs = ready.specs(facts)
        jobs = [NewJob(kind="closing", number=-1)]
        for repeat in range(ready.study.trainings):
            for number, config in trials:
                spec, cost = (None, 0.0) if config is None else specs[repeat * len(trials) + config]
                jobs.append(NewJob(kind="trial", number=number, repeat=repeat, config=config, cost=cost, spec=spec))
        queue.put_jobs(ready.name, jobs)
        queue.put_study(replace(row, facts=replace(facts, planned=True)))
    return queue.study(ready.name)


def extend(name: str, trials: int, queue: Queue, tracker: Tracker) -> StudyRow:
    """Raise the number of a study's configurations to `trials`; its sampler chooses the new ones. Idempotent.

    The identity stays that of its file. Raise StudyError if it cannot have so many.
    """
    with lock_plan(queue, name):
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
    chosen = replace(row.specification, description=row.facts.description)
    note = _note(chosen, row.facts.data, name)
    experiments.ensure(tracker, name, description=note, params=chosen.columns, owner=queue.database_id())
    tracker.set_tags(row.facts.study_run_id, {foreign.NOTE: _with_links(note, row.facts)})
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


def lock_plan(queue: Queue, name: str) -> AbstractContextManager[object]:
    """Return the lock for planning or deleting a study, also held while one that begins with it is planned.

    Studies that would have the same alias have the same lock.
    """
    return queue.lock(f"plan.{study.alias(name)}")


def _track(
    ready: Plan, facts: StudyFacts, tracker: Tracker, settings: Settings, owner: str, draw: Draw | None
) -> StudyFacts:
    """Make the experiment, the study's own run with its data set, and the baseline predictors as runs.

    Return the facts with their ids.
    """
    earlier = earlier_name(ready, "best_of") if ready.study.best_of else ""
    data, note, now = facts.data, _note(ready.study, facts.data, ready.name, earlier=earlier), now_ms()
    experiment_id = experiments.ensure(
        tracker,
        ready.name,
        description=note,
        params=ready.study.columns,
        owner=owner,
    )
    run_id = tracker.ensure_run(
        experiment_id,
        key=f"{ready.name}/study",
        name=f"{ready.name} (study)",
        kind="study",
        params={"identity": ready.identity, "seed": ready.study.seed, "data": data.digest, "split": data.split},
        tags={foreign.NOTE: note},
        start_ms=now,
    )
    file = data_files.keep(settings.home, ready.dataset)
    data_files.upload(tracker, run_id, file)
    _upload_weights(ready, facts, tracker, run_id)
    page = None if draw is None else _page(ready, tracker, run_id, draw)
    facts = replace(facts, page=page, experiment_id=experiment_id, study_run_id=run_id)
    tracker.set_tags(run_id, {foreign.NOTE: _with_links(note, facts)})
    ids = {}
    for name, scores in facts.predictors.items():
        ids[name] = tracker.ensure_run(
            experiment_id,
            key=f"{ready.name}/predictor/{name}",
            name=f"{ready.name}/predictor {name}",
            kind="predictor",
            params={"predictor": name, "data": data.digest, "split": data.split},
            tags={foreign.NOTE: f"Baseline predictor: {LEARNED[name]}, fitted on the training split."},
            start_ms=now,
        )
        summary = {f"best_val_{key}": getattr(scores.validation, key) for key in ("nmse", "mse", "r2", "nrmse")}
        tracker.log_summary(ids[name], summary, timestamp_ms=now)
        tracker.set_status(ids[name], "FINISHED", end_ms=now)
    for run in [run_id, *ids.values()]:
        tracker.log_dataset(run, name=data.name, digest=data.digest, source=data.source, profile=data.profile)
    return replace(
        facts,
        data=replace(data, sha256=npz.sha256_in(file)),
        predictor_run_ids=ids,
    )


def _upload_weights(ready: Plan, facts: StudyFacts, tracker: Tracker, run_id: str) -> None:
    """Upload the files that trials begin with or run, for workers on every machine: models, weights of one's own, and
    code of one's own."""
    for start in ready.starts.values():
        if start.folder is not None:
            for file_name in start.model.files:
                tracker.upload(run_id, start.folder / file_name, start.model.folder)
    for key, weights in (facts.weights or {}).items():
        if (own := ready.study.weights_files.get(key)) is not None:
            tracker.upload(run_id, Path(own), weights.folder)
    with tempfile.TemporaryDirectory() as temporary:
        for digest in ready.study.code:
            code = Path(temporary, digest)
            user.write(ready.study.sources[digest], code)
            for path in filter(Path.is_file, code.rglob("*")):
                tracker.upload(run_id, path, f"code/{path.parent.relative_to(temporary).as_posix()}")


def _page(ready: Plan, tracker: Tracker, run_id: str, draw: Draw) -> str | None:
    """Upload the page on images and labels; return its path at the run. None, with a warning, if it cannot be drawn: no
    picture keeps a study from being planned."""
    try:
        text = draw(ready.dataset, ready.rows, ready.findings)
    except Exception as error:
        log.warning("%s gets no page on its images and labels: %s", ready.name, first_line(error))
        log.debug("", exc_info=True)
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(text, encoding="utf-8")
        tracker.upload(run_id, file, "data")
    return f"data/{file.name}"


def _with_links(note: str, facts: StudyFacts) -> str:
    """Return the description of a study's run: below the note stand doubts about its data, and the page on them."""
    more = doubts_text(facts.findings or ())
    if facts.page is not None:
        more.append(f"[Images and labels]({foreign.file_link(facts.experiment_id, facts.study_run_id, facts.page)})")
    return "\n\n".join([note, *more])


def _note(chosen: study.Study, data: DataFacts, name: str, *, earlier: str = "") -> str:
    """Return the description of a study. `earlier`: the full name of the one whose best configurations it trains."""
    bare = f"**{chosen.at_random}.**\n\n" if chosen.at_random else ""
    scope = chosen.scope.format(earlier)
    repeats = f", each {chosen.repeats} times with another seed" if chosen.repeats > 1 else ""
    if chosen.folds:
        repeats = f", each in {chosen.folds} folds of the training and validation cells"
    learns = f" The sampler learns from trials of {', '.join(chosen.learn_from)}." if chosen.learn_from else ""
    return (
        f"{for_markdown(chosen.description or name)}\n\n{bare}"
        f"{scope[0].upper()}{scope[1:]}{repeats}; data set {data.name} ({counted(data.images, 'cell')}, "
        f"{'/'.join(map(str, data.sizes))} for training/validation/test), targets {', '.join(data.target_names)} "
        f"in {for_markdown(data.unit + data.beside)}. "
        f"Selected by the lowest validation NMSE: the mean over the targets of MSE / "
        f"variance of the training split.{learns}"
    )
