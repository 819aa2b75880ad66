"""A chaos run: studies of tiny networks under random faults; after each one every invariant is checked.

Two `hpo run` of one study, one trainer each, on services of their own. Every few seconds one fault: a trainer or a
worker is killed, frozen beyond its lease or stopped, Postgres or the MLflow server is stopped, killed or frozen. A
worker that ended is started again, a service too. The results must be those of a study that ran in peace, to the bit.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import cells
import psutil
from shell import mlflow_processes, postgres_processes, resume, suspend

from hpo import invariants, sampling, services, settings
from hpo.mirror import Mirror
from hpo.queue import ENDED, DatabaseLost, Job, Queue
from hpo.tracking import Tracker

LEASE = 3.0  # seconds
WORKERS = 2
EPOCHS = 250  # a trial takes a few seconds
RATES = ("3e-3", "1e-3", "3e-4", "1e-4")
PAUSE = (0.5, 4.0)  # seconds between two faults
FAULTY = 90.0  # seconds of faults in one study; then it is left in peace
FEWEST = 6  # faults of a whole run, however slow the machine
LIMIT = 300.0  # seconds in peace after which a study that is not closed has hung


@dataclass
class Counts:
    """What a chaos run did and found."""

    studies: int = 0
    done: int = 0
    dead: int = 0
    attempts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        return (
            f"{self.studies} studies, {self.done} points recorded in {self.attempts} attempts, {self.dead} dead after "
            f"three; {sum(self.faults.values())} faults: {faults}; {len(self.violations)} violations"
        )


def run(folder: Path, *, seconds: float, seed: int, points: int = 8, report: Callable[[str], object] = print) -> Counts:
    """Run studies of 2 to 8 `points` under faults until the time is up (the last one is finished), each checked when
    it has closed."""
    chaos = Chaos(folder, seed, points)
    try:
        chaos.calm()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not chaos.counts.violations:
            chaos.study(end)
            report(f"{max(0, end - time.monotonic()):5.0f} s left: {chaos.counts}")
    finally:
        chaos.close()
    return chaos.counts


class Chaos:
    def __init__(self, folder: Path, seed: int, points: int) -> None:
        self.folder, self.random, self.counts = folder, random.Random(seed), Counts()
        self.rates = ", ".join(RATES[: points // 2])
        self.settings = settings.read({"HPO_HOME": str(folder / "home")})
        self.data = cells.make(folder / "cells")
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "MLFLOW_"))}
        self.environment = plain | {
            "HPO_HOME": str(self.settings.home),
            "HPO_LEASE": str(LEASE),
            "HPO_CHECKPOINT_INTERVAL": "0.5",
            "HPO_TRAINERS": "1",
        }
        self.workers: list[subprocess.Popen] = []
        self.logs: list[Path] = []
        self.expected: dict[str, Job] = {}
        self.queue = Queue(self.up().database_url)

    def up(self) -> services.Services:
        return services.up(self.settings, report=lambda line: None)[0]

    def close(self) -> None:
        for worker in self.workers:
            kill(worker)
        resume([*self.postgres(), *self.mlflow()])
        self.queue.close()
        services.erase(self.settings)

    # Studies

    def calm(self) -> None:
        """What the points give when nothing happens."""
        name = self.plan("calm")
        self.start(name)
        assert self.workers.pop().wait() == 0, self.logs[-1].read_text()
        self.expected = {point(job): job for job in self.trials("calm")}

    def plan(self, name: str) -> Path:
        """The file of a study: two points for each learning rate."""
        return cells.study(self.folder, name, data=self.data, epochs=EPOCHS, rates=f"[{self.rates}]")

    def study(self, end: float) -> None:
        """One study under faults, which cease at `end` (monotonic seconds), unless there were too few."""
        name = f"chaos-{self.counts.studies}"
        file = self.plan(name)
        self.logs = []
        end = min(end, time.monotonic() + FAULTY)
        while not self.closed(name):
            self.workers = [worker for worker in self.workers if worker.poll() is None]
            while len(self.workers) < WORKERS:
                self.start(file)
            time.sleep(self.random.uniform(*PAUSE))
            if time.monotonic() < end or sum(self.counts.faults.values()) < FEWEST:
                self.fault()
            elif time.monotonic() > end + LIMIT:
                self.counts.violations.append(f"{name} did not close within {LIMIT:.0f} s of peace")
                break
        self.up()
        for worker in self.workers:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(90)
            if worker.poll() is None:
                self.counts.violations.append(f"{name}: a worker does not end though the study is closed")
                kill(worker)
        self.workers = []
        self.check(name)
        self.counts.studies += 1

    def closed(self, name: str) -> bool:
        try:
            return self.queue.installed() and self.queue.closing_state(name) in ENDED
        except DatabaseLost:
            return False

    def trials(self, name: str) -> list[Job]:
        return [job for job in self.queue.jobs(name) if job.kind == "trial"]

    def start(self, file: Path) -> None:
        log = self.folder / f"{file.stem}-{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("w") as output:
            words = [sys.executable, "-m", "hpo", "run", "--study", str(file)]
            self.workers.append(
                subprocess.Popen(
                    words, env=self.environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )

    def check(self, name: str) -> None:
        """Every invariant, after one lease and one reconciling pass; and every result, to the bit."""
        time.sleep(LEASE)
        found = self.up()
        store = sampling.storage(found.database_url)
        shown = Mirror(self.queue, Tracker(found.tracking_uri), store, self.queue.study(name))
        shown.reconcile(lease=LEASE, older_than=0)
        violations = [f"{each.rule}: {each.what}" for each in invariants.check(shown)]
        store.remove_session()
        store.engine.dispose()
        for job in self.trials(name):
            self.counts.attempts += job.attempt
            self.counts.dead += job.state == "dead"
            if job.state != "done":
                continue
            self.counts.done += 1
            calm = self.expected[point(job)].result
            assert calm is not None and job.result is not None
            for key in ("best_val_nmse", "best_epoch", "last_val_nmse", "validation"):
                if job.result[key] != calm[key]:
                    violations.append(f"trial {job.number}: {key} is {job.result[key]}, undisturbed {calm[key]}")
            if job.result["files"]["weights.safetensors"] != calm["files"]["weights.safetensors"]:
                violations.append(f"trial {job.number}: other weights than undisturbed")
        violations += [f"a traceback in {log}" for log in self.logs if "Traceback" in log.read_text(errors="replace")]
        self.counts.violations += [f"{name}: {each}" for each in violations]

    # Faults

    def fault(self) -> None:
        fault = self.random.choice(FAULTS)
        self.counts.faults[fault.__name__.replace("_", " ").strip()] += 1
        with suppress(psutil.Error):  # it ended by itself just now
            fault(self)
        self.up()

    def worker(self) -> psutil.Process:
        return psutil.Process(self.random.choice(self.workers).pid)

    def postgres(self) -> list[psutil.Process]:
        return postgres_processes(self.settings)

    def mlflow(self) -> list[psutil.Process]:
        return mlflow_processes(self.settings)

    def kill_trainer(self) -> None:
        trainers = [child for child in self.worker().children() if "hpo.trainer" in " ".join(child.cmdline())]
        for trainer in trainers:
            trainer.kill()

    def kill_worker(self) -> None:
        self.worker().kill()

    def freeze_worker_beyond_its_lease(self) -> None:
        worker = self.worker()
        frozen = [worker, *worker.children()]
        suspend(frozen)
        time.sleep(LEASE + self.random.uniform(0.5, 3))
        resume(frozen)

    def stop_worker(self) -> None:
        self.worker().send_signal(self.random.choice([signal.SIGTERM, signal.SIGINT]))

    def stop_worker_twice(self) -> None:
        worker = self.worker()
        worker.send_signal(signal.SIGINT)
        time.sleep(self.random.uniform(0, 1))
        worker.send_signal(signal.SIGINT)

    def stop_postgres_immediately(self) -> None:
        self.signal_postmaster(signal.SIGQUIT)

    def stop_postgres_fast(self) -> None:
        self.signal_postmaster(signal.SIGINT)

    def kill_postgres(self) -> None:
        self.signal_postmaster(signal.SIGKILL)

    def signal_postmaster(self, number: signal.Signals) -> None:
        for postmaster in self.postgres()[:1]:
            postmaster.send_signal(number)
            psutil.wait_procs([postmaster], timeout=20)
            time.sleep(self.random.uniform(0, 2 * LEASE))

    def freeze_postgres(self) -> None:
        self.freeze(self.postgres())

    def kill_mlflow(self) -> None:
        for process in self.mlflow():
            with suppress(psutil.Error):
                process.kill()
        time.sleep(self.random.uniform(0, 2 * LEASE))

    def freeze_mlflow(self) -> None:
        self.freeze(self.mlflow())

    def freeze(self, processes: list[psutil.Process]) -> None:
        suspend(processes)
        time.sleep(self.random.uniform(0, self.random.choice([LEASE, 14])))  # 14: beyond the client's patience of 10 s
        resume(processes)


FAULTS = (
    *(Chaos.kill_trainer, Chaos.kill_worker, Chaos.freeze_worker_beyond_its_lease),
    *(Chaos.stop_worker, Chaos.stop_worker_twice),
    *(Chaos.stop_postgres_immediately, Chaos.stop_postgres_fast, Chaos.kill_postgres, Chaos.freeze_postgres),
    *(Chaos.kill_mlflow, Chaos.freeze_mlflow),
)


def point(job: Job) -> str:
    assert job.spec is not None
    return json.dumps(job.spec["point"])


def kill(worker: subprocess.Popen) -> None:
    with suppress(psutil.Error):
        process = psutil.Process(worker.pid)
        for each in [*process.children(recursive=True), process]:
            each.kill()
    worker.wait()
