"""How the queue and the MLflow server bear many workers: `python bench/fleet.py`.

    python bench/fleet.py [--workers 1 10 100 500] [--delays 0 1 20 100] [--seconds 40] [--faster 5] [--mlflow 30]

Workers are threads of a few processes that do all that the database sees of a worker, on one embedded Postgres, and
train nothing (`bench/simulated_worker.py`). Trials last as long as recorded ones, divided by `--faster`. So do the
pauses between checkpoints, the five minutes after which a worker is preempted on average, and the time after which it
dies without a word (30 % of the workers an hour). What a worker does by the clock is not faster: a lease is renewed,
orders are asked for and epochs are stored as often as by a real worker. For each worker that leaves another one begins
at once. A delay is of each direction, by a proxy before Postgres; a statement waits for it twice.

The ideal is the number of workers over the mean of a trial. Cores used are those of Postgres, of the simulated workers
and of the proxy. Where their sum is near the machine's cores, or actions begin late, the simulator is the limit.

Then some clients store trials, with hpo's own calls, on an MLflow server of four processes, as many as it takes.
"""

import argparse
import asyncio
import http.client
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psutil
import psycopg
from machine import Home, machine, temporary_home, versions
from simulated_worker import DURATIONS, EPOCHS, FILES, Fleet, Seen, work

