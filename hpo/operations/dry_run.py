"""What a run would train, and how long it would take here, from a measured probe."""

import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.npz import save_npz
from hpo import settings
from hpo.errors import ServiceError
from hpo.operations import own_code
from hpo.operations.compute import Compute
from hpo.operations.preparing import as_parts
from hpo.operations.starts import starting_models
from hpo.planning.content import require_content
from hpo.planning.preparation import START, Plan, prepare
from hpo.queue import ENDED, Job, Queue
from hpo.services import serving
from hpo.settings import Settings
from hpo.study import Study, conflict
from hpo.study.records import TrialSpec
from hpo.worker import protocol
from hpo.worker.devices import CPU, Place
from hpo.worker.processes import Process, next_gpu

ON_CPU = "the CPU"

log = logging.getLogger("hpo.api")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One configuration of a plan, measured in a trainer."""

    label: str  # number in the grid; of a search: start, smallest or largest
    spec: TrialSpec
    epoch_seconds: float
    seconds: float  # of one trial, all epochs
    states: Sequence[str]  # of a grid: of its repeats in the database, or `to do`


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a plan would train, and how long that takes on this machine."""

    plan: Plan
    trainers: int
    configurations: list[Measured]
    left: list[float]  # seconds of training that each unfinished trial has left
    memory: float  # GB that a trainer needs
    where: str  # the GPU's name, or ON_CPU
    place: Place
    on_cpu: "Estimate | None" = None  # where `auto` chose GPUs

    @property
    def is_grid(self) -> bool:
        """Whether the study trains every configuration of its space."""
        return self.plan.study.sampler == "grid"

    @property
    def is_on_cpu(self) -> bool:
        """Whether the networks were measured on the CPU."""
        return self.where == ON_CPU

    @property
    def notes(self) -> list[str]:
        """Sentences on what is doubtful about images and labels."""
        return [finding.text for finding in self.plan.findings if finding.kind != "accepted"]

    @property
    def seconds(self) -> float:
        """Seconds until the plan is trained; a trial has one trainer, and trainers that share a GPU take turns."""
        places = self.trainers if self.is_on_cpu else min(self.trainers, len(self.place.gpus) or 1)
        return max(sum(self.left) / places, max(self.left, default=0.0))


def dry_run(
    study: str | Sequence[Study | Plan], *, compute: Compute | None = None, say: Callable[[str], object] = log.debug
) -> Iterator[Estimate]:
    """Yield for each study what `run` would train and how long it would take here. Leaves nothing behind.

    `say` gets a line for each network that is measured. Raise StudyError or DatasetError if the studies cannot be run,
    ServiceError if the device cannot train.
    """
    chosen, compute = settings.read(), compute or Compute()
    parts = as_parts(study)
    with starting_models([part for part in parts if not isinstance(part, Plan)]) as starts:
        plans = [
            part if isinstance(part, Plan) else prepare(part, trial_run=True, starts=starts.get(part.name))
            for part in parts
        ]
    for plan in plans:
        # Where `auto` has chosen GPUs, the time of the CPU is worth knowing, too.
        choices = [compute.place, CPU] if compute.device == "auto" and compute.place.gpus else [compute.place]
        here, *others = (
            estimate(plan, chosen, trainers=compute.count(chosen, plan.study.threads, place), place=place, say=say)
            for place in choices
        )
        yield replace(here, on_cpu=others[0] if others else None)


