"""How commands and their options are declared, and messages about options."""

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from hpo.errors import SettingsError

Commands = Any  # what argparse's add_subparsers returns has no public name
Function = Callable[[argparse.Namespace], int]  # carries out a command; returns its exit code
Option = Callable[[Any], object]  # adds itself to a parser, or to a group of options

TYPES = {"N": int, "H": float, "SECONDS": float, "DIR": Path, "FILE": Path, "IMAGE": Path}  # of values, by metavar
OPTIONS: dict[Function, tuple[Option, ...]] = {}  # of each command


def option(name: str, metavar: str | tuple[str, ...], text: str, **settings: Any) -> Option:
    """Return an option, by one or two names, or an argument; further settings are those of argparse."""
    settings = {"type": TYPES.get(str(metavar), str), "metavar": metavar, "help": text} | settings
    return lambda parser: parser.add_argument(*name.split(), **settings)


def many(name: str, metavar: str, text: str) -> Option:
    """Return an option that may be given several times."""
    return option(name, metavar, text, action="append", default=[])


def flag(name: str, text: str) -> Option:
    """Return an option without a value."""
    return lambda parser: parser.add_argument(name, action="store_true", help=text)


def choice(name: str, choices: tuple[str, ...], text: str, default: str | None = None) -> Option:
    """Return an option with one of a few values."""
    return lambda parser: parser.add_argument(name, choices=choices, default=default, help=text)


def one_of(*options: Option) -> Option:
    """Return options of which at most one may be given."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for part in options:
            part(group)

    return add


TRUST = many("--trust-code", "SHA256", "let code of a model's author run that has this SHA-256; repeatable")
STUDY = option("--study", "NAME", "name as `hpo studies` lists it", required=True)
JSON = flag("--json", "print JSON for programs")


def command(*options: Option) -> Callable[[Function], Function]:
    """Declare the options of the command that the decorated function carries out."""

    def declare(function: Function) -> Function:
        OPTIONS[function] = options
        return function

    return declare


def add(commands: Commands, module: ModuleType) -> None:
    """Add the commands of a module to the parser, each named as its function and described by that one's docstring."""
    for function, options in OPTIONS.items():
        if function.__module__ == module.__name__:
            text = " ".join((inspect.getdoc(function) or "").partition("\n\n")[0].split())
            parser = commands.add_parser(function.__name__, help=text, description=text)
            parser.set_defaults(function=function)
            for part in options:
                part(parser)


def exclusive(name: str, why: str, others: Mapping[str, Any]) -> None:
    """Raise SettingsError if one of the other options, by their names, was given: beside this one it does nothing."""
    for other, value in others.items():
        if value not in (None, False, []):
            raise SettingsError(f"{name} and {other}: expected one of them, found both. Leave one out: {name} {why}.")


def say(line: str) -> None:
    """Print a line about the progress of a command on standard error."""
    print(line, file=sys.stderr)
