"""How time, memory and disk grow with the trials of a study and with the studies of a database.

    python bench/growth.py [--trials 100 1000 10000] [--studies 50] [--epochs 30]

For each size a study is planned on services of its own, in a temporary folder. One trial is really trained, the best
one. The others are claimed and recorded through the queue's own functions, with curves like its curve, and get copies
of its rows in MLflow. Then the study is closed and looked at. Each step is a process of its own, so that its peak
memory can be told. (The system counts with it what its parent held when it began: this process holds little.) Prints a
table: seconds, milliseconds a trial, and MiB.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from machine import machine
from sqlalchemy import Connection, create_engine, text

from hpo import settings
from hpo.queue import Queue, State, postgres_url
from hpo.services import serving
from hpo.settings import Settings

STUDY = """
[data]
image_size = 8
[model]
family = "cnn"
kernel_size = 3
[space]
filters = [1, 2, 3, 4, 5]
dropout = [0.0, 0.1, 0.2, 0.3, 0.4]
learning_rate = {rates}
[training]
epochs = {epochs}
"""
POINTS = 25  # of the grid without its learning rates
WORSE = 1000.0  # the copy with number n has scores 1 + (n + 1) / WORSE times as high

# MLflow's rows of a run: table, column with the run, and the columns that a copy has of its own.
NAMED = "CASE source.key WHEN 'hpo.key' THEN copy.key WHEN 'mlflow.runName' THEN copy.name ELSE source.value END"
SCALED = "CASE WHEN source.key LIKE '%mse' THEN source.value * copy.factor ELSE source.value END"
COPIES = {
    "runs": ("run_uuid", {"name": "copy.name", "artifact_uri": "replace(source.artifact_uri, :run, copy.run)"}),
    "params": ("run_uuid", {}),
    "tags": ("run_uuid", {"value": NAMED}),
    "metrics": ("run_uuid", {"value": SCALED}),
    "latest_metrics": ("run_uuid", {"value": SCALED}),
    "logged_models": ("source_run_id", {"model_id": "copy.model"}),
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """One thing that was measured."""

    name: str
    seconds: float
    memory: float = 0.0  # MiB, peak of its process


class Bench:
    """One home with its services, and the measurements in it."""

    def __init__(self, folder: Path, count: int, epochs: int) -> None:
        self.folder, self.count, self.epochs = folder, count, epochs
        self.settings: Settings = settings.read({"HPO_HOME": str(folder / "home")})
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HPO_", "MLFLOW_"))}
        self.environment = kept | {"HPO_HOME": str(folder / "home")}
        self.steps: list[Step] = []

    def add(self, name: str, *command: str | Path, ok: tuple[int, ...] = (0,)) -> str:
        """Run a command; note its seconds and its peak memory, and return what it printed."""
        output = self.folder / "output.txt"
        with output.open("w") as file:
            begin = time.monotonic()
            process = subprocess.Popen(
                list(map(str, command)), env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in ok:
            raise SystemExit(f"{name} ended with exit code {process.returncode}:\n{output.read_text()[-2000:]}")
        self.steps.append(Step(name=name, seconds=time.monotonic() - begin, memory=usage.ru_maxrss / 1024))
        return output.read_text()

    def part(self, name: str, *arguments: object) -> None:
        """Run a function of this script in a process of its own, and note the steps that it prints."""
        printed = self.add(name, sys.executable, __file__, "--part", name, *map(str, arguments))
        whole = self.steps.pop()
        for step, seconds in json.loads(printed.splitlines()[-1]).items():
            self.steps.append(Step(name=step, seconds=seconds, memory=whole.memory))

    def hpo(self, name: str, *words: str | Path, ok: tuple[int, ...] = (0,)) -> None:
        """Run a command of hpo and note it."""
        self.add(name, sys.executable, "-P", "-m", "hpo", *words, ok=ok)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000, 10_000], help="of one study, in 25s")
    parser.add_argument("--studies", type=int, default=50, help="studies of 25 trials in one database; 0: none")
    parser.add_argument("--epochs", type=int, default=30, help="of a trial (default 30)")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part[0]](*options.part[1:])))
        return
    print(machine(), flush=True)
    columns = {}
    for count in options.trials:
        columns[f"{count:,}"] = one_study(count, options.epochs)
    if options.studies:
        columns[f"{options.studies} studies"] = many_studies(options.studies, options.epochs)
    print_table(columns, list(map(int, [*options.trials, *([POINTS * options.studies] * bool(options.studies))])))


@contextmanager
def services(count: int, epochs: int) -> Iterator[Bench]:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), count, epochs)
        try:
            serving.up(bench.settings, report=lambda line: None)
            yield bench
        finally:
            serving.erase(bench.settings)


def one_study(count: int, epochs: int) -> list[Step]:
    with services(count, epochs) as bench:
        before = sizes(bench)
        bench.part("plan", study_file(bench.folder, "growth", count, epochs))
        subprocess.run(
            [sys.executable, "-P", "-m", "hpo", "worker", "--study", "growth", "--trainers", "1", "--max-trials", "1"],
            env=bench.environment,
            check=True,
            capture_output=True,
        )
        bench.part("record", "growth")
        bench.part("copy", database_url(bench))
        bench.hpo("hpo status", "status")
        bench.hpo("hpo trials", "trials", "--study", "growth")
        bench.part("look", "growth")
        bench.steps.append(Step(name="MLflow's list page", seconds=list_page(bench)))
        bench.hpo("close", "worker", "--study", "growth", "--trainers", "1")
        bench.hpo("hpo report", "report", "-o", bench.folder / "report")
        bench.hpo("hpo doctor", "doctor", ok=(0, 1))
        bench.steps += sizes(bench, before)
        return bench.steps


def many_studies(count: int, epochs: int) -> list[Step]:
    with services(POINTS * count, epochs) as bench:
        names = [f"growth-{number}" for number in range(count)]
        files = [study_file(bench.folder, name, POINTS, epochs + number) for number, name in enumerate(names)]
        bench.part("plan", *files)
        bench.part("record", *names)
        bench.hpo("hpo status", "status")
        bench.hpo("hpo trials", "trials", "--study", names[0])
        bench.part("look", *names)
        return bench.steps


def study_file(folder: Path, name: str, count: int, epochs: int) -> Path:
    rates = [round(1e-3 + 1e-6 * number, 9) for number in range(count // POINTS)]
    file = folder / f"{name}.toml"
    file.write_text(STUDY.format(rates=rates, epochs=epochs))
    return file


def plan(*files: str) -> dict[str, float]:
    from hpo.operations.connection import connect
    from hpo.operations.preparing import load
    from hpo.planning import plans
    from hpo.planning.preparation import Plan, prepare

    begin = time.monotonic()
    with connect() as connection:
        for file in files:
            (part,) = load(file)
            assert not isinstance(part, Plan)
            url = connection.services.database_url
            plans.plan(prepare(part), connection.queue, connection.tracker, connection.settings, url)
    return {"plan": time.monotonic() - begin}


def record(*names: str) -> dict[str, float]:
    """Claim and record all trials of studies; the first one that was trained is the template, else one is made up."""
    from hpo.operations.connection import connect
    from hpo.search import sampling

    taken = dict.fromkeys(("claim", "record", "Optuna"), 0.0)
    with connect(mlflow=False) as connection:
        queue, store = connection.queue, sampling.storage(connection.services.database_url)
        for name in names:
            study = queue.study(name).specification
            template = next((job for job in queue.jobs(name) if job.state == State.DONE), None)
            epochs = int(study.training["epochs"])
            made_up = [(n, {"train/nmse": 1.0, "val/nmse": 1.0, "seconds": 0.1}) for n in range(1, epochs + 1)]
            curve = queue.curve(template.id) if template else made_up
            while True:
                begin = time.monotonic()
                job = queue.claim(name, worker="bench:1", lease=600.0)
                claimed = time.monotonic()
                if job is None or job.kind == "closing":
                    break
                factor, at = 1 + (job.number + 1) / WORSE, time.time_ns() // 1_000_000
                rows = [
                    (n, at, {key: scaled(key, value, factor) for key, value in epoch.items()}) for n, epoch in curve
                ]
                queue.add_epochs(job, rows)
                if template is None or template.result is None:
                    queue.end(job, State.PRUNED, result={"epoch": epochs}, reason="bench")
                else:
                    best = template.result.best_val_nmse * factor
                    own = {"best_val_nmse": best, "model_id": f"m-{run_of(job.number)}"}
                    queue.set_run(job.id, run_of(job.number))
                    queue.end(job, State.DONE, result=replace(template.result, **own))
                    queue.set_forwarded(job.id, run_of(job.number), [n for n, _ in curve])
                recorded = time.monotonic()
                ended = queue.job(job.id)
                assert ended is not None and job.spec is not None
                sampling.update_trial(store, study, ended, [ended])
                queue.set_mirrored(ended)
                for step, seconds in zip(
                    taken, (claimed - begin, recorded - claimed, time.monotonic() - recorded), strict=True
                ):
                    taken[step] += seconds
            if job is not None:
                queue.disown("bench:1", [])
        store.remove_session()
        store.engine.dispose()
    return taken


def scaled(key: str, value: float, factor: float) -> float:
    return value * factor if key.endswith("mse") else value


def run_of(number: int) -> str:
    """Return the id of the MLflow run of a copied trial."""
    return f"{number:032x}"


def database_url(bench: Bench) -> str:
    running = serving.running(bench.settings)
    assert running is not None
    return running.database_url


def copy_runs(url: str) -> dict[str, float]:
    """Give each copied trial a run and a model in MLflow's tables, by copying those of the trained one."""
    queue = Queue(url)
    jobs = [job for job in queue.jobs("growth") if job.kind == "trial" and job.run_id is not None]
    trained = next(job for job in jobs if job.run_id != run_of(job.number))
    copies = [
        {"run": job.run_id, "key": job.key, "name": job.run_name, "factor": 1 + (job.number + 1) / WORSE}
        | {"model": job.result.model_id if job.result else ""}
        for job in jobs
        if job is not trained
    ]
    queue.close()
    engine = create_engine(postgres_url(url).set(database="mlflow"))
    with engine.begin() as connection:
        for table, (column, own) in COPIES.items():
            copy_rows(connection, table, column, own, str(trained.run_id), copies)
        connection.execute(text("ANALYZE"))
    engine.dispose()
    return {}


