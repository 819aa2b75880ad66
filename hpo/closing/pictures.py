"""The pictures at a closed study's runs: loss curves and parity plots of the best ten, and winners on the test split.

Drawn when the study closes, since only the best are looked at: two each of ten trials take 6 s of a core.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas

from hpo.errors import NotFound
from hpo.queue import DatabaseLost, Job, LeaseLost, Queue, StudyRow
from hpo.report import pareto
from hpo.scores import ranking
from hpo.text import first_line
from hpo.tracking import foreign
from hpo.tracking.client import Tracker
from hpo.tracking.errors import TrackingUnavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 10
FOLDER = "plots"
LINKS = "\n\nPlots: "
PREDICTIONS = "predictions/validation.csv"  # of a trial's run

log = logging.getLogger("hpo")


def log_plots(
    queue: Queue, tracker: Tracker, study: StudyRow, *, closing: Job, predictions: Mapping[int, Path]
) -> None:
    """Draw and upload; tag every finished trial's run with its rank, and link the pictures in its description.

    `predictions` holds each winner's table of validation and test split, by its trial's number. May be repeated. What
    cannot be drawn costs a warning: no picture keeps a study from closing. Raise LeaseLost, and what asks for another
    try.
    """
    jobs = queue.jobs(study.name, brief=True)
    repeats, fronts = ranking.repeats(jobs), pareto.tags(study, jobs)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        for rank, job in enumerate(ranking.ranked(jobs), start=1):
            plots: dict[str, Callable[[], Figure]] = {}
            if rank <= TOP:
                plots["loss"] = partial(_loss, queue, job)
                plots["parity"] = partial(_validation, tracker, study, job, folder)
            if (table := predictions.get(job.number)) is not None:
                plots["parity-test"] = partial(_parity, study, table, "test")
            queue.require(closing)
            drawn = [name for name, draw in plots.items() if _log(tracker, job, folder / f"{name}.png", draw)]
            for repeat in repeats[job.number]:
                tracker.set_tags(str(repeat.run_id), {foreign.RANK: rank} | fronts.get(job.number, {}))
            if drawn:
                _link(tracker, study.facts.experiment_id, str(job.run_id), drawn)


def _link(tracker: Tracker, experiment: str, run_id: str, names: Sequence[str]) -> None:
    """Link pictures of a trial's run at the end of its description; what else stands there stays."""
    links = [f"[{name}]({foreign.file_link(experiment, run_id, f'{FOLDER}/{name}.png')})" for name in names]
    note = tracker.tags(run_id).get(foreign.NOTE, "").partition(LINKS)[0]
    tracker.set_tags(run_id, {foreign.NOTE: f"{note}{LINKS}{', '.join(links)}"})


def _log(tracker: Tracker, job: Job, file: Path, draw: Callable[[], Figure]) -> bool:
    """Draw one picture and upload it to the trial's run; return False, with a warning, if that fails."""
    try:
        draw().savefig(file)
        tracker.upload(str(job.run_id), file, FOLDER)
        return True
    except (TrackingUnavailable, DatabaseLost, LeaseLost):
        raise
    except NotFound as error:  # a trial that was recorded before predictions were kept
        log.debug("%s gets no %s: %s", job.title, file.name, error)
    except Exception as error:
        log.warning("%s gets no %s: %s", job.title, file.name, first_line(error))
        log.debug("", exc_info=True)
    return False


def _loss(queue: Queue, job: Job) -> Figure:
    from hpo.report import figures

    return figures.loss_curves({job.run_name: queue.curve(job.id)})


def _validation(tracker: Tracker, study: StudyRow, job: Job, folder: Path) -> Figure:
    return _parity(study, tracker.download_artifact(str(job.run_id), PREDICTIONS, folder), "validation")


def _parity(study: StudyRow, table: Path, split: str) -> Figure:
    from hpo.report import figures

    data, names = pandas.read_csv(table), study.facts.data.target_names
    if "split" in data:
        data = data[data["split"] == split]
    truth, predicted = (data[[f"{name} {which}" for name in names]].to_numpy() for which in ("true", "predicted"))
    return figures.parity(truth, predicted, names, study.facts.data.unit)
