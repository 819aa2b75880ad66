"""What the recorder's thread does for one job. Every function may be repeated: it raises TrackingUnavailable or
DatabaseLost when it should be called again, and LeaseLost when the job is no longer ours."""

import logging
from pathlib import Path
from typing import Any

from hpo import crash
from hpo.errors import NotFound, disk_is_full
from hpo.files import sha256_of
from hpo.queue import Checkpoint, DatabaseLost, Job, LeaseLost, State
from hpo.recording.holdings import Holdings
from hpo.recording.reconciler import Mirror
from hpo.text import first_line
from hpo.tracking import registry
from hpo.tracking.client import TrackingUnavailable

log = logging.getLogger("hpo")


def show(shown: Mirror, job_id: int) -> None:
    """Make Optuna and MLflow show a job as the database has it now. A mirror that cannot be made harms no training."""
    job = shown.queue.job(job_id)
    if job is None:
        return
    try:
        shown.show(job)
    except (TrackingUnavailable, DatabaseLost):
        raise
    except Exception as error:
        log.warning("%s cannot be shown in MLflow or Optuna: %s", job.title, first_line(error))


def store_checkpoint(shown: Mirror, holdings: Holdings, job: Job, path: Path, *, epoch: int, sha256: str) -> None:
    """Upload a checkpoint under a new name, commit it to the job, then delete the one before."""
    holdings.flush(job)  # a committed checkpoint never runs ahead of the stored curve
    current = shown.queue.require(job)
    name = f"checkpoint-{epoch:06d}-{job.fence}.safetensors"  # a name of this claim: an older one cannot touch it
    local = path.with_name(name)
    if path.exists():
        path.replace(local)
    if not local.exists():
        return  # the job has been given back and its folder removed
    try:
        run_id = shown.run(current)
        shown.tracker.upload(run_id, local, "checkpoints")
    except (TrackingUnavailable, DatabaseLost, LeaseLost):
        raise
    except Exception as error:  # it goes on without: a checkpoint only spares time
        if disk_is_full(error):
            raise
        log.warning("%s: a checkpoint could not be stored: %s", job.title, first_line(error))
        return
    crash.at("checkpoint uploaded")
    shown.queue.checkpoint(job, Checkpoint(path=f"checkpoints/{name}", sha256=sha256, epoch=epoch, run_id=run_id))
    local.unlink(missing_ok=True)
    if current.checkpoint is not None and current.checkpoint.path != f"checkpoints/{name}":
        try:
            shown.tracker.delete_artifact(current.checkpoint.run_id, current.checkpoint.path)
        except TrackingUnavailable:
            raise
        except Exception as error:  # a server that deletes nothing: the new checkpoint is safe all the same
            log.warning("%s: its earlier checkpoint stays in MLflow: %s", job.title, first_line(error))


def fetch_checkpoint(shown: Mirror, job: Job, folder: Path) -> Path | None:
    """The job's newest checkpoint as a local file; None, with a warning, if it is missing or damaged."""
    assert job.checkpoint is not None
    try:
        path = shown.tracker.download_artifact(job.checkpoint.run_id, job.checkpoint.path, folder)
    except NotFound as error:
        log.warning("%s starts again from epoch 0: %s", job.title, error)
        return None
    if (found := sha256_of(path)) != job.checkpoint.sha256:
        expected = job.checkpoint.sha256
        log.warning(
            "%s starts again from epoch 0: its checkpoint is damaged (SHA-256 %.8s, expected %.8s)",
            job.title,
            found,
            expected,
        )
        return None
    return path


def fetch_start(shown: Mirror, job: Job, folder: Path) -> Path | None:
    """The network this job starts from, every file checked against the hashes recorded with it; None if it starts from
    none."""
    assert job.spec is not None
    start = job.spec.get("starts_from")
    if start is None:
        return None
    return registry.download_model(
        shown.tracker, model_id=start["model_id"], folder=folder / "start", expected_sha256=start["files"]
    )


def record(shown: Mirror, holdings: Holdings, job: Job, found: dict[str, Any]) -> None:
    """Log the model and what it predicts of the validation split, then record the one result. `found` is the trainer's
    `trained` event."""
    assert job.spec is not None
    epochs = found.get("epochs", job.spec.training["epochs"])  # fewer than planned when patience was over
    holdings.flush(job)
    shown.queue.cut(job, epochs)  # an earlier attempt on another kind of machine may have had more patience
    current = shown.queue.require(job)
    run_id = shown.run(current)
    curve = dict(shown.queue.curve(job.id))
    if sorted(curve) != list(range(1, epochs + 1)):
        raise ValueError(f"the curve has {len(curve)} of {epochs} epochs")
    folder = Path(found["folder"])
    model = shown.tracker.log_model(
        run_id,
        shown.study.facts["experiment_id"],
        folder,
        name="model",
        # The fence is in the key: what an earlier claim logged is deleted by whoever saw the trial cancelled. And the
        # weights: what is reused after a lost answer is this file.
        key=f"{job.key}/{job.fence}-{sha256_of(folder / 'weights.safetensors')[:12]}",
    )
    crash.at("model logged")
    shown.tracker.upload(run_id, Path(found["predictions"]), "predictions")
    result = {name: value for name, value in found.items() if name not in ("folder", "predictions")} | {
        "seconds": sum(metrics["seconds"] for metrics in curve.values()),
        "epochs": epochs,
        "target_names": shown.study.facts["data"]["target_names"],
        "model_id": model.model_id,
        "files": model.sha256,
    }
    shown.queue.end(job, State.DONE, result=result)
    crash.at("recorded")
    log.info(
        "%s done: val nmse %.4g at epoch %d, %.0f s",
        job.title,
        found["best_val_nmse"],
        found["best_epoch"],
        result["seconds"],
    )
