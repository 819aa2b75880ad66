"""Shell completion: a script for bash or zsh, made from the parser.

The script holds all words that it offers, so pressing Tab starts no hpo and asks no service.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

SHELLS = ("bash", "zsh")
STUDIES = Path(__file__).parents[1] / "studies"

# What to offer for an argument, by its metavar or destination.
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
_FOLDERS = {"bash": "_shtab_compgen_dirs", "zsh": "_files -/"}
_STUDIES = {"bash": "_hpo_study_files", "zsh": "_hpo_study_files"}
_KINDS = {"FILE": _FILES, "IMAGE": _FILES, "DIR": _FOLDERS}

# The studies that ship with hpo, and study files. Those planned here would have to be asked of the database.
_PREAMBLE = {
    "bash": """_hpo_study_files() {{
  compgen -W "{names}" -- "$1"
  compgen -f -X '!*.toml' -- "$1"
  compgen -d -- "$1"
}}""",
    "zsh": """_hpo_study_files() {{
  _alternative 'studies:study:({names})' 'files:study file:_files -g "*.toml"'
}}""",
}


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script of `parser` for one of SHELLS, to be sourced or put where the shell looks for it."""
    import shtab

    for action in _actions(parser):
        kind = _STUDIES if action.dest == "study" else _KINDS.get(str(action.metavar))
        if kind is not None:
            action.complete = kind  # type: ignore[attr-defined]  # shtab reads it
    names = " ".join(sorted(path.stem for path in STUDIES.glob("*.toml")))
    return str(shtab.complete(parser, shell, preamble=_PREAMBLE[shell].format(names=names)))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of the parser and of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action