PROCESSES = 4  # of simulated workers, and of the MLflow server
CONNECTIONS = 900  # of all workers, at most: Postgres admits 200 unless it is told otherwise
PREEMPTION, DEATH = 300.0, 3600 / 0.3  # mean seconds of a worker's life until the one or the other
RAMP = 8.0  # seconds in which workers begin
MEAN = statistics.fmean(DURATIONS)  # seconds of a trial
STUDY = """
[data]
image_size = 8
[model]
family = "cnn"
filters = 1
kernel_size = 3
dropout = 0.0
[space]
learning_rate = {rates}
[training]
epochs = {epochs}
"""
HEAD = (
    "| workers | delay, ms | a round trip, ms | trials/h | of the ideal | claim: median, 95 %, max, ms "
    "| late, 95 %, ms | transactions/s | connections, busy | KB a trial | cores: Postgres, simulator, proxy "
    "| handed back, died | twice / lost |"
)


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was used within a window, or until its begin."""

    postgres: float  # CPU seconds
    workers: float
    proxy: float
    transactions: int

    def row(self, before: "Load", seconds: float) -> tuple[str, float]:
        """Return the cores used since an earlier moment, in words, and transactions a second."""
        pairs = ((self.postgres, before.postgres), (self.workers, before.workers), (self.proxy, before.proxy))
        cores = ", ".join(f"{(now - then) / seconds:.2f}" for now, then in pairs)
        return cores, (self.transactions - before.transactions) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 10, 100, 500], metavar="N")
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 20, 100], metavar="MS", help="each direction")
    parser.add_argument("--seconds", type=float, default=40, help="of each measurement (default 40)")
    parser.add_argument("--faster", type=float, default=5, help="than the recorded trials (default 5)")
    parser.add_argument("--mlflow", type=float, default=30, help="seconds of the MLflow server's turn; 0: none")
    options = parser.parse_args()
    from hpo.services import postgres

    postgres.SETTINGS["max_connections"] = str(CONNECTIONS + 100)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{machine()}; {versions()}; load average {load} before", flush=True)
    print(f"trials of {MEAN:.0f} s on average, {options.faster:g} times as fast; {options.seconds:g} s a row\n")
    with temporary_home() as home:
        print(f"A real worker with one trainer holds {real_worker(home)} connections at most.\n")
        print(f"{HEAD}\n|{'---|' * HEAD.count(' |')}", flush=True)
        for workers in options.workers:
            for delay in options.delays:
                print(one(home, workers, delay, options.seconds, options.faster), flush=True)
        if options.mlflow:
            mlflow_server(home, options.mlflow, options.workers)


# The queue


def one(home: Home, workers: int, delay: float, window: float, faster: float) -> str:
    """Run one fleet; return its row of the table."""
    planned = round(workers * (2.5 + (RAMP + window) * faster / MEAN * 1.3)) + 5
    study = plan(home, f"fleet-{workers}-{delay:g}", planned)
    with proxy(home.services.database_url, delay) as (url, between), database(home) as connection:
        trip, before = round_trip(url), size(connection)
        with fleet(home, url, study, workers, window, faster) as (processes, begin, results):
            opens = begin + RAMP
            time.sleep(max(0.0, opens - time.monotonic()))
            first, busy = used(home, connection, processes, between), list[tuple[int, int]]()
            while time.monotonic() < opens + window - 1.0:
                busy.append(connections(connection))
                time.sleep(1.0)
            time.sleep(max(0.0, opens + window - time.monotonic()))
            cores, transactions = used(home, connection, processes, between).row(first, window)
            seen = [results.get() for _ in processes]
        faults = check(connection, study, planned, seen)
        grown = (size(connection) - before) / max(1, sum(len(part.ended) for part in seen))
    rate = sum(opens <= at < opens + window for part in seen for at, _ in part.ended) / window
    claims = sorted(seconds for part in seen for at, seconds in part.claims if opens <= at < opens + window) or [0.0]
    late = sorted(seconds for part in seen for at, seconds in part.late if opens <= at < opens + window) or [0.0]
    latency = ", ".join(f"{1000 * share(claims, part):,.0f}" for part in (0.5, 0.95, 1.0))
    for error in sorted({error for part in seen for error in part.errors})[:3]:
        print(f"The database: {error}", file=sys.stderr)
    cells = [
        f"{workers}",
        f"{delay:g}",
        f"{1000 * trip:.1f}",
        f"{3600 * rate:,.0f}",
        f"{rate * MEAN / faster / workers:.0%}",
        latency,
        f"{1000 * share(late, 0.95):,.0f}",
        f"{transactions:,.0f}",
        f"{max(count for count, _ in busy)}, {max(count for _, count in busy)}",
        f"{grown / 1000:.0f}",
        cores,
        f"{sum(part.handed_back for part in seen)}, {sum(len(part.died) for part in seen)}",
        faults,
    ]
    return f"| {' | '.join(cells)} |"


def share(ordered: Sequence[float], part: float) -> float:
    """Return the value that this part of the ordered values does not exceed."""
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def plan(home: Home, name: str, trials: int, *, epochs: int = EPOCHS) -> str:
    """Plan a study of so many trials, in a process of its own, which imports torch; return its name."""
    file = home.folder / f"{name}.toml"
    rates = [round(1e-3 + 1e-7 * number, 9) for number in range(trials)]
    file.write_text(STUDY.format(rates=rates, epochs=epochs), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-P", "-m", "hpo", "run", "--study", str(file), "--detach"],
        env=home.environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,  # it says that the images are resized
    )
    return name


@contextmanager
def fleet(
    home: Home, url: str, study: str, workers: int, window: float, faster: float
) -> Iterator[tuple[list[Any], float, Any]]:
    """Processes of workers, the moment at which they begin (monotonic), and the queue of what they see."""
    context = multiprocessing.get_context("spawn")
    ready, go, begin, results = context.Semaphore(0), context.Event(), context.Value("d"), context.Queue()
    count = min(PROCESSES, workers)
    processes = []
    for process in range(count):
        part = Fleet(
            database_url=url,
            study=study,
            workers=len(range(process, workers, count)),
            process=process,
            faster=faster,
            lease=home.settings.lease,
            checkpoint_interval=home.settings.checkpoint_interval,
            preemption=PREEMPTION,
            death=DEATH,
            ramp=RAMP,
            window=window,
            connections=CONNECTIONS // count,
        )
        processes.append(context.Process(target=work, args=(part, ready, go, begin, results), daemon=True))
        processes[-1].start()
    try:
        for _ in processes:
            if not ready.acquire(timeout=120):
                raise SystemExit("the simulated workers did not start")
        begin.value = time.monotonic() + 0.2
        go.set()
        yield processes, begin.value, results
        for running in processes:
            running.join(60)
    finally:
        for running in processes:
            running.kill()


@contextmanager
def database(home: Home) -> Iterator[psycopg.Connection]:
    """A connection to the queue's database that is not delayed."""
    with psycopg.connect(home.services.database_url, autocommit=True, application_name="fleet") as connection:
        yield connection


def number(connection: psycopg.Connection, query: str) -> int:
    """Return the one number that a query asks for."""
    row = connection.execute(query.encode()).fetchone()
    return int(row[0] or 0) if row else 0


