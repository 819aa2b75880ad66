"""`hpo data make` and `hpo data check`: labelled data sets."""

import argparse
import json
import time
from typing import Any

from hpo import api
from hpo.cli import terminal
from hpo.cli.options import JSON, command, flag, option
from hpo.errors import SettingsError
from hpo.text import counted, duration

PHASES = ("matrix", "inclusion")


CONSTANTS = "Young's modulus in GPa and Poisson's ratio of the {} (default: that of the shipped set)"


@command(
    option("folder", "DIR", "folder to write"),
    option("--count", "N", "cells (default: 520)", default=520),
    option("--size", "N", "pixels along an edge (default: 64)", default=64),
    option("--seed", "N", "seed of the cells (default: 0)", default=0),
    *(option(f"--{name}", ("E", "NU"), CONSTANTS.format(name), type=float, nargs=2) for name in PHASES),
)
def make(options: argparse.Namespace) -> int:
    """Draw microstructures and compute their stiffness. Goes on where it stopped."""
    begin, first = time.monotonic(), None
    cells: dict[str, Any] = {"count": options.count, "size": options.size, "seed": options.seed}
    for done in api.make_data(options.folder, **cells, **_phases(options)):
        first = done - 1 if first is None else first
        seconds = (time.monotonic() - begin) / max(1, done - first)
        terminal.progress(
            f"{counted(done, 'cell', of=options.count)}, {duration((options.count - done) * seconds)} left"
        )
    terminal.progress("")
    print(
        f"{options.folder}: {counted(options.count, 'cell')}. "
        f"`hpo run --study grid --data {options.folder}` trains on them."
    )
    return 0


def _phases(options: argparse.Namespace) -> dict[str, Any]:
    """Return the phases that were given, by name. Raise SettingsError if one does not exist."""
    phases = {}
    for name in PHASES:
        try:
            if constants := getattr(options, name):
                phases[name] = api.Phase(*constants)
        except ValueError as error:
            raise SettingsError(f"--{name}: {error}") from None
    return phases


@command(
    option("folder", "DIR", "folder of images and labels"),
    option("--image-size", "N", "resize to N x N pixels"),
    option("-o --output", "FILE", "HTML page to write: images, labels, and what was found"),
    JSON,
    flag("--write", "write dataset.toml as it was understood, to be edited"),
)
def check(options: argparse.Namespace) -> int:
    """Print what hpo understands of a folder, what is doubtful, and what is wrong."""
    from hpo.report.understanding import show  # numpy and pandas

    understood = api.check_data(options.folder, image_size=options.image_size, page=options.output)
    wrong = [*understood.notes.questions, *understood.notes.errors]
    if options.json:
        print(json.dumps(understood.to_dict(), indent=2, ensure_ascii=False))
        return 1 if wrong else 0
    show(understood)
    if options.output and understood.dataset is not None:
        print(f"{options.output}: open it in a browser.")
    if options.write or understood.dataset is None:
        print(f"{api.describe_data(understood)} was written. Edit what is not so.")  # or raises what is wrong
    return 1 if wrong else 0
