"""Studies side by side, in a report, and what they promoted."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hpo.errors import ModelError, NotFound
from hpo.operations.connection import connect
from hpo.queue import Job, State, StudyRow
from hpo.queue.closing_result import ClosingResult
from hpo.report import comparison, document, sections
from hpo.report.comparison import Comparison
from hpo.scores import champion, evidence
from hpo.search.importances import importances
from hpo.study import alias
from hpo.text import counted


@dataclass(frozen=True, kw_only=True)
class Promotion:
    """What a closed study promoted."""

    result: ClosingResult  # of the closing, with the champion of now
    alias: str  # of the study's best version
    is_alias_set: bool  # by this call: it was missing


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report that was written."""

    page: Path  # HTML
    others: list[Path]  # report.md, and the files in tables/ and figures/
    summary: list[str]
    alarms: list[str]


def compare(*names: str) -> Comparison:
    """Put studies, trials, MLflow runs and registered versions side by side.

    A name is a study (its best trial), a trial (`grid/22`), a run id, or a version (`MODEL@champion`, `@champion`).
    Raise NotFound if one stands for nothing.
    """
    with connect(mlflow=False) as connection:
        return comparison.compare(connection.queue, connection.tracker_if_up, names)


def promote(study: str, *, force: bool = False) -> Promotion:
    """Return what a closed study promoted, and set its alias again if it is missing.

    With `force` its best version may be champion though it is not distinguishable from the mean predictor. Raise
    NotFound if the study is not closed or, with `force`, has registered no version, ModelError if that is damaged.
    """
    with connect() as connection:
        row = connection.queue.study(study)
        closing = closed(row, connection.queue.jobs(row.name))
        result = closing.closing or ClosingResult()
        if force:
            champion.force(connection.queue, row, result)
        outcome = champion.settle(connection.queue, connection.tracker, row)
    name = alias(row.name)
    if fault := outcome.refused.get(name):
        version = result.winner.version if result.winner is not None else None
        raise ModelError(f"{result.model_name} version {version} is not promoted again: {fault}")
    elected = replace(result, election=outcome.elected)
    return Promotion(result=elected, alias=name, is_alias_set=name in outcome.moved)


def closed(row: StudyRow, jobs: list[Job]) -> Job:
    """Return the closing of a closed study. Raise NotFound for another one, saying what it waits for."""
    closing = next((job for job in jobs if job.kind == "closing"), None)
    if closing is None:
        raise NotFound(f"{row.name} is not planned to its end: `hpo run --study {row.name}` goes on with it.")
    if closing.state == State.DEAD:
        raise NotFound(f"Closing {row.name} failed: {closing.reason}. `hpo run --study {row.name}` tries it again.")
    if closing.closing is None:
        left = sum(job.state in (State.WAITING, State.RUNNING) for job in jobs if job.kind == "trial")
        raise NotFound(
            f"The study {row.name} is not closed: {counted(left, 'trial', 'are')} still to be trained. Closing "
            f"promotes its best model; `hpo run` or `hpo worker --study {row.name}` finishes it."
        )
    return closing


def report(folder: Path, studies: Sequence[str] = ()) -> Report:
    """Write the report of closed studies into a folder, and attach it to their runs.

    Without `studies`: all closed studies on the data of the newest one. Raise NotFound, StudyConflict or ReportError.
    """
    with connect() as connection:
        tracker = connection.tracker
        gathered = evidence.gather(connection.queue, tracker, studies)
        contents = sections.build(gathered, importances)
        page, *others = document.write(contents, folder)
        for study in gathered.closed:
            for path in (page, *others):
                target = Path("report") / path.relative_to(folder).parent
                tracker.upload(study.row.facts.study_run_id, path, target.as_posix())
        return Report(page=page, others=others, summary=contents.summary, alarms=contents.alarms)
