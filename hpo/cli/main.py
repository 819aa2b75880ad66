"""The command line: `hpo COMMAND`. Parses, calls, prints; heavy imports happen inside the command that needs them."""

import argparse
import errno
import json
import logging
import math
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.cli import away, completion, terminal
from hpo.errors import ModelError, NotFound, ServiceError, SettingsError, UserError
from hpo.text import visible

if TYPE_CHECKING:
    from hpo.launch.slurm import Request
    from hpo.planning.plans import Plan
    from hpo.queue import Queue, Stop, StudyRow
    from hpo.services.serving import Services
    from hpo.settings import Settings
    from hpo.study import Study
    from hpo.tracking.client import Tracker
    from hpo.worker.supervisor import Limits

WATCH_INTERVAL = 2.0  # seconds


def program() -> None:
    """The `hpo` of the shell: `main`, and then the end, though a thread may still be waiting for a server."""
    terminal.take_over()
    os.environ["PYTHONSAFEPATH"] = "1"  # for what a library starts: nothing imports from where the user stands
    code = main()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0 done, 1 the user can put it right, 2 usage."""
    options = parser().parse_args(arguments)
    if options.version:
        print(f"hpo {metadata.version('hpo')}")
        return 0
    if options.print_completion:
        print(completion.script(parser(), options.print_completion))
        return 0
    if options.command is None:
        parser().print_help()
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_Messages()])
    logging.getLogger("hpo").setLevel(logging.INFO)
    try:
        _require_folder()
        code = options.function(options)
        sys.stdout.flush()
        return int(code or 0)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except Exception as error:
        if message := _mistake(error):
            print(f"hpo: {message}", file=sys.stderr)
            return 1
        raise


def _require_folder() -> None:
    """Raise SettingsError if paths cannot be relative to anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise SettingsError("The current folder was removed, perhaps made anew: change into one (cd).") from None


