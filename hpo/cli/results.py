"""`hpo status`, `studies`, `trials`, `compare`, `report`, `promote`: what was trained, and what it gave."""

import argparse
import json
import time
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hpo import api, settings
from hpo.cli import terminal
from hpo.cli.options import JSON, STUDY, command, exclusive, flag, many, option
from hpo.text import counted

if TYPE_CHECKING:
    from rich.console import Group

    from hpo.api import Job

WATCH_INTERVAL = 2.0  # seconds


@command(flag("--watch", "refresh until Ctrl-C"), JSON)
def status(options: argparse.Namespace) -> int:
    """Show services, studies and running trials."""
    if options.json:
        exclusive("--json", "prints once", {"--watch": options.watch})
    state = api.status()
    if options.json:
        print(json.dumps(state.as_dict(), indent=2) if state else json.dumps({"services": None, "studies": []}))
    elif state is None:
        print(f"The services of {settings.read().home} are not running. `hpo up` or `hpo run` starts them.")
    else:
        _show_status(state, watch=options.watch)
    return 0


def _show_status(state: "api.Status", *, watch: bool) -> None:
    from rich.live import Live

    from hpo.report import tables
    from hpo.report.display import is_live

    console = tables.console()
    if not watch:
        console.print(_render(state))
        return
    with suppress(KeyboardInterrupt):
        if not is_live(console):
            while not terminal.gone():
                console.print(_render(state))
                time.sleep(WATCH_INTERVAL)
                state.refresh()
            return
        with Live(_render(state), console=console, auto_refresh=False) as live:
            while not terminal.gone():
                time.sleep(WATCH_INTERVAL)
                state.refresh()
                live.update(_render(state), refresh=True)


def _render(state: "api.Status") -> "Group":
    from rich.console import Group

    from hpo.report.display import View

    head = f"MLflow: {state.tracking_uri or 'does not answer'}"
    trouble = [state.trouble] if state.trouble else []
    counts = f"studies: {state.closed} closed, {len(state.open)} open"
    return Group(f"{head}    {counts}", *trouble, *(View(progress=progress) for progress in state.open))


@command(JSON)
def studies(options: argparse.Namespace) -> int:
    """List the studies that were planned here."""
    from hpo.report import results, tables

    summaries = [asdict(summary) for summary in api.studies()]
    if options.json:
        print(json.dumps(summaries, indent=2))
    else:
        tables.print_table(tables.console(), results.studies_table(summaries))
    return 0


@command(option("study", "NAME", "study as `hpo studies` lists it, or one of its trials (grid/22)"), JSON)
def show(options: argparse.Namespace) -> int:
    """Show a study in full: the command that planned it, its settings, its result and its pages in MLflow.

    Of a trial: what determines it, where it ran, its scores, and its attempts.
    """
    from hpo.cli import watch
    from hpo.report import attempts, comparison, tables

    if "/" in options.study:
        compared, tried = api.compare(options.study), api.attempts(options.study)
        if options.json:
            print(json.dumps(compared.as_dict()["things"][0] | {"attempts": [asdict(row) for row in tried]}, indent=2))
            return 0
        console = tables.console()
        tables.print_table(console, comparison.table(compared))
        console.print("\n".join(attempts.lines(tried)), soft_wrap=True, markup=False)
        return 0
    details = api.show(options.study)
    command = details.row.facts.command
    if options.json:
        print(json.dumps(_details(details), indent=2))
        return 0
    console = tables.console()
    watch.print_head(console, details)
    console.print(f"Planned by: {command or 'an earlier hpo, which kept no command'}", soft_wrap=True)
    console.print("\n".join(_changes(details)), soft_wrap=True)
    watch.print_result(console, details)
    return 0


def _changes(details: "api.Details") -> list[str]:
    """Return lines on the settings in which a study differs from its file."""
    if details.changed is None:
        return [f"Its file {details.file} is gone: `hpo show {details.row.name} --json` has all settings."]
    if not details.changed:
        return [f"Its settings are those of {details.file}."]
    lines = [f"  {key}: {there} in the file, {here} here" for key, (there, here) in details.changed.items()]
    return [f"Its settings differ from {details.file}:", *lines]


