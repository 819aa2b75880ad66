"""What tracking and orchestration add to a trial of the grid's smallest configuration, model logging included.

    python bench/overhead.py [--trials 3] [--epochs 300]

Half one: a bare process per core trains that configuration `--trials` times with `models.training` alone. Half two:
`hpo run` with one trainer per core does the same, on Postgres and MLflow servers of its own, in a temporary folder. All
of it counts: claims, leases, epochs stored and forwarded, checkpoints, the model packaged and logged, the cores that
supervisor and servers take from the trainers. Each trainer's first trial is left out: it imports what packaging needs,
once per process. Prints seconds per trial of both, and the ratio.
"""

import argparse
import multiprocessing
import statistics
import subprocess
import sys
import time

from machine import cores, machine, temporary_home

SPEC = {"family": "cnn", "filters": 8, "kernel_size": 3, "dropout": 0.0}
STUDY = """
[model]
family = "cnn"
filters = 8
kernel_size = 3
dropout = 0.0
[space]
learning_rate = {rates}
[training]
epochs = {epochs}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=3, help="counted trials of each process (default 3)")
    parser.add_argument("--epochs", type=int, default=300, help="of a trial (default 300)")
    arguments = parser.parse_args()
    trials, epochs, processes = arguments.trials, arguments.epochs, cores()
    print(f"{machine()}; {trials} trials a core of {epochs} epochs", flush=True)
    before = trial_seconds_bare(trials, epochs, processes)
    print(f"bare training:  {before:7.2f} s a trial", flush=True)
    tracked = trial_seconds_tracked(trials, epochs, processes)
    print(f"hpo run:        {tracked:7.2f} s a trial", flush=True)
    after = trial_seconds_bare(trials, epochs, processes)
    print(f"bare training:  {after:7.2f} s a trial (again: the machine may have changed its speed)")
    bare = (before + after) / 2
    print(
        f"ratio:          {tracked / bare:7.2f} (hpo run to the mean of the two: {100 * (tracked / bare - 1):+.1f} %)"
    )


def trial_seconds_bare(trials: int, epochs: int, processes: int) -> float:
    """Seconds a trial takes without hpo, all cores busy."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        pool.starmap(bare, [(1, 2)] * processes, chunksize=1)  # imports and first steps
        rounds = pool.starmap(bare, [(trials, epochs)] * processes, chunksize=1)
    return statistics.mean(rounds) / trials


def bare(trials: int, epochs: int) -> float:
    """Train in this process; return the seconds."""
    import torch

    from data_pipeline.dataset import DEFAULT, load
    from data_pipeline.split import split
    from models import specs
    from models.training import Training

    torch.set_num_threads(1)
    data = load(DEFAULT)
    parts = split(len(data.images))
    begin = time.monotonic()
    for _ in range(trials):
        training = Training(
            specs.from_dict(SPEC),
            specs.training_from_dict({"epochs": epochs}),
            train=(data.images[parts.train], data.targets[parts.train]),
            validation=(data.images[parts.validation], data.targets[parts.validation]),
        )
        for _ in training.epochs():
            pass
    return time.monotonic() - begin


def trial_seconds_tracked(trials: int, epochs: int, processes: int) -> float:
    """Seconds a trial takes with everything, all cores busy, from the first round's end to the last's."""
    from hpo.queue import Queue

    with temporary_home() as home:
        rates = [1e-3 + 1e-9 * index for index in range(processes * (trials + 1))]
        study = home.folder / "overhead.toml"
        study.write_text(STUDY.format(rates=rates, epochs=epochs))
        subprocess.run(
            [sys.executable, "-P", "-m", "hpo", "run", "--study", str(study)],
            env=home.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
        queue = Queue(home.services.database_url)
        ends = sorted(job.changed_at for job in queue.jobs("overhead") if job.kind == "trial")
        queue.close()
    first_round, last_round = ends[:processes], ends[-processes:]
    return (statistics.mean(last_round) - statistics.mean(first_round)) / trials


if __name__ == "__main__":
    main()
