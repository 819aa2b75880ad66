"""Reconciliation: bring Optuna's trial and MLflow's run in line with the job's row.

Everything here is idempotent and may be repeated by any worker: the row is the truth, and a projection that was written
by half is completed by the next pass.
"""

import logging
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import optuna
from mlflow.exceptions import MlflowException

from hpo import crash
from hpo.machine import environment
from hpo.queue import FREEZE_LIMIT, DatabaseLost, Job, Judged, Queue, State, StudyRow, TrialResult
from hpo.search import sampling
from hpo.study import provenance, sizing
from hpo.text import first_line
from hpo.tracking import foreign, logged_models
from hpo.tracking.client import Row, Status, Tracker, in_unit, summary_row
from hpo.tracking.errors import TrackingUnavailable

log = logging.getLogger("hpo")

PAGE = 1000  # epochs of a trial that are read and sent at a time; the client makes requests of 1,000 values of them

RUN_STATUS: dict[State, Status] = {
    State.WAITING: "SCHEDULED",  # between attempts: a run that was KILLED would keep its old end time
    State.RUNNING: "RUNNING",
    State.DONE: "FINISHED",
    State.DIVERGED: "FAILED",
    State.PRUNED: "KILLED",
    State.DEAD: "FAILED",
    State.CANCELLED: "KILLED",
}