def _details(details: "api.Details") -> dict[str, Any]:
    """Return a study as `hpo show --json` prints it."""
    from hpo.report import pareto

    closing = next((job.closing for job in details.jobs if job.kind == "closing"), None)
    front = pareto.records(details.row, details.jobs)
    return {
        "name": details.row.name,
        "identity": details.row.identity,
        "command": details.row.facts.command,
        "file": details.file,
        "changed": details.changed,
        "settings": details.row.canonical,
        "data": details.row.facts.data.uri,
        "links": details.links,
        "result": closing and closing.to_json(),
        **({"pareto": front} if front else {}),
        "learning_curve": details.learning_curve and details.learning_curve.to_json(),
    }


@command(
    STUDY,
    option(
        "--sort",
        "KEY",
        "order: score, number, state, epochs, changed (the latest first), or a parameter (default: score)",
        default="score",
    ),
    option("--top", "N", "only the first N (default: all)"),
    flag("--full", "cut no reason, however narrow the terminal is"),
    JSON,
)
def trials(options: argparse.Namespace) -> int:
    """List the trials of a study, best first."""
    from hpo.report import pareto, results, tables

    settings.at_least("--top", options.top, 1)
    if options.json:
        exclusive("--json", "lists all trials by their number", {"--top": options.top, "--full": options.full})
        row, jobs = api.jobs(options.study, brief=True)
        sizes = pareto.values(row, jobs)
        listed = [_trial(job) | sizes.get(job.number, {}) for job in jobs if job.kind == "trial"]
        print(json.dumps(listed, indent=2))
        return 0
    table = results.trials_table(*api.jobs(options.study, brief=True), sort=options.sort, top=options.top)
    tables.print_table(tables.console(), table if not options.full else tables.uncut(table))
    return 0


def _trial(job: "Job") -> dict[str, Any]:
    """Return a trial as `hpo trials --json` prints it."""
    names = ("number", "repeat", "config", "state")
    return {name: getattr(job, name) for name in names} | {
        "params": job.spec.point if job.spec else {},
        "value": job.result.best_val_nmse if job.result else None,
        "run_id": job.run_id,
        "attempt": job.attempt,
        "epochs": job.epochs,
        "worker": job.worker if job.alive else None,
        "reason": job.reason,
        **({"refit": True} if job.is_refit else {}),
    }


@command(
    option("first", "A", "study (its best trial), trial (grid/22), MLflow run id, or version"),
    option("others", "B", "the same; a version is MODEL@ALIAS, MODEL/NUMBER or @ALIAS", nargs="+"),
    flag("--differences", "only what is not the same for all"),
    JSON,
)
def compare(options: argparse.Namespace) -> int:
    """Show studies, trials, runs and registered versions side by side."""
    from hpo.report import comparison, tables

    if options.json:
        exclusive("--json", "names the differences and prints all values", {"--differences": options.differences})
    compared = api.compare(options.first, *options.others)
    if options.json:
        print(json.dumps(compared.as_dict(), indent=2))
        return 0
    console = tables.console()
    if options.differences and not compared.differences:
        console.print("No difference: they are the same trial, or equal in everything that is known of them.")
        return 0
    tables.print_table(console, comparison.table(compared, only_differences=options.differences))
    if compared.warning:
        console.print(compared.warning, style="bold red", soft_wrap=True)
    return 0


@command(
    many(
        "--study",
        "NAME",
        "name as `hpo studies` lists it; repeatable (default: all closed ones on the newest one's data)",
    ),
    option("-o --output", "DIR", "folder to write", required=True),
)
def report(options: argparse.Namespace) -> int:
    """Write the report of closed studies: one HTML page, Markdown, CSV and JSON tables."""
    written = api.report(options.output, options.study)
    for line in written.summary + [f"ALARM: {alarm}" for alarm in written.alarms]:
        print(line)
    tables = len(written.others) - 1
    print(
        f"{written.page}: open it in a browser. Beside it: report.md, "
        f"{counted(tables, 'file')} in tables/ and figures/."
    )
    return 0


@command(
    STUDY,
    flag("--force", "let its best model be @champion though it is not distinguishable from the mean of the labels"),
)
def promote(options: argparse.Namespace) -> int:
    """Show what a closed study promoted, and set missing aliases again."""
    from hpo.report import promotion

    promoted = api.promote(options.study, force=options.force)
    if promoted.is_alias_set:
        print(f"Set the alias @{promoted.alias} again.")
    print("\n".join(promotion.sentences(options.study, promoted.result, None, is_forced=options.force)))
    return 0