class _Messages(logging.Handler):
    """Log lines on standard error as it is at that moment: the live display puts them above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # a full disk under a log file ends no work
            print(visible(self.format(record)), file=sys.stderr)  # the display would take colours out of it


def _mistake(error: Exception) -> str | None:
    """The message of an error the user can put right; None for one that is ours."""
    if isinstance(error, UserError):
        return str(error)
    kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__]  # by name: none is imported for it
    if "data_pipeline.dataset.DatasetError" in kinds or "models.specs.SpecError" in kinds:
        return str(error)
    if "hpo.queue.DatabaseLost" in kinds:
        return away.database(error)
    if "hpo.tracking.errors.TrackingUnavailable" in kinds:
        return away.tracking(error)
    if "mlflow.exceptions.MlflowException" in kinds or kinds[0].startswith("requests."):
        return away.tracking_refuses(error)
    if kinds[0].startswith("sqlalchemy."):
        return away.database_refuses(error)
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    ):
        return f"{error.filename or 'A file of hpo'}: {error.strerror}. Nothing is lost; the same command goes on."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return None


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="hpo",
        description="Search hyperparameters of networks that predict a microstructure's stiffness tensor; every trial "
        "is tracked in MLflow, the best model is promoted and can be downloaded.",
        epilog="Without HPO_DATABASE_URL and MLFLOW_TRACKING_URI hpo runs its own Postgres and MLflow server under "
        "HPO_HOME (default: ./mlruns). All settings: docs/reference/settings.md.",
    )
    made.add_argument("--version", action="store_true", help="print the version of hpo and leave")
    made.add_argument(
        "--print-completion", choices=completion.SHELLS, help="print a script that completes hpo's commands on Tab"
    )
    commands = made.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(function=function)
        return added

    def study_options(to: argparse.ArgumentParser) -> None:
        to.add_argument("--study", required=True, metavar="NAME", help="a shipped study, or the path of a .toml file")
        to.add_argument("--data", metavar="DIR", help="folder of images and label table (default: the study's)")
        to.add_argument("--epochs", type=int, metavar="N", help="short for --set training.epochs=N")
        to.add_argument("--seed", type=int, metavar="N", help="short for --set seed=N; never moves the split")
        to.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override any key of the study file; STUDY:KEY=VALUE one study of a sequence; repeatable",
        )

    def as_json(to: argparse.ArgumentParser) -> None:
        to.add_argument("--json", action="store_true", help="print JSON for programs")

    def trainers(to: argparse.ArgumentParser) -> None:
        either = to.add_mutually_exclusive_group()
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

    def device(to: argparse.ArgumentParser) -> None:
        to.add_argument(
            "--device",
            choices=("cpu", "auto", "cuda"),
            default="cpu",
            help="where to train: auto takes the GPUs that are visible, if any, cuda insists (default: cpu)",
        )

    it = command("run", run, "Plan a study, train it to its end, promote its best model. Goes on where it stopped.")
    study_options(it)
    trainers(it)
    device(it)
    it.add_argument(
        "--with-prerequisites", action="store_true", help="first run the study that this one starts from, if need be"
    )
    it.add_argument("--retry", action="store_true", help="train trials that are dead again, and close again")
    it.add_argument("--dry-run", action="store_true", help="print the plan and a time estimate; leave nothing behind")
    it.add_argument("--on", choices=("slurm",), help="hand the workers to SLURM as an array job (default: work here)")
    it.add_argument("--workers", type=int, metavar="N", help="with --on slurm: tasks of the array (default: 1)")
    it.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="with --on slurm: an option of sbatch, such as partition=gpu, time=240 or gres=gpu:1; repeatable",
    )

    it = command("worker", worker, "Train trials of a planned study, beside other workers, until it is closed.")
    it.add_argument("--study", required=True, metavar="NAME", help="name of a planned study, as `hpo studies` lists it")
    either = it.add_mutually_exclusive_group()
    either.add_argument("--max-trials", type=int, metavar="N", help="leave after N trials")
    either.add_argument("--once", dest="max_trials", action="store_const", const=1, help="short for --max-trials 1")
    it.add_argument("--max-hours", type=float, metavar="H", help="after H hours hand back what is training, and leave")
    it.add_argument(
        "--idle-exit", type=float, metavar="SECONDS", help="leave when there was nothing to train for so long"
    )
    it.add_argument(
        "--stops",
        type=int,
        metavar="N",
        help="leave once the study has been stopped more than N times, even before this starts (default: as often as "
        "when it starts)",
    )
    trainers(it)
    device(it)

    it = command("stop", stop, "Let all workers of a study, on whatever host, give their trials back and leave.")
    it.add_argument("--study", required=True, metavar="NAME", help="name as `hpo studies` lists it")
    it.add_argument("--no-wait", action="store_true", help="do not wait until they have left")

    it = command("cancel", cancel, "End one trial for good: it is not retried, and its study closes without it.")
    it.add_argument("--study", required=True, metavar="NAME", help="name as `hpo studies` lists it")
    it.add_argument(
        "--trial", required=True, metavar="N", help="number as `hpo trials` lists it; N/R its repeat R alone"
    )
    it.add_argument("--undo", action="store_true", help="bring a cancelled trial back; it goes on where it was")

    it = command("up", up, "Start the embedded Postgres and MLflow server, or say where they are.")
    it.add_argument(
        "--listen",
        metavar="ADDRESS",
        help="serve other machines at this address of this one, with access control; 127.0.0.1 serves none (default: "
        "as it was, at first 127.0.0.1)",
    )
    command("down", down, "Stop the embedded Postgres and MLflow server.")

    it = command("status", status, "Show services, studies and running trials.")
    it.add_argument("--watch", action="store_true", help="refresh until Ctrl-C")
    as_json(it)

    as_json(command("studies", studies, "List the studies that were planned here."))

    it = command("trials", trials, "List all trials of a study.")
    it.add_argument("--study", required=True, metavar="NAME", help="name as `hpo studies` lists it")
    as_json(it)

    it = command("compare", compare, "Show studies, trials, runs and registered versions side by side.")
    it.add_argument("first", metavar="A", help="study (its best trial), trial (grid/22), MLflow run id, or version")
    it.add_argument("others", metavar="B", nargs="+", help="the same; a version is MODEL@ALIAS, MODEL/NUMBER or @ALIAS")
    it.add_argument("--differences", action="store_true", help="only what is not the same for all")
    as_json(it)

    it = command("promote", promote, "Show what a closed study promoted, and set missing aliases again.")
    it.add_argument("--study", required=True, metavar="NAME", help="name as `hpo studies` lists it")

    it = command("report", report_, "Write the report of closed studies: one HTML page, Markdown, CSV and JSON tables.")
    it.add_argument(
        "--study",
        action="append",
        default=[],
        metavar="NAME",
        help="name as `hpo studies` lists it; repeatable (default: all closed studies on the newest one's data)",
    )
    it.add_argument("-o", "--output", required=True, metavar="DIR", type=Path, help="folder to write")

    it = command("download", download, "Download a registered model, checked against the hashes in the database.")
    it.add_argument("--alias", default="champion", metavar="NAME", help="alias or version number (default: champion)")
    it.add_argument("--model", metavar="NAME", help="registered model (default: the only one, or the newest study's)")
    it.add_argument("folder", metavar="DIR", type=Path, help="folder to make")

    it = command(
        "predict", predict, "Predict the components of images with a downloaded model; CSV on standard output."
    )
    it.add_argument("folder", metavar="DIR", type=Path, help="folder that `hpo download` made")
    it.add_argument(
        "images",
        metavar="IMAGE",
        type=Path,
        nargs="+",
        help="image file, grey, of the size trained on (periodic networks: any)",
    )
    as_json(it)

    it = command("delete", delete, "Delete a study: trials, runs, models, versions. Asks first.")
    it.add_argument("--study", required=True, metavar="NAME", help="name as `hpo studies` lists it")
    it.add_argument("--yes", action="store_true", help="do not ask")
    it.add_argument(
        "--not-in-mlflow", action="store_true", help="although the MLflow server has lost (or never had) its experiment"
    )

    it = command("backup", backup, "Save the databases and all artifacts in one file, while workers go on.")
    it.add_argument("file", metavar="FILE", type=Path, help="file to make, such as hpo.tar")

    it = command("restore", restore, "Fill an empty HPO_HOME, or empty databases given by URL, from a backup.")
    it.add_argument("file", metavar="FILE", type=Path, help="file that `hpo backup` made")

    it = command("doctor", doctor, "Check services, versions, every study's invariants, orphans and caches.")
    it.add_argument("--study", metavar="NAME", help="only this study (default: all)")
    it.add_argument("--fix", action="store_true", help="mend what can be mended; safe on a running study")
    as_json(it)
    it = command("weights", weights, "List pretrained weights; fetch those that are missing, or take files from hand.")
    it.add_argument("files", metavar="FILE", type=Path, nargs="*", help="torchvision's file, brought by hand")

    it = command("data", None, "Make a labelled data set, or check a folder.")
    data_commands = it.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    make = data_commands.add_parser("make", help="draw microstructures and compute their stiffness; resumes")
    make.add_argument("folder", metavar="DIR", type=Path, help="folder to write")
    make.add_argument("--count", type=int, default=520, metavar="N", help="cells (default: 520)")
    make.add_argument("--size", type=int, default=64, metavar="N", help="pixels along an edge (default: 64)")
    make.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cells (default: 0)")
    for phase in ("matrix", "inclusion"):
        make.add_argument(
            f"--{phase}",
            type=float,
            nargs=2,
            metavar=("E", "NU"),
            help=f"Young's modulus in GPa and Poisson's ratio of the {phase} (default: that of the shipped set)",
        )
    make.set_defaults(function=data_make)
    check = data_commands.add_parser("check", help="list everything that is wrong with a folder")
    check.add_argument("folder", metavar="DIR", type=Path, help="folder of images and label table")
    check.add_argument("--image-size", type=int, metavar="N", help="resize to N x N pixels")
    check.set_defaults(function=data_check)
    return made


# Studies


def run(options: argparse.Namespace) -> int:
    """Plan, train, close, show; one study after the other."""
    from hpo import settings
    from hpo.operations import dry_run
    from hpo.planning import plans as planning
    from hpo.queue import Queue
    from hpo.report import tables, winners
    from hpo.services import serving
    from hpo.tracking.client import Tracker

    if options.dry_run:
        given = {"--on": options.on, "--workers": options.workers, "--slurm": options.slurm, "--retry": options.retry}
        _without("--dry-run", "starts and changes nothing", given)
    read, chosen = settings.read(), _studies(options)
    console = tables.console()
    if options.dry_run:
        plans = [planning.prepare(each, trial_run=True) for each in chosen]
        dry_run.show(
            [(plan, _trainers(options, read, plan.study.threads)) for plan in plans], read, device=options.device
        )
        return 0
    requests = [_slurm_request(options, read, threads=each.threads) for each in chosen]
    if request := requests[0]:
        request.check(read)
    _fetch_weights(chosen)
    plans = [planning.prepare(each) for each in chosen]
    found, started = serving.up(read, report=_say)
    queue = Queue(found.database_url)
    queue.install()
    codes = []
    for plan in plans:
        codes.append(_run_one(plan, options, read, found, queue, console))
        if codes[-1] == 130:
            break
    if len(plans) > 1 and max(codes) == 0:
        closings = {plan.name: job.closing for plan in plans for job in queue.jobs(plan.name) if job.kind == "closing"}
        for alike in winners.comparable([(queue.study(name), ended or {}) for name, ended in closings.items()]):
            tables.print_table(console, winners.winners_table(alike))
            link = winners.log_winners(Tracker(found.tracking_uri), alike)
            console.print(f"All their trials side by side:\n  compare: {link}", soft_wrap=True)
    if started:
        console.print("Postgres and the MLflow server keep running (`hpo down` stops them). For a notebook:")
        console.print(serving.export_lines(found), soft_wrap=True)
    return max(codes)


def _run_one(
    plan: "Plan",
    options: argparse.Namespace,
    read: "Settings",
    found: "Services",
    queue: "Queue",
    console: Any,
) -> int:
    from hpo.planning import plans as planning
    from hpo.report import results
    from hpo.tracking.client import Tracker

    tracker = Tracker(found.tracking_uri)
    row = planning.plan(plan, queue, tracker, read, found.database_url)
    queue.revive(row.name, trials=options.retry)
    links = _links(tracker, row)
    bare = ", NOT PRETRAINED" if plan.study.at_random else ""
    console.print(
        f"Study {row.name}: {plan.study.trials} trials, data set {row.facts['data']['name']}, seed "
        f"{plan.study.seed}{bare}."
    )
    for name, link in links.items():
        console.print(f"  {name}: {link}", soft_wrap=True)
    if request := _slurm_request(options, read, threads=plan.study.threads):
        closed, asked = _on_slurm(request, read, queue, row, console)
    else:
        closed, asked = _work(read, found, row, options, console)
    if not closed:  # the database may be away: it is not asked again
        console.print(f"Stopped{_by(asked)}: what is done is kept. The same command goes on.", soft_wrap=True)
        return 130
    program, image = _program(), _near(plan.folder / plan.dataset.names[0])
    jobs = queue.jobs(row.name)
    results.show_result(console, row, jobs, links, program=program, image=image)
    finished = any(job.state == "done" for job in jobs if job.kind == "trial")
    return 0 if finished and queue.closing_state(row.name) != "dead" else 1


def _fetch_weights(chosen: "list[Study]") -> None:
    """Fetch the pretrained weights that studies need and this machine lacks."""
    from models import weights as pretrained

    for backbone in dict.fromkeys(backbone for each in chosen for backbone in each.pretrained()):
        if pretrained.absent(pretrained.FILES[backbone]):
            print(f"Fetching {pretrained.SOURCE}{pretrained.FILES[backbone]} …", file=sys.stderr)
            pretrained.fetch(backbone)


def _work(
    read: "Settings",
    found: "Services",
    row: "StudyRow",
    options: argparse.Namespace,
    console: Any,
    *,
    limits: "Limits | None" = None,
    stops: int | None = None,
) -> "tuple[bool | None, Stop | None]":
    """Work on a study under a display; whether it was closed, None if a signal or `hpo stop` ended the work before,
    and who gave that."""
    from hpo import study
    from hpo.report.display import Display, Progress
    from hpo.worker.supervisor import NO_LIMITS, OUT_OF_TIME, Supervisor
    from hpo.worker.worker import Worker

    trainers = _trainers(options, read, study.restore(row.name, row.spec).threads)
    worker = Worker(
        read, found.database_url, found.tracking_uri, row.name, trainers=trainers, device=options.device, stops=stops
    )
    if console.is_terminal:
        logging.getLogger("hpo").setLevel(logging.WARNING)  # the display shows the events
    with Display(Progress(worker.queue, worker.row), console) as display:

        def tick(supervisor: Supervisor) -> None:
            try:
                display.tick(supervisor.concern)
            except OSError:  # as in _Messages
                console.quiet = True

        closed = worker.run(limits=limits or NO_LIMITS, on_tick=tick)
        ended = worker.ending.reason not in (None, OUT_OF_TIME) and not closed
        return (None if ended else closed), worker.ending.asked


def _slurm_request(options: argparse.Namespace, read: "Settings", *, threads: int) -> "Request | None":
    """What is asked of SLURM for trainers of so many threads; None without `--on slurm`."""
    from hpo.launch import slurm

    workers = _at_least("--workers", options.workers, 1)
    if options.on is None:
        if workers is not None or options.slurm:
            raise SettingsError("--workers and --slurm: expected --on slurm beside them.")
        return None
    wanted = slurm.parse(options.slurm)
    trainers = _at_least("--trainers", options.trainers, 1) or read.trainers
    if threads > 1 and options.device == "cpu":
        needed = threads * (trainers or 1)
        if wanted.setdefault("cpus-per-task", needed) < needed:
            raise SettingsError(
                f"--slurm: cpus-per-task: expected at least {needed} for {trainers or 1} x training.threads = "
                f"{threads}, found {wanted['cpus-per-task']}."
            )
    each = _at_least("--trainers-per-gpu", options.trainers_per_gpu, 1)
    words = ["--device", options.device]
    if each is not None:
        words += ["--trainers-per-gpu", str(each)]
    elif trainers or options.device == "cpu":
        # a node has more cores than the task may use, and only some clusters hide the others
        words += ["--trainers", str(trainers or max(1, wanted.get("cpus-per-task", 1) // threads))]
    return slurm.Request(workers=workers or 1, options=wanted, words=tuple(words))


def _on_slurm(
    request: "Request", read: "Settings", queue: "Queue", row: "StudyRow", console: Any
) -> "tuple[bool | None, Stop | None]":
    """Have a study worked on by an array job, under a display; like `_work`."""
    from hpo.launch import slurm
    from hpo.queue import ENDED
    from hpo.report.display import Display, Progress

    if queue.closing_state(row.name) in ENDED:
        return True, None
    with slurm.collect_interrupts() as interrupts:
        array = slurm.hand_in(request, read, queue, row, report=lambda line: console.print(line, soft_wrap=True))
        with Display(Progress(queue, row), console) as display:

            def tick(trouble: str) -> None:
                with suppress(OSError):  # as in _Messages
                    display.tick(trouble)

            return slurm.watch(array, queue, row, interrupts=interrupts, tick=tick)


def worker(options: argparse.Namespace) -> int:
    from hpo.report import tables

    limits, stops = _limits(options), _at_least("--stops", options.stops, 0)
    read, found, queue = _connect()
    patience = min((limit for limit in (limits.idle, limits.seconds) if limit is not None), default=math.inf)
    begin, said = time.monotonic(), False
    while not (row := queue.study(options.study)).facts.get("planned"):
        if time.monotonic() - begin >= patience:
            print(f"Left at its limit: study {row.name} is not planned yet.")
            return 0
        if not said:
            _say(f"Waiting until {row.name} is planned; `hpo run` with the same options goes on with that.")
        said = True
        time.sleep(min(WATCH_INTERVAL, patience))
    if limits.seconds is not None:
        limits = replace(limits, seconds=max(0.0, limits.seconds - (time.monotonic() - begin)))
    closed, asked = _work(read, found, row, options, tables.console(), limits=limits, stops=stops)
    if closed and queue.closing_state(options.study) == "dead":
        raise ServiceError(
            f"Closing {options.study} failed; `hpo run` tries it again, `hpo promote` says why it failed."
        )
    if closed:
        print(f"Study {options.study} is closed. `hpo run --study ...` shows its result.")
    elif closed is not None:
        print(f"Left at its limit: study {options.study} is not closed yet.")
    elif asked is not None:
        print(f"Stopped{_by(asked)}: what is done is kept. The same command goes on.")
        return 0  # it did what it was asked to: whatever started it need not start it again
    return 130 if closed is None else 0


def _by(asked: "Stop | None") -> str:
    return f" by {asked.by} at {time.strftime('%H:%M:%S', time.localtime(asked.at))} (hpo stop)" if asked else ""


def stop(options: argparse.Namespace) -> int:
    from hpo.operations import stopping

    read, found, queue = _connect(mlflow=False)
    row = queue.study(options.study)
    said: list[str] | None = None
    for left in stopping.stop(queue, row.name, lease=read.lease):
        if left and left != said:
            print(f"Asked to stop: {', '.join(left)}.", flush=True)
        said = left
        if options.no_wait:
            print(f"The workers of {row.name} give their trials back and leave within seconds.")
            return 0
    _show(read, found, queue, row)
    jobs = [job for job in queue.jobs(row.name) if job.kind == "trial"]
    print(
        f"Nobody works on {row.name}; {sum(job.state == 'done' for job in jobs)} of {len(jobs)} trials are done. "
        f"`hpo run` with the same options, or `hpo worker --study {row.name}`, goes on."
    )
    return 0


def cancel(options: argparse.Namespace) -> int:
    from hpo.operations import stopping

    read, found, queue = _connect(mlflow=False)
    row = queue.study(options.study)
    changed = stopping.cancel(queue, row, options.trial, undo=options.undo)
    for job in changed:
        where = f" after epoch {job.epochs}" if job.epochs else ""
        if options.undo:
            print(f"{job.title} waits again{where}. A worker, or `hpo run` with the same options, trains it.")
        else:
            print(
                f"Cancelled {job.title}{where}: it is not trained any more, and the study closes without it. "
                f"`hpo cancel --study {row.name} --trial {options.trial} --undo` brings it back."
            )
    _show(read, found, queue, row)
    return 0


def _show(read: "Settings", found: "Services", queue: "Queue", row: "StudyRow") -> None:
    """Let MLflow and Optuna show what has changed, or say that this is done later."""
    from hpo.operations import stopping
    from hpo.search import sampling

    store, tracker = sampling.storage(found.database_url), _tracker(read, found)
    if tracker is None or not stopping.show(queue, tracker, store, row, lease=read.lease):
        print("MLflow is away: a worker shows it there later.", file=sys.stderr)


def studies(options: argparse.Namespace) -> int:
    from hpo.report import results, tables

    _, _, queue = _connect(mlflow=False)
    listed = [_study_summary(queue, row) for row in queue.studies()]
    if options.json:
        print(json.dumps(listed, indent=2))
        return 0
    tables.print_table(tables.console(), results.studies_table(listed))
    return 0


def _study_summary(queue: "Queue", row: "StudyRow") -> dict[str, Any]:
    from hpo.scores import ranking

    jobs = queue.jobs(row.name)
    trials = [job for job in jobs if job.kind == "trial"]
    best = ranking.ranked(jobs)
    close = next((job for job in jobs if job.kind == "closing"), None)
    state = "planned"
    if row.deleting:
        state = "half deleted"
    elif close is not None and close.state == "done":
        state = "closed"
    elif any(job.alive for job in jobs):
        state = "running"
    elif any(job.state != "waiting" or job.epochs for job in trials):
        state = "interrupted"
    return {
        "name": row.name,
        "state": state,
        "trials": len(trials),
        "done": sum(job.state == "done" for job in trials),
        "failed": sum(job.state in ("dead", "diverged") for job in trials),
        "pruned": sum(job.state == "pruned" for job in trials),
        "cancelled": sum(job.state == "cancelled" for job in trials),
        "best_val_nmse": best[0].result["best_val_nmse"] if best and best[0].result else None,
        "data": row.facts["data"]["name"],
        "identity": row.identity,
        "experiment_id": row.facts["experiment_id"],
    }


def trials(options: argparse.Namespace) -> int:
    from hpo.report import results, tables

    _, _, queue = _connect(mlflow=False)
    row = queue.study(options.study)
    jobs = queue.jobs(row.name)
    if not options.json:
        tables.print_table(tables.console(), results.trials_table(row, jobs))
        return 0
    listed = [
        {
            "number": job.number,
            "repeat": job.repeat,
            "config": job.config,
            "state": job.state,
            "params": job.spec.point if job.spec else {},
            "value": job.result["best_val_nmse"] if job.state == "done" and job.result else None,
            "run_id": job.run_id,
            "attempt": job.attempt,
            "epochs": job.epochs,
            "worker": job.worker if job.alive else None,
            "reason": job.reason,
        }
        for job in jobs
        if job.kind == "trial"
    ]
    print(json.dumps(listed, indent=2))
    return 0


def compare(options: argparse.Namespace) -> int:
    from hpo.report import comparison, tables

    if options.json:
        _without("--json", "names the differences and prints all values", {"--differences": options.differences})
    read, found, queue = _connect(mlflow=False)
    compared = comparison.compare(queue, _tracker(read, found), [options.first, *options.others])
    if options.json:
        print(json.dumps(compared.as_dict(), indent=2))
        return 0
    console = tables.console()
    if options.differences and not compared.differences:
        console.print("No difference: they are the same trial, or equal in everything that is known of them.")
        return 0
    shown = comparison.table(compared, only_differences=options.differences)
    tables.print_table(console, shown)
    if compared.warning:
        console.print(compared.warning, style="bold red", soft_wrap=True)
    return 0


def status(options: argparse.Namespace) -> int:
    from hpo import settings
    from hpo.queue import Queue
    from hpo.report import tables
    from hpo.report.display import Progress
    from hpo.services import serving

    if options.json:
        _without("--json", "prints once", {"--watch": options.watch})
    read = settings.read()
    found = serving.running(read, mlflow=False)
    if found is None:
        if options.json:
            print(json.dumps({"services": None, "studies": []}))
        else:
            print(f"The services of {read.home} are not running. `hpo up` or `hpo run` starts them.")
        return 0
    queue = Queue(found.database_url)
    queue.install()
    console = tables.console()
    progress: dict[str, Progress] = {}

    def look() -> list[Progress]:
        open_ones = []
        for row in queue.studies():
            each = progress.setdefault(row.name, Progress(queue, row))
            each.refresh()
            if each.closing is None or each.closing.state in ("waiting", "running"):
                open_ones.append(each)
        return open_ones

    if options.json:
        answers = serving.running(read) is not None
        print(
            json.dumps(
                {
                    "services": {"tracking_uri": found.tracking_uri if answers else None},
                    "studies": [_study_summary(queue, row) for row in queue.studies()],
                    "open": [each.as_dict() for each in look()],
                },
                indent=2,
            )
        )
        return 0

    def view() -> Any:
        from rich.console import Group

        open_ones = look()
        closed = len(progress) - len(open_ones)
        answers = serving.running(read) is not None
        mlflow = found.tracking_uri if answers else "does not answer"
        return Group(
            f"MLflow: {mlflow}    studies: {closed} closed, {len(open_ones)} open",
            *([] if answers else [_mlflow_away(read)]),
            *(each.render() for each in open_ones),
        )

    if not options.watch:
        console.print(view())
        return 0
    if not console.is_terminal:
        with suppress(KeyboardInterrupt):
            while not terminal.gone():
                console.print(view())
                time.sleep(WATCH_INTERVAL)
        return 0
    from rich.live import Live

    with suppress(KeyboardInterrupt), Live(view(), console=console, auto_refresh=False) as live:
        while not terminal.gone():
            time.sleep(WATCH_INTERVAL)
            live.update(view(), refresh=True)
    return 0


# Models


def promote(options: argparse.Namespace) -> int:
    from hpo import study
    from hpo.report import results
    from hpo.scores import champion
    from hpo.tracking.client import Tracker

    _, found, queue = _connect()
    row = queue.study(options.study)
    jobs = queue.jobs(row.name)
    close = next((job for job in jobs if job.kind == "closing"), None)
    if close is None:
        raise NotFound(f"{row.name} is not planned to its end: `hpo run` with the same options goes on with it.")
    if close.state == "dead":
        raise NotFound(f"Closing {row.name} failed: {close.reason}. `hpo run` with the same options tries it again.")
    if close.closing is None:
        left = sum(job.state in ("waiting", "running") for job in jobs if job.kind == "trial")
        raise NotFound(
            f"The study {row.name} is not closed: {left} trials are still to be trained. Closing promotes its best "
            f"model; `hpo run` or `hpo worker --study {row.name}` finishes it."
        )
    ended, tracker = close.closing, Tracker(found.tracking_uri)
    outcome, alias = champion.settle(queue, tracker, row), study.alias(row.name)
    if fault := outcome.refused.get(alias):
        raise ModelError(f"{ended['model_name']} version {ended['winner']['version']} is not promoted again: {fault}")
    if alias in outcome.moved:
        print(f"Set the alias @{alias} again.")
    ended = ended | outcome.elected
    print("\n".join(results.promotion(row, ended, close)))
    return 0


def report_(options: argparse.Namespace) -> int:
    from hpo.report import document, sections
    from hpo.scores import evidence
    from hpo.tracking.client import Tracker

    _, found, queue = _connect()
    tracker = Tracker(found.tracking_uri)
    gathered = evidence.gather(queue, tracker, options.study)
    made = sections.build(gathered)
    page, *others = document.write(made, options.output)
    for each in gathered.closed:
        for path in (page, *others):
            folder = path.relative_to(options.output).parent
            tracker.upload(each.row.facts["study_run_id"], path, (Path("report") / folder).as_posix())
    for line in made.summary + [f"ALARM: {alarm}" for alarm in made.alarms]:
        print(line)
    print(f"{page}: open it in a browser. Beside it: report.md, {len(others) - 1} files in tables/ and figures/.")
    return 0


def download(options: argparse.Namespace) -> int:
    from hpo.scores import champion
    from hpo.tracking import registry
    from hpo.tracking.client import Tracker

    _, found, queue = _connect()
    tracker = Tracker(found.tracking_uri)
    candidates = [options.model] if options.model else champion.downloadable(queue, tracker)
    if not candidates:
        done = "closed" if queue.studies() else "planned"
        raise NotFound(f"No study has been {done} here, so there is no model. `hpo run --study grid` makes one.")
    # the newest study's model, unless only an older one has such a version
    with_it = [name for name in candidates if registry.get_alias(tracker, name, options.alias) is not None]
    name = with_it[0] if with_it else candidates[0]
    version = registry.find(tracker, name, options.alias)
    job = queue.by_run(version.run_id)
    if job is None or job.result is None:
        raise NotFound(
            f"{name} version {version.number} was not made by a study of this database: its hashes are unknown."
        )
    folder = registry.download(
        tracker, model_name=name, version=version.number, folder=options.folder, expected_sha256=job.result["files"]
    )
    aliases = ", ".join(f"@{alias}" for alias in version.aliases) or "no alias"
    print(f"{name} version {version.number} ({aliases}) is in {folder}.")
    print(f"{len(job.result['files'])} files, each as recorded in the database. Its README.md shows how to use it.")
    if version.tags.get("hpo.verdict") == "below volume fraction":
        print("Note: a cubic polynomial in the volume fraction predicts better than this model.")
    return 0


def predict(options: argparse.Namespace) -> int:
    from hpo.operations.predict import predict as predicted
    from hpo.text import for_csv

    frame = predicted(options.folder, options.images)
    if options.json:
        print(json.dumps({"unit": frame.attrs["unit"], "predictions": frame.to_dict("records")}, indent=2))
        return 0
    unit = frame.attrs["unit"]
    frame = frame.rename(columns={name: f"{name} [{unit}]" for name in frame.columns[1:]})
    terminal.exactly(for_csv(frame).to_csv(index=False))
    return 0


def delete(options: argparse.Namespace) -> int:
    from hpo.operations import deletion
    from hpo.search import sampling
    from hpo.tracking.client import Tracker

    read, found, queue = _connect()
    row, tracker = queue.study(options.study), Tracker(found.tracking_uri)
    deletion.check(queue, tracker, row, lease=read.lease, in_mlflow=not options.not_in_mlflow)
    if not options.yes:
        done = sum(job.state == "done" for job in queue.jobs(row.name) if job.kind == "trial")
        print(f"This deletes the study {row.name} for good: {done} finished trials, their runs, models and versions.")
        try:
            answer = input("Type the study's name to go on: ")
        except EOFError:
            answer = ""
        if answer.strip() != row.name:
            raise NotFound("Not deleted: the name was not typed. (--yes goes on without asking.)")
    store = sampling.storage(found.database_url)
    deletion.delete(queue, tracker, store, row, lease=read.lease, in_mlflow=not options.not_in_mlflow, report=_say)
    print(f"Deleted the study {row.name}.")
    return 0


# Services and data


def up(options: argparse.Namespace) -> int:
    from hpo import settings
    from hpo.services import serving

    read = settings.read()
    found, started = serving.up(read, listen=options.listen, report=_say)
    print(f"{'Started' if started else 'Already running'}. MLflow: {found.tracking_uri}")
    if found.credentials:
        print(f"User and password are in {found.credentials}. A worker on another machine needs a copy of this file:")
        here = shlex.quote(f"{socket.gethostname()}:{found.credentials}")
        terminal.exactly(f"scp {here} ~/hpo-credentials.toml\nexport HPO_CREDENTIALS=~/hpo-credentials.toml\n")
    elif read.embedded:
        terminal.exactly(f"{serving.export_lines(found)}\n")
    return 0


def down(options: argparse.Namespace) -> int:
    from hpo import settings
    from hpo.services import serving

    read = settings.read()
    print("Stopped." if serving.down(read) else f"The services of {read.home} were not running.")
    return 0


def backup(options: argparse.Namespace) -> int:
    from hpo.operations import backup as saving

    read, found, _ = _connect()
    made = saving.backup(saving.place(read, found), options.file.absolute(), _say)
    for fault in made["faults"]:
        print(f"Note: {fault}.", file=sys.stderr)
    print(f"{options.file}: {_contents(made)}, {options.file.stat().st_size / 1e6:.1f} MB. `hpo restore` reads it.")
    return 0


def restore(options: argparse.Namespace) -> int:
    from hpo import settings
    from hpo.operations import backup as saving
    from hpo.operations import restore as filling
    from hpo.operations import stopping
    from hpo.queue import Queue
    from hpo.search import sampling
    from hpo.services import serving
    from hpo.tracking.client import Tracker

    read = settings.read()
    _say(f"Checking {options.file}.")
    manifest = filling.check(options.file)
    found, _ = serving.up(read, report=_say)
    filling.restore(saving.place(read, found), options.file, manifest, _say)
    queue, store = Queue(found.database_url), sampling.storage(found.database_url)
    for row in queue.studies():
        if row.facts.get("planned"):
            stopping.show(queue, Tracker(found.tracking_uri), store, row, lease=read.lease)
    print(f"Restored {_contents(manifest)}. MLflow: {found.tracking_uri}")
    print("`hpo doctor` checks it; `hpo run` with a study's options, or `hpo worker --study NAME`, goes on.")
    return 0


def _contents(manifest: dict[str, Any]) -> str:
    """What is in a backup, in words."""
    studies = [f"{name} ({each['done']} of {each['trials']} trials done)" for name, each in manifest["studies"].items()]
    files = sum(name.startswith("artifacts/") for name in manifest["files"])
    return f"{', '.join(studies) or 'no study'} as of {manifest['at']}, {files} artifacts"


def doctor(options: argparse.Namespace) -> int:
    """Exit code 1 if something is left that is not as it should be."""
    from hpo.operations import doctor as examiner

    read, found, _ = _connect()
    findings = list(examiner.examine(read, found, study=options.study))
    mended = 0
    if options.fix:
        for finding in findings:
            try:
                if finding.remedy is not None:
                    finding.remedy()
                    mended += 1
            except Exception as error:  # the others still want mending; what is left is found again below
                print(f"{finding.kind}: {finding.what}: could not be mended: {error}", file=sys.stderr)
        findings = list(examiner.examine(read, found, study=options.study))
    if options.json:
        listed = [{"kind": each.kind, "what": each.what, "todo": each.todo} for each in findings]
        print(json.dumps({"mended": mended, "findings": listed}, indent=2))
        return 1 if findings else 0
    for each in findings:
        print(f"{each.kind}: {each.what}. To do: {each.todo}.")
    if mended:
        print(f"Mended: {mended}.")
    if not findings:
        print("Healthy: services, versions, studies, aliases, files and caches are as they should be.")
    elif not options.fix and any(each.remedy is not None for each in findings):
        print("`hpo doctor --fix` mends what it can.")
    return 1 if findings else 0


def weights(options: argparse.Namespace) -> int:
    """List, fetch, or take over files of pretrained weights; exit code 1 if one is missing in the end."""
    from models import weights as pretrained

    for file in options.files:
        print(f"{file}: good, now {pretrained.adopt(file)}.")
    print(f"Pretrained weights in {pretrained.folder()}:")
    failures = []
    for backbone, name in pretrained.FILES.items():
        state = "here, its hash is right"
        try:
            if pretrained.absent(name):
                if options.files:  # whoever brings files has no connection
                    state = "missing"
                else:
                    pretrained.fetch(backbone)
                    state = "fetched, its hash is right"
            else:
                pretrained.find(name)
        except ValueError as error:  # SpecError: the others are looked at all the same
            state = "missing or damaged"
            failures.append(str(error))
        print(f"  {backbone:12} {name:26} {state}")
    for failure in failures:
        print(f"hpo: {failure}", file=sys.stderr)
    return 1 if failures else 0


def data_make(options: argparse.Namespace) -> int:
    from data_pipeline import synthesize
    from data_pipeline.phase import Phase
    from hpo.report.display import duration, progress_line

    def phase(name: str, default: Phase) -> Phase:
        given = getattr(options, name)
        try:
            return Phase(*given) if given else default
        except ValueError as error:
            raise SettingsError(f"--{name}: {error}") from None

    matrix, inclusion = phase("matrix", synthesize.MATRIX), phase("inclusion", synthesize.INCLUSION)
    cells = {"count": options.count, "size": options.size, "seed": options.seed}
    begin, first = time.monotonic(), None
    for done in synthesize.make(options.folder, **cells, matrix=matrix, inclusion=inclusion):
        first = done - 1 if first is None else first
        speed = (time.monotonic() - begin) / max(1, done - first)
        progress_line(f"{done} of {options.count} cells, {duration((options.count - done) * speed)} left")
    progress_line("")
    print(f"{options.folder}: {options.count} cells. `hpo run --study grid --data {options.folder}` trains on them.")
    return 0


def data_check(options: argparse.Namespace) -> int:
    from data_pipeline import dataset
    from data_pipeline.split import lacks, unscored

    found = dataset.load(options.folder, image_size=options.image_size)
    height, width = found.images.shape[2:]
    print(
        f"{options.folder}: good. {len(found.images)} images of {width} x {height} pixels, {len(found.target_names)} "
        f"components in {found.unit}, digest {found.digest[:8]}."
    )
    if lacking := lacks(found):
        print(f"But no study can be trained on it: {lacking}.")
        return 1
    for note in unscored(found):
        print(f"Note: {note}")
    return 0


# Shared


def _studies(options: argparse.Namespace) -> "list[Study]":
    """What the options of `hpo run` name, overrides applied."""
    from hpo import study

    if options.data is not None and options.data != options.data.encode(errors="ignore").decode():
        raise SettingsError(f"--data {options.data}: expected a path in UTF-8, as a study can record it. Rename it.")
    overrides = list(options.set)  # one for a single study (STUDY:KEY=VALUE) comes behind what holds for all
    keys = {each.partition("=")[0].strip() for each in overrides}
    short = {"epochs": "training.epochs", "seed": "seed", "data": "data.path"}
    for name, key in short.items():
        if (value := getattr(options, name)) is not None:
            _without(f"--{name}", f"is short for --set {key}=…", {f"--set {key}=…": key in keys})
            overrides.insert(0, f"{key}={json.dumps(value)}")
    return study.load_all(options.study, overrides, prerequisites=options.with_prerequisites)


def _without(option: str, why: str, others: dict[str, Any]) -> None:
    """Raises SettingsError if one of the other options, by their names, was given: beside this one it does nothing."""
    for other, value in others.items():
        if value not in (None, False, []):
            raise SettingsError(
                f"{option} and {other}: expected one of them, found both. Leave one out: {option} {why}."
            )


def _connect(*, mlflow: bool = True) -> "tuple[Settings, Services, Queue]":
    """Settings, running services and the queue; raises ServiceError if the services do not run. Without `mlflow` the
    database is enough."""
    from hpo import settings
    from hpo.queue import Queue
    from hpo.services import serving

    read = settings.read()
    found = serving.running(read, mlflow=mlflow)
    if found is None and mlflow and serving.running(read, mlflow=False):
        raise ServiceError(_mlflow_away(read))
    if found is None:
        raise ServiceError(
            f"The services of {read.home} are not running. `hpo up` starts them. (Is HPO_HOME the one you mean?)"
        )
    queue = Queue(found.database_url)
    queue.install()
    return read, found, queue


def _mlflow_away(read: "Settings") -> str:
    return (
        f"The MLflow server of {read.home} (HPO_HOME) does not answer, its Postgres does. `hpo up` starts it if it has "
        f"ended; if it hangs, `hpo down` and then `hpo up`. Its log: {read.home}/logs/mlflow.log"
    )


def _tracker(read: "Settings", found: "Services") -> "Tracker | None":
    """MLflow, after a connection without it: None if it is away, when nobody knows who answers in its place."""
    from hpo.services import serving
    from hpo.tracking.client import Tracker

    return Tracker(found.tracking_uri) if serving.running(read) else None


def _trainers(options: argparse.Namespace, read: "Settings", threads: int) -> int:
    """How many trainers of so many threads there are to be."""
    from hpo import settings
    from hpo.worker.processes import visible_gpus

    each = _at_least("--trainers-per-gpu", options.trainers_per_gpu, 1)
    if each is not None and options.device == "cpu":
        raise SettingsError("--trainers-per-gpu: expected --device auto or --device cuda beside it.")
    gpus = 0 if options.device == "cpu" else len(visible_gpus())
    given = _at_least("--trainers", options.trainers, 1) or (each or 0) * gpus or read.trainers
    count = given or gpus or max(1, settings.cores() // threads)
    if threads > 1 and not gpus and count * threads > settings.cores():
        _say(f"Note: {count} x training.threads = {count * threads} threads on {settings.cores()} cores are slow.")
    return count


def _limits(options: argparse.Namespace) -> "Limits":
    from hpo.worker.supervisor import Limits

    hours = _at_least("--max-hours", options.max_hours, 0)
    return Limits(
        trials=_at_least("--max-trials", options.max_trials, 1),
        seconds=None if hours is None else 3600 * hours,
        idle=_at_least("--idle-exit", options.idle_exit, 0),
    )


def _at_least(option: str, value: Any, minimum: int) -> Any:
    """The number as it is, or None. Raises SettingsError if it is too small, or no number."""
    if value is not None and not minimum <= value < float("inf"):
        raise SettingsError(f"{option}: expected at least {minimum}, found {value:g}.")
    return value


def _links(tracker: Any, row: "StudyRow") -> dict[str, str]:
    from hpo.tracking import experiments

    experiment = row.facts["experiment_id"]
    return {"list": experiments.link(tracker, experiment), "charts": experiments.chart_link(tracker, experiment)}


def _program() -> str:
    """How this shell would call us: `hpo`, or the path of the environment's own."""
    called = Path(sys.argv[0])
    if called.name != "hpo" or shutil.which("hpo") == str(called.absolute()):
        return "hpo"
    return shlex.quote(_near(called.absolute()))


def _near(path: Path) -> str:
    """The path as one would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
