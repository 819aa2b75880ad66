"""`hpo run`, `worker`, `stop`, `cancel`, `delete`: the work on studies."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from hpo import api
from hpo.cli import terminal
from hpo.cli.options import STUDY, TRUST, choice, command, exclusive, flag, many, one_of, option, say
from hpo.errors import NotFound, SettingsError
from hpo.text import counted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpo.api import Plan, Study, StudyRow

STOPPED = 130  # exit code


COMPUTE = (
    one_of(
        option(
            "--trainers",
            "N",
            "training processes (default: HPO_TRAINERS, or one for every training.threads cores; one on each GPU)",
        ),
        option("--trainers-per-gpu", "N", "training processes on each GPU; with --device auto or cuda (default: 1)"),
    ),
    choice(
        "--device",
        ("cpu", "auto", "cuda"),
        "where to train: auto takes the GPUs that pass a test, else the CPU; cuda insists on GPUs; cpu gives the same "
        "bits as other machines of this kind (default: auto)",
        default="auto",
    ),
)

OPTIONS = {  # of each engine
    "slurm": "an option of sbatch, such as partition=gpu, time=240 or gres=gpu:1",
    "ray": "what each worker gets, such as cpus=4, gpus=0.5 or labels=market:spot, or address=HOST:PORT",
}
CLUSTER = (
    choice("--on", tuple(OPTIONS), "let an engine place the workers on other machines (default: work here)"),
    option(
        "--workers",
        "N",
        "with --on: how many; MIN..MAX: as many as the trials that wait can use, between these two (default: 1)",
        type=str,
    ),
    *(many(f"--{name}", "KEY=VALUE", f"with --on {name}: {text}; repeatable") for name, text in OPTIONS.items()),
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
    option("--priority", "N", "the pool takes trials of the highest priority first (default: as it is; 0 at first)"),
    flag("--detach", "plan it, leave the work to the pool (`hpo worker` without --study), and return at once"),
    option("--max-hours", "H", "after H hours close the study with the best so far"),
    option("--until", "nmse=X", "close the study once its best configuration has a validation NMSE of X"),
    option("--trials", "N", "raise the number of a search's trials to N; what is trained stays"),
    flag("--dry-run", "print the plan and a time estimate; leave nothing behind"),
    *CLUSTER,
)
def run(options: argparse.Namespace) -> int:
    """Plan a study, train it to its end, promote its best model. Goes on where it stopped."""
    from hpo.cli.watch import Terminal
    from hpo.report import tables, winners
    from hpo.study import AUTO

    if options.study == AUTO:
        return _auto(options)
    if options.dry_run:
        others = on_cluster(options) | {"--retry": options.retry}
        others |= {"--priority": options.priority, "--detach": options.detach}
        others |= {"--trials": options.trials, "--max-hours": options.max_hours, "--until": options.until}
        exclusive("--dry-run", "starts and changes nothing", others)
        return _dry_run(options)
    if options.detach:
        return _detach(options)
    console = tables.console()
    with Terminal(console, is_run=True) as watch:
        done = api.run(
            load(options),
            compute=compute(options),
            cluster=cluster(options),
            retry=options.retry,
            trust_code=options.trust_code,
            priority=options.priority,
            trials=options.trials,
            budget=api.Budget(max_hours=options.max_hours, until=options.until),
            watch=watch,
        )
    for studies, link in done.comparisons:
        tables.print_table(console, winners.winners_table(studies))
        console.print(f"All their trials side by side:\n  compare: {link}", soft_wrap=True)
    if done.are_services_started:
        print("Postgres and the MLflow server keep running (`hpo down` stops them).")
        terminal.exports(done.services)
    failed = [_tell_failed_gpus(outcome.failed_gpus, outcome.row.name) for outcome in done.outcomes]
    if done.outcomes[-1].stopped and done.outcomes[-1].stop is None:
        return STOPPED
    is_over = done.outcomes[-1].stopped or all(outcome.succeeded for outcome in done.outcomes)
    return 0 if is_over and not any(failed) else 1


def _auto(options: argparse.Namespace) -> int:
    from hpo.cli import auto, watch

    auto.check(options, on_cluster(options))
    data, seed, hours = data_folder(options), options.seed or 0, options.max_hours
    with watch.Terminal(is_run=False) as display:
        done = api.auto(data=data, seed=seed, max_hours=hours, compute=compute(options), watch=display)
    failed = _tell_failed_gpus(done.failed_gpus, options.study)
    if not done.is_finished:
        print(f"Stopped{watch.by(done.stop)}: what is done is kept. The same command goes on.")
        return STOPPED if done.stop is None else int(failed)
    auto.show(display.console, done, auto.next_steps(done, options))
    if done.are_services_started:
        print("Postgres and the MLflow server keep running (`hpo down` stops them).")
        terminal.exports(done.services)
    return int(failed or not any(step.done for step in done.steps))


def _detach(options: argparse.Namespace) -> int:
    from hpo.cli.watch import Plain

    others = on_cluster(options) | {"--trainers": options.trainers, "--trainers-per-gpu": options.trainers_per_gpu}
    others |= {"--max-hours": options.max_hours, "--until": options.until}
    exclusive("--detach", "trains nothing itself", others | {"--device": options.device != "auto"})
    done = api.detach(
        load(options),
        retry=options.retry,
        trials=options.trials,
        priority=options.priority,
        trust_code=options.trust_code,
        watch=Plain(),
    )
    for row in done.rows:
        is_closed = row.name in done.closed
        print(f"{row.name} is {'closed' if is_closed else f'planned, priority {row.priority}'}.")
    for name in done.later:
        print(f"{name} is not planned yet: the same command plans it when the studies before it are closed.")
    if done.workers:
        print(f"The pool has {counted(done.workers, 'worker')} ({counted(done.trainers, 'trainer')}).")
    else:
        print("No worker of the pool is here. `hpo worker` starts one, on this machine or another.")
    print("`hpo status` shows how far it is; the command without --detach follows it, and works on it.")
    if done.are_services_started:
        print("Postgres and the MLflow server keep running (`hpo down` stops them).")
        terminal.exports(done.services)
    return 0


def _tell_failed_gpus(failed: "Mapping[str, str]", study: str) -> bool:
    """Say which GPUs failed while others went on; return whether there are any."""
    if failed:
        failures = "; ".join(f"GPU {gpu} failed: {reason.rstrip('.')}" for gpu, reason in failed.items())
        print(
            f"hpo: {study}: {failures}. The other GPUs went on, and no attempt counts. Look after it, or "
            "leave it out (CUDA_VISIBLE_DEVICES).",
            file=sys.stderr,
        )
    return bool(failed)


def _dry_run(options: argparse.Namespace) -> int:
    from hpo.cli import plan
    from hpo.report import tables

    estimates = api.dry_run(load(options), compute=compute(options), say=terminal.progress)
    plan.show(estimates, tables.console())
    return 0


def load(options: argparse.Namespace) -> "list[Study] | list[Plan]":
    """Return what the options of `hpo run` name, overrides applied."""
    data = data_folder(options)
    keys = {override.partition("=")[0].strip() for override in options.set}
    for name, key in {"epochs": "training.epochs", "seed": "seed", "data": "data.path"}.items():
        if getattr(options, name) is not None:
            exclusive(f"--{name}", f"is short for --set {key}=…", {f"--set {key}=…": key in keys})
    return api.load(
        options.study,
        data=data,
        epochs=options.epochs,
        seed=options.seed,
        overrides=options.set,
        prerequisites=options.with_prerequisites,
    )


def data_folder(options: argparse.Namespace) -> str | None:
    """Return the folder of `--data`. Raise SettingsError if no study can record its name."""
    data: str | None = options.data
    if data is not None and data != data.encode(errors="ignore").decode():
        raise SettingsError(f"--data {data}: expected a path in UTF-8, as a study can record it. Rename it.")
    return data


def compute(options: argparse.Namespace) -> "api.Compute":
    """Return where to train. Raise SettingsError."""
    return api.Compute(device=options.device, trainers=options.trainers, trainers_per_gpu=options.trainers_per_gpu)


def on_cluster(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options about an engine, by their names."""
    names = ("on", "workers", *OPTIONS)
    return {f"--{name}": getattr(options, name) for name in names}


