"""The rival of `bench/throughput.py` from Ray: Ray Tune with its MLflow callback, on the servers of that script.

    PYTHON bench/ray_tune.py URI EXPERIMENT TRIALS PROCESSES FOLDER

That script starts this one with the interpreter of an environment that has Ray besides the packages of the present one.
A trial reports 300 epochs of six scores and writes its network of 1 MB, which the callback uploads with the trial's
folder. Actors are used again, so that torch is imported once in each. Prints as JSON the CPU seconds of Ray's processes
from the time when every actor had imported torch.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path
from typing import Any

from throughput import EPOCHS, MODEL, SCORES

# In the environment of hpo


def environment(folder: Path) -> Path | str:
    """Return the interpreter of an environment with Ray that finds all other packages where they are.

    It is pip's last line instead if Ray cannot be installed.
    """
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists():
        venv.create(folder, with_pip=True, clear=True)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "present.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
        command = [python, "-m", "pip", "install", "--quiet", "ray[tune]"]
        installed = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if installed.returncode:
            return str(installed.stdout.strip().splitlines()[-1])
        done.touch()
    return python


def tune(home: Any, python: Path, name: str, trials: int, processes: int, ready: Any, go: Any, used: Any) -> None:
    """Have Ray Tune do so many trials in so many actors."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a system's path to a socket has 107 characters at most
    ready.release()
    go.wait()
    command = [python, __file__, home.services.tracking_uri, name, str(trials), str(processes), folder]
    try:
        answer = subprocess.run(command, env=home.environment, capture_output=True, text=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    used.update(json.loads(answer.stdout.splitlines()[-1]))


# In that of Ray


def main(uri: str, experiment: str, trials: int, processes: int, folder: Path) -> None:
    import logging

    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    used, begin = dict[int, float](), dict[int, float]()
    threading.Thread(target=watch, args=(used, begin, folder, processes), daemon=True).start()
    ray.init(num_cpus=processes, include_dashboard=False, configure_logging=False, _temp_dir=str(folder / "r"))
    callback = MLflowLoggerCallback(
        tracking_uri=uri, experiment_name=experiment, tags={"hpo.kind": "trial"}, save_artifact=True
    )
    tuner = tune.Tuner(
        tune.with_parameters(trial, folder=str(folder)),
        param_space={"learning_rate": tune.loguniform(1e-4, 1e-2)},
        tune_config=tune.TuneConfig(num_samples=trials, reuse_actors=True, max_concurrent_trials=processes),
        run_config=tune.RunConfig(storage_path=str(folder / "results"), callbacks=[callback], verbose=0),
    )
    tuner.fit()
    time.sleep(0.5)  # the last look at the processes
    print(json.dumps({"client": sum(used.values()) - sum(begin.values())}))


def trial(config: dict[str, Any], folder: str) -> None:
    import torch
    from ray import tune

    from models import networks, specs

    torch.set_num_threads(1)
    network = networks.build(specs.from_dict(MODEL), (1, 8, 8), 9)
    Path(folder, f"ready-{os.getpid()}").touch()
    for epoch in range(1, EPOCHS + 1):
        if epoch == EPOCHS:
            torch.save(network, Path(tune.get_context().get_trial_dir()) / "model.pt")
        tune.report(dict.fromkeys(SCORES, 0.5))


def watch(used: dict[int, float], begin: dict[int, float], folder: Path, processes: int) -> None:
    """Keep the CPU seconds of this process and all that it has started, by process; and those at the first trial."""
    import psutil

    own = psutil.Process()
    while True:
        for process in [own, *own.children(recursive=True)]:
            try:
                used[process.pid] = sum(process.cpu_times()[:2])
            except psutil.Error:
                continue
        if not begin and len(list(folder.glob("ready-*"))) >= processes:
            begin.update(used)
        time.sleep(0.2)


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in (Path(__file__).parents[1], sys.path[0]))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
