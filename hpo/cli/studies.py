"""`hpo run`, `worker`, `stop`, `cancel`, `delete`: the work on studies."""

import argparse
import sys
from typing import TYPE_CHECKING

from hpo import api
from hpo.cli import terminal
from hpo.cli.options import STUDY, TRUST, choice, command, exclusive, flag, many, one_of, option, say
from hpo.errors import NotFound, SettingsError
from hpo.text import counted

if TYPE_CHECKING:
    from hpo.api import Plan, Study, StudyRow

STOPPED = 130  # exit code


COMPUTE = (
    one_of(
        option(
            "--trainers",
            "N",
            "training processes (default: HPO_TRAINERS, or one for every training.threads cores; one on each GPU)",
        ),
        option(
            "--trainers-per-gpu",
            "N",
            "training processes on each GPU; with --device auto or cuda (default: 1)",
        ),
    ),
    choice(
        "--device",
        ("cpu", "auto", "cuda"),
        "where to train: auto takes the GPUs that pass a test, else the CPU; cuda insists on GPUs; cpu gives the same "
        "bits as other machines of this kind (default: auto)",
        default="auto",
    ),
)


@command(
    option("--study", "NAME", "a shipped study, the path of a .toml file, or a planned study", required=True),
    option("--data", "DIR", "folder of images and label table (default: the study's)", type=str),
    option("--epochs", "N", "short for --set training.epochs=N"),
    option("--seed", "N", "short for --set seed=N; never moves the split"),
    many(
        "--set", "KEY=VALUE", "override any key of the study file; STUDY:KEY=VALUE one study of a sequence; repeatable"
    ),
    *COMPUTE,
    TRUST,
    flag("--with-prerequisites", "first run the study that this one starts from, if need be"),
    flag("--retry", "train trials that are dead again, and close again"),
    flag("--dry-run", "print the plan and a time estimate; leave nothing behind"),
    choice("--on", ("slurm",), "hand the workers to SLURM as an array job (default: work here)"),
    option("--workers", "N", "with --on slurm: tasks of the array (default: 1)"),
    many(
        "--slurm",
        "KEY=VALUE",
        "with --on slurm: an option of sbatch, such as partition=gpu, time=240 or gres=gpu:1; repeatable",
    ),
)
def run(options: argparse.Namespace) -> int:
    """Plan a study, train it to its end, promote its best model. Goes on where it stopped."""
    from hpo.cli.watch import Terminal
    from hpo.report import tables, winners

    if options.dry_run:
        others = {"--on": options.on, "--workers": options.workers, "--slurm": options.slurm, "--retry": options.retry}
        exclusive("--dry-run", "starts and changes nothing", others)
        return _dry_run(options)
    console = tables.console()
    with Terminal(console, is_run=True) as watch:
        done = api.run(
            load(options),
            compute=compute(options),
            slurm=slurm(options),
            retry=options.retry,
            trust_code=options.trust_code,
            watch=watch,
        )
    for studies, link in done.comparisons:
        tables.print_table(console, winners.winners_table(studies))
        console.print(f"All their trials side by side:\n  compare: {link}", soft_wrap=True)
    if done.are_services_started:
        print("Postgres and the MLflow server keep running (`hpo down` stops them).")
        terminal.exports(done.services)
    failed = [_tell_failed_gpus(outcome) for outcome in done.outcomes]
    if done.outcomes[-1].stopped and done.outcomes[-1].stop is None:
        return STOPPED
    is_over = done.outcomes[-1].stopped or all(outcome.succeeded for outcome in done.outcomes)
    return 0 if is_over and not any(failed) else 1


def _tell_failed_gpus(outcome: "api.Outcome") -> bool:
    """Say which GPUs failed while others went on; return whether there are any."""
    if outcome.failed_gpus:
        failures = "; ".join(f"GPU {gpu} failed: {reason.rstrip('.')}" for gpu, reason in outcome.failed_gpus.items())
        print(
            f"hpo: {outcome.row.name}: {failures}. The other GPUs went on, and no attempt counts. Look after it, or "
            "leave it out (CUDA_VISIBLE_DEVICES).",
            file=sys.stderr,
        )
    return bool(outcome.failed_gpus)


def _dry_run(options: argparse.Namespace) -> int:
    from hpo.cli import plan
    from hpo.report import tables

    estimates = api.dry_run(load(options), compute=compute(options), say=terminal.progress)
    plan.show(estimates, tables.console())
    return 0


def load(options: argparse.Namespace) -> "list[Study] | list[Plan]":
    """Return what the options of `hpo run` name, overrides applied."""
    if options.data is not None and options.data != options.data.encode(errors="ignore").decode():
        raise SettingsError(f"--data {options.data}: expected a path in UTF-8, as a study can record it. Rename it.")
    keys = {override.partition("=")[0].strip() for override in options.set}
    for name, key in {"epochs": "training.epochs", "seed": "seed", "data": "data.path"}.items():
        if getattr(options, name) is not None:
            exclusive(f"--{name}", f"is short for --set {key}=…", {f"--set {key}=…": key in keys})
    return api.load(
        options.study,
        data=options.data,
        epochs=options.epochs,
        seed=options.seed,
        overrides=options.set,
        prerequisites=options.with_prerequisites,
    )


