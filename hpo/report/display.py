"""What `hpo run` and `hpo status` show of a study in progress: one live display, or plain lines in a pipe."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.queue import DatabaseLost, Job, Present, State
from hpo.report.progress import Progress
from hpo.report.words import number
from hpo.text import counted, cut, duration, in_brackets, point_text

REFRESH = 1.0  # seconds between two looks at the database
LINE_INTERVAL = 15.0  # seconds between two plain lines
BAR = 24  # characters
POINT = 24  # characters of a configuration that a narrow terminal shows, at least
DROPPED = (
    "speed",
    "left",
    "attempt",
    "card",
    "state",
)  # columns that a narrow terminal leaves out, the first one first


@dataclass(frozen=True, kw_only=True)
class View:
    """The progress as a few lines, with `trouble` as the last one; no line is wider than the terminal."""

    progress: Progress
    trouble: str | None = None
    is_read: bool = True  # from the database, just now

    @classmethod
    def look(cls, progress: Progress, trouble: str | None) -> Self:
        """Read the progress again. A database that is lost is one more `trouble`: the last progress is shown."""
        try:
            progress.refresh()
        except DatabaseLost:
            return cls(progress=progress, trouble=trouble or "database lost, retrying", is_read=False)
        return cls(progress=progress, trouble=trouble)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        progress = self.progress
        yield Text(progress.study.name, style="bold")
        rate = f"{progress.rate:.1f} epochs/s" if progress.rate else ""
        bar = Table.grid(padding=(0, 2))
        bar.add_row("", ProgressBar(total=1.0, completed=progress.share, width=BAR), rate, progress.left_text())
        yield bar
        yield Text("  " + ", ".join(progress.counts()))
        yield from self._workers(options.max_width)
        if progress.closing is not None and progress.closing.state == State.RUNNING:
            yield Text("  closing: scoring the winner on the test split, registering it")
        if progress.best is not None:
            yield Text(f"  best so far: {progress.best_text()}")
        if progress.pause:
            yield Text(f"  PAUSED: {progress.pause} `hpo run` with the same options ends the pause.", style="yellow")
        if self.trouble:
            yield Text(f"  {self.trouble}", style="yellow")

    def _workers(self, width: int) -> Iterator[Text]:
        """Yield a line for each worker, and below it one for each of its trials."""
        progress = self.progress
        closing = progress.closing.worker if progress.closing is not None and progress.closing.alive else None
        rows = dict(zip((job.id for job in progress.running), self._rows(width - 4), strict=True))
        for name, worker, jobs in progress.by_worker():
            yield Text(f"  {name}: {_about(worker)}{', closing the study' if name == closing else ''}")
            yield from (Text(f"    {rows[job.id]}") for job in jobs)

    def _rows(self, width: int) -> list[str]:
        """Return a line for each running trial; columns that do not fit are left out, and then the configuration is
        cut."""
        trials = [self._trial(job) for job in self.progress.running]
        columns = {name: max(len(trial[name]) for trial in trials) for name in (trials[0] if trials else ())}
        columns = {name: size for name, size in columns.items() if size}

        def excess() -> int:
            return sum(columns.values()) + 2 * (len(columns) - 1) - width

        for name in DROPPED:
            if excess() > max(0, columns.get("point", 0) - POINT):
                columns.pop(name, None)
        if "point" in columns:
            columns["point"] = max(1, columns["point"] - max(0, excess()))
        lines = ([cut(trial[name], size).ljust(size) for name, size in columns.items()] for trial in trials)
        return ["  ".join(line).rstrip() for line in lines]

    def _trial(self, job: Job) -> dict[str, str]:
        progress, planned = self.progress, self.progress.epochs_planned(job)
        pace, speed, left = progress.paces.get(job.id), progress.speed(job), progress.left(job)
        state, place = "starting" if pace is None else "", progress.places.get(job.id, "cpu")
        if not job.alive:
            state = "lease expired"
        elif job.epochs >= planned:
            state = "recording"
        return {
            "number": str(number(job)),
            "point": f"{point_text(job.spec.point)} {job.part}".strip() if job.spec else "not chosen yet",
            "epoch": f"epoch {job.epochs}/{planned}",
            "state": state,
            "left": f"{duration(left)} left" if left else "",
            "nmse": f"val NMSE {pace.best:.4g}" if pace and pace.best is not None else "",
            "speed": f"{speed:.1f} epochs/s" if speed else "",
            "card": "" if place == "cpu" else place,  # the line of the worker says it of the CPU
            "attempt": f"attempt {job.attempt}" if job.attempt > 1 else "",
        }


class Display:
    """A live display on a terminal, lines in a pipe: a context manager whose `tick` may be called at any rate."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console = progress, console
        self._live = Live(console=console, auto_refresh=False, transient=True) if is_live(console) else None
        self._next = 0.0

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self, trouble: str | None = None) -> bool:
        """Show the progress again, if the last time was long enough ago; return whether the database was read."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + (REFRESH if self._live is not None else LINE_INTERVAL)
        view = View.look(self.progress, trouble)
        if self._live is not None:
            self._live.update(view, refresh=True)
        else:
            self.console.print(self.progress.line() + in_brackets(view.trouble or ""), soft_wrap=True)
        return view.is_read


def is_live(console: Console) -> bool:
    """Return whether the console can replace what it has shown; a terminal that cannot move its cursor gets lines."""
    return console.is_terminal and not console.is_dumb_terminal


def _about(worker: Present | None) -> str:
    """Return how many trainers a worker has, and since when it is here, or silent."""
    if worker is None:
        return "ended"
    since = f"here for {duration(worker.here)}" if worker.alive else f"SILENT for {duration(worker.silent)}"
    others = ", ".join(f"{count} of {study}" for study, count in worker.elsewhere.items())
    pool = f", of the pool{in_brackets(f'also {others}' if others else '')}" if worker.in_pool else ""
    return f"{counted(worker.trainers, 'trainer')} ({worker.device}){pool}, {since}"
