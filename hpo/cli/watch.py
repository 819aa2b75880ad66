"""What a terminal, or a cell of a notebook, shows of studies while `hpo run` or `hpo worker` works on them."""

import io
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hpo.api import Begun, Details, Outcome, Plan, Stop, Watch
from hpo.cli.options import say
from hpo.report import results, tables
from hpo.report.display import REFRESH, Display, View, is_live
from hpo.report.progress import Progress
from hpo.study import sizing
from hpo.text import counted, duration

SETTLED = 20.0  # seconds after which the first measurements tell how long everything takes
LATEST = 40.0  # seconds after which that is said though nothing is known
HOUR = 3600.0  # seconds of work above which a first result is offered
FIRST_RESULT = 600.0  # seconds that it takes, about

TARGETS = 9  # that the head of a run names
WIDTH = 100  # characters of what a cell shows


class Plain(Watch):
    """Lines alone: of steps that take time, and of what is wrong when that changes."""

    def __init__(self) -> None:
        self._trouble: str | None = None

    def say(self, line: str) -> None:
        say(line)

    def tick(self, trouble: str | None) -> None:
        if trouble is not None and trouble != self._trouble:
            say(trouble)
        self._trouble = trouble


class Terminal(Watch):
    """A live display, or plain lines in a pipe; use as a context manager."""

    def __init__(self, console: Console | None = None, *, is_run: bool) -> None:
        """`console`: standard output's if it is None. `is_run`: print what the studies are, how long they take, and
        what they came to."""
        self.console, self.is_run = console or tables.console(), is_run
        self._display: Display | None = None
        self._begun: Begun | None = None  # until it is said how long everything takes
        self._began, self._is_announced = 0.0, False  # monotonic seconds

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def say(self, line: str) -> None:
        say(line)

    def begin(self, begun: Begun) -> None:
        if self.is_run:
            print_head(self.console, begun)
        self._display = Display(Progress(begun.queue, begun.row), self.console)
        if is_live(self.console):
            logging.getLogger("hpo").setLevel(logging.WARNING)  # the display shows the events
        self._display.__enter__()
        if self.is_run and not self._is_announced:
            self._begun, self._began = begun, time.monotonic()

    def tick(self, trouble: str | None) -> None:
        try:
            if self._display is not None and self._display.tick(trouble):
                self._announce(self._display.progress)
        except OSError:  # a full disk under a log file ends no work
            self.console.quiet = True

    def end(self, outcome: Outcome) -> None:
        self.close()
        if not self.is_run:
            return
        if outcome.closed:
            print_result(self.console, outcome)
        else:
            text = f"Stopped{by(outcome.stop)}: what is done is kept. The same command goes on."
            self.console.print(text, soft_wrap=True)

    def close(self) -> None:
        if self._display is not None:
            self._display.__exit__(None, None, None)
            self._display = None

    def _announce(self, progress: Progress) -> None:
        """Say once, within the first minute of the first study, how long everything takes."""
        begun, here = self._begun, time.monotonic() - self._began
        if begun is None or here < SETTLED or (here < LATEST and progress.seconds_left is None):
            return
        self._begun, self._is_announced = None, True
        for line in announcement(progress, begun.later, sys.argv[1:], program=program()):
            self.console.print(line, soft_wrap=not self.console.is_terminal)


