"""Options that several commands have, and messages about them."""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hpo.errors import SettingsError

Commands = Any  # what argparse's add_subparsers returns has no public name


def command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Return the parser of a new command, which `function` carries out and whose exit code it returns."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(function=function)
    return parser


def add_study(parser: argparse.ArgumentParser, text: str = "name as `hpo studies` lists it") -> None:
    parser.add_argument("--study", required=True, metavar="NAME", help=text)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def exclusive(option: str, why: str, others: Mapping[str, Any]) -> None:
    """Raise SettingsError if one of the other options, by their names, was given: beside this one it does nothing."""
    for other, value in others.items():
        if value not in (None, False, []):
            raise SettingsError(
                f"{option} and {other}: expected one of them, found both. Leave one out: {option} {why}."
            )


def say(line: str) -> None:
    """Print a line about the progress of a command on standard error."""
    print(line, file=sys.stderr)
