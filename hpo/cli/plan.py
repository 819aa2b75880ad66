"""The tables of `hpo run --dry-run`."""

from collections.abc import Iterable, Sequence

from rich.console import Console

from hpo.api import Estimate
from hpo.report import tables
from hpo.report.tables import Column, Row, Table
from hpo.report.words import label
from hpo.text import duration

LONG = 3600.0  # seconds of fine-tuning that deserve a word


def show(estimates: Iterable[Estimate], console: Console) -> None:
    """Print each plan as soon as it is measured: configurations, parameters, times, what is done; then the total."""
    plans, told = [], set[str]()
    for estimate in estimates:
        plans.append(estimate)
        _show_plan(estimate, console)
        for note in [note for note in estimate.notes if note not in told]:
            console.print(f"Note: {note}", markup=False)
            told.add(note)
    total, on_cpu = sum(estimate.seconds for estimate in plans), plans[-1].is_on_cpu
    missing = [file.name for estimate in plans for file in estimate.plan.weights.values() if not file.sha256]
    for name in dict.fromkeys(missing):
        console.print(f"The pretrained weights {name} are not on this machine yet: `hpo weights` fetches them.")
    console.print(
        f"About {duration(total)} with {_trainers(plans)}, from a few batches of each network in one of them, on "
        f"{plans[-1].where}; up to {max(estimate.memory for estimate in plans):.1f} GB of "
        f"{'memory' if on_cpu else 'main memory'} a trainer."
    )
    if slower := [estimate.on_cpu for estimate in plans if estimate.on_cpu]:
        seconds = sum(estimate.seconds for estimate in slower)
        console.print(f"On the CPU (`--device cpu`) about {duration(seconds)} with {_trainers(slower)}.")
    if reason := plans[-1].place.reason:
        console.print(f"`hpo run` trains {reason}.")
    tuned = any(estimate.plan.study.model.get("trainable", "head") != "head" for estimate in plans)
    if total > LONG and on_cpu and tuned:
        console.print("Fine-tuning takes hours on a CPU. A GPU is faster, and Ctrl-C keeps everything.")
    console.print("Nothing was started or written.")


def _trainers(plans: Sequence[Estimate]) -> str:
    counts = list(dict.fromkeys(str(estimate.trainers) for estimate in plans))
    return f"{' and '.join(counts)} trainer{'' if counts == ['1'] else 's'}"


def _show_plan(estimate: Estimate, console: Console) -> None:
    plan, study, is_grid = estimate.plan, estimate.plan.study, estimate.is_grid
    columns = [
        Column(name="label", label="config" if is_grid else "point"),
        *([Column(name="point", left=True)] if is_grid else []),
        Column(name="parameters"),
        Column(name="trainable", spare=True),
        Column(name="seconds an epoch"),
        Column(name="time", text=duration),
        *([Column(name="state")] if is_grid else []),
    ]
    rows = [
        Row(
            values={
                "label": measured.label,
                "point": label(measured.spec),
                "parameters": measured.spec.parameters,
                "trainable": measured.spec.trainable_parameters,
                "seconds an epoch": measured.epoch_seconds,
                "time": (study.trainings if is_grid else 1) * measured.seconds,
                "state": ", ".join(dict.fromkeys(measured.states)),
            }
        )
        for measured in estimate.configurations
    ]
    tables.print_table(console, Table(title=f"Plan of {plan.name}: {_title(estimate)}", columns=columns, rows=rows))
    if study.is_pruned:
        console.print("The pruner ends some of them earlier; the time below takes each to its end.")


def _title(estimate: Estimate) -> str:
    """Return which configurations the plan trains."""
    study = estimate.plan.study
    text = study.scope.format(study.best_of.name if study.best_of else "")
    text += f", each {study.repeats} times" if study.repeats > 1 else ""
    text += f", each in {study.folds} folds, and the best once more on all of them" if study.folds else ""
    text += ", NOT PRETRAINED" if study.at_random else ""
    if estimate.is_grid:
        return text
    by = "" if study.best_of else f", chosen by the sampler '{study.sampler}'"
    return f"{text}{by}; measured where the search starts and at the ends of its space"
