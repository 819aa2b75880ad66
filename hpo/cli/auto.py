"""A search within a budget: which options it takes, and what a terminal or a cell of a notebook shows of its end."""

import argparse
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from hpo import api
from hpo.cli import watch
from hpo.cli.options import exclusive
from hpo.report import auto, tables


def check(options: argparse.Namespace, others: Mapping[str, Any]) -> None:
    """Raise SettingsError if `hpo run` was given an option that such a search does not take, or one of the others."""
    names = "epochs set with-prerequisites retry priority detach until trials dry-run trust-code"
    own = {f"--{name}": getattr(options, name.replace("-", "_")) for name in names.split()}
    exclusive(f"--study {options.study}", "chooses studies and their sizes itself", own | dict(others))


def show(console: Console, done: "api.Auto", commands: Sequence[str] = ()) -> None:
    """Print the steps, the best of each, what the search came to, where its page is, and commands that go on."""
    for table in auto.end_tables(done.steps):
        tables.print_table(console, table)
    lines = ["", *auto.sentences(done.steps, done.hours), f"Page: {done.page}", *commands]
    console.print("\n".join(lines), soft_wrap=True)


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