def compute(options: argparse.Namespace) -> "api.Compute":
    """Return where to train. Raise SettingsError."""
    return api.Compute(device=options.device, trainers=options.trainers, trainers_per_gpu=options.trainers_per_gpu)


def slurm(options: argparse.Namespace) -> "api.Slurm | None":
    """Return what is asked of SLURM, None without `--on slurm`. Raise SettingsError."""
    if options.on is not None:
        return api.Slurm(workers=1 if options.workers is None else options.workers, options=options.slurm)
    if options.workers is not None or options.slurm:
        raise SettingsError("--workers and --slurm: expected --on slurm beside them.")
    return None


@command(
    option("--study", "NAME", "name of a planned study, as `hpo studies` lists it", required=True),
    one_of(
        option("--max-trials", "N", "leave after N trials"),
        flag("--once", "short for --max-trials 1"),
    ),
    option("--max-hours", "H", "after H hours hand back what is training, and leave"),
    option("--idle-exit", "SECONDS", "leave when there was nothing to train for so long"),
    flag("--stay", "wait while the study is paused (default: leave with exit code 1)"),
    option(
        "--stops",
        "N",
        "leave once the study has been stopped more than N times, even before this starts (default: as often as when "
        "it starts)",
    ),
    *COMPUTE,
    TRUST,
)
def worker(options: argparse.Namespace) -> int:
    """Train trials of a planned study, beside other workers, until it is closed."""
    from hpo.cli.watch import Terminal, by
    from hpo.report import results, tables

    with Terminal(tables.console(), is_run=False) as watch:
        outcome = api.worker(
            options.study,
            compute=compute(options),
            max_trials=1 if options.once else options.max_trials,
            max_hours=options.max_hours,
            idle_exit=options.idle_exit,
            stay=options.stay,
            stops=options.stops,
            trust_code=options.trust_code,
            watch=watch,
        )
    name, has_failed = outcome.row.name, _tell_failed_gpus(outcome)
    if outcome.closed:
        print(f"Study {name} is closed. `hpo show {name}` prints its result.")
        if not outcome.succeeded:
            print("\n".join(results.fruitless(name, list(outcome.jobs))))
            return 1
    elif not outcome.stopped:
        state = "not closed yet" if outcome.row.facts.planned else "not planned yet"
        print(f"Left at its limit: study {name} is {state}.")
    elif outcome.stop is not None:
        print(f"Stopped{by(outcome.stop)}: what is done is kept. The same command goes on.")
        return int(has_failed)  # it did what it was asked to: the program that started it need not start it again
    return STOPPED if outcome.stopped and outcome.stop is None else int(has_failed)


@command(STUDY, flag("--no-wait", "do not wait until they have left"))
def stop(options: argparse.Namespace) -> int:
    """Let all workers of a study, on whatever host, give their trials back and leave."""

    def tell(line: str) -> None:
        print(line, flush=True)

    outcome = api.stop(options.study, wait=not options.no_wait, say=tell)
    if options.no_wait:
        print(f"The workers of {outcome.study} give their trials back and leave within seconds.")
        return 0
    _tell_if_not_recorded(outcome.is_recorded)
    print(
        f"Nobody works on {outcome.study}; {counted(outcome.done, 'trial', 'are', of=outcome.trials)} done. "
        f"`hpo run --study {outcome.study}` or `hpo worker --study {outcome.study}` goes on."
    )
    return 0


@command(
    STUDY,
    option("--trial", "N", "number as `hpo trials` lists it; N/R its repeat R alone", type=str, required=True),
    flag("--undo", "bring a cancelled trial back; it goes on where it was"),
)
def cancel(options: argparse.Namespace) -> int:
    """End one trial for good: it is not retried, and its study closes without it."""
    cancelled = api.cancel(options.study, options.trial, undo=options.undo)
    for job in cancelled.jobs:
        where = f" after epoch {job.epochs}" if job.epochs else ""
        if options.undo:
            print(f"{job.title} waits again{where}. A worker, or `hpo run --study {job.study}`, trains it.")
        else:
            print(
                f"Cancelled {job.title}{where}: it is not trained any more, and the study closes without it. "
                f"`hpo cancel --study {job.study} --trial {options.trial} --undo` brings it back."
            )
    _tell_if_not_recorded(cancelled.is_recorded)
    return 0


def _tell_if_not_recorded(is_recorded: bool) -> None:
    if not is_recorded:
        say("MLflow is away: a worker shows it there later.")


@command(
    STUDY,
    flag("--yes", "do not ask"),
    flag("--not-in-mlflow", "although the MLflow server has lost (or never had) its experiment"),
)
def delete(options: argparse.Namespace) -> int:
    """Delete a study: trials, runs, models, versions. Asks first."""

    def confirm(row: "StudyRow", done: int) -> None:
        print(
            f"This deletes the study {row.name} for good: {counted(done, 'finished trial')}, with runs, models and "
            "versions."
        )
        try:
            answer = input("Type the study's name to go on: ")
        except EOFError:
            answer = ""
        if answer.strip() != row.name:
            raise NotFound("Not deleted: the name was not typed. (--yes goes on without asking.)")

    api.delete(options.study, in_mlflow=not options.not_in_mlflow, confirm=None if options.yes else confirm, say=say)
    print(f"Deleted the study {options.study}.")
    return 0
