"""`hpo run`, `worker`, `stop`, `cancel`, `delete`: the work on studies."""

import argparse
from typing import TYPE_CHECKING

from hpo import api
from hpo.cli import terminal
from hpo.cli.options import Commands, add_study, command, exclusive, say
from hpo.errors import NotFound, SettingsError

if TYPE_CHECKING:
    from hpo.api import Study, StudyRow

STOPPED = 130  # exit code


def add(commands: Commands) -> None:
    """Add these commands to the parser."""
    text = "Plan a study, train it to its end, promote its best model. Goes on where it stopped."
    _add_run(command(commands, "run", run, text))
    text = "Train trials of a planned study, beside other workers, until it is closed."
    _add_worker(command(commands, "worker", worker, text))

    text = "Let all workers of a study, on whatever host, give their trials back and leave."
    parser = command(commands, "stop", stop, text)
    add_study(parser)
    parser.add_argument("--no-wait", action="store_true", help="do not wait until they have left")

    text = "End one trial for good: it is not retried, and its study closes without it."
    parser = command(commands, "cancel", cancel, text)
    add_study(parser)
    text = "number as `hpo trials` lists it; N/R its repeat R alone"
    parser.add_argument("--trial", required=True, metavar="N", help=text)
    parser.add_argument("--undo", action="store_true", help="bring a cancelled trial back; it goes on where it was")

    parser = command(commands, "delete", delete, "Delete a study: trials, runs, models, versions. Asks first.")
    add_study(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    text = "although the MLflow server has lost (or never had) its experiment"
    parser.add_argument("--not-in-mlflow", action="store_true", help=text)


def _add_run(parser: argparse.ArgumentParser) -> None:
    add_study(parser, "a shipped study, or the path of a .toml file")
    parser.add_argument("--data", metavar="DIR", help="folder of images and label table (default: the study's)")
    parser.add_argument("--epochs", type=int, metavar="N", help="short for --set training.epochs=N")
    parser.add_argument("--seed", type=int, metavar="N", help="short for --set seed=N; never moves the split")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override any key of the study file; STUDY:KEY=VALUE one study of a sequence; repeatable",
    )
    _add_compute(parser)
    parser.add_argument(
        "--with-prerequisites", action="store_true", help="first run the study that this one starts from, if need be"
    )
    parser.add_argument("--retry", action="store_true", help="train trials that are dead again, and close again")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and a time estimate; leave nothing behind"
    )
    parser.add_argument(
        "--on", choices=("slurm",), help="hand the workers to SLURM as an array job (default: work here)"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="with --on slurm: tasks of the array (default: 1)")
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --on slurm: an option of sbatch, such as partition=gpu, time=240 or gres=gpu:1; repeatable",
    )


def _add_worker(parser: argparse.ArgumentParser) -> None:
    add_study(parser, "name of a planned study, as `hpo studies` lists it")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--max-trials", type=int, metavar="N", help="leave after N trials")
    either.add_argument("--once", dest="max_trials", action="store_const", const=1, help="short for --max-trials 1")
    parser.add_argument(
        "--max-hours", type=float, metavar="H", help="after H hours hand back what is training, and leave"
    )
    parser.add_argument(
        "--idle-exit", type=float, metavar="SECONDS", help="leave when there was nothing to train for so long"
    )
    parser.add_argument(
        "--stops",
        type=int,
        metavar="N",
        help="leave once the study has been stopped more than N times, even before this starts (default: as often as "
        "when it starts)",
    )
    _add_compute(parser)


def _add_compute(parser: argparse.ArgumentParser) -> None:
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--trainers",
        type=int,
        metavar="N",
        help="training processes (default: HPO_TRAINERS, or one for every training.threads cores; one on each GPU)",
    )
    either.add_argument(
        "--trainers-per-gpu",
        type=int,
        metavar="N",
        help="training processes on each visible GPU; with --device auto or cuda (default: 1)",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "auto", "cuda"),
        default="cpu",
        help="where to train: auto takes the GPUs that are visible, if any, cuda insists (default: cpu)",
    )


