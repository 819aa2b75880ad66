"""Make Optuna's trial and MLflow's run show what the job row says. Everything here is idempotent and may be repeated
by any worker: the row is the truth, and a half-done mirror image is mended by the next pass."""

import getpass
import logging
import math
import os
import platform
import socket
import subprocess
import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import optuna
from mlflow.exceptions import MlflowException

from hpo import crash, sampling
from hpo.queue import FREEZE_LIMIT, DatabaseLost, Job, Queue, StudyRow
from hpo.study import provenance, restore
from hpo.text import utf8
from hpo.tracking import Tracker, TrackingUnavailable

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
            self.tracker.log_summary(run_id, summary(job.result), timestamp_ms=now, step=job.result["best_epoch"])
            if "device" in job.result:
                self.tracker.set_tags(run_id, {"hpo.device": job.result["device"]})
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

        experiment, kept = self.study.facts["experiment_id"], (job.result or {}).get("model_id")
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
            log.warning("%s: what it does not need any more stays in MLflow: %s", title(job), first_line(error))

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
                key=key(job),
                name=run_name(job),
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
        self.tracker.delete_other_runs(experiment, key(job), keep=kept)
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
                log.warning("%s cannot be shown in MLflow or Optuna: %s", title(job), first_line(error))
        return mended


def title(job: Job) -> str:
    """What messages call it: `trial 7 of grid`."""
    again = f", repeat {job.repeat}" if job.repeat else ""
    return f"closing of {job.study}" if job.kind == "closing" else f"trial {job.number} of {job.study}{again}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__


def key(job: Job) -> str:
    """What marks everything of this job in MLflow."""
    return f"{job.study}/{job.number}/{job.repeat}"


def run_name(job: Job) -> str:
    """Such as `grid/22 f32 k5 d0.2 lr1e-3`."""
    assert job.spec is not None
    number = job.number if job.config is None else job.config
    again = f" repeat {job.repeat}" if job.repeat else ""
    return f"{job.study}/{number} {point_text(job.spec['point'])}".strip() + again


SHORT = {"filters": "f", "kernel_size": "k", "dropout": "d", "learning_rate": "lr", "backbone": ""}


def point_text(point: dict[str, Any]) -> str:
    """A point in few letters, such as `f32 k5 d0.2 lr1e-3`."""
    return " ".join(SHORT.get(name, f"{name}=") + number_text(value) for name, value in point.items())


def number_text(value: Any) -> str:
    """A number as people write it: 32, 0.2, 1e-3; anything else as it is."""
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        mantissa, exponent = f"{value:.6e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def params(spec: dict[str, Any]) -> dict[str, Any]:
    """What determines the result of a trial, flat, as MLflow params. The point comes first, under its own names."""
    flat = dict(spec["point"])
    flat |= {"config": spec["config"]} if spec["config"] is not None else {}
    flat |= {f"model.{name}": value for name, value in spec["model"].items()}
    flat |= {f"training.{name}": value for name, value in spec["training"].items()}
    for name in ("weights", "starts_from", "best_of"):  # the file or trial it begins with, the trial of the same point
        if found := spec.get(name):
            flat |= {f"{name}.{key}": value for key, value in found.items() if key != "files"}
            if "files" in found:
                flat[f"{name}.sha256"] = found["files"]["weights.safetensors"]
    others = ("seed", "parameters", "trainable_parameters", "data", "split", "identity", "numerics")
    return flat | {name: spec[name] for name in others if name in spec}


def tags(job: Job) -> dict[str, Any]:
    """What a run says of its trial in words."""
    assert job.spec is not None
    words = {"mlflow.note.content": f"Trial {job.number} of the study {job.study}."}
    if weights := provenance(job.spec["model"]):
        words["hpo.weights"] = weights
        words["mlflow.note.content"] += f" Backbone: {weights}."
    for name in ("starts_from", "best_of"):
        if (first := job.spec.get(name)) is not None:
            words[f"hpo.{name}"] = f"trial {first['trial']} of {first['study']}, run {first['run_id']}"
    if "hpo.best_of" in words:
        words["mlflow.note.content"] += f" The point is that of {words['hpo.best_of']}."
    return words


def summary(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a finished trial that MLflow's table shows: of the best epoch, and of the last."""
    flat = {name: result[name] for name in ("best_val_nmse", "best_val_mse", "best_epoch")}
    flat["train_seconds"] = result["seconds"]  # "seconds" is the name of an epoch's
    flat |= {name: result[name] for name in ("last_val_nmse", "last_val_mse")}
    for prefix, part in (("best_val", "validation"), ("last_val", "last_validation")):
        flat |= {f"{prefix}_{score}": result[part][score] for score in ("r2", "nrmse")}
    for score in ("r2", "nrmse"):
        for name, value in zip(result["target_names"], result["validation"]["per_target"][score], strict=True):
            flat[f"best_val_{score}/{name}"] = value
    return known(flat)


def known(scores: dict[str, Any]) -> dict[str, float]:
    """The scores that are numbers: R² of a target that does not vary in a split, say, is none."""
    return {name: float(value) for name, value in scores.items() if value is not None and math.isfinite(value)}


def score_text(value: float | None, places: str = ".4g") -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{places}}"


@lru_cache(maxsize=1)
def environment() -> dict[str, str]:
    """Where a trial runs: what may change between attempts, so tags and not params."""
    versions = {name: metadata.version(name) for name in ("hpo", "torch", "optuna", "mlflow", "numpy")}
    return {
        "hpo.host": socket.gethostname(),
        "hpo.user": _user(),
        "hpo.device": f"cpu: {_processor()}",
        "hpo.python": platform.python_version(),
        **{f"hpo.version.{name}": version for name, version in versions.items()},
        "hpo.commit": _commit(),
    }


def who() -> str:
    """Whoever gives this command: user@host."""
    return f"{_user()}@{socket.gethostname()}"


def _user() -> str:
    try:
        return utf8(getpass.getuser())
    except (KeyError, OSError):
        return str(os.getuid())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of the program's own checkout, with `+changes` if files differ; empty for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        run = lambda *words: subprocess.run(  # noqa: E731
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        return run("rev-parse", "HEAD") + ("+changes" if run("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def now_ms() -> int:
    """Milliseconds since 1970, this machine's clock: for times MLflow shows, never for a decision."""
    return time.time_ns() // 1_000_000
