"""The pictures at a closed study's runs: loss curves and parity plots of the best ten, and winners on the test split.

Drawn when the study closes, since only the best are looked at: two each of ten trials take 6 s of a core.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pandas

from hpo.errors import NotFound
from hpo.queue import DatabaseLost, Job, LeaseLost
from hpo.recording.reconciler import Reconciler
from hpo.scores import ranking
from hpo.text import first_line
from hpo.tracking.errors import TrackingUnavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOP = 10
FOLDER = "plots"
PREDICTIONS = "predictions/validation.csv"  # of a trial's run

log = logging.getLogger("hpo")


def log_plots(reconciler: Reconciler, closing: Job, predictions: Mapping[int, Path]) -> None:
    """Draw and upload. `predictions` holds each winner's table of validation and test split, by its trial's number.

    May be repeated. What cannot be drawn costs a warning: no picture keeps a study from closing. Raises what asks for
    another try, and LeaseLost.
    """
    best = ranking.ranked(reconciler.queue.jobs(reconciler.study.name))
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent)
        wanted: list[tuple[Job, str, Callable[[], Figure]]] = []
        for job in best[:TOP]:
            wanted.append((job, "loss.png", partial(_loss, reconciler, job)))
            wanted.append((job, "parity.png", partial(_validation, reconciler, job, folder)))
        for job in best:
            if (table := predictions.get(job.number)) is not None:
                wanted.append((job, "parity-test.png", partial(_parity, reconciler, table, "test")))
        for job, name, draw in wanted:
            reconciler.queue.require(closing)
            try:
                draw().savefig(folder / name)
                reconciler.tracker.upload(str(job.run_id), folder / name, FOLDER)
            except (TrackingUnavailable, DatabaseLost, LeaseLost):
                raise
            except NotFound as error:  # a trial that was recorded before predictions were kept
                log.debug("%s gets no %s: %s", job.title, name, error)
            except Exception as error:
                log.warning("%s gets no %s: %s", job.title, name, first_line(error))
                log.debug("", exc_info=True)


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