def run(options: argparse.Namespace) -> int:
    """Plan, train, close and show one study after the other."""
    from hpo.cli.watch import Terminal
    from hpo.report import tables, winners

    if options.dry_run:
        others = {"--on": options.on, "--workers": options.workers, "--slurm": options.slurm, "--retry": options.retry}
        exclusive("--dry-run", "starts and changes nothing", others)
        return _dry_run(options)
    console = tables.console()
    with Terminal(console, is_run=True) as watch:
        done = api.run(load(options), compute=compute(options), slurm=slurm(options), retry=options.retry, watch=watch)
    for studies, link in done.comparisons:
        tables.print_table(console, winners.winners_table(studies))
        console.print(f"All their trials side by side:\n  compare: {link}", soft_wrap=True)
    if done.are_services_started:
        console.print("Postgres and the MLflow server keep running (`hpo down` stops them). For a notebook:")
        console.print(api.export_lines(done.services), soft_wrap=True)
    if done.outcomes[-1].stopped:
        return STOPPED
    return 0 if all(outcome.succeeded for outcome in done.outcomes) else 1


def _dry_run(options: argparse.Namespace) -> int:
    from hpo.cli import plan
    from hpo.report import tables

    estimates = api.dry_run(load(options), compute=compute(options), say=terminal.progress)
    plan.show(estimates, tables.console())
    return 0


def load(options: argparse.Namespace) -> "list[Study]":
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


def worker(options: argparse.Namespace) -> int:
    from hpo.cli.watch import Terminal, by
    from hpo.report import tables

    with Terminal(tables.console(), is_run=False) as watch:
        outcome = api.worker(
            options.study,
            compute=compute(options),
            max_trials=options.max_trials,
            max_hours=options.max_hours,
            idle_exit=options.idle_exit,
            stops=options.stops,
            watch=watch,
        )
    name = outcome.row.name
    if outcome.closed:
        print(f"Study {name} is closed. `hpo run --study ...` shows its result.")
    elif not outcome.stopped:
        state = "not closed yet" if outcome.row.facts.planned else "not planned yet"
        print(f"Left at its limit: study {name} is {state}.")
    elif outcome.stop is not None:
        print(f"Stopped{by(outcome.stop)}: what is done is kept. The same command goes on.")
        return 0  # it did what it was asked to: the program that started it need not start it again
    return STOPPED if outcome.stopped else 0


def stop(options: argparse.Namespace) -> int:
    def tell(line: str) -> None:
        print(line, flush=True)

    outcome = api.stop(options.study, wait=not options.no_wait, say=tell)
    if options.no_wait:
        print(f"The workers of {outcome.study} give their trials back and leave within seconds.")
        return 0
    _tell_if_not_recorded(outcome.is_recorded)
    print(
        f"Nobody works on {outcome.study}; {outcome.done} of {outcome.trials} trials are done. "
        f"`hpo run` with the same options, or `hpo worker --study {outcome.study}`, goes on."
    )
    return 0


def cancel(options: argparse.Namespace) -> int:
    cancelled = api.cancel(options.study, options.trial, undo=options.undo)
    for job in cancelled.jobs:
        where = f" after epoch {job.epochs}" if job.epochs else ""
        if options.undo:
            print(f"{job.title} waits again{where}. A worker, or `hpo run` with the same options, trains it.")
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


def delete(options: argparse.Namespace) -> int:
    def confirm(row: "StudyRow", done: int) -> None:
        print(f"This deletes the study {row.name} for good: {done} finished trials, their runs, models and versions.")
        try:
            answer = input("Type the study's name to go on: ")
        except EOFError:
            answer = ""
        if answer.strip() != row.name:
            raise NotFound("Not deleted: the name was not typed. (--yes goes on without asking.)")

    api.delete(options.study, in_mlflow=not options.not_in_mlflow, confirm=None if options.yes else confirm, say=say)
    print(f"Deleted the study {options.study}.")
    return 0
