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
from hpo.queue import DatabaseLost, Job, LeaseLost
from hpo.recording.reconciler import Reconciler
from hpo.scores import ranking
from hpo.text import first_line
from hpo.tracking import foreign
from hpo.tracking.errors import TrackingUnavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 10
FOLDER = "plots"
LINKS = "\n\nPlots: "
PREDICTIONS = "predictions/validation.csv"  # of a trial's run

log = logging.getLogger("hpo")


def log_plots(reconciler: Reconciler, closing: Job, predictions: Mapping[int, Path]) -> None:
    """Draw and upload; tag every finished trial's run with its rank, and link the pictures in its description.

    `predictions` holds each winner's table of validation and test split, by its trial's number. May be repeated. What
    cannot be drawn costs a warning: no picture keeps a study from closing. Raise LeaseLost, and what asks for another
    try.
    """
    jobs = reconciler.queue.jobs(reconciler.study.name, brief=True)
    repeats = ranking.repeats(jobs)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        for rank, job in enumerate(ranking.ranked(jobs), start=1):
            plots: dict[str, Callable[[], Figure]] = {}
            if rank <= TOP:
                plots["loss"] = partial(_loss, reconciler, job)
                plots["parity"] = partial(_validation, reconciler, job, folder)
            if (table := predictions.get(job.number)) is not None:
                plots["parity-test"] = partial(_parity, reconciler, table, "test")
            reconciler.queue.require(closing)
            drawn = [name for name, draw in plots.items() if _log(reconciler, job, folder / f"{name}.png", draw)]
            for repeat in repeats[job.number]:
                reconciler.tracker.set_tags(str(repeat.run_id), {foreign.RANK: rank})
            if drawn:
                _link(reconciler, job, drawn)


def _link(reconciler: Reconciler, job: Job, names: Sequence[str]) -> None:
    """Link pictures of a trial's run at the end of its description; what else stands there stays."""
    experiment, run_id = reconciler.study.facts.experiment_id, str(job.run_id)
    links = [f"[{name}]({foreign.file_link(experiment, run_id, f'{FOLDER}/{name}.png')})" for name in names]
    note = reconciler.tracker.tags(run_id).get(foreign.NOTE, "").partition(LINKS)[0]
    reconciler.tracker.set_tags(run_id, {foreign.NOTE: f"{note}{LINKS}{', '.join(links)}"})


def _log(reconciler: Reconciler, job: Job, file: Path, draw: Callable[[], Figure]) -> bool:
    """Draw one picture and upload it to the trial's run; return False, with a warning, if that fails."""
    try:
        draw().savefig(file)
        reconciler.tracker.upload(str(job.run_id), file, FOLDER)
        return True
    except (TrackingUnavailable, DatabaseLost, LeaseLost):
        raise
    except NotFound as error:  # a trial that was recorded before predictions were kept
        log.debug("%s gets no %s: %s", job.title, file.name, error)
    except Exception as error:
        log.warning("%s gets no %s: %s", job.title, file.name, first_line(error))
        log.debug("", exc_info=True)
    return False


def _loss(reconciler: Reconciler, job: Job) -> Figure:
    from hpo.report import figures

    return figures.loss_curves({job.run_name: reconciler.queue.curve(job.id)})


def _validation(reconciler: Reconciler, job: Job, folder: Path) -> Figure:
    return _parity(reconciler, reconciler.tracker.download_artifact(str(job.run_id), PREDICTIONS, folder), "validation")


def _parity(reconciler: Reconciler, table: Path, split: str) -> Figure:
    from hpo.report import figures

    data, names = pandas.read_csv(table), reconciler.study.facts.data.target_names
    if "split" in data:
        data = data[data["split"] == split]
    truth, predicted = (data[[f"{name} {which}" for name in names]].to_numpy() for which in ("true", "predicted"))
    return figures.parity(truth, predicted, names, reconciler.study.facts.data.unit)