def copy_rows(
    connection: Connection, table: str, column: str, own: dict[str, str], run: str, copies: list[dict[str, object]]
) -> None:
    columns = connection.execute(
        text("SELECT column_name FROM information_schema.columns WHERE table_name = :table AND is_generated = 'NEVER'"),
        {"table": table},
    ).scalars()
    values = {name: f"source.{name}" for name in columns} | own | {column: "copy.run"}
    connection.execute(
        text(f"""
            INSERT INTO {table} ({", ".join(values)}) SELECT {", ".join(values.values())}
            FROM {table} AS source, json_to_recordset(:copies)
                AS copy (run text, key text, name text, model text, factor float8)
            WHERE source.{column} = :run
        """),
        {"copies": json.dumps(copies), "run": run},
    )


def look(*names: str) -> dict[str, float]:
    from rich.console import Console

    from hpo.operations.connection import connect
    from hpo.report.display import View
    from hpo.report.progress import Progress

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with connect(mlflow=False) as connection:
        progress = Progress(connection.queue, connection.queue.study(names[0]))
        times = []
        for _ in range(6):
            begin = time.monotonic()
            progress.refresh()
            console.print(View(progress=progress))
            times.append(time.monotonic() - begin)
    return {"first look": times[0], "tick": min(times[1:])}


