"""`hpo data make` and `hpo data check`: labelled data sets."""

import argparse
import time
from pathlib import Path
from typing import Any

from hpo import api
from hpo.cli import terminal
from hpo.cli.options import Commands
from hpo.errors import SettingsError
from hpo.text import duration

PHASES = ("matrix", "inclusion")


def add(commands: Commands) -> None:
    """Add these commands to the parser."""
    text = "Make a labelled data set, or check a folder."
    below = commands.add_parser("data", help=text, description=text).add_subparsers(
        dest="data_command", metavar="COMMAND", required=True
    )
    parser = below.add_parser("make", help="draw microstructures and compute their stiffness; resumes")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder to write")
    parser.add_argument("--count", type=int, default=520, metavar="N", help="cells (default: 520)")
    parser.add_argument("--size", type=int, default=64, metavar="N", help="pixels along an edge (default: 64)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cells (default: 0)")
    for phase in PHASES:
        parser.add_argument(
            f"--{phase}",
            type=float,
            nargs=2,
            metavar=("E", "NU"),
            help=f"Young's modulus in GPa and Poisson's ratio of the {phase} (default: that of the shipped set)",
        )
    parser.set_defaults(function=make)
    parser = below.add_parser("check", help="list everything that is wrong with a folder")
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder of images and label table")
    parser.add_argument("--image-size", type=int, metavar="N", help="resize to N x N pixels")
    parser.set_defaults(function=check)


def make(options: argparse.Namespace) -> int:
    begin, first = time.monotonic(), None
    cells: dict[str, Any] = {"count": options.count, "size": options.size, "seed": options.seed}
    for done in api.make_data(options.folder, **cells, **_phases(options)):
        first = done - 1 if first is None else first
        seconds = (time.monotonic() - begin) / max(1, done - first)
        terminal.progress(f"{done} of {options.count} cells, {duration((options.count - done) * seconds)} left")
    terminal.progress("")
    print(f"{options.folder}: {options.count} cells. `hpo run --study grid --data {options.folder}` trains on them.")
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


def check(options: argparse.Namespace) -> int:
    data, lack, notes = api.check_data(options.folder, image_size=options.image_size)
    height, width = data.images.shape[2:]
    print(
        f"{options.folder}: good. {len(data.images)} images of {width} x {height} pixels, {len(data.target_names)} "
        f"components in {data.unit}, digest {data.digest[:8]}."
    )
    if lack:
        print(f"But no study can be trained on it: {lack}.")
        return 1
    for note in notes:
        print(f"Note: {note}")
    return 0