def size(connection: psycopg.Connection) -> int:
    """Return the bytes of the queue's database, in which Optuna's tables lie too."""
    return number(connection, "SELECT pg_database_size(current_database())")


def connections(connection: psycopg.Connection) -> tuple[int, int]:
    """Return how many connections hpo has to the queue's database, and how many of them are in a transaction."""
    of_hpo = "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'hpo'"
    return (
        number(connection, f"SELECT count(*) {of_hpo}"),
        number(connection, f"SELECT count(*) {of_hpo} AND state <> 'idle'"),
    )


def used(home: Home, connection: psycopg.Connection, workers: Sequence[Any], between: Any) -> Load:
    """Return what has been used up to now."""
    connection.execute("SELECT pg_stat_clear_snapshot()")
    committed = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    return Load(
        postgres=sum(map(cpu, postgres_processes(home))),
        workers=sum(cpu(psutil.Process(process.pid)) for process in workers),
        proxy=0.0 if between is None else cpu(psutil.Process(between.pid)),
        transactions=number(connection, committed),
    )


def postgres_processes(home: Home) -> list[psutil.Process]:
    """Return the embedded postmaster and its children."""
    from hpo.services import home as homes

    served = homes.read(home.settings.home.resolve())
    assert served is not None
    postmaster = psutil.Process(int((served.data / "postmaster.pid").read_text().splitlines()[0]))
    return [postmaster, *postmaster.children()]