class Cell(Watch):
    """Shows the progress of a study below a cell of a notebook, in one place."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._shown: Any = None  # what IPython updates
        self._next = 0.0

    def say(self, line: str) -> None:
        print(line)

    def begin(self, begun: Begun) -> None:
        from IPython.display import Markdown, display

        links = " · ".join(f"[{name}]({link})" for name, link in begun.links.items())
        display(Markdown(f"**{begun.row.name}** {links}"))
        self._progress, self._next = Progress(begun.queue, begun.row), 0.0
        self._shown = display({"text/plain": "…"}, raw=True, display_id=True)

    def tick(self, trouble: str | None) -> None:
        now = time.monotonic()
        if self._progress is None or now < self._next:
            return
        self._next = now + REFRESH
        view = View.look(self._progress, trouble)
        self._shown.update({"text/plain": as_text(lambda console: console.print(view))}, raw=True)

    def end(self, outcome: Outcome) -> None:
        text = "Closed." if outcome.closed else "Stopped: what is done is kept. The same call goes on."
        self._shown.update({"text/plain": text}, raw=True)


def as_text(show: Callable[[Console], None]) -> str:
    """Return what a cell of a notebook shows of what is printed to a console."""
    with io.StringIO() as file:
        show(tables.plain_console(file, width=WIDTH, is_screen=True))
        return file.getvalue()


def print_head(console: Console, study: Begun | Details) -> None:
    """Print what a study is, and where MLflow shows it."""
    row, planned = study.row, study.row.specification
    bare = ", NOT PRETRAINED" if planned.at_random else ""
    text = f"Study {row.name}: {sizing.extent(planned)}, data set {row.facts.data.name}, seed {planned.seed}"
    console.print(f"{text}{bare}.")
    facts, (channels, height, width) = row.facts.data, row.facts.data.image_shape
    names = ", ".join(facts.target_names[:TARGETS]) + (", …" if len(facts.target_names) > TARGETS else "")
    sizes = " / ".join(map(str, facts.sizes))
    console.print(
        f"  {width} x {height} pixels, {counted(channels, 'channel')}; {sizes} images for "
        f"training / validation / test; targets {names} in {facts.unit}{facts.beside}",
        soft_wrap=not console.is_terminal,
    )
    for name, link in study.links.items():
        console.print(f"  {name}: {link}", soft_wrap=True)


def print_result(console: Console, study: Outcome | Details) -> None:
    """Print what a study gave, and the next commands."""
    image = "" if study.image is None else _near(study.image)
    results.show_result(console, study.row, list(study.jobs), dict(study.links), program=program(), image=image)


def announcement(progress: Progress, later: Sequence[Plan], words: Sequence[str], *, program: str) -> list[str]:
    """Return how long everything takes and, above an hour, how to get a first result. `words`: those of the command."""
    left, forecast = progress.seconds_left, progress.forecast
    if left is None:
        return ["How long everything takes is not known yet: no epoch has been trained. See the time left below."]
    total = left + sum(
        forecast.later_seconds(plan.costs(), int(plan.study.training["epochs"]), plan.study.pruner) for plan in later
    )
    if not total:
        return []  # others have trained the last of it
    what = f"{1 + len(later)} studies, roughly" if later else counted(len(progress.jobs), "trial")
    trainers = counted(forecast.trainers, "trainer")
    until = time.strftime("%H:%M" if total < HOUR else "%a %H:%M", time.localtime(time.time() + total))
    lines = [f"Everything ({what}) takes about {duration(total)} more with {trainers}, until {until}."]
    planned = max((progress.epochs_planned(job) for job in progress.jobs), default=0)
    epochs = max(1, round(planned * FIRST_RESULT / total))
    if total > HOUR and epochs < planned:
        command = shlex.join([*_without_epochs(words), "--epochs", str(epochs)])
        lines.append(f"A first result in about {duration(FIRST_RESULT)}: {program} {command}")
    return lines


def _without_epochs(words: Sequence[str]) -> list[str]:
    """Return the words of a command without what they say of epochs."""
    kept: list[str] = []
    for word in words:
        if (word.startswith("training.epochs=") and kept and kept[-1] == "--set") or (kept and kept[-1] == "--epochs"):
            kept.pop()
        elif not word.startswith(("--epochs=", "--set=training.epochs=")):
            kept.append(word)
    return kept


def by(request: Stop | None) -> str:
    """Return who, or which budget, stopped a study when, for a message; nothing if that was a signal."""
    if request is None:
        return ""
    how = "" if request.is_budget else " (hpo stop)"
    return f" by {request.by} at {time.strftime('%H:%M:%S', time.localtime(request.at))}{how}"


def program() -> str:
    """Return how this shell would call hpo: `hpo`, or the path of the environment's own."""
    called = Path(sys.argv[0])
    if called.name != "hpo" or shutil.which("hpo") == str(called.absolute()):
        return "hpo"
    return shlex.quote(_near(called.absolute()))


def _near(path: Path) -> str:
    """Return the path as one would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