def estimate(plan: Plan, chosen: Settings, *, trainers: int, place: Place, say: Callable[[str], object]) -> Estimate:
    """Measure a few batches of each network on the first device of `place`. Writes nothing but temporary files.

    `say` gets a line for each network, an empty one at the end.

    Raise ServiceError if the device cannot train, StudyConflict if the plan's name is another study's, StudyError if
    its images or labels are wrong and it is not planned yet.
    """
    jobs, repeats = _planned(plan, chosen), plan.study.trainings
    if not jobs:
        require_content(plan.folder, plan.findings)
    grid = [spec for spec, _ in plan.specs()]
    # another repeat of a configuration costs the same
    specs = [(str(spec.config), spec) for spec in grid[: len(grid) // repeats]] or plan.examples()
    probed = _probe(plan, [spec for _, spec in specs], place, say)
    configurations: list[Measured] = []
    left: list[float] = []
    for index, (label, spec) in enumerate(specs):
        epoch_seconds = probed[index].seconds
        if not spec.parameters:  # of a network that code of the user's makes
            spec = replace(spec, parameters=probed[index].parameters, trainable_parameters=None)
        seconds = probed[index].once + epoch_seconds * spec.training["epochs"]
        trained = {job.repeat: job for job in jobs if job.config == spec.config} if grid else {}
        states = [trained[repeat].state if repeat in trained else "to do" for repeat in range(repeats if grid else 0)]
        left += [
            seconds - epoch_seconds * (trained[repeat].epochs if repeat in trained else 0)
            for repeat, state in enumerate(states)
            if state not in ENDED
        ]
        configurations.append(
            Measured(label=label, spec=spec, epoch_seconds=epoch_seconds, seconds=seconds, states=states)
        )
    if not grid:
        at_start = [measured.seconds for measured in configurations if measured.label == START]
        mean = statistics.fmean(at_start or [measured.seconds for measured in configurations])
        left = [mean] * (plan.study.trials * repeats - sum(job.state in ENDED and not job.is_refit for job in jobs))
    if plan.study.folds and left:
        left.append(statistics.fmean(measured.seconds for measured in configurations))  # a winner, trained again
    return Estimate(
        plan=plan,
        trainers=trainers,
        configurations=configurations,
        left=left,
        memory=max(measured.memory for measured in probed.values()),
        where=next(measured.device for measured in probed.values()) or ON_CPU,
        place=place,
    )


def _planned(plan: Plan, chosen: Settings) -> list[Job]:
    """Return the trials of this study that the database has already. Raise StudyConflict if the name is taken."""
    services = serving.running(chosen, mlflow=False)
    if services is None or not all(file.sha256 for file in plan.weights.values()):
        return []
    with closing(Queue(services.database_url)) as queue:
        row = next((row for row in queue.studies() if row.name == plan.name), None) if queue.installed() else None
        if row is None:
            return []
        if row.identity != plan.identity:
            raise conflict(plan.name, row.canonical, plan.canonical)
        return [job for job in queue.jobs(plan.name) if job.kind == "trial"]


def _probe(
    plan: Plan, specs: list[TrialSpec], place: Place, say: Callable[[str], object]
) -> dict[int, protocol.Probed]:
    """What a trainer measures of each specification. Raises ServiceError."""
    probed: dict[int, protocol.Probed] = {}
    with (
        own_code.at_hand(plan.study) as code,
        tempfile.TemporaryDirectory() as folder,
        Path(folder, "log").open("wb") as log,
    ):
        data = Path(folder, "data.npz")
        save_npz(plan.dataset, data)
        trainer = Process("trainer", log, gpu=next_gpu(place.gpus, []), code=code)
        try:
            trainer.send(protocol.Probe(specs=tuple(specs), data=data, device=place.device))
            finished, reason = False, ""
            while not finished and not trainer.closed:
                for message in trainer.messages():
                    if isinstance(message, protocol.Probed):
                        probed[message.index] = message
                        say(f"measuring {len(probed)} of {len(specs)}")
                    reason = getattr(message, "reason", reason)
                    finished = finished or not isinstance(message, protocol.Ready | protocol.Probed)
                time.sleep(0.05)
        finally:
            trainer.kill()
            trainer.close()
        say("")
        if len(probed) < len(specs):
            reason = reason or Path(folder, "log").read_text(encoding="utf-8", errors="replace")[-2000:]
            hint = "" if place.device == "cpu" else " `--device auto` takes the CPU where there is no GPU."
            raise ServiceError(f"The probe failed on the device '{place.device}': {reason.rstrip('.')}.{hint}")
    return probed
