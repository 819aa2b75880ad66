"""What a terminal, or a cell of a notebook, shows of a finished search within a budget."""

import argparse
import shlex

from rich.console import Console

from hpo import api
from hpo.cli import watch
from hpo.report import auto, tables


def show(console: Console, done: "api.Auto") -> None:
    """Print the steps, the best of each, what the search came to, and where its page is."""
    for table in auto.end_tables(done.steps):
        tables.print_table(console, table)
    console.print("\n".join(["", *auto.sentences(done.steps, done.hours), f"Page: {done.page}"]), soft_wrap=True)


def next_steps(done: "api.Auto", options: argparse.Namespace) -> list[str]:
    """Return commands that run as they stand."""
    words = ["--study", options.study, *(["--data", options.data] if options.data else [])]
    words += [] if options.seed is None else ["--seed", str(options.seed)]
    program = watch.program()
    return [
        "Go on with:",
        f"  {program} download champion/",
        f"  {program} run {shlex.join(words)} --max-hours {2 * done.hours:g}",
    ]
