"""What `hpo run` and `hpo status` show of a study in progress: one live display, or plain lines in a pipe."""

import statistics
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.queue import ENDED, DatabaseLost, Job, Present, Queue, State, StudyRow
from hpo.text import duration, point_text

REFRESH = 1.0  # seconds between two looks at the database
LINE_INTERVAL = 15.0  # seconds between two plain lines
RATE_WINDOW = 30.0  # seconds over which epochs a second are measured


class Progress:
    """The progress of a study over all workers, from the database."""

    def __init__(self, queue: Queue, study: StudyRow) -> None:
        self.queue, self.study = queue, study
        self.jobs: list[Job] = []
        self.measured: dict[int, tuple[float, float]] = {}
        self.workers: list[Present] = []
        self._history: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self.closing: Job | None = None
        self.epochs = 0

    def refresh(self) -> None:
        """Read the database. Raise DatabaseLost."""
        jobs = self.queue.jobs(self.study.name)
        self.jobs = [job for job in jobs if job.kind == "trial"]
        self.closing = next((job for job in jobs if job.kind == "closing"), None)
        self.measured = self.queue.epoch_seconds(self.study.name)
        self.workers = self.queue.workers(self.study.name)
        self.epochs = sum(job.epochs for job in self.jobs)
        now = time.monotonic()
        self._history = [(at, n) for at, n in self._history if now - at <= RATE_WINDOW] + [(now, self.epochs)]

    def count(self, *states: State) -> int:
        return sum(job.state in states for job in self.jobs)

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.state == State.RUNNING]

    @property
    def rate(self) -> float:
        """Epochs per second of all trials together, over RATE_WINDOW."""
        (first, before), (last, now) = self._history[0], self._history[-1]
        return (now - before) / (last - first) if last > first else 0.0

    @property
    def best(self) -> tuple[float, Job] | None:
        """The lowest validation NMSE so far, of running trials too, and its trial."""
        scored = [(self.measured[job.id][1], job) for job in self.jobs if job.id in self.measured]
        return min(scored, key=lambda pair: pair[0], default=None)

    def epochs_planned(self, job: Job) -> int:
        training = job.spec.training if job.spec else dict(self.study.spec["training"])
        return int(training.get("epochs", 0))

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the last trial ends, None if unknown. Trials that have not begun are taken to end as early
        as those that have ended."""
        by_cost: dict[float, list[float]] = {}
        for job in self.jobs:
            if job.id in self.measured:
                by_cost.setdefault(job.cost, []).append(self.measured[job.id][0])
        if not by_cost or not self.running:
            return None
        ended = [job.epochs / self.epochs_planned(job) for job in self.jobs if job.state in (State.DONE, State.PRUNED)]
        share = statistics.fmean(ended or [1.0])
        total = 0.0
        for job in self.jobs:
            if job.state in (State.WAITING, State.RUNNING):
                planned = self.epochs_planned(job)
                epochs = max(0, planned - job.epochs) if job.epochs else share * planned
                total += epochs * self._epoch_seconds(job, by_cost)
        return total / len(self.running)

    def _epoch_seconds(self, job: Job, by_cost: Mapping[float, list[float]]) -> float:
        """Return the seconds of an epoch: of the trial itself, else of trials of the same cost, else in proportion to
        the cost; the mean of all if the sampler has not chosen the configuration yet."""
        if job.id in self.measured:
            return self.measured[job.id][0]
        if job.spec is None:
            return statistics.fmean(seconds for times in by_cost.values() for seconds in times)
        near = min(by_cost, key=lambda cost: abs(cost - job.cost))
        return statistics.fmean(by_cost[near]) * (job.cost / near if near else 1.0)

    def speed(self, job: Job) -> float | None:
        """Return the epochs per second of a running trial; None if they are unknown or no worker trains it."""
        seconds = self.measured.get(job.id, (0.0, 0.0))[0]
        return 1 / seconds if job.alive and seconds > 0 else None

    def by_worker(self) -> list[tuple[str, Present | None, list[Job]]]:
        """Return every worker with its trials; those that hold a trial but have ended come last, without a record."""
        present = {worker.name: worker for worker in self.workers}
        held: dict[str, list[Job]] = {name: [] for name in present}
        for job in self.running:
            held.setdefault(str(job.worker), []).append(job)
        return [(name, present.get(name), jobs) for name, jobs in held.items()]

    def line(self) -> str:
        """Return the progress in one plain line."""
        done, *others = self._counts()
        words = [f"{self.study.name}: {done}", f"{len(self.running)} running", *others, f"{self.rate:.1f} epochs/s"]
        if self.best is not None:
            words.append(f"best val NMSE {self.best[0]:.4g} ({_point(self.best[1])})")
        return ", ".join([*words, self._time_left()])

    def _counts(self) -> list[str]:
        early = [f"{self.count(state)} {state}" for state in (State.PRUNED, State.CANCELLED) if self.count(state)]
        done = f"{self.count(State.DONE)} of {len(self.jobs)} trials done"
        return [
            done,
            f"{self.count(State.WAITING)} waiting",
            f"{self.count(State.DEAD, State.DIVERGED)} failed",
            *early,
        ]

    def _time_left(self) -> str:
        left = self.seconds_left
        return "time left: measuring" if left is None else f"{duration(left)} left"

    def as_dict(self) -> dict[str, Any]:
        """Return the progress for programs."""
        return {
            "study": self.study.name,
            **{state: self.count(state) for state in (State.WAITING, State.RUNNING, *ENDED)},
            "epochs": self.epochs,
            "seconds_left": self.seconds_left,
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
                    "alive": job.alive,
                    "epoch": job.epochs,
                    "epochs": self.epochs_planned(job),
                    "epochs_per_second": self.speed(job),
                    "seconds_left": self._left(job),
                    "best_val_nmse": self.measured[job.id][1] if job.id in self.measured else None,
                }
                for job in jobs
            ],
        }

    def _left(self, job: Job) -> float | None:
        """Return the seconds of training that a running trial has left; None if they are unknown."""
        speed = self.speed(job)
        return max(0, self.epochs_planned(job) - job.epochs) / speed if speed else None

    def render(self, trouble: str | None = None) -> RenderableType:
        """Return the progress as a few lines, with `trouble` as the last one."""
        planned = sum(self.epochs_planned(job) for job in self.jobs) or 1
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(self.study.name, style="bold"),
            ProgressBar(total=planned, completed=min(planned, self.epochs), width=32),
            ", ".join(self._counts()),
            f"{self.rate:.1f} epochs/s",
            self._time_left(),
        )
        parts: list[RenderableType] = [head, *self._workers()]
        if self.closing is not None and self.closing.state == State.RUNNING:
            parts.append(Text("  closing: scoring the winner on the test split, registering it"))
        if self.best is not None:
            parts.append(Text(f"  best so far: val NMSE {self.best[0]:.4g} ({_point(self.best[1])})"))
        if trouble:
            parts.append(Text(f"  {trouble}", style="yellow"))
        return Group(*parts)

    def _workers(self) -> list[Text]:
        """Return a line for each worker, and below it one for each of its trials; a narrow terminal cuts them."""
        closing = self.closing.worker if self.closing is not None and self.closing.alive else None
        rows = {job.id: self._about(job) for job in self.running}
        widths = [max(map(len, column)) for column in zip(*rows.values(), strict=True)]
        lines = []
        for name, worker, jobs in self.by_worker():
            lines.append(f"  {name}: {_about(worker)}{', closing the study' if name == closing else ''}")
            for job in jobs:
                cells = [cell.ljust(width) for cell, width in zip(rows[job.id], widths, strict=True)]
                lines.append("    " + "  ".join(cells).rstrip())
        return [Text(line, no_wrap=True, overflow="ellipsis") for line in lines]

    def _about(self, job: Job) -> list[str]:
        measured, speed, left = self.measured.get(job.id), self.speed(job), self._left(job)
        state = f"{duration(left)} left" if left else ""
        if not job.alive:
            state = "lease ran out"
        elif job.epochs >= self.epochs_planned(job):
            state = "recording"
        return [
            str(job.number if job.config is None else job.config),
            _point(job),
            f"epoch {job.epochs}/{self.epochs_planned(job)}",
            state,
            f"{speed:.1f} epochs/s" if speed else "",
            f"val NMSE {measured[1]:.4g}" if measured else "starting",
            f"attempt {job.attempt}" if job.attempt > 1 else "",
        ]


class Display:
    """A live display on a terminal, lines in a pipe: a context manager whose `tick` may be called at any rate."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console = progress, console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._next = 0.0

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self, trouble: str | None = None) -> None:
        """Show the progress again, if the last time was long enough ago."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (REFRESH if self._live is not None else LINE_INTERVAL)
        try:
            self.progress.refresh()
        except DatabaseLost:
            trouble = trouble or "database lost, retrying"
        if self._live is not None:
            self._live.update(self.progress.render(trouble), refresh=True)
        else:
            self.console.print(self.progress.line() + (f" ({trouble})" if trouble else ""), soft_wrap=True)


def _about(worker: Present | None) -> str:
    """Return how many trainers a worker has, and since when it is here, or silent."""
    if worker is None:
        return "ended"
    since = f"here for {duration(worker.here)}" if worker.alive else f"SILENT for {duration(worker.silent)}"
    return f"{worker.trainers} trainer{'' if worker.trainers == 1 else 's'} ({worker.device}), {since}"


def _point(job: Job) -> str:
    return point_text(job.spec.point) if job.spec else "no point yet"
