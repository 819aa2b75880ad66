"""Make Optuna's trial and MLflow's run show what the job row says. Everything here is idempotent and may be repeated
by any worker: the row is the truth, and a half-done mirror image is mended by the next pass."""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import optuna
from mlflow.exceptions import MlflowException

from hpo import crash
from hpo.machine import environment
from hpo.queue import FREEZE_LIMIT, DatabaseLost, Job, Queue, StudyRow, TrialResult
from hpo.search import sampling
from hpo.study import provenance, restore
from hpo.study.records import TrialSpec
from hpo.text import first_line
from hpo.tracking.client import Tracker, TrackingUnavailable

log = logging.getLogger("hpo")

RUN_STATUS = {
    "waiting": "SCHEDULED",  # between attempts: a run that was KILLED would keep its old end time
    "running": "RUNNING",
    "done": "FINISHED",
    "diverged": "FAILED",
    "pruned": "KILLED",
    "dead": "FAILED",
    "cancelled": "KILLED",
}


class Mirror:
    """Shows jobs of one study. Every method may raise TrackingUnavailable or DatabaseLost: call again later."""

    def __init__(
        self,
        queue: Queue,
        tracker: Tracker,
        store: optuna.storages.RDBStorage,
        study: StudyRow,
        *,
        worker: str = "",
    ) -> None:
        """`worker`: whose lapsed leases are left to itself to renew."""
        self.queue, self.tracker, self.store, self.study, self.worker = queue, tracker, store, study, worker

    def show(self, job: Job) -> None:
        """Bring the run (params, tags, epochs, status) and the trial (state, value) up to the row."""
        if job.kind == "closing":
            self.queue.set_mirrored(job)
            return
        run_id = self._show_run(job) if job.spec is not None else None  # a slot no sampler has filled has no run
        with self._alone(job), self.queue.frozen(job) as same:
            if same:
                if job.spec is not None and job.config is None:  # whoever let the sampler choose it may have died since
                    planned = restore(self.study.name, self.study.spec)
                    sampling.tell(self.store, planned, job, job.spec["point"])
                sampling.show(self.store, self.study.name, job, self._repeats(job))
        if same and run_id is not None and job.state in ("done", "diverged", "pruned", "cancelled"):
            self._tidy(job, run_id)  # before the row says that all is shown, or doctor would find what is left
        self.queue.set_mirrored(job, run_id)
        # It may have gone on while we were at it, and what we wrote in MLflow is old.
        if not same and (current := self.queue.job(job.id)) is not None:
            self.show(current)

    def _show_run(self, job: Job) -> str:
        """Bring the run up to the row; its id."""
        run_id = self.run(job)
        self.forward(job, run_id)
        now = round(job.changed_at * 1000)
        tags: dict[str, Any] = {"hpo.attempt": job.attempt, "hpo.state": job.state, "hpo.reason": job.reason or ""}
        if job.state == "running":
            tags |= environment() | {"hpo.worker": job.worker or ""}
        self.tracker.set_tags(run_id, tags)
        if job.state == "done" and job.result:
            self.tracker.log_summary(run_id, summary(job.result), timestamp_ms=now, step=job.result.best_epoch)
            if job.result.device:
                self.tracker.set_tags(run_id, {"hpo.device": job.result.device})
        status = RUN_STATUS[job.state]
        self.tracker.set_status(run_id, status, end_ms=now if job.state not in ("waiting", "running") else None)  # type: ignore[arg-type]
        if job.state == "done":
            crash.at("run ended")
        return run_id

    def _tidy(self, job: Job, run_id: str) -> None:
        """Delete what a recorded trial does not need: checkpoints, and models that are not the recorded one.

        A cancelled one keeps its checkpoint, for it may be brought back; its worker may just have logged a model. Who
        claims it then logs one of its own (its fence is in the key), after our list or seen by our second look.
        """

        def still() -> bool:
            current = self.queue.job(job.id)
            return current is not None and (current.state, current.fence) == (job.state, job.fence)

        experiment, kept = self.study.facts.experiment_id, job.result.model_id if job.result else None
        try:
            for each in (run_id, *job.discarded):
                if (job.checkpoint is not None or job.discarded) and job.state != "cancelled":
                    self.tracker.delete_artifact(each, "checkpoints")
                if job.state == "cancelled" or (job.state == "done" and job.result):
                    self.tracker.delete_other_models(each, experiment, keep=kept, still=still)
        except DatabaseLost:
            raise
        except Exception as error:  # such as a server that deletes nothing; `hpo doctor` finds what stays
            self.tracker.ping(experiment)  # one that is away is asked again later
            log.warning("%s: what it does not need any more stays in MLflow: %s", job.title, first_line(error))

    def _alone(self, job: Job) -> AbstractContextManager[object]:
        """Nobody else shows this job's point meanwhile: who shows it last has read all its repeats last."""
        if self.study.spec.get("repeats", 1) == 1:
            return nullcontext()
        return self.queue.lock(f"show.{job.study}.{job.number}", patience=FREEZE_LIMIT)

    def _repeats(self, job: Job) -> list[Job]:
        """All jobs of this one's point."""
        if self.study.spec.get("repeats", 1) == 1:
            return [job]
        return [each for each in self.queue.jobs(self.study.name) if each.number == job.number]

    def run(self, job: Job) -> str:
        """The job's MLflow run, made if there is none yet."""
        if job.run_id is not None:
            return job.run_id
        assert job.spec is not None
        experiment = self.study.facts["experiment_id"]
        try:
            run_id = self.tracker.ensure_run(
                experiment,
                key=job.key,
                name=job.run_name,
                kind="trial",
                params=params(job.spec),
                tags=tags(job),
                start_ms=round(job.changed_at * 1000),
                without=job.discarded,
            )
        except MlflowException:  # another creator may have won, and deleted this run before its params were written
            current = self.queue.job(job.id)
            if current is None or current.run_id is None:
                raise
            return current.run_id
        crash.at("run made")
        kept = self.queue.set_run(job.id, run_id)  # of two creators at once the database says which one made it
        if kept is None:
            return run_id  # the study was deleted meanwhile, or the run discarded
        self.tracker.delete_other_runs(experiment, job.key, keep=kept)
        run_id = kept
        data = self.study.facts["data"]
        self.tracker.log_dataset(
            run_id, name=data["name"], digest=data["digest"], source=data["source"], profile=data["profile"]
        )
        return run_id

    def forward(self, job: Job, run_id: str) -> int:
        """Send the epochs MLflow does not have yet, with the times they were stored with: a resend doubles nothing."""
        count = 0
        while rows := self.queue.outbox(job.id):
            self.tracker.log_epochs(run_id, rows)
            if not self.queue.set_forwarded(job.id, run_id, [number for number, _, _ in rows]):
                break  # the curve was cut back meanwhile
            count += len(rows)
        return count

    def show_judged(self, job: Job) -> None:
        """Let Optuna show what the pruner has judged of a running trial."""
        sampling.show_judged(self.store, self.study.name, job)

    def answers(self) -> bool:
        """True if database and tracking server answer; otherwise it raises."""
        self.queue.closing_state(self.study.name)
        self.tracker.ping(self.study.facts["experiment_id"])
        return True

    def takes(self) -> bool:
        """Whether the tracking server takes something harmless that we write at the study's own run."""
        try:
            self.tracker.set_tags(self.study.facts["study_run_id"], {"hpo.kind": "study"})
        except MlflowException as error:
            log.warning("MLflow refuses what is written at the run of %s: %s", self.study.name, first_line(error))
            return False
        return True

    def reconcile(self, *, lease: float, older_than: float, expire: bool = True) -> int:
        """Mend what other workers left half done (both in seconds), with `expire` also trials whose leases ran out;
        return how many jobs that were."""
        expired = self.queue.expire(self.study.name, lease=lease, sparing=self.worker) if expire else []
        mended = 0
        for job in self.queue.unmirrored(self.study.name, older_than=older_than, also=expired):
            try:
                self.show(job)
                mended += 1
            except (TrackingUnavailable, DatabaseLost):
                raise
            except Exception as error:  # such as a run somebody deleted: the others still want mending
                log.warning("%s cannot be shown in MLflow or Optuna: %s", job.title, first_line(error))
        return mended


