"""How many trials a second are recorded, beside Optuna with MLflow's own client: `python bench/throughput.py`.

    python bench/throughput.py [--workers 1 2 4] [--trials 60] [--study 200] [--rival NAME …] [--ray DIR]

Trials without training: each has a curve of 300 epochs and a model of 1 MB. `hpo` is the real worker with one trainer
process, whose training stops after the first epoch and repeats its scores; all else is real: claims, leases, the model
packaged and hashed, everything recorded. The rivals are as many processes on the same servers:

- `optuna`: `Study.optimize`, the client logs the same curve and table, `mlflow.pytorch.log_model` a pickle;
- `optuna-no-model`: the same without the model;
- `calls`: no search at all. What hpo has stored of one of its trials is stored again, with the client's own calls;
- `ray`: Ray Tune with its MLflow callback (`bench/ray_tune.py`), in an environment of its own, made in DIR (default:
  `hpo-bench-ray` in the temporary folder) at the first call. One trial a process, from its start: the
  callback sends every score and every figure of Ray's own in a request of its own, thousands a trial.

A rate counts from the time when as many trials have ended as there are processes, so that no start is in it. CPU
seconds are of all processes of one kind, from the first trial on. Before all that `hpo run` trains a real study of 200
trials of 3 epochs, start and end included.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from machine import Home, machine, temporary_home, versions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "support"))

EPOCHS, SCORES = 300, ("train/nmse", "val/nmse", "train/mse", "val/mse", "learning_rate", "seconds")  # of an epoch
RAY_TRIALS = 1  # of each process
LARGEST_BATCH = 1000  # metrics of one request
MODEL = {"family": "cnn", "filters": 100, "kernel_size": 3, "dropout": 0.0}  # 1 MB for images of 8 x 8 pixels
STUDY = """
[data]
path = "{data}"
[model]
family = "cnn"
kernel_size = 3
dropout = 0.0
[space]
filters = {filters}
learning_rate = {rates}
[training]
epochs = {epochs}
batch_size = 16
"""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one side did."""

    side: str
    workers: int
    rate: float  # trials a second
    cpu: dict[str, float]  # seconds a trial, by kind of process
    duplicates: int
    unfinished: int
    lost: int

    def row(self) -> str:
        total, faults = sum(self.cpu.values()), f"{self.duplicates} / {self.unfinished} / {self.lost}"
        parts = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in self.cpu.items())
        return f"| {self.side} | {self.workers} | {self.rate:.2f} | {total:.2f} ({parts}) | {faults} |"


