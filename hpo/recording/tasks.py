"""What the recorder does for one job. Each task returns its outcome, for the supervisor.

A task may be repeated. It raises TrackingUnavailable or DatabaseLost when it should be called again, and LeaseLost when
the job is no longer held. The epochs of the job that had arrived before the task are in the database by then.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas

from hpo import crash, ownership
from hpo.errors import NotFound, ServiceError, disk_is_full
from hpo.files import sha256_of
from hpo.queue import AttemptOutcome, Checkpoint, DatabaseLost, Job, LeaseLost, State, TrialResult
from hpo.recording.outcomes import DataFetched, Ended, Fetched, HandedBack, NoData, NoStore, Refused, StoreProved
from hpo.recording.reconciler import Reconciler
from hpo.recording.trained import Trained
from hpo.search.pruning import Pruning
from hpo.study.records import NETWORK
from hpo.text import first_line
from hpo.tracking import data_sets, experiments, logged_models, registry, study_files
from hpo.tracking.client import PAUSED
from hpo.tracking.errors import TrackingUnavailable

log = logging.getLogger("hpo")


@dataclass(frozen=True)
class Tasks:
    """The tasks of one worker."""

    reconciler: Reconciler
    pruning: Pruning
    home: Path

    def reconcile(self, job: Job) -> None:
        """Bring Optuna and MLflow in line with the job as the database has it now."""
        current = self.reconciler.queue.job(job.id)
        if current is not None:
            self.reconciler.try_job(current)

    def hand_back(self, job: Job, reason: str) -> HandedBack:
        """Return a job to the queue after its checkpoint; no attempt is counted."""
        return HandedBack(job=job, reason=reason)

    def store_checkpoint(self, job: Job, path: Path, *, epoch: int, sha256: str) -> None:
        """Upload a checkpoint under a new name, commit it to the job, then delete the one before."""
        queue, tracker = self.reconciler.queue, self.reconciler.tracker
        current = queue.require(job)
        name = f"checkpoint-{epoch:06d}-{job.fence}.safetensors"  # a name of this claim: an older one cannot touch it
        local = path.with_name(name)
        if path.exists():
            path.replace(local)
        if not local.exists():
            return  # the job has been given back and its folder removed
        try:
            run_id = self.reconciler.ensure_run(current)
            tracker.upload(run_id, local, "checkpoints")
        except (TrackingUnavailable, DatabaseLost, LeaseLost):
            raise
        except Exception as error:  # it goes on without: a checkpoint only spares time
            if disk_is_full(error):
                raise
            log.warning("%s: a checkpoint could not be stored: %s", job.title, first_line(error))
            return
        crash.at("checkpoint uploaded")
        queue.checkpoint(job, Checkpoint(path=f"checkpoints/{name}", sha256=sha256, epoch=epoch, run_id=run_id))
        local.unlink(missing_ok=True)
        if current.checkpoint is not None and current.checkpoint.path != f"checkpoints/{name}":
            try:
                tracker.delete_artifact(current.checkpoint.run_id, current.checkpoint.path)
            except TrackingUnavailable:
                raise
            except Exception as error:  # a server that deletes nothing: the new checkpoint is safe all the same
                log.warning("%s: its earlier checkpoint stays in MLflow: %s", job.title, first_line(error))

    def fetch(self, job: Job, folder: Path) -> Fetched:
        """Download the checkpoint that the trial goes on with and the model, or the weights, that it starts from.

        Every file is checked against the hash recorded with it. Those of the study are fetched once for all trials.
        """
        checkpoint = self._fetch_checkpoint(job, folder) if job.checkpoint is not None else None
        assert job.spec is not None
        network, start = job.spec.starts_from, None
        if network is not None:
            start = registry.download_model(
                self.reconciler.tracker,
                model_id=network.model_id,
                folder=folder / "start",
                expected_sha256=network.files,
            )
        elif (model := job.spec.start) is not None:
            start = self._fetch_files(model.folder, model.files)
        elif (weights := job.spec.own_weights) is not None:
            start = self._fetch_files(weights.folder, {weights.name: weights.sha256})
        return Fetched(job=job, checkpoint=checkpoint, start=start)

    def _fetch_files(self, source: str, files: Mapping[str, str]) -> Path:
        """Return a folder with the files, of these SHA-256, that lie in the folder `source` of the study's run."""
        run_id = self.reconciler.study.facts.study_run_id
        return study_files.fetch(self.home, self.reconciler.tracker, run_id, source, files)

    def _fetch_checkpoint(self, job: Job, folder: Path) -> Path | None:
        """Return the job's newest checkpoint as a local file; None, with a warning, if it is missing or damaged."""
        stored = job.checkpoint
        assert stored is not None
        try:
            path = self.reconciler.tracker.download_artifact(stored.run_id, stored.path, folder)
        except NotFound as error:
            log.warning("%s starts again from epoch 0: %s", job.title, error)
            return None
        if (sha256 := sha256_of(path)) != stored.sha256:
            message = "%s starts again from epoch 0: its checkpoint is damaged (SHA-256 %.8s, expected %.8s)"
            log.warning(message, job.title, sha256, stored.sha256)
            return None
        return path

    def show_pause(self, reason: str) -> None:
        """Show at the study's run in MLflow why the study is paused."""
        self.reconciler.tracker.set_tags(self.reconciler.study.facts.study_run_id, {PAUSED: reason})

    def fetch_data(self) -> DataFetched | NoData:
        """Download the study's data set again, as the database describes it now: `hpo doctor --fix` may have put it
        there with another hash."""
        name = self.reconciler.study.name
        try:
            row = self.reconciler.queue.study(name)
            return DataFetched(
                study=name, path=data_sets.fetch(self.home, self.reconciler.tracker, row.name, row.facts)
            )
        except ServiceError as error:
            return NoData(study=name, error=error)
        except Exception as error:
            if isinstance(error, TrackingUnavailable | DatabaseLost) and not disk_is_full(error):
                raise
            return NoData(
                study=name, error=ServiceError(f"The data set of {name} cannot be fetched here: {first_line(error)}.")
            )

    def prove_store(self, refused: Refused | None = None) -> StoreProved | NoStore:
        """Show that files can be stored and read from here; `refused` is the failure that makes this a question."""
        study = self.reconciler.study
        experiment = study.facts.experiment_id
        try:
            experiments.prove_store(self.reconciler.tracker, str(experiment), ownership.folder(self.home, "cache"))
        except Exception as error:
            if isinstance(error, TrackingUnavailable) and not disk_is_full(error):
                raise
            message = (
                "This worker cannot work here: expected to store, read and remove a small file beside the runs of the "
                f"MLflow experiment {experiment}, found: {type(error).__name__}: {first_line(error).rstrip('.')}. It "
                "takes no trial; what it held is given back, and no attempt counts."
            )
            return NoStore(study=study.name, error=ServiceError(message), refused=refused)
        return StoreProved(study=study.name, refused=refused)

    def record(self, job: Job, trained: Trained) -> Ended:
        """Log the model and what it predicts of the validation split, then record the job's one result.

        A verdict of the pruner counts instead, though it came too late to spare the rest of the training.
        """
        if verdict := self.pruning.settle(job):
            return self.end(job, State.PRUNED, epoch=trained.epochs, reason=verdict)
        queue, tracker, study = self.reconciler.queue, self.reconciler.tracker, self.reconciler.study
        queue.cut(job, trained.epochs)  # an earlier attempt on another kind of machine may have had more patience
        run_id = self.reconciler.ensure_run(queue.require(job))
        curve = dict(queue.curve(job.id))
        if sorted(curve) != list(range(1, trained.epochs + 1)):
            raise ValueError(f"the curve has {len(curve)} of {trained.epochs} epochs")
        # The fence is in the key: a model that an earlier claim logged is deleted by the worker that saw the trial
        # cancelled. And the weights: only this file is used again after a lost answer.
        weights = sha256_of(trained.folder / "weights.safetensors")[:12]
        key = f"{job.key}/{job.fence}-{weights}"
        name, experiment = logged_models.name_of(job.run_name, job.repeat), study.facts.experiment_id
        is_first = self.reconciler.is_first(key)  # nobody else has this fence
        model = logged_models.log(tracker, run_id, experiment, trained.folder, name=name, key=key, is_first=is_first)
        crash.at("model logged")
        tracker.upload(run_id, trained.predictions, "predictions")
        seconds = sum(metrics["seconds"] for metrics in curve.values())
        result = TrialResult(
            best_val_nmse=trained.best_val_nmse,
            best_val_mse=trained.best_val_mse,
            best_epoch=trained.best_epoch,
            last_val_nmse=trained.last_val_nmse,
            last_val_mse=trained.last_val_mse,
            validation=trained.validation,
            last_validation=trained.last_validation,
            epochs=trained.epochs,
            seconds=seconds,
            target_names=study.facts.data.target_names,
            model_id=model.model_id,
            files=model.sha256,
            device=trained.device,
            training=trained.training,
            images=trained.images,
            common=trained.common,
            parameters=trained.parameters,
            multiply_adds=trained.multiply_adds,
        )
        errors = {} if job.is_refit else {NETWORK: squared_errors(trained.predictions)}  # its folds have them
        queue.end(job, State.DONE, result=result, validation=errors)
        crash.at("recorded")
        nmse, epoch = trained.best_val_nmse, trained.best_epoch
        log.info("%s done: val nmse %.4g at epoch %d, %.0f s", job.title, nmse, epoch, seconds)
        return Ended(job=job, logged=True)

    def end(self, job: Job, state: State, *, epoch: int, reason: str) -> Ended:
        """Record that a trial has diverged or was pruned at an epoch; a verdict of the pruner counts first."""
        queue = self.reconciler.queue
        if state == State.DIVERGED:
            queue.cut(job, epoch - 1)  # an attempt on another kind of machine may have come further
        if verdict := self.pruning.settle(job):
            state, reason = State.PRUNED, verdict
        queue.end(job, state, result={"epoch": epoch}, reason=reason)
        return Ended(job=job, logged=False)

    def bury(self, job: Job, reason: str) -> Ended:
        """End a trial that was trained well and cannot be recorded: training it again would not help."""
        self.reconciler.queue.give_back(job, AttemptOutcome.NOT_RECORDED, reason=reason)
        log.warning("%s is dead: %s", job.title, reason)
        return Ended(job=job, logged=False)


def squared_errors(predictions: Path) -> np.ndarray:
    """Return what a trial's table of predictions misses of the labels, squared, (n, k); NaN where there is no label."""
    table = pandas.read_csv(predictions, dtype=str)  # pandas before 3 rounds numbers
    true, predicted = np.hsplit(table.iloc[:, 1:].to_numpy().astype(np.float64), 2)  # behind the names of the images
    return (predicted - true) ** 2
