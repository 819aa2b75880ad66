"""Where to train on this machine, or on each machine of a cluster."""

import logging
from dataclasses import dataclass
from functools import cached_property

from data_pipeline.cores import cores
from hpo.errors import SettingsError
from hpo.settings import Settings, at_least
from hpo.worker import devices
from hpo.worker.devices import Place

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