def list_page(bench: Bench) -> float:
    """Return the seconds of the request behind the first page of the experiment's list of runs."""
    running = serving.running(bench.settings)
    assert running is not None
    queue = Queue(running.database_url)
    experiment = queue.study("growth").facts.experiment_id
    queue.close()
    body = {"experiment_ids": [experiment], "max_results": 100, "order_by": ["attributes.start_time DESC"]}
    request = urllib.request.Request(
        f"{running.tracking_uri}/api/2.0/mlflow/runs/search",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    times = []
    for _ in range(3):
        begin = time.monotonic()
        with urllib.request.urlopen(request) as answer:
            answer.read()
        times.append(time.monotonic() - begin)
    return min(times)


def sizes(bench: Bench, before: list[Step] | None = None) -> list[Step]:
    """Return the MiB of the databases and of the artifacts, less those of `before`."""
    queue = Queue(database_url(bench))
    with queue.engine.begin() as connection:
        query = text("SELECT sum(pg_database_size(datname)) FROM pg_database WHERE datname IN ('hpo', 'mlflow')")
        databases = float(connection.scalar(query) or 0)
    queue.close()
    files = sum(path.stat().st_size for path in (bench.folder / "home" / "artifacts").rglob("*") if path.is_file())
    earlier = [step.memory for step in before or ()] or [0.0, 0.0]
    names = ("in the databases", "in files")
    return [
        Step(name=name, seconds=0.0, memory=size / 2**20 - less)
        for name, size, less in zip(names, (databases, files), earlier, strict=True)
    ]


PARTS: dict[str, Callable[..., dict[str, float]]] = {"plan": plan, "record": record, "copy": copy_runs, "look": look}


def print_table(columns: dict[str, list[Step]], counts: list[int]) -> None:
    heads = " | ".join(f"{name} (s, ms a trial, MiB)" for name in columns)
    print(f"\n| step | {heads} |\n|---|{'---|' * len(columns)}")
    names = dict.fromkeys(step.name for steps in columns.values() for step in steps)
    for name in names:
        cells = []
        for steps, count in zip(columns.values(), counts, strict=True):
            step = next((step for step in steps if step.name == name), None)
            if step is None:
                cells.append("")
            elif step.seconds:
                memory = f", {step.memory:.0f}" if step.memory else ""
                cells.append(f"{step.seconds:.2f}, {1000 * step.seconds / count:.2f}{memory}")
            else:
                cells.append(f"{step.memory:.1f} MiB, {2**20 * step.memory / count:,.0f} bytes a trial")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
