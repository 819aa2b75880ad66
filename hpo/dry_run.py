"""`hpo run --dry-run`: what a run would train, and how long it would take here, from a measured probe."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipeline.dataset import save_npz
from hpo import report, services
from hpo.display import duration, progress_line
from hpo.errors import ServiceError
from hpo.mirror import number_text
from hpo.planning import Plan
from hpo.queue import ENDED, Job, Queue
from hpo.settings import Settings
from hpo.study import conflict
from hpo.trainers import Trainer

LONG = 3600.0  # seconds of fine-tuning that deserve a word


def show(plans: Sequence[Plan], read: Settings, trainers: int) -> None:
    """Print the plans: points, parameters, measured time, what is done. Writes nothing but a temporary file."""
    console = report.console()
    times, memory = [], 0.0
    for plan in plans:
        seconds, needed = _show_plan(plan, read, trainers, console)
        times.append(seconds)
        memory = max(memory, needed)
    total = sum(times) / trainers
    missing = [file["name"] for plan in plans for file in plan.weights.values() if not file["sha256"]]
    for name in dict.fromkeys(missing):
        console.print(f"The pretrained weights {name} are not on this machine yet: `hpo weights` fetches them.")
    if memory:
        console.print(
            f"About {duration(total)} with {trainers} trainers, from a few batches of "
            f"each network on one core; up to {memory:.1f} GB of memory a trainer."
        )
    if total > LONG and any(plan.study.model.get("trainable") == "all" for plan in plans):
        console.print(
            "Fine-tuning takes hours on a CPU: `--device auto` trains on a GPU if there is one, and Ctrl-C keeps "
            "everything."
        )
    console.print("Nothing was started or written.")


def _show_plan(plan: Plan, read: Settings, trainers: int, console: Console) -> tuple[float, float]:
    """Print one plan; seconds of training that are left, and GB of memory a trainer needs."""
    known: dict[tuple[int | None, int], Job] = {}
    found = services.running(read)
    if found is not None and all(file["sha256"] for file in plan.weights.values()):
        queue = Queue(found.database_url)
        rows = {row.name: row for row in queue.studies()} if queue.installed() else {}
        if plan.name in rows:
            if rows[plan.name].identity != plan.identity:
                raise conflict(plan.name, rows[plan.name].spec, plan.canonical)
            known = {(job.config, job.repeat): job for job in queue.jobs(plan.name) if job.kind == "trial"}
    repeats = plan.study.repeats
    specs = [spec for spec, _ in plan.specs()]
    specs = specs[: len(specs) // repeats]  # another seed costs the same
    probed = _probe(plan, specs) if specs else {}
    bare = ", NOT PRETRAINED" if plan.study.at_random else ""
    each = f", each {repeats} times" if repeats > 1 else ""
    table = Table(title=f"Plan of {plan.name}: {plan.study.trials} trials{each}{bare}", title_justify="left")
    names = list(plan.study.space)
    for name in ("config", *names, "parameters", "trainable", "seconds an epoch", "time", "state"):
        table.add_column(name, justify="right")
    total = 0.0
    for index, spec in enumerate(specs):
        seconds, once, epochs = probed[index]["seconds"], probed[index]["once"], spec["training"]["epochs"]
        jobs = [known.get((index, repeat)) for repeat in range(repeats)]
        for job in jobs:
            if job is None or job.state not in ENDED:
                total += once + seconds * (epochs - (job.epochs if job else 0))
        states = dict.fromkeys(job.state if job else "to do" for job in jobs)
        cells = [number_text(spec["point"][name]) for name in names]
        table.add_row(
            str(index),
            *cells,
            f"{spec['parameters']:,}",
            f"{spec['trainable_parameters']:,}",
            f"{seconds:.3f}",
            duration(repeats * (once + seconds * epochs)),
            ", ".join(states),
        )
    if specs:
        console.print(table)
    else:
        console.print(
            f"Plan of {plan.name}: the best {plan.study.trials} points of {best.name}{each}."
            if (best := plan.study.best_of) is not None
            else f"Plan of {plan.name}: {plan.study.trials} trials{each} chosen by the sampler '{plan.study.sampler}' "
            f"from {', '.join(names)}{bare}."
        )
    return total, max((each["memory"] for each in probed.values()), default=0.0)


def _probe(plan: Plan, specs: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """What a trainer measures of each specification. Raises ServiceError."""
    probed: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, Path(folder, "log").open("wb") as log:
        data = Path(folder, "data.npz")
        save_npz(plan.dataset, data)
        trainer = Trainer(log)
        try:
            trainer.send("probe", specs=specs, data=str(data))
            finished = False
            while not finished and not trainer.closed:
                for event in trainer.events():
                    if event["event"] == "probed":
                        probed[event["index"]] = event
                        progress_line(f"measuring {len(probed)} of {len(specs)}")
                    finished = finished or event["event"] in ("finished", "failed")
                time.sleep(0.05)
        finally:
            trainer.kill()
            trainer.close()
        progress_line("")
        if len(probed) < len(specs):
            raise ServiceError(f"The probe failed: {Path(folder, 'log').read_text(errors='replace')[-2000:]}")
    return probed