def cluster(options: argparse.Namespace) -> "api.Cluster | None":
    """Return what is asked of an engine, None without `--on`. Raise SettingsError."""
    for name in OPTIONS:
        if options.on != name and getattr(options, name):
            raise SettingsError(f"--{name}: expected --on {name} beside it.")
    if options.on is not None:
        workers = 1 if options.workers is None else options.workers
        return api.Cluster(engine=options.on, workers=workers, options=getattr(options, options.on))
    if options.workers is not None:
        raise SettingsError(f"--workers: expected --on {' or --on '.join(OPTIONS)} beside it.")
    return None


@command(
    option("--study", "NAME", "the only study to train (default: every open one: a worker of the pool)"),
    one_of(
        option("--max-trials", "N", "leave after N trials"),
        flag("--once", "short for --max-trials 1"),
    ),
    option("--max-hours", "H", "after H hours hand back what is training, and leave"),
    option("--idle-exit", "SECONDS", "leave when there was nothing to train for so long"),
    flag("--probe", "only say which hpo this machine has, and whether it reaches database and MLflow server"),
    flag("--stay", "with --study: wait while it is paused (default: leave with exit code 1)"),
    option(
        "--stops",
        "N",
        "leave once the study, or the pool, has been stopped more than N times, even before this starts (default: as "
        "often as when it starts)",
    ),
    *COMPUTE,
    TRUST,
    *CLUSTER,
)
def worker(options: argparse.Namespace) -> int:
    """Train trials, beside other workers: of one study until it is closed, or of every open one until it is stopped."""
    from hpo.cli.watch import Terminal, by
    from hpo.report import results, tables

    if options.probe:
        exclusive("--probe", "trains nothing", on_cluster(options) | {"--study": options.study})
        api.probe(say=lambda line: print(line, flush=True))
        return 0
    if options.on is not None:
        others = {"--study": options.study, "--stay": options.stay, "--stops": options.stops}
        exclusive("--on", "hands in workers of the pool; `hpo run --study NAME --on` those of a study", others)
    where = cluster(options)
    if options.study is None:
        return _serve(options, where)
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
    name, has_failed = outcome.row.name, _tell_failed_gpus(outcome.failed_gpus, outcome.row.name)
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


