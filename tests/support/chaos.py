"""A chaos run: studies of tiny networks under random faults and commands; after each round every invariant is checked.

A round is one study with two workers, or two studies with one worker each, in one database or in two that share an
MLflow server and a data set. Some workers are of the pool. Every few seconds one fault
(tests/support/chaos_faults.py) or one command of a user (tests/support/chaos_commands.py). A worker that ended is
started again, a service too. What was trained to its end must be what a study gives that ran in peace, to the bit.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cells
import psutil
from chaos_commands import COMMANDS
from chaos_faults import FAULTS
from proxy import Proxy
from shell import create_database, mlflow_processes, postgres_processes, resume

from hpo import settings
from hpo.operations import invariants
from hpo.queue import ENDED, DatabaseLost, Job, Queue
from hpo.recording.reconciler import Reconciler
from hpo.search import sampling
from hpo.services import serving
from hpo.tracking import experiments, registry
from hpo.tracking.client import OWNER, Tracker

LEASE = 3.0  # seconds
WORKERS = 2  # of a round
EPOCHS = 250  # a trial takes a few seconds
RATES = ("3e-3", "1e-3", "3e-4", "1e-4")
REPEATS = 2
PAUSE = (0.5, 4.0)  # seconds between two faults or commands
COMMANDED = 0.35  # how many of them are commands
FAULTY = 90.0  # seconds of faults in one round; then it is left in peace
FEWEST = 6  # faults, and commands, of a whole run, however slow the machine
HASTY = 0.3  # how often the first fault comes before the studies of a round are planned
LIMIT = 300.0  # seconds in peace after which a study that is not closed has hung
PATIENCE = 120.0  # seconds in peace for a command or a worker to end
POOLED = 0.4  # how often a worker of a planned study is one of the pool
REUSED = 0.5  # how often a study takes the name of a deleted one

# What is special about a study, by its kind: lines before its tables, and tables.
KINDS = {
    "grid": ("", ""),
    "repeats": (f"repeats = {REPEATS}", ""),
    "tpe": ("", '[sampler]\nname = "tpe"\ntrials = {points}'),
    "qmc": ("", '[sampler]\nname = "qmc"\ntrials = {points}'),
    "median": ("", '[pruner]\nname = "median"\nstartup_trials = 1\nwarmup_epochs = 20'),
    "halving": ("", '[pruner]\nname = "successive-halving"\nmin_epochs = 20\nreduction_factor = 2'),
    "tpe-halving": (
        "",
        '[sampler]\nname = "tpe"\ntrials = {points}\n[pruner]\nname = "successive-halving"\nmin_epochs = 40',
    ),
}


@dataclass
class Counts:
    """What a chaos run did and found."""

    studies: Counter[str] = field(default_factory=Counter)  # by kind
    states: Counter[str] = field(default_factory=Counter)  # of their trials in the end
    attempts: int = 0
    claims: Counter[str] = field(default_factory=Counter)  # of trials, by the kind of worker
    faults: Counter[str] = field(default_factory=Counter)
    commands: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def shown(counter: Counter[str]) -> str:
            return ", ".join(f"{count} x {name}" for name, count in sorted(counter.items())) or "none"

        return (
            f"{self.studies.total()} studies ({shown(self.studies)}), {self.states.total()} trials "
            f"({shown(self.states)}) in {self.attempts} attempts, claimed by {shown(self.claims)}; "
            f"{self.faults.total()} faults: {shown(self.faults)}; "
            f"{self.commands.total()} commands: {shown(self.commands)}; {len(self.violations)} violations"
        )


@dataclass
class Lab:
    """A database, with the studies in it."""

    name: str
    url: str
    queue: Queue
    closed: list["Study"] = field(default_factory=list)  # and not deleted


@dataclass(eq=False)
class Study:
    """A study of a round."""

    lab: Lab
    name: str
    kind: str
    file: Path
    workers: list[subprocess.Popen] = field(default_factory=list)
    logs: list[Path] = field(default_factory=list)
    pruned: set[tuple[int, int]] = field(default_factory=set)  # number and repeat of trials that a pruner ended
    cancelled: dict[int, bool] = field(default_factory=dict)  # by number; false: brought back, or not sure
    base: "Study | None" = None  # whose best point it trains again
    deleted: bool = False

    def trials(self) -> list[Job]:
        return [job for job in self.lab.queue.jobs(self.name) if job.kind == "trial"]

    def closing(self) -> str | None:
        """The state of its closing; None if it is not planned, or the database is away."""
        with suppress(DatabaseLost):
            return self.lab.queue.closing_state(self.name) if self.lab.queue.installed() else None
        return None

    def ended(self) -> bool:
        return self.deleted or self.closing() in ENDED

    def planned(self) -> bool:
        return self.deleted or self.closing() is not None

    def cancelling(self, number: int, *, sure: bool) -> int:
        """Note that a trial was cancelled (or may have been, or was brought back); return its number."""
        self.cancelled[number] = sure
        return number

    def note_pruned(self) -> None:
        with suppress(DatabaseLost):
            if self.lab.queue.installed():
                self.pruned |= {(job.number, job.repeat) for job in self.trials() if job.state == "pruned"}


@dataclass
class Command:
    """A command of a user under way."""

    words: tuple[str, ...]
    process: subprocess.Popen
    log: Path
    then: Callable[[int, str], object]  # is given its exit code and what it said


def run(folder: Path, *, seconds: float, seed: int, points: int = 8, report: Callable[[str], object] = print) -> Counts:
    """Rounds of studies of 4 to 8 `points` until the time is up (the last one is finished), each checked when its
    studies have closed."""
    chaos = Chaos(folder, seed, points)
    try:
        chaos.calm()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not chaos.counts.violations:
            chaos.round(end)
            report(f"{max(0, end - time.monotonic()):5.0f} s left: {chaos.counts}")
        chaos.check_all()
    finally:
        chaos.close()
    return chaos.counts


class Chaos:
    lease, crew = LEASE, WORKERS

    def __init__(self, folder: Path, seed: int, points: int) -> None:
        self.folder, self.random, self.counts, self.points = folder, random.Random(seed), Counts(), points
        self.settings = settings.read({"HPO_HOME": str(folder / "home")})
        self.data = cells.make(folder / "cells")
        self.plain = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "MLFLOW_"))}
        found = serving.up(self.settings, report=lambda line: None)[0]
        self.proxy = Proxy(found.tracking_uri)
        self.labs = [Lab("first", found.database_url, Queue(found.database_url))]
        other = create_database(found.database_url, "other")
        self.labs.append(Lab("second", other, Queue(other)))
        self.studies: list[Study] = []  # of the round
        self.commands: list[Command] = []
        self.free: list[str] = []  # names of deleted studies
        self.expected: dict[str, Job] = {}  # by point and seed
        self.decks: dict[str, list[Any]] = {}
        self.planned = self.started = 0

    def draw(self, deck: str, cards: Iterable[Any]) -> Any:
        """The next of these things; each comes once before one comes again."""
        if not self.decks.get(deck):
            self.decks[deck] = list(cards)
            self.random.shuffle(self.decks[deck])
        return self.decks[deck].pop()

    def up(self) -> serving.Services:
        found = serving.up(self.settings, report=lambda line: None)[0]
        self.proxy.upstream = urlsplit(found.tracking_uri)
        return found

    def close(self) -> None:
        for process in [*(command.process for command in self.commands), *self.workers()]:
            kill(process)
        resume([*self.postgres(), *self.mlflow()])
        for lab in self.labs:
            lab.queue.close()
        self.proxy.close()
        serving.erase(self.settings)

    # Processes

    def workers(self) -> list[subprocess.Popen]:
        return [worker for study in self.studies for worker in study.workers if worker.poll() is None]

    def postgres(self) -> list[psutil.Process]:
        return postgres_processes(self.settings)

    def mlflow(self) -> list[psutil.Process]:
        return mlflow_processes(self.settings)

    def hpo(self, lab: Lab, log: Path, *words: str) -> subprocess.Popen:
        """Start `hpo WORDS` on a database, with what it says in the file `log`."""
        environment = self.plain | {
            "HPO_HOME": str(self.settings.home),
            "HPO_DATABASE_URL": lab.url,
            "MLFLOW_TRACKING_URI": self.proxy.url,
            "HPO_LEASE": str(LEASE),
            "HPO_CHECKPOINT_INTERVAL": "0.5",
            "HPO_TRAINERS": "1",
        }
        with log.open("w") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "hpo", *words],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start(self, study: Study, *options: str, pooled: bool = False) -> None:
        """A worker of the study, or one of the pool in its database."""
        self.started += 1
        log = self.folder / f"{study.lab.name}-{study.name}-{self.started}{'-pool' if pooled else ''}.log"
        study.logs.append(log)
        words = ["worker", "--idle-exit", "2"] if pooled else ["run", "--study", str(study.file)]
        study.workers.append(self.hpo(study.lab, log, *words, *options))

    def command(self, lab: Lab, *words: str, then: Callable[[int, str], object] = lambda *_: None) -> Command:
        """Begin a command of a user; `then` is called with its exit code and what it said when it has ended."""
        self.started += 1
        log = self.folder / f"command-{self.started}-{words[0]}.log"
        command = Command(words, self.hpo(lab, log, *words), log, then)
        self.commands.append(command)
        return command

    def collect(self) -> None:
        """Look at the commands that have ended."""
        for command in [command for command in self.commands if command.process.poll() is not None]:
            self.commands.remove(command)
            said = command.log.read_text(errors="replace")
            if command.process.returncode not in (0, 1) or "Traceback" in said:
                self.violation(
                    f"`hpo {' '.join(command.words)}` ended with {command.process.returncode}: {said[-2000:]}"
                )
            command.then(command.process.returncode, said)

    # Studies

    def plan(self, lab: Lab, kind: str) -> Study:
        """Write the file of a study: two points for each learning rate."""
        name = f"chaos-{self.planned}"
        self.planned += 1
        if self.free and self.random.random() < REUSED:
            name = self.free.pop()
        folder = self.folder / lab.name
        folder.mkdir(exist_ok=True)
        rates = RATES[: self.points // (2 * REPEATS if kind == "repeats" else 2)]
        file = cells.study(folder, name, data=self.data, epochs=EPOCHS, rates=f"[{', '.join(rates)}]")
        before, tables = KINDS[kind]
        file.write_text(f"{before}\n{file.read_text()}\n{tables.format(points=self.points)}\n")
        return Study(lab, name, kind, file)

    def again(self, lab: Lab) -> Study | None:
        """A study of the best point of an earlier one, with the other seed of the calm one."""
        bases = [
            study
            for study in lab.closed
            if study.kind not in ("repeats", "again") and any(job.state == "done" for job in study.trials())
        ]
        if not bases:
            return None
        study = self.plan(lab, "grid")
        study.kind, study.base = "again", self.random.choice(bases)
        study.file.write_text(f'best_of = "{study.base.file}"\npoints = 1\nseed = {REPEATS - 1}\n')
        return study

    def calm(self) -> None:
        """What the points give when nothing happens."""
        study = self.plan(self.labs[0], "grid")
        study.file.write_text(f"repeats = {REPEATS}\n{study.file.read_text()}")
        self.studies = [study]
        for _ in range(WORKERS):
            self.start(study)
        codes = [worker.wait() for worker in study.workers]
        assert codes == [0] * WORKERS, "\n".join(log.read_text() for log in study.logs)
        self.expected = {point(job): job for job in study.trials()}
        study.lab.closed.append(study)
        study.kind, self.studies = "repeats", []

    def round(self, end: float) -> None:
        """One or two studies under faults, which cease at `end` (monotonic seconds), unless there were too few."""
        first, second = self.labs
        labs = self.draw("labs", ([first, second], [first, first], [self.random.choice(self.labs)]))
        for lab in labs:
            kind = self.draw("kinds", [*KINDS, "again"])
            study = self.again(lab) if kind == "again" else self.plan(lab, kind)
            self.studies.append(study or self.plan(lab, self.draw("kinds", KINDS)))
        hasty = self.random.random() < HASTY
        last = time.monotonic()
        end = min(end, last + FAULTY)
        while self.commands or not all(study.ended() for study in self.studies):
            self.collect()
            for study in self.studies:
                study.note_pruned()
                study.workers = [worker for worker in study.workers if worker.poll() is None]
                while len(study.workers) < WORKERS // len(labs) and not study.ended():
                    self.start(study, pooled=study.closing() is not None and self.random.random() < POOLED)
            time.sleep(self.random.uniform(*PAUSE))
            begun = hasty or all(study.planned() for study in self.studies)
            few = min(self.counts.faults.total(), self.counts.commands.total()) < FEWEST
            if begun and (time.monotonic() < end or few):
                self.happen()
                last = time.monotonic()
            elif time.monotonic() > max(end, last) + LIMIT:
                for study in self.studies:
                    if not study.ended():
                        self.violation(f"{study.name} did not close within {LIMIT:.0f} s of peace", study)
                for command in self.commands:
                    self.violation(f"`hpo {' '.join(command.words)}` does not end within {LIMIT:.0f} s of peace")
                break
        self.up()
        for worker in self.workers():
            with suppress(subprocess.TimeoutExpired):
                worker.wait(PATIENCE)
            if worker.poll() is None:
                self.violation("a worker does not end though its study is closed")
                kill(worker)
        for study in self.studies:
            self.check(study)
            self.counts.studies[study.kind] += 1
            if not study.deleted:
                study.lab.closed.append(study)
        self.studies = []

    def happen(self) -> None:
        """A fault or a command; then the services run again."""
        commanded = self.random.random() < COMMANDED
        deck, cards = ("commands", COMMANDS) if commanded else ("faults", FAULTS)
        counter = self.counts.commands if commanded else self.counts.faults
        for _ in cards:
            act = self.draw(deck, cards)
            with suppress(psutil.Error, DatabaseLost):  # it ended by itself just now, or the database is not back yet
                if act(self) is not False:
                    counter[act.__name__.replace("_", " ")] += 1
                    break
        self.up()

    def give_up(self, study: Study) -> None:
        """Forget a study that somebody deleted while nobody held anything of it."""
        study.deleted = True
        for worker in study.workers:
            kill(worker)

    # Checks

    def violation(self, what: str, study: Study | None = None) -> None:
        self.counts.violations.append(
            what if study is None else f"{study.name} ({study.kind}, {study.lab.name}): {what}"
        )

    @contextmanager
    def shown(self, study: Study) -> Iterator[Reconciler]:
        store = sampling.storage(study.lab.url)
        try:
            yield Reconciler(study.lab.queue, Tracker(self.up().tracking_uri), store, study.lab.queue.study(study.name))
        finally:
            store.remove_session()
            store.engine.dispose()

    def check(self, study: Study) -> None:
        """Every invariant, after one lease and one reconciling pass; and every result, to the bit."""
        for log in study.logs:
            said = log.read_text(errors="replace")
            if "Traceback" in said:
                self.violation(f"a traceback in {log}", study)
            kind = "worker of the pool" if log.stem.endswith("-pool") else "worker of one study"
            self.counts.claims[kind] += said.count(" claimed: ")
        if study.deleted:
            return
        time.sleep(LEASE)
        with self.shown(study) as shown:
            shown.reconcile(lease=LEASE, older_than=0)
            for each in invariants.check(shown):
                self.violation(f"{each.rule}: {each.what}", study)
        study.note_pruned()
        for log in study.logs:
            ended = re.findall(rf"trial (\d+) of {re.escape(study.name)} pruned after", log.read_text(errors="replace"))
            study.pruned |= {(int(number), 0) for number in ended}
        for job in study.trials():
            self.counts.attempts += job.attempt
            self.counts.states[job.state] += 1
            if study.cancelled.get(job.number) and job.state != "cancelled":
                self.violation(f"trial {job.number} was cancelled, and is {job.state}", study)
            if (job.number, job.repeat) in study.pruned and job.number not in study.cancelled and job.state != "pruned":
                self.violation(f"trial {job.number} was ended by the pruner, and is {job.state}", study)
            if job.state == "done":
                for difference in self.differences(job):
                    self.violation(f"trial {job.number}: {difference}", study)

    def differences(self, job: Job) -> Iterator[str]:
        """Where a result is not the undisturbed one."""
        calm = self.expected[point(job)].result
        assert calm is not None and job.result is not None
        for key in ("best_val_nmse", "best_epoch", "last_val_nmse", "validation"):
            if getattr(job.result, key) != getattr(calm, key):
                yield f"{key} is {getattr(job.result, key)}, undisturbed {getattr(calm, key)}"
        if job.result.files["weights.safetensors"] != calm.files["weights.safetensors"]:
            yield "other weights than undisturbed"

    def check_all(self) -> None:
        """The invariants of every study once more: what came later must not have harmed it."""
        for study in (study for lab in self.labs for study in lab.closed):
            with self.shown(study) as shown:
                for each in invariants.check(shown):
                    self.violation(f"in the end: {each.rule}: {each.what}", study)

    def check_deleted(self, study: Study) -> None:
        """Of a deleted study nothing is left in the database, in Optuna's tables, and in MLflow."""
        found = self.up()
        tracker, store = Tracker(found.tracking_uri), sampling.storage(study.lab.url)
        if study.name in [row.name for row in study.lab.queue.studies()]:
            self.violation("is deleted, and in the database", study)
        if study.name in [each.study_name for each in store.get_all_studies()]:
            self.violation("is deleted, and in Optuna", study)
        store.remove_session()
        store.engine.dispose()
        owner = study.lab.queue.database_id()
        if study.name in [experiment.name for experiment in experiments.owned(tracker, owner)]:
            self.violation("is deleted, and an experiment of MLflow", study)
        for model in tracker.client.search_registered_models():
            for version in registry.versions(tracker, model.name):
                if version.tags.get("hpo.study") == study.name and version.tags.get(OWNER) == owner:
                    self.violation(f"is deleted, and has version {version.number} of {model.name}", study)


def point(job: Job) -> str:
    assert job.spec is not None
    return json.dumps([job.spec.point, job.spec.seed], sort_keys=True)


def kill(worker: subprocess.Popen) -> None:
    with suppress(psutil.Error):
        process = psutil.Process(worker.pid)
        for each in [*process.children(recursive=True), process]:
            each.kill()
    worker.wait()
