"""Workers on an engine that places them on machines."""

from collections.abc import Sequence
from dataclasses import dataclass

from hpo.errors import SettingsError
from hpo.launch.engine import Size
from hpo.launch.engines import engine
from hpo.launch.fleets import Request
from hpo.operations.compute import Compute
from hpo.settings import Settings
from models import user


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers that an engine places. Raise SettingsError for an engine or a number that there is not."""

    engine: str  # slurm or ray
    workers: int | str = 1  # or "MIN..MAX": as many as the trials that wait can use, between these two
    options: Sequence[str] = ()  # of the engine: KEY=VALUE, such as cpus=4

    def __post_init__(self) -> None:
        engine(self.engine)
        Size.parse(self.workers)

    def request(self, compute: Compute, chosen: Settings, threads: int, words: Sequence[str] = ()) -> Request:
        """Return what the engine is asked for, for networks of so many threads; `words`: further ones of `hpo worker`.

        Raise SettingsError.
        """
        target = engine(self.engine).parse(self.options, chosen)
        trainers = compute.trainers or chosen.trainers
        # `auto` is the CPU for a worker that asks for no GPU. Clusters that give one unasked need `cuda`.
        device = "cpu" if compute.device == "auto" and not target.resources.has_gpus else compute.device
        if threads > 1 and device == "cpu":
            needed = threads * (trainers or 1)
            target = target.sized(needed)
            if (target.resources.cpus or needed) < needed:
                raise SettingsError(
                    f"--{self.engine}: cpus: expected at least {needed} for {trainers or 1} x training.threads = "
                    f"{threads}, found {target.resources.cpus}."
                )
        words = [*words, "--device", device]
        count = trainers or 1
        if compute.trainers_per_gpu is not None:
            words += ["--trainers-per-gpu", str(compute.trainers_per_gpu)]
            count = compute.trainers_per_gpu
        elif trainers or device == "cpu":
            # a node has more cores than the worker may use, and only some clusters hide the others
            count = trainers or max(1, (target.resources.cpus or 1) // threads)
            words += ["--trainers", str(count)]
        words += [word for digest in user.trusted() for word in ("--trust-code", digest)]
        return Request(engine=target, size=Size.parse(self.workers), words=tuple(words), trainers=count)