class NotMeasured(Exception):
    """Why a rival cannot run here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4], help="processes (default 1 2 4)")
    parser.add_argument("--trials", type=int, default=60, help="of each side (default 60)")
    parser.add_argument("--study", type=int, default=200, help="trials of the real study; 0: none (default 200)")
    parser.add_argument("--rival", nargs="*", choices=RIVALS, default=list(RIVALS), help="(default: all)")
    parser.add_argument("--ray", type=Path, default=Path(tempfile.gettempdir()) / "hpo-bench-ray", metavar="DIR")
    arguments = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{machine()}; {versions()}; load average {load} before", flush=True)
    with temporary_home() as home:
        import cells

        data = cells.make(home.folder / "cells", size=8)
        if arguments.study:
            seconds = real_study(home, data, arguments.study)
            rate = arguments.study / seconds
            print(f"real study: {arguments.study} trials in {seconds:.0f} s, {rate:.2f} a second", flush=True)
        print("| side | processes | trials/s | CPU s a trial | duplicates / unfinished / lost |\n|---|---|---|---|---|")
        for workers in arguments.workers:
            figures, stored = ours(home, data, workers, arguments.trials)
            print(figures.row(), flush=True)
            for rival in arguments.rival:
                try:
                    print(theirs(home, rival, workers, arguments.trials, stored, arguments.ray).row(), flush=True)
                except NotMeasured as error:
                    print(f"| {RIVALS[rival]} | {workers} | not measured: {error} | | |", flush=True)


def write_study(folder: Path, name: str, data: Path, *, filters: list[int], trials: int, epochs: int) -> Path:
    """Write the file of a grid."""
    rates = [round(1e-3 + 1e-7 * index, 9) for index in range(trials // len(filters))]
    file = folder / f"{name}.toml"
    file.write_text(STUDY.format(data=data, filters=filters, rates=rates, epochs=epochs))
    return file


def real_study(home: Home, data: Path, trials: int) -> float:
    """Train a study of tiny networks with `hpo run`; return its seconds, start and end included."""
    file = write_study(home.folder, "real", data, filters=[1, 2], trials=trials, epochs=3)
    begin = time.monotonic()
    command = [sys.executable, "-P", "-m", "hpo", "run", "--study", str(file), "--trainers", "2", "--device", "cpu"]
    subprocess.run(command, env=home.environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.monotonic() - begin


# Our side


def ours(home: Home, data: Path, workers: int, trials: int) -> tuple[Figures, str]:
    """Return the figures, and the MLflow experiment."""
    from hpo import study
    from hpo.planning import plans
    from hpo.planning.preparation import prepare
    from hpo.queue import Queue
    from hpo.tracking.client import Tracker

    file = write_study(home.folder, f"untrained-{workers}", data, filters=[100], trials=trials, epochs=EPOCHS)
    queue = Queue(home.services.database_url)
    queue.install()
    tracker = Tracker(home.services.tracking_uri)
    row = plans.plan(prepare(study.load(str(file))), queue, tracker, home.settings, home.services.database_url)
    queue.close()
    experiment, task = row.facts.experiment_id, partial(work, home, row.name, trials // workers)
    return measure(home, "hpo", workers, trials // workers * workers, experiment, task), experiment


def work(home: Home, name: str, trials: int, ready: Any, go: Any, used: Any) -> None:
    """Be one worker for so many trials of the study, with one trainer that does not train."""
    from dataclasses import replace

    from hpo.worker.children import Trainers
    from hpo.worker.ending import Limits
    from hpo.worker.processes import Process
    from hpo.worker.worker import Worker

    class Untrained(Process):
        def _program(self) -> list[str]:
            folder = str(Path(__file__).resolve().parent)
            return [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {folder!r}); from throughput import be; be()",
            ]

    class Recording(Worker):
        def _parts(self, log: Any, served: Any) -> Any:
            trainers = Trainers(lambda gpu: Untrained("trainer", log), count=1, clock=time)
            return replace(super()._parts(log, served), trainers=trainers)

    begin: dict[str, float] = {}
    this, trainers = psutil.Process(), list[psutil.Process]()

    def look(supervisor: Any) -> None:
        if not trainers:  # once: a search through all processes takes long
            trainers.extend(this.children())
        now = {"worker": cpu(this), "trainers": sum(map(cpu, trainers))}
        if supervisor.claims.claimed:
            begin.update(begin or now)
            used.update({kind: now[kind] - begin[kind] for kind in now} if now["trainers"] else {})

    worker = Recording(home.settings, home.services.database_url, home.services.tracking_uri, name, trainers=1)
    ready.release()
    go.wait()
    worker.run(limits=Limits(trials=trials), on_tick=look)


def be() -> None:
    """Be a trainer that repeats the scores of its first epoch."""
    from dataclasses import replace

    from hpo.worker.channel import serve
    from hpo.worker.trainer import answer_requests
    from models.training import Training

    def epochs(training: Training, stop: Callable[[], bool] | None = None) -> Any:
        first = training._run_epoch(stop)
        yield first
        for number in range(2, training.training.epochs + 1):
            training.epoch = number
            yield replace(first, number=number, best=False)

    Training.epochs = epochs  # type: ignore[method-assign]
    serve(answer_requests)


# Their side

RIVALS = {
    "optuna": "Optuna, MLflow's client, pickled model",
    "optuna-no-model": "the same, no model",
    "calls": "the client's calls that store what hpo does",
    "ray": "Ray Tune, its MLflow callback, pickled model",
}


def theirs(home: Home, rival: str, workers: int, trials: int, stored: str, ray: Path) -> Figures:
    """Return the figures of a rival; `stored` is the experiment of hpo. Raise NotMeasured."""
    from mlflow import MlflowClient

    name, each = f"{rival}-{workers}", trials // workers
    experiment = MlflowClient(home.services.tracking_uri).create_experiment(name)
    task: Callable[[Any, Any, Any], None]
    if rival == "ray":
        import ray_tune

        trials = RAY_TRIALS * workers
        python = ray_tune.environment(ray)
        if isinstance(python, str):
            raise NotMeasured(python)
        task = partial(ray_tune.tune, home, python, name, trials, workers)
        return measure(home, RIVALS[rival], workers, trials, experiment, task, processes=1)
    if rival == "calls":
        task = partial(store_again, home, stored, experiment, each)
    else:
        task = partial(optimise, home, name, experiment, each, rival == "optuna")
    return measure(home, RIVALS[rival], workers, each * workers, experiment, task)


def client_of(home: Home) -> Any:
    """Return MLflow's own client, and nothing of what it and Optuna say."""
    import logging
    import warnings

    import mlflow
    import optuna

    warnings.simplefilter("ignore")
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    mlflow.set_tracking_uri(home.services.tracking_uri)
    return mlflow.MlflowClient()