class Reconciler:
    """Reconciles jobs of one study. Every method may raise TrackingUnavailable or DatabaseLost: call again later."""

    def __init__(
        self,
        queue: Queue,
        tracker: Tracker,
        store: optuna.storages.RDBStorage,
        study: StudyRow,
        *,
        worker: str = "",
    ) -> None:
        """`worker`: the one whose expired leases are left to itself to renew."""
        self.queue, self.tracker, self.store, self.study, self.worker = queue, tracker, store, study, worker
        self._tried: set[str] = set()

    def reconcile_job(self, job: Job) -> None:
        """Bring the run (params, tags, epochs, status) and the trial (state, value) in line with the row."""
        if job.kind == "closing":
            self.queue.set_mirrored(job)
            return
        run_id = self._reconcile_run(job) if job.spec is not None else None  # a slot no sampler has filled has no run
        with self._alone(job), self.queue.frozen(job) as same:
            if same and not job.is_refit:  # Optuna has no trial of its own for a refit
                if job.spec is not None and job.config is None:  # the worker whose sampler chose it may have died since
                    planned = self.study.specification
                    sampling.tell(self.store, planned, job, job.spec.point)
                sampling.update_trial(self.store, self.study.specification, self._seen(job), self._repeats(job))
        if same and job.state == State.DONE and job.spec is not None and job.spec.fold is not None:
            self._tag_spread(self._repeats(job))
        if same and run_id is not None and job.state in (State.DONE, State.DIVERGED, State.PRUNED, State.CANCELLED):
            self._remove_leftovers(job, run_id)  # before the row is reconciled, or doctor would report what is left
        self.queue.set_mirrored(job, run_id)
        # It may have gone on meanwhile, and what we wrote in MLflow is old.
        if not same and (current := self.queue.job(job.id)) is not None:
            self.reconcile_job(current)

    def _reconcile_run(self, job: Job) -> str:
        """Bring the run in line with the row; return its id."""
        run_id, is_new = self._run(job)
        now, rows = round(job.changed_at * 1000), list[Row]()
        labels = {} if is_new else state_tags(job)
        if job.state == State.DONE and job.result:
            measures = sizing.measures(self.study.specification)
            values = summary(job.result) | job.sizes(measures)
            rows = [summary_row(values, timestamp_ms=now, step=job.result.best_epoch)]
            labels |= {"hpo.device": job.result.device} if job.result.device else {}
        self.send_epochs(job, run_id, rows=rows, tags=labels)
        if not is_new:
            self.tracker.set_status(run_id, RUN_STATUS[job.state], end_ms=now if job.state.ended else None)
        if job.state == State.DONE:
            crash.at("run ended")
        return run_id

    def _remove_leftovers(self, job: Job, run_id: str) -> None:
        """Delete what a recorded trial does not need: checkpoints, and models that are not the recorded one.

        A cancelled one keeps its checkpoint, for it may be brought back; its worker may just have logged a model. The
        worker that claims it then logs one of its own (its fence is in the key), after our list or seen by our second
        look.
        """

        def still() -> bool:
            current = self.queue.job(job.id)
            return current is not None and (current.state, current.fence) == (job.state, job.fence)

        experiment, kept = self.study.facts.experiment_id, job.result.model_id if job.result else None
        is_cancelled = job.state == State.CANCELLED
        is_retried = job.fence > 1 or is_cancelled  # otherwise the only claim has logged the only model
        try:
            for run in (run_id, *job.discarded):
                if (job.checkpoint is not None or job.discarded) and not is_cancelled:
                    self.tracker.delete_artifact(run, "checkpoints")
                if is_cancelled or (is_retried and job.state == State.DONE and job.result):
                    logged_models.delete_others(self.tracker, run, experiment, keep=kept, still=still)
        except DatabaseLost:
            raise
        except Exception as error:  # such as a server that deletes nothing; `hpo doctor` finds what stays
            self.tracker.ping(experiment)  # one that is away is asked again later
            log.warning("%s: what it does not need any more stays in MLflow: %s", job.title, first_line(error))

    def _tag_spread(self, folds: Sequence[Job]) -> None:
        """Tag the runs of a configuration with the mean of its folds and their spread, once all are done."""
        values = [fold.result.best_val_nmse for fold in folds if fold.result is not None]
        if len(values) == len(folds):
            for run in {fold.run_id for fold in folds if fold.run_id is not None}:
                self.tracker.set_tags(run, spread_tags(statistics.fmean(values), statistics.stdev(values)))

    def _alone(self, job: Job) -> AbstractContextManager[object]:
        """Serialise the updates of one configuration, so that the last writer has seen every repeat."""
        if self.study.specification.trainings == 1:
            return nullcontext()
        return self.queue.lock(f"show.{job.study}.{job.number}", patience=FREEZE_LIMIT)

    def _repeats(self, job: Job) -> list[Job]:
        """Return all jobs of this one's configuration, but for its refit."""
        if self.study.specification.trainings == 1:
            return [job]
        return [other for other in self.queue.repeats(self.study.name, job.number) if not other.is_refit]

    def ensure_run(self, job: Job) -> str:
        """Return the id of the job's MLflow run; create the run if there is none yet."""
        return self._run(job)[0]

    def _run(self, job: Job) -> tuple[str, bool]:
        """Return the id of the job's MLflow run, and whether it was created now, as the run of a running trial."""
        if job.run_id is not None:
            return job.run_id, False
        assert job.spec is not None
        experiment, is_running = self.study.facts.experiment_id, job.state == State.RUNNING
        searched = {f"{section}.{name}" for section in ("model", "training") for name in job.spec.point}
        # Nobody else has had a reason to create it: the trial waits no more, and no claim came before this one.
        is_first = is_running and job.fence == 1 and job.worker == self.worker and self.is_first(job.key)
        try:
            run_id = self.tracker.ensure_run(
                experiment,
                key=job.key,
                name=job.run_name,
                kind="trial",
                params={name: value for name, value in job.spec.params().items() if name not in searched},
                tags=tags(job) | (state_tags(job) if is_first else {}),
                start_ms=round(job.changed_at * 1000),
                without=job.discarded,
                is_first=is_first,
            )
        except MlflowException:  # another creator may have won, and deleted this run before its params were written
            current = self.queue.job(job.id)
            if current is None or current.run_id is None:
                raise
            return current.run_id, False
        crash.at("run made")
        kept = self.queue.set_run(job.id, run_id)  # of two creators at once the database says whose run it is
        if kept is None:
            return run_id, False  # the study was deleted meanwhile, or the run discarded
        if not is_first or kept != run_id:
            self.tracker.delete_other_runs(experiment, job.key, keep=kept)
        data = self.study.facts.data
        self.tracker.log_dataset(kept, name=data.name, digest=data.digest, source=data.source, profile=data.profile)
        return kept, is_first and kept == run_id

    def is_first(self, what: str) -> bool:
        """Return whether this worker asks so for the first time: what it has tried once may be there."""
        is_first = what not in self._tried
        self._tried.add(what)
        return is_first

    def send_epochs(
        self, job: Job, run_id: str, *, rows: Sequence[Row] = (), tags: Mapping[str, Any] = MappingProxyType({})
    ) -> int:
        """Send the epochs that MLflow does not have yet; return their number. Send `rows` and `tags` with the last.

        They carry the times they were stored with, so that sending them again doubles nothing.
        """
        count, is_last = 0, False
        while not is_last:
            epochs = self.queue.outbox(job.id, limit=PAGE)
            is_last = len(epochs) < PAGE
            self.tracker.log_epochs(run_id, [*epochs, *rows] if is_last else epochs, tags=tags if is_last else {})
            if epochs and not self.queue.set_forwarded(job.id, run_id, [number for number, _, _ in epochs]):
                break  # the curve was cut back meanwhile
            count += len(epochs)
        return count

    def update_judged(self, job: Job) -> None:
        """Store the epochs of a running trial in Optuna: those that the pruner has judged, all if there is none."""
        if len(self.study.specification.objectives) == 1:  # Optuna's own calls store none of several
            sampling.update_judged(self.store, self.study.name, self._seen(job))

    def _seen(self, job: Job) -> Job:
        """Return the job as Optuna sees it: where nothing is pruned all epochs count as judged, of the first repeat."""
        is_judged = self.study.specification.is_pruned or job.repeat > 0
        return job if is_judged else replace(job, judged=Judged(epoch=job.epochs))

    def answers(self) -> bool:
        """Return True if database and tracking server answer; raise otherwise."""
        self.queue.closing_state(self.study.name)
        self.tracker.ping(self.study.facts.experiment_id)
        return True

    def takes(self) -> bool:
        """Return whether the tracking server takes something harmless that we write at the study's own run."""
        try:
            self.tracker.set_tags(self.study.facts.study_run_id, {"hpo.kind": "study"})
        except MlflowException as error:
            log.warning("MLflow refuses what is written at the run of %s: %s", self.study.name, first_line(error))
            return False
        return True

    def reconcile(self, *, lease: float, older_than: float, expire: bool = True) -> int:
        """Reconcile what other workers left half done for `older_than` seconds; return the number of jobs.

        With `expire` also the trials whose leases (of `lease` seconds) have expired.
        """
        expired = self.queue.expire(self.study.name, lease=lease, sparing=self.worker) if expire else []
        jobs = self.queue.unmirrored(self.study.name, older_than=older_than, also=expired)
        return sum(self.try_job(job) for job in jobs)

    def try_job(self, job: Job) -> bool:
        """Reconcile a job; return False, with a warning, if that fails: a projection that fails harms no training."""
        try:
            self.reconcile_job(job)
        except (TrackingUnavailable, DatabaseLost):
            raise
        except Exception as error:  # such as a run that somebody deleted
            log.warning("%s cannot be shown in MLflow or Optuna: %s", job.title, first_line(error))
            return False
        return True


