"""The progress of a study over all workers, from the database."""

import statistics
from typing import Any

from hpo.queue import ENDED, FREEZE_LIMIT, Job, Pace, Present, Queue, State, StudyRow
from hpo.report.forecast import Forecast
from hpo.text import counted, duration, in_brackets, point_text

OVERLAP = 2 * FREEZE_LIMIT  # seconds: what changed so long before a look may have been committed after it


class Progress:
    """What is done, running and waiting, how fast, and how long it still takes."""

    def __init__(self, queue: Queue, study: StudyRow) -> None:
        self.queue, self.study = queue, study
        self._jobs: dict[int, Job] = {}  # by id
        self.jobs: list[Job] = []  # trials
        self.paces: dict[int, Pace] = {}
        self.workers: list[Present] = []
        self.places: dict[int, str] = {}  # by job that runs: "cpu", or the card
        self.closing: Job | None = None
        self.pause: str | None = None  # why the study is paused
        self.now = 0.0  # the database's clock, seconds since 1970

    def refresh(self) -> None:
        """Read from the database what may have changed since the last time. Raise DatabaseLost."""
        after = self.now - OVERLAP if self._jobs else None
        for job in self.queue.jobs(self.study.name, after=after, brief=True):
            self._jobs[job.id] = job
            self.paces.pop(job.id, None)  # its curve may have been cut back
        self.now, paces = self.queue.paces(self.study.name, after=after)
        self.paces |= paces
        jobs = sorted(self._jobs.values(), key=lambda job: (job.number, job.repeat))
        self.jobs = [job for job in jobs if job.kind == "trial"]
        self.closing = next((job for job in jobs if job.kind == "closing"), None)
        self.workers, self.places = self.queue.workers(self.study.name), self.queue.places(self.study.name)
        self.pause = self.queue.pause(self.study.name)

    def count(self, *states: State) -> int:
        return sum(job.state in states for job in self.jobs)

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.state == State.RUNNING]

    @property
    def epochs(self) -> int:
        """Completed and stored, of all trials."""
        return sum(job.epochs for job in self.jobs)

    @property
    def share(self) -> float:
        """Which share of the planned epochs is done; the rest of a trial that has ended early counts as done."""
        planned = sum(self.epochs_planned(job) for job in self.jobs)
        done = sum(self.epochs_planned(job) if job.state.ended else job.epochs for job in self.jobs)
        return min(1.0, done / planned) if planned else 0.0

    @property
    def rate(self) -> float:
        """Epochs per second of all trials that are trained now."""
        return sum(self.speed(job) or 0.0 for job in self.running)

    @property
    def best(self) -> tuple[float, Job] | None:
        """The lowest validation NMSE so far, of running trials too, and its trial; after a cross-validation the mean
        of a configuration's folds, once all of them have begun."""
        trials: dict[tuple[int, int], list[tuple[float, Job]]] = {}
        for job in self.jobs:
            if job.id in self.paces and (best := self.paces[job.id].best) is not None:
                trials.setdefault((job.number, 0 if self.study.specification.folds else job.repeat), []).append(
                    (best, job)
                )
        means = [
            (statistics.fmean(best for best, _ in own), own[0][1])
            for own in trials.values()
            if len(own) == (self.study.specification.folds or 1)
        ]
        return min(means, key=lambda pair: pair[0], default=None)

    def epochs_planned(self, job: Job) -> int:
        return job.spec.epochs if job.spec else int(self.study.specification.training.get("epochs", 0))

    @property
    def forecast(self) -> Forecast:
        return Forecast(
            jobs=self.jobs,
            closing=self.closing,
            workers=self.workers,
            paces=self.paces,
            now=self.now,
            epochs=self.epochs_planned,
            report_by=self.study.specification.report_by,
            pruner=self.study.specification.pruner,
            folds=self.study.specification.folds,
        )

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the study is closed; None if they are unknown."""
        return self.forecast.seconds_left

    def speed(self, job: Job) -> float | None:
        """Return the epochs per second of a trial that is trained now; None if they are unknown."""
        is_trained = job.alive and job.id in self.paces and job.epochs < self.epochs_planned(job)
        return 1 / self.paces[job.id].seconds if is_trained and self.paces[job.id].seconds > 0 else None

    def left(self, job: Job) -> float | None:
        """Return the seconds of training that a running trial has left; None if they are unknown."""
        speed = self.speed(job)
        return (self.epochs_planned(job) - job.epochs) / speed if speed else None

    def by_worker(self) -> list[tuple[str, Present | None, list[Job]]]:
        """Return every worker with its trials; those that hold a trial but have ended come last, without a record."""
        present = {worker.name: worker for worker in self.workers}
        held: dict[str, list[Job]] = {name: [] for name in present}
        for job in self.running:
            held.setdefault(str(job.worker), []).append(job)
        return [(name, present.get(name), jobs) for name, jobs in held.items()]

    # In words

    def counts(self) -> list[str]:
        """Return how many trials are in which state; the first one are those that are done."""
        early = [f"{self.count(state)} {state}" for state in (State.PRUNED, State.CANCELLED) if self.count(state)]
        done = f"{counted(self.count(State.DONE), 'trial', of=len(self.jobs))} done"
        failed = f"{self.count(State.DEAD, State.DIVERGED)} failed"
        return [done, f"{len(self.running)} running", f"{self.count(State.WAITING)} waiting", failed, *early]

    def best_text(self) -> str:
        """Return such as `val NMSE 0.0512 (f16 k5)`; nothing before the first epoch."""
        if self.best is None:
            return ""
        nmse, job = self.best
        point = point_text(job.spec.point) if job.spec else ""
        return f"val NMSE {nmse:.4g}{in_brackets(point)}"

    def left_text(self) -> str:
        """Return how long the study still takes."""
        left = self.seconds_left
        if left is not None:
            return f"{duration(left)} left"
        return "time left: measuring" if self.workers or self.running else "no worker is here"

    def line(self) -> str:
        """Return the progress in one plain line."""
        words = [f"{self.study.name}: {', '.join(self.counts())}"]
        words += [f"{self.rate:.1f} epochs/s"] if self.rate else []
        words += [f"best {self.best_text()}"] if self.best is not None else []
        return ", ".join([*words, f"PAUSED: {self.pause}" if self.pause else self.left_text()])

    def as_dict(self) -> dict[str, Any]:
        """Return the progress for programs."""
        return {
            "study": self.study.name,
            **{state: self.count(state) for state in (State.WAITING, State.RUNNING, *ENDED)},
            "epochs": self.epochs,
            "seconds_left": self.seconds_left,
            "paused": self.pause,
            "best_val_nmse": self.best[0] if self.best else None,
            "workers": [self._worker(*entry) for entry in self.by_worker()],
        }

    def _worker(self, name: str, worker: Present | None, jobs: list[Job]) -> dict[str, Any]:
        return {
            "worker": name,
            "host": name.partition(":")[0],
            "alive": worker is not None and worker.alive,
            "trainers": worker.trainers if worker else None,
            "device": worker.device if worker else None,
            "pool": worker is not None and worker.in_pool,
            "elsewhere": dict(worker.elsewhere) if worker else {},
            "seconds_here": worker.here if worker else None,
            "seconds_silent": worker.silent if worker else None,
            "epochs_per_second": sum(self.speed(job) or 0.0 for job in jobs),
            "trials": [
                {
                    "number": job.number,
                    "repeat": job.repeat,
                    "config": job.config,
                    "params": job.spec.point if job.spec else {},
                    "attempt": job.attempt,
                    "device": self.places.get(job.id),
                    "alive": job.alive,
                    "epoch": job.epochs,
                    "epochs": self.epochs_planned(job),
                    "epochs_per_second": self.speed(job),
                    "seconds_left": self.left(job),
                    "best_val_nmse": self.paces[job.id].best if job.id in self.paces else None,
                }
                for job in jobs
            ],
        }