def optimise(
    home: Home, name: str, experiment: str, trials: int, with_model: bool, ready: Any, go: Any, used: Any
) -> None:
    """Be one process of Optuna's for so many trials."""
    import mlflow
    import mlflow.pytorch
    import optuna
    import torch
    from mlflow.entities import Metric, Param, RunTag

    from models import networks, specs

    torch.set_num_threads(1)
    client, network = client_of(home), networks.build(specs.from_dict(MODEL), (1, 8, 8), 9)
    table = home.folder / f"{name}-{os.getpid()}" / "validation.csv"
    table.parent.mkdir()
    table.write_text("\n".join([",".join(["1.2345678"] * 19)] * 9))
    requirements = [f"torch=={torch.__version__.partition('+')[0]}"]
    options = {"pip_requirements": requirements, "serialization_format": "pickle"}

    def objective(trial: optuna.Trial) -> float:
        rate, now = trial.suggest_float("learning_rate", 1e-4, 1e-2), time.time_ns() // 1_000_000
        words = {"hpo.key": f"{os.getpid()}/{trial.number}", "hpo.kind": "trial"}
        run = client.create_run(experiment, tags=words).info.run_id
        curve = [Metric(score, 0.5, now, epoch) for epoch in range(1, EPOCHS + 1) for score in SCORES]
        params = [Param(f"p{index}", str(rate)) for index in range(20)]
        client.log_batch(run, params=params, tags=[RunTag(f"t{index}", "x") for index in range(15)])
        log_metrics(client, run, curve)
        client.log_artifact(run, str(table), "predictions")
        if with_model:
            with mlflow.start_run(run_id=run):
                mlflow.pytorch.log_model(network, name="model", **options)
        client.set_terminated(run)
        return rate

    storage = optuna.storages.RDBStorage(home.services.database_url.replace("postgresql://", "postgresql+psycopg://"))
    sampler = optuna.samplers.RandomSampler()
    search = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
    ready.release()
    go.wait()
    begin = cpu(psutil.Process())
    search.optimize(objective, n_trials=trials)
    used["client"] = cpu(psutil.Process()) - begin


def store_again(home: Home, stored: str, experiment: str, trials: int, ready: Any, go: Any, used: Any) -> None:
    """Store a trial of the experiment `stored` so many times, with as few of the client's own calls as it takes."""
    from mlflow.entities import LoggedModelOutput, Param, RunTag
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = client_of(home)
    run = client.search_runs([stored], "tags.`hpo.kind` = 'trial' AND attributes.status = 'FINISHED'", max_results=1)[0]
    (model,) = client.search_logged_models([stored], f"source_run_id = '{run.info.run_id}'")
    params = [Param(*param) for param in run.data.params.items()]
    words = {tag: value for tag, value in run.data.tags.items() if tag.startswith("hpo.")}
    words["mlflow.note.content"] = run.data.tags["mlflow.note.content"]
    tags = [RunTag(*tag) for tag in words.items()]
    metrics = [point for name in run.data.metrics for point in client.get_metric_history(run.info.run_id, name)]
    files, table = (home.folder / f"{experiment}-{os.getpid()}-{what}" for what in ("model", "table"))
    for folder in (files, table):
        folder.mkdir()
    get_artifact_repository(model.artifact_location).download_artifacts("", str(files))
    client.download_artifacts(run.info.run_id, "predictions", str(table))

    def record(number: int) -> None:
        key = {"hpo.key": f"{os.getpid()}/{number}", "hpo.kind": "trial"}
        run_id = client.create_run(experiment, run_name=run.info.run_name, tags=key).info.run_id
        client.log_batch(run_id, params=params, tags=[tag for tag in tags if tag.key not in key])
        log_inputs(client, run_id, run.inputs.dataset_inputs)
        copy = client.create_logged_model(experiment, model.name, source_run_id=run_id, tags=model.tags)
        client.log_model_artifacts(copy.model_id, str(files))
        client.finalize_logged_model(copy.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(copy.model_id, step=0)])
        client.log_artifacts(run_id, str(table))
        log_metrics(client, run_id, metrics)
        client.set_terminated(run_id)

    ready.release()
    go.wait()
    begin = cpu(psutil.Process())
    for number in range(trials):
        record(number)
    used["client"] = cpu(psutil.Process()) - begin