def cpu(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and of its children that have ended."""
    try:
        return float(sum(process.cpu_times()[:4]))
    except psutil.NoSuchProcess:
        return 0.0


def check(connection: psycopg.Connection, study: str, planned: int, seen: Sequence[Seen]) -> str:
    """Return how many results were stored twice, and how many trials are lost."""
    rows = connection.execute("SELECT id, state, worker FROM hpo.job WHERE study = %s AND kind = 'trial'", [study])
    jobs = {job: (state, worker) for job, state, worker in rows}
    attempts = connection.execute(
        "SELECT job, count(*) FROM hpo.attempt WHERE study = %s AND outcome = 'recorded' GROUP BY job", [study]
    ).fetchall()
    ended = Counter(job for part in seen for _, job in part.ended)
    died = {name for part in seen for name in part.died}
    done = {job for job, (state, _) in jobs.items() if state == "done"}
    twice = sum(count - 1 for count in ended.values()) + sum(count - 1 for _, count in attempts)
    left = {job for job, (state, worker) in jobs.items() if state == "running" and worker not in died}
    other = {job for job, (state, _) in jobs.items() if state not in ("done", "running", "waiting")}
    return f"{twice} / {planned - len(jobs) + len(done ^ ended.keys()) + len(left) + len(other)}"


def real_worker(home: Home) -> int:
    """Let `hpo worker` train a few trials; return how many connections to the queue's database it holds at most."""
    study, most = plan(home, "fleet-real", 2, epochs=10), 0
    command = [sys.executable, "-P", "-m", "hpo", "worker", "--study", study, "--trainers", "1", "--max-trials", "2"]
    with database(home) as connection:
        worker = subprocess.Popen(command, env=home.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while worker.poll() is None:
            most = max(most, connections(connection)[0])
            time.sleep(0.1)
    if worker.returncode:
        raise SystemExit(f"hpo worker ended with exit code {worker.returncode}")
    return most


# The delay


@contextmanager
def proxy(url: str, delay: float) -> Iterator[tuple[str, Any]]:
    """The URL of the database behind a delay (ms) of each direction, and the process that delays; None without one."""
    if delay == 0:
        yield url, None
        return
    context = multiprocessing.get_context("spawn")
    port = context.Value("i", 0)
    host, _, its_port = url.rpartition("@")[2].partition("/")[0].partition(":")
    process = context.Process(target=pass_on, args=(port, host, int(its_port), delay / 1000), daemon=True)
    process.start()
    try:
        while port.value == 0:
            if not process.is_alive():
                raise SystemExit("the proxy did not start")
            time.sleep(0.02)
        yield url.replace(f"@{host}:{its_port}/", f"@127.0.0.1:{port.value}/"), process
    finally:
        process.kill()
        process.join()


def pass_on(port: Any, host: str, its_port: int, delay: float) -> None:
    """Be the proxy: listen at a port of its own, and tell it."""
    import uvloop

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Side(delay, upstream=(host, its_port)), "127.0.0.1", 0, backlog=1024)
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    uvloop.run(serve())


class Side(asyncio.Protocol):
    """One end of a connection through the proxy: what it gets leaves at the other end after the delay, in order."""

    def __init__(self, delay: float, *, upstream: tuple[str, int] | None = None, other: "Side | None" = None) -> None:
        """`upstream`: the address to connect to, of the end that a client has connected to."""
        self.delay, self.upstream, self.other = delay, upstream, other
        self.transport: asyncio.Transport | None = None
        self.waiting: deque[bytes | None] = deque()  # None: the end

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are of no class of asyncio's
        if self.upstream is not None:
            asyncio.get_running_loop().create_task(self.connect(*self.upstream))

    async def connect(self, host: str, port: int) -> None:
        """Connect the other end, and pass on what has come meanwhile."""
        other = Side(self.delay, other=self)
        try:
            await asyncio.get_running_loop().create_connection(lambda: other, host, port)
        except OSError:
            assert self.transport is not None
            self.transport.close()
            return
        self.other = other
        for _ in self.waiting:
            asyncio.get_running_loop().call_later(self.delay, self.leave)

    def data_received(self, data: bytes) -> None:
        self.hold(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.hold(None)

    def hold(self, data: bytes | None) -> None:
        """Let something leave after the delay."""
        self.waiting.append(data)
        if self.other is not None:
            asyncio.get_running_loop().call_later(self.delay, self.leave)

    def leave(self) -> None:
        """Send the first of what waits."""
        data = self.waiting.popleft()
        if self.other is None or self.other.transport is None or self.other.transport.is_closing():
            return
        if data is None:
            self.other.transport.close()
        else:
            self.other.transport.write(data)


def round_trip(url: str) -> float:
    """Return the median seconds of a statement that does nothing."""
    with psycopg.connect(url, autocommit=True) as connection:
        times = []
        for _ in range(20):
            begin = time.monotonic()
            connection.execute("SELECT 1")
            times.append(time.monotonic() - begin)
    return statistics.median(times)


# The MLflow server


def mlflow_server(home: Home, seconds: float, fleets: Sequence[int]) -> None:
    """Print how many requests a second an MLflow server of PROCESSES takes, and how many each fleet makes."""
    from hpo.recording.recorder import FORWARD_INTERVAL

    context = multiprocessing.get_context("spawn")
    ready, go, results = context.Semaphore(0), context.Event(), context.Queue()
    with server(home) as (url, process):
        clients = [
            context.Process(target=record, args=(url, home.folder, ready, go, seconds, results), daemon=True)
            for _ in range(PROCESSES)
        ]
        try:
            for client in clients:
                client.start()
            for _ in clients:
                ready.acquire()
            family = [process, *process.children(recursive=True)]
            watched = {"server": family, "Postgres": postgres_processes(home)}
            watched["clients"] = [psutil.Process(client.pid) for client in clients]
            before = {kind: sum(map(cpu, processes)) for kind, processes in watched.items()}
            go.set()
            time.sleep(seconds)
            cores = {kind: sum(map(cpu, processes)) - before[kind] for kind, processes in watched.items()}
            trials, requests = (sum(counts) for counts in zip(*(results.get() for _ in clients), strict=True))
        finally:
            for client in clients:
                client.kill()
    took, each = requests / seconds, requests / trials
    spent = ", ".join(f"{kind} {value / seconds:.2f}" for kind, value in cores.items())
    own = took / (cores["server"] / seconds) if cores["server"] else 0.0
    print(f"\nMLflow server, {PROCESSES} processes: {took:.0f} requests/s, {each:.1f} requests a trial; cores: {spent}")
    print(f"One core of the server alone takes {own:.0f} requests/s, so {PROCESSES} cores {PROCESSES * own:.0f}.\n")
    interval = home.settings.checkpoint_interval
    print("| workers | requests/s that the fleet makes | servers that took as many here | on four cores each |")
    print("|---|---|---|---|")
    for workers in sorted({*fleets, 1000, 10_000}):
        needed = workers * (each / MEAN + 1 / FORWARD_INTERVAL + 3 / interval)  # a checkpoint: one upload, one removal
        print(f"| {workers:,} | {needed:,.1f} | {needed / took:.2f} | {needed / (PROCESSES * own):.2f} |")


@contextmanager
def server(home: Home) -> Iterator[tuple[str, psutil.Process]]:
    """An MLflow server as hpo starts it, but of PROCESSES processes, on the Postgres of the home."""
    from hpo.services import daemon, postgres
    from hpo.services import home as homes
    from hpo.services import mlflow_server as product

    served, port = homes.read(home.settings.home.resolve()), daemon.choose_port(None)
    assert served is not None
    store = home.folder / "store"
    words = product.arguments(host="127.0.0.1", port=port, artifacts=store.as_uri())
    words[words.index("--workers") + 1] = str(PROCESSES)
    environment = {name: os.environ[name] for name in product.INHERITED if name in os.environ} | product.ENVIRONMENT
    environment |= {"MLFLOW_BACKEND_STORE_URI": postgres.url(served, "mlflow"), "TMPDIR": str(home.folder)}
    product.stop(served)  # its processes would hold memory and connections
    process = psutil.Popen(
        [sys.executable, *words],
        env=environment,
        cwd=Path(__file__).resolve().parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not answers(product, port):
            if process.poll() is not None:
                raise SystemExit("the MLflow server did not start")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process
    finally:
        family = [*process.children(recursive=True), process]
        for member in family:
            member.terminate()
        psutil.wait_procs(family, timeout=10)


def answers(product: Any, port: int) -> bool:
    """Return whether a server on this port answers a search."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        return bool(product.search(connection, user=None) == 200)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def record(url: str, folder: Path, ready: Any, go: Any, seconds: float, results: Any) -> None:
    """Store trials with hpo's own calls for so many seconds; tell the number of trials and of requests."""
    import requests

    from hpo.tracking import logged_models
    from hpo.tracking.client import Tracker

    count, send = Counter[str](), requests.adapters.HTTPAdapter.send

    def counted(*arguments: Any, **options: Any) -> Any:
        count["requests"] += 1
        return send(*arguments, **options)

    requests.adapters.HTTPAdapter.send = counted  # type: ignore[method-assign]
    tracker, name = Tracker(url), f"fleet-{os.getpid()}"
    experiment = tracker.client.create_experiment(name)
    model, predictions = model_files(folder / name)
    params = {f"training.p{index}": "0.001" for index in range(20)}
    tags = {f"hpo.t{index}": "a word" for index in range(15)}
    scores = {f"{split}/{score}": 0.5 for split in ("train", "val") for score in ("nmse", "mse")}
    scores |= {"learning_rate": 1e-3, "seconds": 0.5}
    ready.release()
    go.wait()
    count.clear()
    end, trials = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        key, now = f"{name}/{trials}/0", time.time_ns() // 1_000_000
        run = tracker.ensure_run(
            experiment, key=key, name=key, kind="trial", params=params, tags=tags, start_ms=now, is_first=True
        )
        tracker.log_dataset(run, name="default", digest="0" * 32, source="{}")
        own = Path(shutil.copytree(model, model.with_name("copy"), dirs_exist_ok=True))
        logged_models.log(tracker, run, experiment, own, name="model", key=key, is_first=True)
        tracker.upload(run, predictions, "predictions")
        tracker.log_epochs(run, [(epoch, now, scores) for epoch in range(1, EPOCHS + 1)], tags={"hpo.state": "done"})
        tracker.set_status(run, "FINISHED", end_ms=now)
        trials += 1
    results.put((trials, count["requests"]))


def model_files(folder: Path) -> tuple[Path, Path]:
    """Return a folder with as many files as a model has, 1 MB in all, and a table of predictions."""
    model = folder / "model"
    (model / "data").mkdir(parents=True)
    (model / "MLmodel").write_text("flavors: {}\nutc_time_created: '2026-01-01 00:00:00.000000'\n", encoding="utf-8")
    for index in range(FILES - 1):
        (model / "data" / f"file-{index}").write_bytes(os.urandom(1_000_000 // (FILES - 1)))
    predictions = folder / "validation.csv"
    predictions.write_text("\n".join([",".join(["1.2345678"] * 19)] * 78), encoding="utf-8")
    return model, predictions


if __name__ == "__main__":
    main()