def tags(job: Job) -> dict[str, Any]:
    """Return the tags that describe a trial in words."""
    assert job.spec is not None
    words = {foreign.NOTE: f"Trial {job.number} of the study {job.study}."}
    if weights := provenance(job.spec.model):
        words["hpo.weights"] = weights
        words[foreign.NOTE] += f" Backbone: {weights}."
    for name, origin in (("starts_from", job.spec.starts_from), ("best_of", job.spec.best_of)):
        if origin is not None:
            words[f"hpo.{name}"] = f"trial {origin.trial} of {origin.study}, run {origin.run_id}"
    if job.spec.start is not None:
        words["hpo.start_from"] = f"{job.spec.start.name} ({job.spec.start.source})"
    if "hpo.best_of" in words:
        words[foreign.NOTE] += f" The point is that of {words['hpo.best_of']}."
    if (fold := job.spec.fold) is not None:
        words[foreign.NOTE] += f" Fold {fold.number} of {fold.count} (from 0) of its cross-validation."
    if (refit := job.spec.refit) is not None:
        words |= {"hpo.refit": "true"} | spread_tags(refit.nmse, refit.deviation)
        words[foreign.NOTE] += (
            f" Trained again on the images of all {refit.folds} folds, for the median of their best epochs. Its "
            "validation scores are their means."
        )
    return words


def spread_tags(mean: float, deviation: float) -> dict[str, Any]:
    """Return the tags of mean and standard deviation of the validation NMSE of a configuration's folds."""
    return {"hpo.point_val_nmse": repr(mean), "hpo.point_val_deviation": repr(deviation)}


def state_tags(job: Job) -> dict[str, Any]:
    """Return the tags that follow the job's state."""
    words: dict[str, Any] = {"hpo.attempt": job.attempt, "hpo.state": job.state, "hpo.reason": job.reason or ""}
    return words | environment() | {"hpo.worker": job.worker or ""} if job.state == State.RUNNING else words


def summary(result: TrialResult) -> dict[str, float | None]:
    """Return the metrics of a finished trial that MLflow's table shows: of the best epoch, and of the last."""
    flat: dict[str, float | None] = {
        "best_val_nmse": result.best_val_nmse,
        "best_val_mse": result.best_val_mse,
        "best_epoch": result.best_epoch,
        "train_seconds": result.seconds,  # "seconds" is the name of an epoch's
        "last_val_nmse": result.last_val_nmse,
        "last_val_mse": result.last_val_mse,
    }
    flat |= {} if result.parameters is None else {"parameters": result.parameters}
    for prefix, scores in (("best_val", result.validation), ("last_val", result.last_validation)):
        flat |= {f"{prefix}_r2": scores.r2, f"{prefix}_nrmse": scores.nrmse}
    for score in ("r2", "nrmse"):
        for name, value in zip(result.target_names, result.validation.per_target[score], strict=True):
            flat[f"best_val_{score}/{name}"] = value
    return flat | in_unit("best_val", result.validation.in_unit)