def log_inputs(client: Any, run_id: str, inputs: Any) -> None:
    """Log the data set. MLflow refuses one of two processes that create it at once; hpo creates it before."""
    from mlflow import MlflowException

    try:
        client.log_inputs(run_id, inputs)
    except MlflowException:
        client.log_inputs(run_id, inputs)


def log_metrics(client: Any, run_id: str, metrics: list[Any]) -> None:
    for start in range(0, len(metrics), LARGEST_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + LARGEST_BATCH])


# Measuring


def measure(
    home: Home,
    side: str,
    workers: int,
    trials: int,
    experiment: str,
    task: Callable[[Any, Any, Any], None],
    *,
    processes: int | None = None,
) -> Figures:
    """Run `task` in `workers` processes at once, or `processes`; return what MLflow says of the experiment then."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        ready, go, used = context.Semaphore(0), context.Event(), [manager.dict() for _ in range(processes or workers)]
        running = [context.Process(target=task, args=(ready, go, usage)) for usage in used]
        for process in running:
            process.start()
        for _ in running:
            ready.acquire()
        before = services_cpu(home)
        go.set()
        for process in running:
            process.join()
            if process.exitcode:
                raise SystemExit(f"a process of {side} failed: exit {process.exitcode}")
        after = services_cpu(home)
        total = Counter[str]()
        for usage in used:
            total.update(dict(usage))
    times, faults = result(home, experiment, trials)
    ends, since = [end for _, end in times], times[workers - 1][1] if len(times) > workers else min(times)[0]
    seconds = {kind: after[kind] - before[kind] for kind in after} | total
    return Figures(
        side=side,
        workers=workers,
        rate=sum(end > since for end in ends) / (ends[-1] - since) * 1000,
        cpu={kind: value / trials for kind, value in seconds.items()},
        **faults,
    )


def result(home: Home, experiment: str, trials: int) -> tuple[list[tuple[int, int]], dict[str, int]]:
    """Return start and end (ms) of each trial by its end, and how many are there twice, open or not at all."""
    from mlflow import MlflowClient

    client = MlflowClient(home.services.tracking_uri)
    runs = client.search_runs([experiment], "tags.`hpo.kind` = 'trial'", max_results=10_000)
    finished = [run for run in runs if run.info.status == "FINISHED"]
    distinct = {run.data.tags.get("hpo.key", run.data.tags.get("trial_name")) for run in finished}
    faults = {"duplicates": len(finished) - len(distinct), "unfinished": len(runs) - len(finished)}
    times = sorted(((run.info.start_time, run.info.end_time) for run in finished), key=lambda pair: pair[1])
    return times, faults | {"lost": trials - len(distinct)}


def services_cpu(home: Home) -> dict[str, float]:
    """Return the CPU seconds that both services have used."""
    from shell import mlflow_processes, postgres_processes

    kinds = {"mlflow": mlflow_processes, "postgres": postgres_processes}
    return {kind: sum(map(cpu, processes(home.settings))) for kind, processes in kinds.items()}


def cpu(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and of its children that have ended."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.NoSuchProcess:
        return 0.0


if __name__ == "__main__":
    main()
