"""A study's own run in MLflow: its description, the files that workers fetch, and the baseline predictors beside it."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data_pipeline import npz
from data_pipeline.dataset import Dataset
from data_pipeline.findings import Finding
from hpo import study
from hpo.machine import now_ms
from hpo.planning.baselines import LEARNED
from hpo.planning.preparation import Plan
from hpo.queue import StudyRow
from hpo.study.records import DataFacts, StudyFacts
from hpo.text import counted, first_line, for_markdown
from hpo.tracking import data_sets as data_files
from hpo.tracking import experiments, foreign, links
from hpo.tracking.client import Tracker
from models import user

Draw = Callable[[Dataset, Sequence[str], Sequence[Finding]], str]  # the page on images, their rows and what was found

PAGE = "data/page.html"  # at the run: images and labels

log = logging.getLogger("hpo")


def track(ready: Plan, facts: StudyFacts, tracker: Tracker, *, home: Path, owner: str, draw: Draw | None) -> StudyFacts:
    """Make the experiment, the study's own run with its data set, and the baseline predictors as runs.

    Return the facts with their ids. `owner`: the queue's database.
    """
    data, now = facts.data, now_ms()
    note = _note(ready.study, data, ready.name, earlier=(ready.earlier or "") if ready.study.best_of else "")
    page = None if draw is None else _drawn(ready, draw)
    with tempfile.TemporaryDirectory() as temporary:
        files = list(_files(ready, facts, Path(temporary), page=page))
        params = ready.study.columns
        experiment_id = experiments.ensure(tracker, ready.name, description=note, params=params, owner=owner)
        run_id = tracker.ensure_run(
            experiment_id,
            key=f"{ready.name}/study",
            name=f"{ready.name} (study)",
            kind="study",
            params={"identity": ready.identity, "seed": ready.study.seed, "data": data.digest, "split": data.split},
            tags={foreign.NOTE: note},
            start_ms=now,
        )
        kept = data_files.keep(home, ready.dataset)
        data_files.upload(tracker, run_id, kept)
        for file, folder in files:
            tracker.upload(run_id, file, folder)
    data = replace(data, sha256=npz.sha256_in(kept))
    facts = replace(facts, data=data, page=page and PAGE, experiment_id=experiment_id, study_run_id=run_id)
    description = [note, *facts.doubts, links.data_page(facts)]
    tracker.set_tags(run_id, {foreign.NOTE: "\n\n".join(filter(None, description))})
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
    return replace(facts, predictor_run_ids=ids)


def renew(tracker: Tracker, row: StudyRow, *, owner: str) -> None:
    """Bring the descriptions of a study in line with its present number of configurations."""
    chosen = replace(row.specification, description=row.facts.description)
    note = _note(chosen, row.facts.data, row.name)
    experiments.ensure(tracker, row.name, description=note, params=chosen.columns, owner=owner)
    description = [note, *row.facts.doubts, links.data_page(row.facts)]
    tracker.set_tags(row.facts.study_run_id, {foreign.NOTE: "\n\n".join(filter(None, description))})


def _drawn(ready: Plan, draw: Draw) -> str | None:
    """Return the page on images and labels. None, with a warning, if it cannot be drawn: no picture keeps a study from
    being planned."""
    try:
        return draw(ready.dataset, ready.rows, ready.findings)
    except Exception as error:
        log.warning("%s gets no page on its images and labels: %s", ready.name, first_line(error))
        log.debug("", exc_info=True)
        return None


def _files(ready: Plan, facts: StudyFacts, temporary: Path, *, page: str | None) -> Iterator[tuple[Path, str]]:
    """Yield the files, with their folders at the run, that trials on every machine begin with or run (models, weights
    and code of one's own), and the page. Those that are written here lie in `temporary`."""
    for start in ready.starts.values():
        if start.folder is not None:
            for name in start.model.files:
                yield start.folder / name, start.model.folder
    for key, weights in (facts.weights or {}).items():
        if (own := ready.study.weights_files.get(key)) is not None:
            yield Path(own), weights.folder
    for digest in ready.study.code:
        user.write(ready.study.sources[digest], temporary / digest)
        for path in filter(Path.is_file, (temporary / digest).rglob("*")):
            yield path, f"code/{path.parent.relative_to(temporary).as_posix()}"
    if page is not None:
        folder, name = PAGE.split("/")
        (temporary / name).write_text(page, encoding="utf-8")
        yield temporary / name, folder


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