def _serve(options: argparse.Namespace, where: "api.Cluster | None") -> int:
    from hpo.cli.watch import Plain

    if options.stay:
        raise SettingsError("--stay: expected --study beside it. Without it, a worker stays until it is stopped.")
    what: dict[str, Any] = {
        "compute": compute(options),
        "max_trials": 1 if options.once else options.max_trials,
        "max_hours": options.max_hours,
        "idle_exit": options.idle_exit,
        "trust_code": options.trust_code,
        "watch": Plain(),
    }
    if where is not None:
        return _tell_left(api.hand_in(where, **what), "All workers of the pool have left: nothing is left to train.")
    return _tell_left(api.serve(**what, stops=options.stops), "Left at its limit.")


def _tell_left(left: "api.Left", otherwise: str) -> int:
    from hpo.cli.watch import by

    has_failed = _tell_failed_gpus(left.failed_gpus, "the pool")
    if left.stopped and left.stop is None:
        return STOPPED
    print(f"Stopped{by(left.stop)}: what is done is kept." if left.stopped else otherwise)
    return int(has_failed)


@command(
    option("--study", "NAME", "its workers leave, the pool goes on with others (default: the workers of the pool)"),
    flag("--no-wait", "do not wait until they have left"),
)
def stop(options: argparse.Namespace) -> int:
    """Let all workers of a study, or of the pool, on whatever host, give their trials back and leave."""

    def tell(line: str) -> None:
        print(line, flush=True)

    if options.study is None:
        api.stop_pool(wait=not options.no_wait, say=tell)
        print("The workers of the pool leave within seconds." if options.no_wait else "No worker of the pool is here.")
        return 0
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