def params(spec: TrialSpec) -> dict[str, Any]:
    """What determines the result of a trial, flat, as MLflow params. The point comes first, under its own names."""
    flat = dict(spec.point)
    flat |= {"config": spec.config} if spec.config is not None else {}
    flat |= {f"model.{name}": value for name, value in spec.model.items()}
    flat |= {f"training.{name}": value for name, value in spec.training.items()}
    # The file or trial that it begins with, and the trial of the same configuration.
    origins = {"weights": spec.weights, "starts_from": spec.starts_from, "best_of": spec.best_of}
    for name, origin in origins.items():
        if origin is not None:
            flat |= {f"{name}.{key}": value for key, value in origin.to_json().items() if key != "files"}
    if spec.starts_from is not None:
        flat["starts_from.sha256"] = spec.starts_from.files["weights.safetensors"]
    flat |= {"seed": spec.seed, "parameters": spec.parameters}
    flat |= {} if spec.trainable_parameters is None else {"trainable_parameters": spec.trainable_parameters}
    return flat | {"data": spec.data, "split": spec.split, "identity": spec.identity, "numerics": spec.numerics}


def tags(job: Job) -> dict[str, Any]:
    """What a run says of its trial in words."""
    assert job.spec is not None
    words = {"mlflow.note.content": f"Trial {job.number} of the study {job.study}."}
    if weights := provenance(job.spec.model):
        words["hpo.weights"] = weights
        words["mlflow.note.content"] += f" Backbone: {weights}."
    for name, origin in (("starts_from", job.spec.starts_from), ("best_of", job.spec.best_of)):
        if origin is not None:
            words[f"hpo.{name}"] = f"trial {origin.trial} of {origin.study}, run {origin.run_id}"
    if "hpo.best_of" in words:
        words["mlflow.note.content"] += f" The point is that of {words['hpo.best_of']}."
    return words


def summary(result: TrialResult) -> dict[str, float | None]:
    """The metrics of a finished trial that MLflow's table shows: of the best epoch, and of the last."""
    flat: dict[str, float | None] = {
        "best_val_nmse": result.best_val_nmse,
        "best_val_mse": result.best_val_mse,
        "best_epoch": result.best_epoch,
        "train_seconds": result.seconds,  # "seconds" is the name of an epoch's
        "last_val_nmse": result.last_val_nmse,
        "last_val_mse": result.last_val_mse,
    }
    for prefix, scores in (("best_val", result.validation), ("last_val", result.last_validation)):
        flat |= {f"{prefix}_r2": scores.r2, f"{prefix}_nrmse": scores.nrmse}
    for score in ("r2", "nrmse"):
        for name, value in zip(result.target_names, result.validation.per_target[score], strict=True):
            flat[f"best_val_{score}/{name}"] = value
    return flat
