"""`hpo run --dry-run`: what a run would train, and how long it would take here, from a measured probe."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from data_pipeline.npz import save_npz
from data_pipeline.split import unscored
from hpo.errors import ServiceError
from hpo.planning.plans import START, Plan
from hpo.queue import ENDED, Job, Queue
from hpo.report import tables
from hpo.report.display import duration, progress_line
from hpo.services import serving
from hpo.settings import Settings
from hpo.study import conflict
from hpo.study.records import TrialSpec
from hpo.text import number_text
from hpo.worker import protocol
from hpo.worker.processes import Process, next_gpu, visible_gpus

LONG = 3600.0  # seconds of fine-tuning that deserve a word
CPU = "the CPU"


def show(chosen: Sequence[tuple[Plan, int]], read: Settings, *, device: str) -> None:
    """Print the plans, each of so many trainers: points, parameters, time measured on `device` ("cpu", "auto" or
    "cuda"), what is done. Writes nothing but a temporary file."""
    console = tables.console()
    plans, counts = [plan for plan, _ in chosen], dict.fromkeys(str(trainers) for _, trainers in chosen)
    total, memory, where = 0.0, 0.0, ""
    for plan, trainers in chosen:
        left, needed, where = _show_plan(plan, read, console, device)
        places = trainers if where == CPU else min(trainers, len(visible_gpus()) or 1)  # who share a GPU take turns
        total += max(sum(left) / places, max(left, default=0.0))  # a trial has one trainer
        memory = max(memory, needed)
    missing = [file["name"] for plan in plans for file in plan.weights.values() if not file["sha256"]]
    for name in dict.fromkeys(missing):
        console.print(f"The pretrained weights {name} are not on this machine yet: `hpo weights` fetches them.")
    with_trainers = f"{' and '.join(counts)} trainer{'' if [*counts] == ['1'] else 's'}"
    console.print(
        f"About {duration(total)} with {with_trainers}, from a few batches of each network in one of them, on {where}; "
        f"up to {memory:.1f} GB of {'memory' if where == CPU else 'main memory'} a trainer."
    )
    if total > LONG and where == CPU and any(plan.study.model.get("trainable") == "all" for plan in plans):
        console.print(
            "Fine-tuning takes hours on a CPU: `--device auto` trains on a GPU if there is one, and Ctrl-C keeps "
            "everything."
        )
    console.print("Nothing was started or written.")


def _show_plan(plan: Plan, read: Settings, console: Console, device: str) -> tuple[list[float], float, str]:
    """Print one plan; seconds of training that are left of each trial, GB of memory a trainer needs, and where it was
    measured."""
    jobs = _planned(plan, read)
    study, repeats = plan.study, plan.study.repeats
    grid = [spec for spec, _ in plan.specs()]
    rows = [(str(config), spec) for config, spec in enumerate(grid[: len(grid) // repeats])]  # a seed costs the same
    rows = rows or plan.examples()
    probed = _probe(plan, [spec for _, spec in rows], device)
    each = f", each {repeats} times" if repeats > 1 else ""
    chosen = f"the best {study.trials} points of {study.best_of.name}" if study.best_of else f"{study.trials} trials"
    chosen += each + (", NOT PRETRAINED" if study.at_random else "")
    if not grid:
        by = "" if study.best_of else f", chosen by the sampler '{study.sampler}'"
        chosen += f"{by}; measured where the search starts and at the ends of its space"
    names = list(study.space) if grid else []
    heads = ["config" if grid else "point", *names, "parameters", "trainable", "seconds an epoch", "time"]
    lines: list[list[str]] = []
    times: list[float] = []
    left: list[float] = []
    for index, (label, spec) in enumerate(rows):
        seconds, once, epochs = probed[index].seconds, probed[index].once, spec["training"]["epochs"]
        times.append(once + seconds * epochs)
        state = []
        if grid:
            known = {job.repeat: job for job in jobs if job.config == index}
            left += [
                times[-1] - seconds * (known[repeat].epochs if repeat in known else 0)
                for repeat in range(repeats)
                if repeat not in known or known[repeat].state not in ENDED
            ]
            states = [known[repeat].state if repeat in known else "to do" for repeat in range(repeats)]
            state = [", ".join(dict.fromkeys(states))]
        point = [number_text(spec["point"][name]) for name in names]
        sizes = [f"{spec['parameters']:,}", f"{spec['trainable_parameters']:,}"]
        time = duration((repeats if grid else 1) * times[-1])
        lines.append([label, *point, *sizes, f"{seconds:.3f}", time, *state])
    if not grid:
        ended = sum(job.state in ENDED for job in jobs)
        at_start = [taken for taken, (label, _) in zip(times, rows, strict=True) if label == START]
        left = [statistics.fmean(at_start or times)] * (study.trials * repeats - ended)
    title = f"Plan of {plan.name}: {chosen}"
    tables.print_table(console, tables.of_lines(title, [*heads, *(["state"] if grid else [])], lines))
    for note in unscored(plan.dataset):
        console.print(f"Note: {note}")
    if study.pruner["name"] != "none":
        console.print("The pruner ends some of them earlier; the time below takes each to its end.")
    where = next(probe.device for probe in probed.values())
    return left, max(probe.memory for probe in probed.values()), where or CPU


def _planned(plan: Plan, read: Settings) -> list[Job]:
    """The trials of this study that the database has already. StudyError if its name is another study's there."""
    found = serving.running(read, mlflow=False)
    if found is None or not all(file["sha256"] for file in plan.weights.values()):
        return []
    queue = Queue(found.database_url)
    row = next((row for row in queue.studies() if row.name == plan.name), None) if queue.installed() else None
    if row is None:
        return []
    if row.identity != plan.identity:
        raise conflict(plan.name, row.spec, plan.canonical)
    return [job for job in queue.jobs(plan.name) if job.kind == "trial"]


def _probe(plan: Plan, specs: list[TrialSpec], device: str) -> dict[int, protocol.Probed]:
    """What a trainer measures of each specification. Raises ServiceError."""
    probed: dict[int, protocol.Probed] = {}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("wb") as log:
        data = Path(folder, "data.npz")
        save_npz(plan.dataset, data)
        trainer = Process("trainer", log, gpu=None if device == "cpu" else next_gpu(visible_gpus(), []))
        try:
            trainer.send(protocol.Probe(specs=tuple(specs), data=data, device=device))
            finished, reason = False, ""
            while not finished and not trainer.closed:
                for message in trainer.messages():
                    if isinstance(message, protocol.Probed):
                        probed[message.index] = message
                        progress_line(f"measuring {len(probed)} of {len(specs)}")
                    reason = getattr(message, "reason", reason)
                    finished = finished or not isinstance(message, protocol.Ready | protocol.Probed)
                time.sleep(0.05)
        finally:
            trainer.kill()
            trainer.close()
        progress_line("")
        if len(probed) < len(specs):
            reason = reason or Path(folder, "log").read_text(encoding="utf-8", errors="replace")[-2000:]
            hint = "" if device == "cpu" else " `--device auto` takes the CPU where there is no GPU."
            raise ServiceError(f"The probe failed on the device '{device}': {reason.rstrip('.')}.{hint}")
    return probed
