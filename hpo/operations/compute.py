"""Where to train: on this machine, or as an array job of SLURM."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from data_pipeline.cores import cores
from hpo.errors import SettingsError
from hpo.launch import slurm as arrays
from hpo.settings import Settings, at_least
from hpo.worker import devices
from hpo.worker.devices import Place
from models import user

log = logging.getLogger("hpo.api")


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where to train, and in how many trainer processes."""

    device: str = "auto"  # auto (the GPUs that pass a test, else the CPU), cpu, or cuda, which insists
    trainers: int | None = None  # None: HPO_TRAINERS, or one for every training.threads cores, or one on each GPU
    trainers_per_gpu: int | None = None  # instead of trainers

    def __post_init__(self) -> None:
        at_least("--trainers-per-gpu", self.trainers_per_gpu, 1)
        at_least("--trainers", self.trainers, 1)
        if self.trainers_per_gpu is not None and self.device == "cpu":
            raise SettingsError("--trainers-per-gpu: expected --device auto or --device cuda beside it.")

    @cached_property
    def place(self) -> Place:
        """The device that trains on this machine. GPUs are tested once."""
        return devices.choose(self.device)

    def count(self, chosen: Settings, threads: int, place: Place) -> int:
        """Return the number of trainer processes, each of so many threads, on this machine."""
        gpus = len(place.gpus)
        given = self.trainers or (self.trainers_per_gpu or 0) * gpus or chosen.trainers
        count = given or gpus or max(1, cores() // threads)
        if threads > 1 and not gpus and count * threads > cores():
            log.warning(f"Note: {count} x training.threads = {count * threads} threads on {cores()} cores are slow.")
        return count


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """Workers as an array job of SLURM."""

    workers: int = 1  # tasks of the array
    options: Sequence[str] = ()  # of sbatch: KEY=VALUE, such as partition=gpu

    def __post_init__(self) -> None:
        at_least("--workers", self.workers, 1)

    def request(self, compute: Compute, chosen: Settings, threads: int) -> arrays.Request:
        """Return what SLURM is asked for. Raise SettingsError."""
        wanted = arrays.parse(self.options)
        trainers = compute.trainers or chosen.trainers
        # `auto` is the CPU for a task that asks for no GPU. Clusters that give one unasked need `cuda`.
        asks = any("gpu" in f"{key}={value}".lower() for key, value in wanted.items())
        device = "cpu" if compute.device == "auto" and not asks else compute.device
        if threads > 1 and device == "cpu":
            needed = threads * (trainers or 1)
            if wanted.setdefault("cpus-per-task", needed) < needed:
                raise SettingsError(
                    f"--slurm: cpus-per-task: expected at least {needed} for {trainers or 1} x training.threads = "
                    f"{threads}, found {wanted['cpus-per-task']}."
                )
        words = ["--device", device]
        if compute.trainers_per_gpu is not None:
            words += ["--trainers-per-gpu", str(compute.trainers_per_gpu)]
        elif trainers or device == "cpu":
            # a node has more cores than the task may use, and only some clusters hide the others
            words += ["--trainers", str(trainers or max(1, wanted.get("cpus-per-task", 1) // threads))]
        words += [word for digest in user.trusted() for word in ("--trust-code", digest)]
        return arrays.Request(workers=self.workers, options=wanted, words=tuple(words))
