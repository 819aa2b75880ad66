"""How long hpo's commands take to start, and its MLflow server beside `mlflow server` with the same words.

    python bench/start.py [--rounds 3] [--study] [--other FOLDER]

Every round times `hpo up` on a new home, again after `hpo down`, and while the services run, then `hpo status`,
`hpo trials` and `hpo --help`; with `--study` also `hpo run` of a study that is finished. Then it starts MLflow's own
command on the same Postgres. `--other` takes turns with another checkout of hpo, whose dependencies are those of this
one. Prints medians: seconds until the command ends, and seconds of CPU of it and of the server that it started.
"""

import argparse
import http.client
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
from machine import machine, versions

from hpo import settings
from hpo.services import daemon, mlflow_server, postgres, serving
from hpo.services import home as homes

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
[data]
path = "data"
[model]
family = "cnn"
filters = 1
kernel_size = 3
dropout = 0.0
[space]
learning_rate = [0.001]
[training]
epochs = 1
"""
ROW = "| {:44} | {:>8} | {:>9} | {:>5} |"
Times = dict[str, list[tuple[float, float]]]  # seconds and CPU seconds of each round, by what was timed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default 3)")
    parser.add_argument("--study", action="store_true", help="also `hpo run` of a finished study")
    parser.add_argument("--other", type=Path, help="another checkout of hpo, timed in turn with this one")
    arguments = parser.parse_args()
    print(f"{machine()}; {versions()}; medians of {arguments.rounds} rounds", flush=True)
    sides = [ROOT] if arguments.other is None else [arguments.other.resolve(), ROOT]
    times: dict[Path, Times] = {side: defaultdict(list) for side in sides}
    own: Times = defaultdict(list)
    for _ in range(arguments.rounds):
        for side in sides:
            with tempfile.TemporaryDirectory() as name:
                one_round(side, Path(name), times[side], arguments.study, own if side == ROOT else None)
    print(ROW.format("", "seconds", "CPU s", "ratio"))
    for side in sides:
        print(ROW.format(f"**{side.name}**", "", "", ""))
        for what, measured in times[side].items():
            show(what, measured, times[sides[0]][what])
    show("`mlflow server` until it answers", own["mlflow"], own["mlflow"])
    show("the server of hpo until it answers", own["hpo"], own["mlflow"])


def show(what: str, measured: list[tuple[float, float]], rival: list[tuple[float, float]]) -> None:
    """Print medians, and the ratio of the CPU seconds to the rival's, pair by pair."""
    seconds, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
    ratio = statistics.median(ours[1] / theirs[1] for ours, theirs in zip(measured, rival, strict=True))
    print(ROW.format(what, f"{seconds:.2f}", f"{cpu:.2f}", f"{ratio:.2f}"), flush=True)


def one_round(side: Path, folder: Path, times: Times, with_study: bool, own: Times | None) -> None:
    """Time each command of a checkout in a new home; with `own` the MLflow servers on its Postgres, too."""
    home = folder / "home"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HPO_", "MLFLOW_"))}
    environment = kept | {"HPO_HOME": str(home), "PYTHONPATH": str(side), "HPO_TRAINERS": "1"}

    def hpo(*words: str) -> tuple[float, float]:
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-P", "-m", "hpo", *words]
        subprocess.run(command, env=environment, cwd=folder, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return time.monotonic() - begin, used

    def up() -> tuple[float, float]:
        seconds, used = hpo("up")
        return seconds, used + served(home)

    try:
        times["`hpo up`, a new home"].append(up())
        hpo("down")
        times["`hpo up`, the services are down"].append(up())
        times["`hpo up`, the services run"].append(hpo("up"))
        times["`hpo status`"].append(hpo("status"))
        times["`hpo studies`"].append(hpo("studies"))
        times["`hpo --help`"].append(hpo("--help"))
        if with_study:
            finished(folder, hpo)
            times["`hpo run`, the study is finished"].append(hpo("run", "--study", "start.toml"))
            times["`hpo trials`"].append(hpo("trials", "--study", "start"))
        if own is not None:
            compare_servers(homes.read(home.resolve()), own)
    finally:
        serving.erase(settings.read({"HPO_HOME": str(home)}))


def finished(folder: Path, hpo) -> None:
    """Train one trial of a study of 40 images."""
    draw = np.random.default_rng(0)
    (folder / "data").mkdir()
    images = draw.random((40, 8, 8), dtype=np.float32)
    np.save(folder / "data" / "images.npy", images)
    np.save(folder / "data" / "labels.npy", images.mean(axis=(1, 2)) + 0.1 * images[:, 0, 0])
    (folder / "start.toml").write_text(STUDY, encoding="utf-8")
    hpo("run", "--study", "start.toml")


def served(home: Path) -> float:
    """Return the CPU seconds of the server's processes that live: their current folder is in the home."""
    return sum(map(cpu, mlflow_server._processes(homes.read(home.resolve()))))


def cpu(process: psutil.Process) -> float:
    """Return the CPU seconds of a process, and of its children that have ended."""
    used = process.cpu_times()
    return used.user + used.system + used.children_user + used.children_system


def answers(port: int) -> bool:
    """Return whether a server on this port answers a search, for which it reads its database."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        return mlflow_server.search(connection, user=None) == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def compare_servers(home: homes.Home, own: Times) -> None:
    """Start MLflow's own command and ours, with the same words, on the Postgres of a home."""
    words = mlflow_server._embedded_arguments(home)
    mlflow_server.stop(home)
    for name, module in (("mlflow", "mlflow"), ("hpo", "hpo.services.run_mlflow")):
        port = str(daemon.choose_port(None))
        ours = [module if word == "hpo.services.run_mlflow" else word for word in words]
        ours[ours.index("--port") + 1] = port
        environment = {key: os.environ[key] for key in mlflow_server.INHERITED if key in os.environ}
        environment |= mlflow_server.ENVIRONMENT | {"MLFLOW_BACKEND_STORE_URI": postgres.url(home, "mlflow")}
        environment |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(home.services / "tmp")}
        begin = time.monotonic()
        process = psutil.Popen(
            [sys.executable, *ours], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while not answers(int(port)):
                time.sleep(0.02)
            family = [process, *process.children(recursive=True)]
            own[name].append((time.monotonic() - begin, sum(map(cpu, family))))
        finally:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    main()
